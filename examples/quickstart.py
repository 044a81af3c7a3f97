"""Unlearn basketball from a model that knows it, where attribution patching says, next to controls.

    make demo                                # or: python examples/quickstart.py --out out

Prints what the model knows, where it seems to keep it, and what edits with the same budget of steps
did to it: there, at random places of the same size, and in all MLPs. Writes the scores, the masks, the
edits and two pictures to the folder `out`.
"""

import argparse
import time
from pathlib import Path

import mechunlearn as mu

FORGET = "basketball"
CONTROLS = 3
"""Random masks of as many weights: one draw is no distribution."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps per edit")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.time()

    model = mu.testbed.load()
    task = mu.tasks.sports_facts(model, forget=FORGET, seed=arguments.seed)
    print(f"{task}\n")
    show_knowledge(model, task)

    scores = mu.localize.attribution_patching(model, task.forget)
    where = scores.top(fraction=0.05)
    print(f"\nThe largest effects by attribution patching ({scores.metric}, noising: negative = needed):")
    print(scores.interval().loc[[str(component) for component in where]].round(3).to_string())
    masks = {"attribution": where}
    masks |= {f"random {i}": mu.localize.random_like(where, model, seed=i) for i in range(CONTROLS)}
    masks["all MLPs"] = mu.localize.all_mlps(model)
    edits = {}
    for name, mask in masks.items():
        print(f"\nEdit {name}: {mask}")
        edits[name] = mu.edit.finetune(
            model, task, mask, steps=arguments.steps, learning_rate=arguments.learning_rate, seed=arguments.seed
        )

    report = mu.evaluate.compare(model, task, edits, metrics=mu.evaluate.paper_metrics)
    print(f"\n{report.to_markdown()}\n")
    print("Every edit had the same steps and learning rate. That is equal treatment, not yet a fair comparison:")
    print("what suits one mask need not suit another. And no attack was tried: see the README for what is missing.\n")
    save(arguments.out, scores, masks, edits, report)
    print(f"\nThe model is as it was; {time.time() - started:.0f} seconds.")


def show_knowledge(model: object, task: mu.Task) -> None:
    """Accuracy of the original model on held-out athletes, format by format."""
    print(f"What the model knows about held-out athletes (forget = {FORGET}, retain = the other sports):")
    print(f"{'format':32} forget  retain  chance   (argmax over the candidates)")
    for name, asked in task.formats.items():
        sides = [mu.evaluate.accuracy(model, prompts).candidates for prompts in (asked.forget, asked.retain)]
        print(f"{name:32} {sides[0].value:6.3f}  {sides[1].value:6.3f}  {sides[0].chance:6.3f}")


def save(folder: Path, scores: mu.ComponentScores, masks: dict, edits: dict, report: mu.evaluate.Report) -> None:
    scores.save(folder / "scores.safetensors")
    scores.plot().write_html(folder / "scores.html")
    report.plot().write_html(folder / "report.html")
    (folder / "report.md").write_text(report.to_markdown() + "\n")
    report.intervals.to_csv(folder / "report.csv")
    for name, edit in edits.items():
        stem = name.replace(", ", "_").replace(" ", "_")
        masks[name].save(folder / f"{stem}.mask.json")
        edit.save(folder / f"{stem}.edit.safetensors")
    print(f"Saved {', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}/.")
    print(f"Open {folder}/scores.html in a browser for the heat map of the scores.")


if __name__ == "__main__":
    main()
