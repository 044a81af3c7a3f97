"""Where a real pretrained model keeps capitals, and what is left of twelve of them after edits there and elsewhere.

    make real                                # or: python examples/real_model.py --out out/real

SmolLM2-135M-Instruct, in at most ten minutes on two cores. Prints which of the countries' capitals it says and in which
formats, localizes twelve by four methods, edits at the best places of each and at random ones of the same size, and
prints what is left in each format, with the damage. Writes pictures, scores and the table to the folder `out/real`.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pictures import write_pngs

import mechunlearn as mu

SUBJECTS = 12
FORMATS = ("chat", "two-shot question", "reverse", "kept, language")
"""Besides the trained prompt: two other ways to ask, the other direction, and what should stay."""
MLPS = 7
"""How many MLPs' weights each place has."""
HEADS = 5
"""How many of the heads that integrated gradients rank first are taken for those that extract the fact."""
TEXT_ROWS = 8
_started = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps per edit")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    model = mu.testbed.smollm2()
    say(f"loaded: {mu.shape(model)}, {mu.model.n_parameters(model):,} weights")
    task = mu.tasks.known_facts(
        model, relation="capital", forget=SUBJECTS, formats=FORMATS, seed=arguments.seed, candidates=4
    )
    show_knowledge(model, task)

    places, pictures = localize(model, task, seed=arguments.seed)
    edits = {}
    for name, mask in places.items():
        say(f"edit: {name}: {mask}")
        options: dict[str, Any] = {"learning_rate": arguments.learning_rate, "seed": arguments.seed}
        edits[name] = mu.edit.finetune(
            model, task, mask, steps=arguments.steps, batch_size=8, text_batch_size=1, **options
        )
    say("what is left")
    tests = mu.evaluate.every_format(task, metric=mu.metrics.answer_probability, text_rows=TEXT_ROWS)
    asked = {name: test for name, test in tests.items() if "generated" not in name and "injected" not in name}
    report = mu.evaluate.compare(model, task, edits, metrics=asked)
    print(f"\n{report.to_markdown()}\n")
    print("Probabilities of whole answers; chance is about 0. In the reverse direction the answer is the country.")
    print(f"Every edit had {arguments.steps} steps at one rate, which suits one place better than another, and one")
    print("random draw is no distribution: this shows how it is done, and decides nothing.\n")
    save(arguments.out, report, pictures)
    say("the model is as it was")


def say(what: str) -> None:
    print(f"[{time.time() - _started:4.0f} s] {what}", flush=True)


def show_knowledge(model: Any, task: mu.Task) -> None:
    """How many facts it says in each format, and on the facts to forget, among four candidates, with chance."""
    print(f"\n{task.name}. Said: the whole answer is the most probable one of the vocabulary (chance: about 0).")
    print(f"{'format':20} said of asked   right among the candidates, facts to forget (chance)")
    for name, format in task.formats.items():
        said, of = task.known[name]
        among = mu.evaluate.in_format(model, task, name=name, metric=mu.metrics.is_top_of_candidates)
        chance = "none" if among.chance is None else f"{among.chance:.2f}"
        print(f"{name:20} {said:4} of {of:<7}  {among.value:.2f} ({chance}), {len(format.forget)} facts")
    print()


def localize(model: Any, task: mu.Task, *, seed: int) -> tuple[dict[str, mu.ComponentMask], dict[str, Any]]:
    """Four localizations' best places and a random one, all with the weights of seven MLPs; and pictures to save."""
    metric, few = mu.metrics.answer_log_probability, task.forget[:4]
    budget = MLPS * mu.shape(model).n_parameters([mu.Component.parse("L0MLP")])
    methods: dict[str, Callable[[], mu.ComponentScores]] = {
        "attribution": lambda: mu.localize.attribution_patching(model, task.forget, metric=metric),
        "integrated gradients": lambda: mu.localize.integrated_gradients(model, task.forget, metric=metric),
    }
    scores = {}
    for name, method in methods.items():
        say(f"localize: {name}")
        scores[name] = method()
    say("localize: causal tracing, 4 prompts, 3 draws")
    trace = mu.localize.causal_tracing(model, few, draws=3, kinds=("MLP",), seed=seed)
    scores["tracing"] = trace.scores("MLP")
    say("localize: fact lookup, 4 prompts, heads that integrated gradients found")
    ranked = sorted(scores["integrated gradients"].items(), key=lambda item: -abs(item[1]))
    heads = [part for part, _ in ranked if part.kind == ("H", None) and part.layer > 0][:HEADS]
    lookup = mu.localize.fact_lookup_by_paths(model, few, metric=metric, extraction_heads=heads)
    scores["fact lookup"] = lookup.scores["mlps"]
    for name, found in scores.items():
        strongest = sorted(found.items(), key=lambda item: -abs(item[1]))[:5]
        print(f"  {name:20} {', '.join(f'{label} {value:+.3f}' for label, value in strongest)}")
    places = {name: found.top(parameters=budget) for name, found in scores.items()}
    places["random"] = mu.localize.random_like(places["fact lookup"], model, seed=seed)
    plots = {
        "trace": trace.plot(),
        "integrated_gradients": scores["integrated gradients"].plot(),
        "fact_lookup": lookup.plot(),
    }
    return places, plots


def save(folder: Path, report: mu.evaluate.Report, plots: dict[str, Any]) -> None:
    """Interactive pages, and PNG files where there is a browser that draws them."""
    plots = {**plots, "report": report.plot()}
    for name, plot in plots.items():
        plot.write_html(folder / f"{name}.html")
    problem = write_pngs({folder / f"{name}.png": plot for name, plot in plots.items()})
    (folder / "report.md").write_text(report.to_markdown() + "\n")
    report.intervals.to_csv(folder / "report.csv")
    report.save(folder / "report.json")
    print(f"Saved {', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}/.")
    if problem is not None:
        print(f"No PNG files: {problem}")


if __name__ == "__main__":
    main()
