"""The second moment of an MLP's keys over text: by it, closed-form editors spare what the MLP usually reads."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.files import Saved
from mechunlearn.model import Model, device_of, fingerprint, preserved
from mechunlearn.model.mlp_values import key_moments
from mechunlearn.model.running import check_length
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.text import pack
from mechunlearn.weights import Entries, select


@dataclass(frozen=True, eq=False, repr=False)
class KeyCovariance(Saved):
    """By layer, the uncentred second moment of the MLP's keys (what W_out reads) over the tokens of a text.

    C = (1 - shrinkage) * S + shrinkage * trace(S) / d_mlp * I,    S = mean over tokens of key key^T
    """

    moments: Mapping[int, Float[Tensor, "d_mlp d_mlp"]]
    """Layer -> S, in float32 (in float64 for a model in float64)."""
    shrinkage: Mapping[int, float]
    """Layer -> the share of the identity in C; 0 where S is used as it is."""
    n_tokens: int
    """The number of tokens that it was measured on."""
    source: str
    """A name for their text."""
    fingerprint: str
    """That of the weights that it was measured on (`mu.model.fingerprint`)."""

    def at(self, layer: int) -> Float[Tensor, "d_mlp d_mlp"]:
        """C of one layer, in float64 on the CPU."""
        moment, share = self.moments[layer].double().cpu(), self.shrinkage[layer]
        identity = torch.eye(len(moment), dtype=torch.float64)
        return (1 - share) * moment + share * moment.diagonal().mean() * identity

    def check(self, model: Model, layers: Iterable[int]) -> None:
        """ValueError unless it was measured on these weights, at these layers."""
        own = fingerprint(model)
        if own != self.fingerprint:
            raise ValueError(
                f"expected a key covariance of this model (fingerprint {own}), got one of other weights "
                f"({self.fingerprint}): call key_covariance on the model as it is now."
            )
        missing = [layer for layer in layers if layer not in self.moments]
        if missing:
            raise ValueError(
                f"expected a key covariance of layers {sorted(layers)}, got one of layers {sorted(self.moments)}: "
                f"call key_covariance with the mask that you edit."
            )

    def described(self) -> dict[str, Any]:
        """For the provenance of an edit: source, number of tokens, shrinkage."""
        shares = {str(layer): share for layer, share in self.shrinkage.items()}
        return {"source": self.source, "n_tokens": self.n_tokens, "shrinkage": shares}

    def __repr__(self) -> str:
        layers = ", ".join(str(layer) for layer in sorted(self.moments))
        return f"KeyCovariance(layers {layers}; {self.n_tokens:,} tokens of {self.source})"


def key_covariance(
    model: Model,
    mask: ComponentMask,
    text: Int[Tensor, "row pos"] | Iterable[str],
    *,
    prompts: Prompts | None = None,
    shrinkage: float | None = None,
    batch_size: int = 16,
    source: str = "text given to key_covariance",
) -> KeyCovariance:
    """The second moment of the keys of every MLP whose W_out the mask names, over all tokens of `text` and `prompts`.

    `text`: rows of tokens without padding, such as `task.text`, or strings, which are packed to rows of 64 tokens.
    `prompts`: what else is to be spared, such as `task.retain`; text without a single name spares no name.

    `shrinkage`: the share of the identity in C, the same for all layers; 1 is plain least squares. By default each
    layer has the one with the smallest expected squared error if tokens were independent,

        min(1, (mean of |key|^4 - |S|^2) / (n_tokens * |S - trace(S) / d_mlp * I|^2))      (norms: Frobenius)

    of Ledoit & Wolf 2004 (https://doi.org/10.1016/S0047-259X(03)00096-4), which goes to 0 with more text. Tokens of a
    text are not independent: raise it if edits spill over.

    Meng et al. 2022 (https://arxiv.org/abs/2202.05262) use 100,000 samples of Wikipedia and no shrinkage.
    Cost: 1F of the text up to the highest layer, and d_mlp^2 numbers for each layer.
    ValueError for a mask without a W_out, an empty text, or a shrinkage outside [0, 1].
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}.")
    layers = [e.slot.layer for e in output_matrices(select(model, mask))]
    rows = (text if isinstance(text, Tensor) else pack(model, text)).to(device_of(model))
    check_length(model, rows.shape[1], "rows of text")
    moments: dict[int, Tensor] = {}
    fourth = dict.fromkeys(layers, 0.0)
    count = 0
    batches = [(batch, torch.ones_like(batch, dtype=torch.bool)) for batch in rows.split(operator.index(batch_size))]
    if prompts is not None:
        batches += [(batch.tokens, batch.attention_mask) for batch in prompts.on(model).batches(batch_size)]
    with preserved(model):
        for tokens, real in batches:
            count += int(real.sum())
            for layer, (second, norms) in key_moments(model, layers, tokens, real).items():
                moments[layer] = moments[layer] + second if layer in moments else second
                fourth[layer] += float(norms)
    moments = {layer: total / count for layer, total in moments.items()}
    shares = {
        layer: _ledoit_wolf(moments[layer], fourth[layer] / count, count) if shrinkage is None else float(shrinkage)
        for layer in layers
    }
    return KeyCovariance(moments, shares, count, source, fingerprint(model))


def output_matrices(entries: Iterable[Entries]) -> list[Entries]:
    """The entries of W_out, in layer order; ValueError if there are none."""
    entries = list(entries)
    outputs = [e for e in entries if e.slot.matrix == "W_out"]
    if not outputs:
        raise ValueError(
            f"expected a mask that names a W_out (an MLP such as L1MLP, L1MLP.W_out, or neurons), got one of "
            f"{', '.join(e.label for e in entries[:5])}: facts are written into W_out; choose MLPs."
        )
    return outputs


def _ledoit_wolf(moment: Float[Tensor, "d_mlp d_mlp"], fourth: float, count: int) -> float:
    moment = moment.double()
    squared = float(moment.pow(2).sum())
    distance = squared - float(moment.diagonal().sum()) ** 2 / len(moment)
    return 1.0 if distance <= 0 else min(1.0, max(0.0, (fourth - squared) / (count * distance)))
