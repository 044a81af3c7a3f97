"""What every method asks of its arguments, checked in one place before anything runs."""

from collections.abc import Iterable

from mechunlearn.components import Component, Components, ModelShape, resolve
from mechunlearn.reading import check_batch_size, check_functions


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
