"""Causal tracing: noise on the subject hides the fact; which state, restored, brings the answer back?"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from mechunlearn.arguments import check_batch_size, check_functions
from mechunlearn.components import Component, ComponentScores, ModelShape
from mechunlearn.components.plot import signed_heat_map
from mechunlearn.files import Saved
from mechunlearn.identity import name_of
from mechunlearn.intervals import bootstrap
from mechunlearn.metrics import Metric, answer_probability, checked
from mechunlearn.model import Hook, Model, Run, base_run, continued, preserved, shape
from mechunlearn.model.classes import at_least_float32
from mechunlearn.model.decomposition import scales_of
from mechunlearn.model.running import computed_in, embeddings
from mechunlearn.tasks.positions import ROLES, roles, subject
from mechunlearn.tasks.prompts import Prompts

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


Kind: TypeAlias = Literal["residual", "MLP", "ATTN"]
"""Which state is restored: the residual stream, or the outputs of MLPs or of attention layers."""


def causal_tracing(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = answer_probability,
    noise: float = 3.0,
    draws: int = 10,
    window: int | None = None,
    kinds: tuple[Kind, ...] = ("residual", "MLP", "ATTN"),
    seed: int = 0,
    batch_size: int = 64,
    compute_dtype: torch.dtype | None = None,
) -> "CausalTrace":
    r"""Indirect effects of every (token, layer) for the residual stream, MLPs and attention.

    The corrupted run adds noise N(0, (noise * s)**2) to the embeddings of the subject's tokens, s the standard
    deviation of all their entries. The same `draws` draws serve every prompt, layer and token: the i-th token of a
    subject always gets the same noise. Then, for one token t at a time,

        indirect effect = mean over draws of (metric with the state at t restored - metric of the corrupted run)
        total effect    = metric of the clean run - mean over draws of metric of the corrupted run

    in the metric's unit; positive = brings the answer back. For `"residual"`, the input of layer l + 1 is restored; for
    `"MLP"` and `"ATTN"`, the outputs of the layers l - window // 2 ... l + (window - 1) // 2 that exist. The default
    window is the paper's 10 layers, or a third of the layers where that is less.

    `trace.scores("MLP")` are component scores for `.top()`; a layer's score is that of its window.

    `compute_dtype=torch.float32` computes a half-precision model's runs in float32.

    Cost: (1 + draws)F, and for each token from the subject on, each layer, kind and draw the part of F above the lowest
    restored layer.

    Meng et al. 2022, https://arxiv.org/abs/2202.05262, section 2. ValueError for prompts without a subject, a window or
    number of draws below 1, a window larger than the model, or negative noise.
    """
    sizes = shape(model)
    check_batch_size(batch_size)
    check_functions(metric=metric)
    window = default_window(sizes.n_layers) if window is None else window
    _check(noise, draws, window, kinds, sizes.n_layers)
    prompts = prompts.on(model)
    pieces: list[dict[str, Tensor]] = []
    with preserved(model), computed_in(model, compute_dtype), torch.no_grad():
        vectors = _noise(model, prompts, noise, draws, seed, batch_size)
        batches = prompts.batches(max(1, batch_size // draws))
        for batch in tqdm(batches, desc="causal tracing", leave=False, disable=None):
            pieces.append(_batch_trace(model, batch, metric, vectors, window, kinds, batch_size))
    width = max(piece["effects"].shape[-1] for piece in pieces)
    settings = {"noise": noise, "draws": draws, "window": window, "seed": seed, "prompts": len(prompts)}
    settings |= {} if compute_dtype is None else {"compute_dtype": str(compute_dtype)}
    clean, corrupt = (torch.cat([piece[name] for piece in pieces]).cpu() for name in ("clean", "corrupt"))
    effects, roles_ = (
        torch.cat([pad(piece[name], (0, width - piece[name].shape[-1]), value=fill) for piece in pieces]).cpu()
        for name, fill in (("effects", 0), ("roles", -1))
    )
    return CausalTrace(clean, corrupt, effects, roles_, kinds, sizes, name_of(metric), settings)


def default_window(n_layers: int) -> int:
    """The paper's 10 layers, or in models of fewer than 30 a third of the layers."""
    return max(1, min(10, round(n_layers / 3)))


def _noise(
    model: Model, prompts: Prompts, noise: float, draws: int, seed: int, batch_size: int
) -> Float[Tensor, "draw token d_model"]:
    # The noise is measured in standard deviations of the embeddings that it is added to.
    entries = []
    for batch in prompts.batches(batch_size):
        embedded = embeddings(model, batch.tokens, batch.attention_mask)
        entries.append(embedded[subject(batch)].flatten().double())
    std = float(torch.cat(entries).std(correction=0))
    generator = torch.Generator().manual_seed(operator.index(seed))
    d_model = shape(model).d_model
    tokens = [torch.randn(draws, d_model, generator=generator) for _ in range(int(subject(prompts).sum(1).max()))]
    return (noise * std * torch.stack(tokens, 1)).to(prompts.tokens.device)


def _batch_trace(
    model: Model, prompts: Prompts, metric: Metric, noise: Tensor, window: int, kinds: tuple[Kind, ...], batch_size: int
) -> dict[str, Tensor]:
    n_layers, draws = len(model.blocks), len(noise)
    names = [f"blocks.{layer}.hook_{part}_out" for layer in range(n_layers) for part in ("mlp", "attn")]
    clean = _run(model, prompts, names)
    copies = prompts.rows(torch.arange(len(prompts), device=prompts.tokens.device).repeat_interleave(draws))
    noisy = _run(model, copies, names, [_noise_hook(copies, noise)])
    corrupt = checked(metric, noisy.logits, copies).double()
    # Each (copy, token) is one restoration, and a row of its own for every layer: rows share passes, layer by layer.
    sites = _restored_sites(copies)
    effects = corrupt.new_zeros(len(copies), len(kinds), n_layers, copies.tokens.shape[1])
    for place, kind in enumerate(kinds):
        for part in sites.split(operator.index(batch_size)):
            rows, tokens = part.unbind(1)
            for layer, logits in _restored_layers(model, noisy, clean, part, kind, window):
                values = checked(metric, logits, copies.rows(rows)).double()
                effects[rows, place, layer, tokens] = values - corrupt[rows]
    masks = torch.stack(list(roles(prompts).values()), -1)
    return {
        "clean": checked(metric, clean.logits, prompts).double(),
        "corrupt": corrupt.view(-1, draws).mean(1),
        "effects": _left_aligned(effects.unflatten(0, (-1, draws)).mean(1), prompts),
        "roles": _left_aligned(torch.where(masks.any(-1), masks.int().argmax(-1), -1), prompts),
    }


def _run(model: Model, prompts: Prompts, names: list[str], hooks: Sequence[Hook] = ()) -> Run:
    return base_run(model, prompts.tokens, prompts.attention_mask, prompts.positions, names=names, hooks=hooks)


def _noise_hook(copies: Prompts, noise: Float[Tensor, "draw token d_model"]) -> Hook:
    """A hook that adds the noise of each copy's draw to its subject, where embeddings enter the first layer."""
    is_subject = subject(copies)
    order = (is_subject.cumsum(1) - 1).clamp(min=0)
    draw = torch.arange(len(copies), device=order.device)[:, None] % len(noise)
    added = noise[draw, order] * is_subject[..., None]
    return "blocks.0.hook_resid_pre", lambda value, hook: value + added.to(value.dtype)


def _restored_sites(copies: Prompts) -> Int[Tensor, "site 2"]:
    """Row and column of each token from the subject's first to the one that predicts the answer."""
    order = torch.arange(copies.tokens.shape[1], device=copies.tokens.device)
    first = subject(copies).int().argmax(1, keepdim=True)
    return ((order >= first) & (order <= copies.positions[:, :1])).nonzero()


def _restored_layers(
    model: Model, noisy: Run, clean: Run, sites: Int[Tensor, "site 2"], kind: Kind, window: int
) -> Iterator[tuple[int, Float[Tensor, "site answer d_vocab"]]]:
    """For each layer, the last first, logits of copies of the noisy run, each with one token restored."""
    row, token = sites.unbind(1)
    # Near the first layers windows are cut off, and all start in layer 0: a shorter one is the longer one's run up to
    # where the shorter ends. The longest comes first and keeps what enters the layers at which the others continue.
    entering: dict[int, Tensor] = {}

    def keep_entering(layer: int) -> Hook:
        return f"blocks.{layer}.hook_resid_pre", lambda value, hook: entering.update({layer: value})

    for layer in reversed(range(len(model.blocks))):
        first, end = max(0, layer - window // 2), min(len(model.blocks), layer + (window + 1) // 2)
        if kind == "residual":
            residual = noisy.residuals[layer + 1][row]
            prompt = row // (len(noisy.tokens) // len(clean.tokens))
            residual[torch.arange(len(row), device=row.device), token] = clean.residuals[layer + 1][prompt, token]
            logits = continued(model, noisy, row, layer + 1, residual=residual)
        elif end in entering:
            logits = continued(model, noisy, row, end, residual=entering[end])
        else:
            hooks = [keep_entering(i) for i in range((window + 1) // 2, end)] if first == 0 else []
            logits = _restored_window(model, noisy, clean, sites, kind, range(first, end), hooks)
        yield layer, logits


def _restored_window(
    model: Model, noisy: Run, clean: Run, sites: Int[Tensor, "site 2"], kind: Kind, layers: range, hooks: list[Hook]
) -> Float[Tensor, "site answer d_vocab"]:
    """Logits with the outputs of these layers restored at one token; `hooks` see the copies."""
    row, token = sites.unbind(1)
    prompt = row // (len(noisy.tokens) // len(clean.tokens))
    copies, first = torch.arange(len(row), device=row.device), layers[0]

    def restoring_hook(layer: int) -> Hook:
        name = f"blocks.{layer}.hook_{kind.lower()}_out"

        def restore(value: Tensor, hook: object) -> Tensor:
            restored = value.clone()
            restored[copies, token] = clean.values[name][prompt, token]
            return restored

        return name, restore

    if kind == "ATTN":
        attention = noisy.attention[first][row]
        # The first window layer's attention output is known, so the run starts behind it.
        hooks = [*(restoring_hook(layer) for layer in layers), *hooks]
        return continued(model, noisy, row, first, attention=attention, hooks=hooks)
    # The first MLP's restored output is added to the stream that leaves its layer: the run starts in the next layer.
    name = f"blocks.{first}.hook_mlp_out"
    residual = at_least_float32(noisy.residuals[first + 1][row])
    change = at_least_float32(clean.values[name][prompt, token]) - noisy.values[name][row, token]
    residual[copies, token] += scales_of(model).written * change
    hooks = [*(restoring_hook(layer) for layer in layers[1:]), *hooks]
    return continued(model, noisy, row, first + 1, residual=residual, hooks=hooks)


def _left_aligned(values: Tensor, prompts: Prompts) -> Tensor:
    """The values with the last axis counted from each prompt's first real token, on whichever side padding is."""
    order = prompts.attention_mask.int().argsort(dim=1, descending=True, stable=True)
    index = order.view(len(order), *[1] * (values.ndim - 2), -1).expand_as(values)
    return values.gather(-1, index)


def _check(noise: float, draws: int, window: int, kinds: tuple[str, ...], n_layers: int) -> None:
    if noise < 0 or draws < 1:
        raise ValueError(
            f"expected noise of at least 0 standard deviations and at least one draw of it, got noise={noise} and "
            f"draws={draws}: the paper takes 3 and 10."
        )
    if not 1 <= window <= n_layers:
        raise ValueError(f"window must lie in 1..{n_layers} (the number of layers), got {window}: pass window=... .")
    if not kinds or not set(kinds) <= set(get_args(Kind)):
        raise ValueError(f"expected kinds among {', '.join(get_args(Kind))}, got {kinds}.")


@dataclass(frozen=True, eq=False, repr=False)
class CausalTrace(Saved):
    """Indirect effects in the metric's unit: positive = restoring brings the answer back."""

    clean: Float[Tensor, "prompt"]
    """The metric of the clean run."""
    corrupt: Float[Tensor, "prompt"]
    """The metric of the corrupted run, the mean over draws of noise."""
    effects: Float[Tensor, "prompt kind layer token"]
    """The metric with the i-th token restored minus that of the corrupted run, mean over draws; 0 without a token."""
    roles: Int[Tensor, "prompt token"]
    """The role of each token, a place in `ROLES`; -1 where there is no token."""
    kinds: tuple[str, ...]
    """The kinds of states that were restored, in the order of the effects."""
    shape: ModelShape
    """Of the model that was traced."""
    metric: str
    """The metric's name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The noise, the number of draws, the window, the seed and the number of prompts."""

    @property
    def total_effect(self) -> Float[Tensor, "prompt"]:
        """The metric of the clean run minus that of the corrupted run, for each prompt."""
        return self.clean - self.corrupt

    def total(self, *, confidence: float = 0.95) -> tuple[float, float, float]:
        """The mean of `total_effect` over prompts, and the low and high end of its interval (bootstrap over prompts).

        Unit: the metric's; positive = the noise lowers it. An interval that contains 0 says that the noise does not
        reliably hide the answer, so that there is little to restore.
        """
        low, high = bootstrap(self.total_effect, confidence=confidence)
        return float(self.total_effect.mean()), float(low), float(high)

    @property
    def by_role(self) -> Float[Tensor, "prompt kind layer role"]:
        """Means over the tokens of each role; NaN where a prompt has no such token."""
        member = torch.nn.functional.one_hot(self.roles + 1, len(ROLES) + 1)[..., 1:].to(self.effects.dtype)
        sums = torch.einsum("pklt,ptr->pklr", self.effects, member)
        return sums / member.sum(1)[:, None, None]

    def scores(self, kind: str = "MLP", *, role: str = "last of the subject") -> ComponentScores:
        """The effects at one role as scores of that kind's layers, for `.top()`.

        A score is that of the window around its layer. ValueError where a prompt has no token of that role.
        """
        if kind not in self.kinds or kind == "residual" or role not in ROLES:
            raise ValueError(
                f"expected a kind that was traced and is a component (traced: {', '.join(self.kinds)}; the residual "
                f"stream is no component) and a role ({', '.join(ROLES)}), got {kind!r} and {role!r}: trace it with "
                f"kinds=..., or choose another."
            )
        values = self.by_role[:, self.kinds.index(kind), :, ROLES.index(role)].contiguous()
        without = values.isnan().any(1).nonzero()[:, 0].tolist()
        if without:
            raise ValueError(f"expected prompts with a token {role}, got none in {without[:5]}: choose another role.")
        components = tuple(Component(layer, kind) for layer in range(self.shape.n_layers))
        settings = {**self.settings, "role": role}
        return ComponentScores(components, values.mean(0), self.shape, "causal_tracing", self.metric, settings, values)

    def to_frame(self, *, confidence: float = 0.95) -> "DataFrame":
        """One row per kind, layer and role: effect, low, high (bootstrap over prompts) and number of prompts."""
        import pandas as pd

        values = self.by_role
        low, high = bootstrap(values, confidence=confidence)
        names = ["kind", "layer", "role"]
        index = pd.MultiIndex.from_product([self.kinds, range(self.shape.n_layers), ROLES], names=names)
        columns = {"effect": values.nanmean(0), "low": low, "high": high, "prompts": (~values.isnan()).sum(0)}
        frame = pd.DataFrame({name: column.flatten().numpy() for name, column in columns.items()}, index=index)
        return frame.query("prompts > 0")

    def plot(self, kind: str | None = None) -> "Figure":
        """The classic heat map, role x layer, of the mean effect over prompts; by default of the first traced kind."""
        kind = self._traced(kind)
        values = self.by_role[:, self.kinds.index(kind)].nanmean(0)
        present = [role for role in range(len(ROLES)) if not bool(values[:, role].isnan().all())]
        clean, corrupt = float(self.clean.mean()), float(self.corrupt.mean())
        title = f"{self._titled(kind)}: clean {clean:.3g}, corrupted {corrupt:.3g}"
        return self._heat_map(values[:, present], [ROLES[role] for role in present], title)

    def plot_prompt(self, prompt: int, kind: str | None = None) -> "Figure":
        """The heat map of one prompt, token x layer (tokens by number and role); default: the first traced kind."""
        kind = self._traced(kind)
        if not 0 <= prompt < len(self.clean):
            raise ValueError(f"expected the number of a prompt in 0..{len(self.clean) - 1}, got {prompt}.")
        tokens = (self.roles[prompt] >= 0).nonzero()[:, 0].tolist()
        values = self.effects[prompt, self.kinds.index(kind)][:, tokens]
        clean, corrupt = float(self.clean[prompt]), float(self.corrupt[prompt])
        title = f"{self._titled(kind)}, prompt {prompt}: clean {clean:.3g}, corrupted {corrupt:.3g}"
        return self._heat_map(values, [f"{i}: {ROLES[int(self.roles[prompt, i])]}" for i in tokens], title)

    def _traced(self, kind: str | None) -> str:
        if kind is not None and kind not in self.kinds:
            raise ValueError(
                f"expected a kind that was traced ({', '.join(self.kinds)}), got {kind!r}: trace it with kinds=..., or "
                f"choose another."
            )
        return self.kinds[0] if kind is None else kind

    def _titled(self, kind: str) -> str:
        windows = "" if kind == "residual" else f", windows of {self.settings.get('window')} layers"
        return f"causal tracing: {kind}{windows}"

    def _heat_map(self, values: Float[Tensor, "layer row"], rows: list[str], title: str) -> "Figure":
        unit, layers = f"indirect effect, {self.metric.replace('_', ' ')}", list(range(self.shape.n_layers))
        look: dict[str, Any] = {"unit": unit, "hover": "layer %{x}, %{y}: %{z:.4g}", "title": title}
        look |= {"width": 420 + 30 * min(self.shape.n_layers, 20), "height": max(360, 150 + 25 * len(rows))}
        figure = signed_heat_map(values.T.tolist(), layers, rows, **look)
        return figure.update_xaxes(title="layer").update_yaxes(autorange="reversed")

    def __repr__(self) -> str:
        clean, corrupt = float(self.clean.mean()), float(self.corrupt.mean())
        means = self.by_role.nanmean(0).nan_to_num(-torch.inf)
        kind, layer, role = torch.unravel_index(means.argmax(), means.shape)
        return (
            f"CausalTrace({self.metric}: clean {clean:.3g}, corrupted {corrupt:.3g}; {len(self.clean)} prompts; "
            f"most is restored by {self.kinds[int(kind)]} at layer {int(layer)}, {ROLES[int(role)]})"
        )
