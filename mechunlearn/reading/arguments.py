"""What methods and tests ask of their arguments, checked before anything runs."""

_HOMES = {
    "metric": "mechunlearn.metrics",
    "where": "mechunlearn.localize.positions",
    "at": "mechunlearn.localize.positions",
    "positions": "mechunlearn.localize.positions",
    "replacement": "mechunlearn.localize.replacement",
    "loss": "mechunlearn.losses",
    "size": "mechunlearn.localize.faithfulness",
    "by": "torch (abs, neg)",
    "estimate": "mechunlearn.localize",
    "verify": "mechunlearn.localize",
    "receivers": "mechunlearn.localize",
}
"""Where functions are that each argument takes."""


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
            home = _HOMES.get(name)
            raise ValueError(
                f"expected a function as {name}, got {given!r}: pass the function itself"
                + (f", one of {home} or your own." if home else ".")
            )
