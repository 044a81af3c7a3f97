"""The first picture of the README, from committed numbers: where basketball is, and what is left there and elsewhere.

python examples/front_picture.py             # draws it again, in a browser
python examples/front_picture.py --measure   # localizes first, and stores the scores
"""

import argparse
import re
from pathlib import Path

import pandas as pd
from pictures import write_pngs
from plotly.graph_objects import Bar, Figure
from plotly.subplots import make_subplots

import mechunlearn as mu
from mechunlearn.components import dressed, looks

ROOT = Path(__file__).parent.parent
SCORES = ROOT / "docs" / "pictures" / "basketball.safetensors"
PICTURE = ROOT / "docs" / "pictures" / "front.png"
TESTS = 6
"""The first columns of the table: what is asked about facts to forget and to retain."""
SHOWN = ("retain, trained prompt", "forget, trained prompt", "forget, paraphrase", "forget, multiple choice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="localize again")
    if parser.parse_args().measure:
        model = mu.testbed.load()
        task = mu.tasks.sports_facts(model, forget="basketball")
        mu.localize.attribution_patching(model, task.forget).save(SCORES)
    problem = write_pngs(
        {PICTURE: picture(mu.ComponentScores.load(SCORES), table_of((ROOT / "README.md").read_text()))}
    )
    print(problem or f"Saved {PICTURE}.")


def table_of(page: str) -> pd.DataFrame:
    """The table that the README shows, which is that of `make demo`."""
    lines = re.search(r"<!-- table:start -->\n(.*?)<!-- table:end -->", page, re.DOTALL)
    assert lines is not None
    table = [line.strip("| ").split(" | ") for line in lines[1].splitlines() if line.startswith("|")]
    tests, _, *rows = table
    values = [[float(cell) for cell in row[1 : 1 + TESTS]] for row in rows]
    return pd.DataFrame(values, columns=tests[:TESTS], index=[row[0] for row in rows])


def picture(scores: mu.ComponentScores, table: pd.DataFrame) -> Figure:
    titles = ("where: effect of each head and MLP", "what is left after the edit there, and elsewhere")
    figure = make_subplots(1, 2, subplot_titles=titles, column_widths=[0.4, 0.6], horizontal_spacing=0.16)
    [heat] = scores.plot().data
    figure.add_trace(heat.update(colorbar={"x": 0.36, "thickness": 12, "title": None}), row=1, col=1)
    rows = [row for row in table.index if row in ("original", "attribution", "all MLPs") or row.startswith("random")]
    for row, look in looks(rows, first=0).items():
        pattern = {"shape": "/" if row.startswith("random") else "", "solidity": 0.3}
        labels = [test.replace(", ", ",<br>") for test in SHOWN]
        bar = Bar(x=labels, y=table.loc[row, list(SHOWN)], name=row, marker={"color": look.color, "pattern": pattern})
        figure.add_trace(bar, row=1, col=2)
    chance = {"dash": "dot", "width": 1.5, "color": "black"}
    figure.add_hline(y=table.loc["*chance*", SHOWN[0]], line=chance, annotation_text="chance", row=1, col=2)
    figure.update_yaxes(title="probability among 4 answers", range=[0, 1.05], row=1, col=2)
    return dressed(figure, height=430, width=1100, showlegend=True)


if __name__ == "__main__":
    main()
