"""Numbers and tables as text."""

from typing import Any

import pandas as pd


def interval(one: Any) -> str:
    return f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def signed(one: Any) -> str:
    return f"{one.difference:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"


def markdown(frame: pd.DataFrame) -> str:
    """A table; numbers of weights with commas."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    lines += [[_shown(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
