"""Where the truth is known: does localizing better unlearn better?

    python examples/planted_study.py --out results/planted --seeds 5

Facts are planted (`mu.testbed.plant`) into five kinds of places in a model that never knew them, so that the true
localization is given. Every localization method is scored against it. Then the facts are erased by localized
fine-tuning in the true place, in those that methods find, and in a random one, each of at most as many weights as the
truth, and every edit is tested: other formats, relearning on the other half, probes, damage.

Each planting is one piece of work. A finished one is a file in `--raw` (default: OUT/raw) and is never computed again;
killed, the study goes on where it was when it is called again. Tables (CSV, Markdown) and the figure go to `--out`.
"""

import argparse
from concurrent.futures import Executor, as_completed
from pathlib import Path

from tqdm.auto import tqdm
from workers import processes


def main() -> None:
    arguments = parsed()
    raw = arguments.raw or arguments.out / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    todo = [(kind, seed) for seed in range(arguments.seeds) for kind in arguments.kinds]
    with processes(arguments.workers) as pool:
        failed = run(raw, todo, pool)
    from planted.tables import write

    print(f"Wrote {', '.join(str(path) for path in write(raw, arguments.out, arguments.kinds, arguments.seeds))}.")
    if failed:
        raise SystemExit(f"{len(failed)} pieces of work failed; call again to try them again.")


def parsed() -> argparse.Namespace:
    from planted.places import KINDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and the figure")
    parser.add_argument("--raw", type=Path, help="folder for finished pieces of work")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread")
    return parser.parse_args()


def run(raw: Path, todo: list[tuple[str, int]], executor: Executor) -> list[tuple[str, int]]:
    """Every planting on any executor whose workers see the folder; gives those that raised."""
    from planted.cell import finish

    futures = {executor.submit(finish, raw, *each): each for each in todo}
    failed = []
    with tqdm(total=len(todo), desc="plantings", smoothing=0.05) as bar:
        for future in as_completed(futures):
            kind, seed = futures[future]
            problem = future.exception()
            if problem is not None:
                failed.append((kind, seed))
            said = future.result() if problem is None else f"failed: {type(problem).__name__}: {problem}"
            bar.write(f"{kind}, seed {seed}: {said}")
            bar.update()
    return failed


if __name__ == "__main__":
    main()
