"""Write docs/results.md from the CSV files that `reproduce_paper.py` and `planted_study.py` wrote.

python examples/write_results.py docs/results.md                          # from the files in docs/results
python examples/write_results.py docs/results.md --run reproduction       # from a run, whose tables are taken over
"""

import argparse
import json
import shutil
from pathlib import Path

from paper.page import page
from paper.setup import DEEPER

SHOWN = ("formats", "relearning", "probes", "stages")
"""Figures that the page shows, of the modes and tasks in `PICTURES`; and the sizes of edits."""

PICTURES = ("sport, erase", "athletes-64, inject", "counterfact-64, inject", "counterfact-sequential, inject")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--run", type=Path, help="the folder of a run of reproduce_paper.py")
    arguments = parser.parse_args()
    if arguments.run is not None:
        publish(arguments.run, arguments.page)
    else:
        arguments.page.write_text(page(arguments.page.with_suffix("")), encoding="utf-8")


def publish(run: Path, path: Path) -> None:
    """Take over the tables and some figures of a run, next to the page, and write the page."""
    setup = json.loads((run / "setup.json").read_text(encoding="utf-8"))
    folder = path.with_suffix("") / (DEEPER if setup["model"] == DEEPER else "reproduction")
    if not (run / "tables" / "results.csv").exists():
        raise SystemExit(f"expected tables in {run}, found none: let reproduce_paper.py finish some work first.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = [f"{start}, {name}.png" for start in PICTURES for name in SHOWN] + ["sport, sizes of edits.png"]
    figures = [run / "figures" / name for name in wanted if (run / "figures" / name).exists()]
    for source in [*sorted((run / "tables").glob("*.csv")), *figures]:
        shutil.copy(source, folder / source.name)
    path.write_text(page(path.with_suffix("")), encoding="utf-8")


if __name__ == "__main__":
    main()
