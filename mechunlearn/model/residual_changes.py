"""The residual stream changed on its way, for every pass inside a block: directions taken out, input vectors put in."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from jaxtyping import Float
from torch import Tensor

from mechunlearn.model.kinds import Model

Change = Callable[[Tensor], Tensor]


@contextmanager
def without_directions(model: Model, directions: Float[Tensor, "place d_model"]) -> Iterator[None]:
    """Inside, a unit vector is projected out of the residual stream at each place: x - (x . d) d, at every token.

    Place l is what enters layer l, and the last what leaves the last layer. A row of zeros takes nothing out.
    """
    last = len(directions) - 1
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(last)] + [f"blocks.{last - 1}.hook_resid_post"]
    rows = zip(names, directions, strict=True)
    with _changed(model, {name: partial(project_out, row) for name, row in rows if bool(row.any())}):
        yield


@contextmanager
def with_input_vectors(model: Model, vectors: Float[Tensor, "vector d_model"], start: int) -> Iterator[None]:
    """Inside, the embeddings at the places from `start` on are these vectors, in every row; gradients reach them.

    They are what the first layer would see of a token, before learned positions and after Gemma's scale.
    """

    def put_in(value: Tensor) -> Tensor:
        value = value.clone()  # in-place changes get lost on a bridge
        value[:, start : start + len(vectors)] = vectors.to(value)
        return value

    with _changed(model, {"hook_embed": put_in}):
        yield


def project_out(direction: Float[Tensor, "d_model"], value: Float[Tensor, "*any d_model"]) -> Tensor:
    """The value without its part along a unit vector; the value itself for the zero vector."""
    along = direction.to(value)
    return value - (value @ along)[..., None] * along


@contextmanager
def _changed(model: Model, changes: Mapping[str, Change]) -> Iterator[None]:
    """RuntimeError on leaving if a hook did not fire."""
    fired = set()

    def apply(value: Tensor, hook: object, *, name: str) -> Tensor:
        fired.add(name)
        return changes[name](value)

    with model.hooks(fwd_hooks=[(name, partial(apply, name=name)) for name in changes]):
        yield
    missing = sorted(changes.keys() - fired)
    if missing:
        raise RuntimeError(f"expected every hook to fire, but {', '.join(missing[:5])} did not: was the model run?")
