"""The scatter plot: how well the edited place agrees with the truth, against how robust the unlearning is."""

from pathlib import Path
from typing import Any

import pandas as pd
from pictures import write_pngs

PANELS = {
    "forget": "trained prompt (never knew: 0)",
    "other formats": "other formats (never knew: 0)",
    "multiple choice": "multiple choice (never knew: 0)",
    "relearned, less nobody": "relearned, less what is said of nobody",
    "probes, less never knew": "probes, less the twin's",
    "retain": "retained facts",
}
WIDTH, HEIGHT = 1200, 800


def write_figure(frame: pd.DataFrame, out: Path) -> list[Path]:
    """One page that needs no network and, where there is a browser, a picture of it."""
    html, png, drawn = out / "planted.html", out / "planted.png", figure(frame)
    drawn.write_html(html, include_plotlyjs=True, config={"displayModeBar": False})
    return [html] if write_pngs({png: drawn}) else [html, png]


def figure(frame: pd.DataFrame) -> Any:
    """A point for each edited place of each planting."""
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    edited = frame[frame.covered.notna()]
    found = make_subplots(rows=2, cols=3, subplot_titles=list(PANELS.values()), vertical_spacing=0.12)
    for place, color in zip(edited.place.unique(), qualitative.Dark24, strict=False):
        rows = edited[edited.place == place]
        for number, column in enumerate(PANELS):
            found.add_scatter(
                x=rows.auroc,
                y=rows[column],
                mode="markers",
                name=place,
                legendgroup=place,
                showlegend=number == 0,
                marker={"color": color, "size": 8, "opacity": 0.7},
                text=[f"{row.kind}, seed {row.seed}" for row in rows.itertuples()],
                row=number // 3 + 1,
                col=number % 3 + 1,
            )
    found.update_xaxes(title="AUROC of the localization against the truth")
    found.update_yaxes(range=[-0.35, 1.05])
    found.update_yaxes(title="accuracy", col=1)
    layout = {"template": "plotly_white", "width": WIDTH, "height": HEIGHT, "legend": {"orientation": "h", "y": -0.12}}
    return found.update_layout(title="Planted facts: agreement with the truth and robustness of unlearning", **layout)
