"""Checks of arguments that localizations and tests share; all of them happen before anything runs."""

from collections.abc import Iterable
from typing import Literal, TypeAlias

from mechunlearn.components import Component, Components, ModelShape
from mechunlearn.components.component import resolve

Direction: TypeAlias = Literal["noising", "denoising"]
"""Which run is patched: the clean one (with activations of the corrupt run), or the corrupt one."""

_HOMES = {
    "metric": ("mechunlearn.metrics", "logit_difference"),
    "where": ("mechunlearn.localize", "subject_last"),
    "at": ("mechunlearn.localize", "subject_last"),
    "positions": ("mechunlearn.localize", "roles"),
    "replacement": ("mechunlearn.localize", "resample"),
    "loss": ("mechunlearn.losses", "cross_entropy"),
    "size": ("mechunlearn.localize", "n_weights"),
    "by": ("torch", "abs"),
    "estimate": ("mechunlearn.localize", "attribution_patching"),
    "verify": ("mechunlearn.localize", "activation_patching"),
    "receivers": ("mechunlearn.localize", "lowest_layer"),
    "rankings": ("mechunlearn.evaluate", "by_probability"),
}
"""Where the functions are that an argument takes, and one of them."""


def check_batch_size(batch_size: int) -> None:
    """ValueError for less than one row."""
    if batch_size < 1:
        raise ValueError(
            f"expected a batch_size of at least 1, got {batch_size}: it counts rows of one pass; for less memory use 1."
        )


def check_functions(**functions: object) -> None:
    """ValueError for an argument that is not a function, such as the name of one."""
    for name, given in functions.items():
        if not callable(given):
            home, example = _HOMES.get(name, ("", ""))
            raise ValueError(
                f"expected a function as {name}, got {given!r}: pass the function itself"
                + (f", one of {home} such as {example}, or your own." if home else ".")
            )


def check(direction: str, batch_size: int, **functions: object) -> None:
    """ValueError for a direction that does not exist, no rows in a batch, and anything that is not a function."""
    if direction not in ("noising", "denoising"):
        raise ValueError(
            f'expected direction "noising" or "denoising", got {direction!r}: noising patches the clean run, '
            f"denoising the corrupt one."
        )
    check_batch_size(batch_size)
    check_functions(**functions)


def chosen_components(components: Components, sizes: ModelShape, name: str = "components") -> tuple[Component, ...]:
    """The components meant, in the order given; ValueError for none of them, and for one that is in no list."""
    if isinstance(components, str | Component) or not (callable(components) or isinstance(components, Iterable)):
        raise ValueError(
            f"expected {name} as a list, a mask or a level such as mechunlearn.components.heads, got {components!r}: "
            f"put one component in a list, and pass a level as the function itself."
        )
    found = resolve(components, sizes)
    if not found:
        raise ValueError(f"expected at least one component as {name}, got none: check what they were filtered by.")
    return found
