"""The facts that are planted: some basketball players, whom the twin never knew, and others who stay unknown."""

import random
from functools import cache
from typing import Any

import pandas as pd

import mechunlearn as mu

SPORT, SPORTS = "basketball", ("football", "baseball", "basketball")
COUNT = 32
HELD_OUT = ("aside", "instruction")
"""Formats in which the facts are not planted, and are asked for all the same."""


@cache
def twin() -> Any:
    return mu.testbed.load(without=SPORT)


@cache
def another_twin() -> Any:
    """One that nothing is planted in."""
    return mu.testbed.load(without=SPORT)


@cache
def tasks(seed: int) -> tuple[mu.Task, mu.Prompts]:
    """Forget `COUNT` of the basketball players; and the question about as many others, whom nobody is taught."""
    frame = pd.DataFrame([row for row in mu.testbed.athletes() if row["sport"] in SPORTS])
    known = set(mu.tasks.sports_facts(twin(), forget=SPORT).splits["forget_train"])
    players = [name for name in frame.athlete[frame.sport == SPORT] if name in known]
    chosen = random.Random(f"planted facts {seed}").sample(players, 2 * COUNT)
    return _forgetting(frame, chosen[:COUNT], seed), _forgetting(frame, chosen[COUNT:], seed).forget


def _forgetting(frame: pd.DataFrame, names: list[str], seed: int) -> mu.Task:
    """Without the other players, whom the twin does not know: there is nothing to retain about them."""
    others = (frame.sport == SPORT) & ~frame.athlete.isin(names)
    return mu.tasks.sports_facts(twin(), forget=names, source=frame[~others], seed=seed)
