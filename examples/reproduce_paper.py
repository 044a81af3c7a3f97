"""The experiments of Guo et al. 2025 (https://arxiv.org/abs/2410.12949): does it matter where knowledge is edited?

    python examples/reproduce_paper.py --out reproduction                       # the shipped model, on 2 CPU cores
    python examples/reproduce_paper.py --out gemma --model google/gemma-2-9b    # the paper's settings, on a GPU

Nine localizations, erasure and injection, six tasks, by localized fine-tuning, and weight masks of every size for the
whole sport; every edit is asked in other formats, relearned and probed. Killed, it goes on where it was when it is
called again. Tables, figures and their numbers are written to the folder; `--docs` writes docs/results.md from them.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from paper.facts import MODES, TASKS
from paper.setup import LOCALIZATIONS, OWN, PAPER_MODELS, SHIPPED, Setup, paper_setup
from workers import processes


def main() -> None:
    arguments = parsed()
    setup = setup_of(arguments)
    from paper.figures import write_figures
    from paper.run import run
    from paper.tables import write_tables
    from paper.work import rounds

    todo = rounds(setup, arguments.task, arguments.localization, arguments.seeds, tuple(arguments.mode))
    if arguments.workers > 1:
        with processes(arguments.workers) as pool:
            failed = run(setup, arguments.out, todo, pool)
    else:
        failed = run(setup, arguments.out, todo)
    if failed and not any((arguments.out / "reports").glob("*/original/*/*.json")):
        raise SystemExit(f"{len(failed)} pieces of work failed, the first: {next(iter(failed.items()))}.")
    tables = write_tables(arguments.out)
    if not arguments.no_figures:
        write_figures(arguments.out)
    figures = "" if arguments.no_figures else " and figures"
    print(f"Wrote {', '.join(path.name for path in tables)}{figures} to {arguments.out}.")
    if arguments.docs is not None:
        from write_results import publish

        publish(arguments.out, arguments.docs)
        print(f"Wrote {arguments.docs}.")
    if failed:
        raise SystemExit(f"{len(failed)} pieces of work failed; call again to try them again.")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED, help="shipped, deeper, a name on the Hub, or a checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder, which a later call goes on with")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--localization", nargs="+", choices=LOCALIZATIONS, default=list(LOCALIZATIONS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="processes; default: 2 for the package's own models, else 1")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two steps an edit, no results")
    parser.add_argument("--full", action="store_true", help="also soft prompts, and relearning by LoRA")
    parser.add_argument("--keep-edits", action="store_true", help="as files, so that they need not be made again")
    parser.add_argument("--docs", type=Path, help="write this page from the tables, such as docs/results.md")
    parser.add_argument("--no-figures", action="store_true")
    own = parser.add_argument_group("in place of the defaults")
    own.add_argument("--settings", choices=sorted(PAPER_MODELS.values()), help="what the paper chose for this model")
    own.add_argument("--layers", type=int, nargs="+", help="where facts are looked up, as you read it off the curves")
    own.add_argument("--athletes", help="CSV file with columns athlete and sport")
    own.add_argument("--counterfact", help="records: a JSON file, or a name on the Hub")
    own.add_argument("--questions", help="multiple-choice questions about the records")
    own.add_argument("--threshold", type=float, help="probability from which a record counts as known; 0: all")
    own.add_argument("--shots", type=int, help="answered examples before a CounterFact question")
    own.add_argument("--steps", type=int)
    own.add_argument("--batch-size", type=int)
    own.add_argument("--everyday-text", action="store_true", help="sentences of the package in place of the Pile")
    found = parser.parse_args()
    if found.questions and not found.counterfact:
        parser.error("--questions are about the records of --counterfact, which is missing: give both or neither")
    found.workers = (2 if found.model in OWN else 1) if found.workers is None else max(1, found.workers)
    return found


def setup_of(arguments: argparse.Namespace) -> Setup:
    """The defaults of the model, and what was given in their place."""
    names = ("athletes", "counterfact", "questions", "threshold", "shots", "steps", "batch_size", "keep_edits")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.steps is not None:
        given["athletes_steps"] = arguments.steps
    if arguments.layers is not None:
        given["layers"] = tuple(arguments.layers)
    if arguments.settings is not None:
        given["paper"] = arguments.settings
    if arguments.everyday_text:
        given["pile"] = False
    if arguments.full:
        given |= {"soft_prompt": True, "lora": True}
    own = arguments.model in OWN
    found = Setup(arguments.model, **given) if own else paper_setup(arguments.model, **given)
    if arguments.quick:
        small = {"steps": 2, "athletes_steps": 2, "batch_size": 4, "text_batch_size": 2, "tested": 8, "traced": 4}
        small |= {"relearn_steps": 2, "relearn_batch_size": 4, "rank": 8}
        found = replace(found, **small, learning_rates=found.learning_rates[:2], sizes=found.sizes[:2])
    threads = max(1, (os.cpu_count() or 1) // arguments.workers)
    return replace(found, threads=threads)


if __name__ == "__main__":
    main()
