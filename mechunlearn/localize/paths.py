"""Path patching: the effect of what senders write on what receivers read, with every other path held fixed."""

from collections.abc import Sequence
from operator import index
from typing import Literal, TypeAlias, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import chosen_components
from mechunlearn.components import Component, Components, ComponentScores, ModelShape, heads_and_mlps
from mechunlearn.identity import name_of
from mechunlearn.localize.options import PathOptions, settings_of
from mechunlearn.localize.sites import Places, passes, places_of, resolution, run_pairs
from mechunlearn.metrics import checked
from mechunlearn.model import Hook, Model, Run, base_run, continued, preserved, shape
from mechunlearn.model.edges import is_parallel
from mechunlearn.model.hooks import layer_of
from mechunlearn.model.paths import (
    Changes,
    arriving_residuals,
    at_answers,
    read_by_attention,
    read_by_mlp,
    sender_changes,
    sender_sites,
)
from mechunlearn.model.running import computed_in
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts

Receivers: TypeAlias = Components | Literal["logits"] | int
"""What reads: components, `"logits"` (the final residual stream), or a layer (the residual stream that enters it)."""

Entry: TypeAlias = int | Places
"""Where receivers' inputs are changed: at the residual stream that enters a layer, or at hook points."""

_Resolved: TypeAlias = tuple[Component, ...] | Literal["logits"] | int


@with_options()
def path_patching(
    model: Model,
    prompts: Prompts,
    *,
    receivers: Receivers = "logits",
    senders: Components = heads_and_mlps,
    **options: Unpack[PathOptions],
) -> ComponentScores:
    """The exact effect of each sender, alone, through the receivers' inputs.

        score = mean over prompts of metric(x with the receivers' inputs changed) - metric(x)

    in the metric's unit. The receivers' inputs are what they would read if the sender wrote what it writes in the other
    run x', and every other component what it writes in x; with `through_mlps`, MLPs between them respond. With these
    inputs x runs, and everything else in it is free.

    Receivers are patched together:

    - `"logits"` (default);
    - a layer (an int): everything from that layer on reads the changed residual stream;
    - components: `L5H3.W_Q` (or `W_K`, `W_V`: the KV head that it reads, which others may share), a head (all three),
      an attention layer, an MLP, one of its input matrices, a neuron.

    Senders are heads (or W_O), attention layers and MLPs (or W_out). One without a path to any receiver scores 0.

    Cost: 2F, and for each sender the part of F from the lowest receiver's layer on; with `through_mlps`, also the
    MLPs from the sender to the highest receiver. For `"logits"`, all of it at the answers' positions only.

    Wang et al. 2022, https://arxiv.org/abs/2211.00593; Goldowsky-Dill et al. 2023, https://arxiv.org/abs/2304.05969.
    ValueError without corrupted prompts, and if no path leads from any sender to any receiver.
    """
    sizes, name = shape(model), name_of(options["metric"])
    chosen, resolved = _senders(senders, sizes), _resolved(receivers, sizes)
    linked, entry = _linked(model, chosen, resolved)
    per_prompt = torch.zeros(len(prompts), len(chosen), dtype=torch.float64)
    columns = [chosen.index(sender) for sender in linked]
    per_prompt[:, columns] = _effects(model, prompts, [{s} for s in linked], entry, options)
    shown = resolved if isinstance(resolved, int | str) else [str(component) for component in resolved]
    patched = prompts if options["direction"] == "noising" else prompts.exchanged()
    limit = resolution(model, patched, options["metric"], options["compute_dtype"], options["batch_size"])
    settings = settings_of(options, prompts, receivers=shown, through_mlps=options["through_mlps"], **limit)
    return ComponentScores(chosen, per_prompt.mean(0), sizes, "path_patching", name, settings, per_prompt)


@with_options()
def path_effect(
    model: Model, prompts: Prompts, senders: Components, receivers: Receivers, **options: Unpack[PathOptions]
) -> Float[Tensor, "prompt"]:
    """The effect of all senders together, through the receivers' inputs, for each prompt; as in `path_patching`."""
    sizes = shape(model)
    linked, entry = _linked(model, _senders(senders, sizes), _resolved(receivers, sizes))
    return _effects(model, prompts, [set(linked)], entry, options)[:, 0]


def _effects(
    model: Model, prompts: Prompts, senders: Sequence[set[Component]], entry: Entry, options: PathOptions
) -> Float[Tensor, "prompt sender"]:
    metric, direction, batch_size = options["metric"], options["direction"], options["batch_size"]
    names = sender_sites({component.layer for members in senders for component in members})
    effects = []
    with preserved(model), computed_in(model, options["compute_dtype"]), torch.no_grad():
        for pair in run_pairs(model, prompts, metric, direction, batch_size):
            batch = pair[0]
            base, other = (base_run(model, p.tokens, p.attention_mask, p.positions, names=names) for p in pair)
            own = checked(metric, base.logits, batch).double()
            if entry == len(base.attention):
                # Into the final norm there is no attention left to run: the answers' positions are enough.
                base, other = at_answers(base), at_answers(other)
            values = []
            for numbers, rows in passes([len(senders), len(batch)], batch_size, batch.tokens.device):
                sent = sender_changes(model, base, other, [senders[i] for i in numbers.tolist()], rows)
                logits = _patched_logits(model, base, sent, entry, options["through_mlps"])
                values.append(checked(metric, logits, batch.rows(rows)).double() - own[rows])
            effects.append(torch.cat(values).view(len(senders), len(batch)).T)
    return torch.cat(effects).cpu()


def _patched_logits(
    model: Model, base: Run, sent: Changes, entry: Entry, through_mlps: bool
) -> Float[Tensor, "row answer d_vocab"]:
    if isinstance(entry, int):
        residual = arriving_residuals(model, base, sent, [entry], through_mlps=through_mlps)[entry]
        return continued(model, base, sent.rows, entry, residual=residual)
    # First what arrives at each receiver's layer and what it reads of that; then one suffix run in which the receivers'
    # queries, keys, values and pre-activations are set to it. Their layers' residual streams stay the base run's.
    layers = sorted({layer_of(name) for name in entry})
    entering = arriving_residuals(model, base, sent, layers, through_mlps=through_mlps)
    hooks = []
    for layer in layers:
        names = [name for name in entry if layer_of(name) == layer]
        for read, is_attention in ((read_by_attention, True), (read_by_mlp, False)):
            wanted = [name for name in names if (".attn." in name) == is_attention]
            values = read(model, base, sent, layer, entering[layer], wanted) if wanted else {}
            hooks += [_unit_hook(name, value, list(entry[name].values())) for name, value in values.items()]
    return continued(model, base, sent.rows, layers[0], hooks=hooks)


def _unit_hook(name: str, value: Tensor, units: list[int | None]) -> Hook:
    def put(own: Tensor, hook: object) -> Tensor:
        if None in units:
            return value
        changed = own.clone()
        changed[:, :, units] = value[:, :, units]
        return changed

    return name, put


def _senders(senders: Components, sizes: ModelShape) -> tuple[Component, ...]:
    chosen = chosen_components(senders, sizes, "senders")
    for sender in chosen:
        if sender.kind not in (("H", None), ("H", "W_O"), ("ATTN", None), ("MLP", None), ("MLP", "W_out")):
            raise ValueError(
                f"expected senders that write to the residual stream (heads, attention layers, MLPs), got {sender}: "
                f"use the head or MLP that it belongs to."
            )
    return chosen


def _resolved(receivers: Receivers, sizes: ModelShape) -> _Resolved:
    """The receivers, components as a tuple: an iterator can be read only once."""
    if receivers == "logits":
        return "logits"
    if isinstance(receivers, bool | str):
        raise ValueError(
            f'expected components, a layer or "logits" as receivers, got {receivers!r}: put one component in a list.'
        )
    if isinstance(receivers, int | np.integer):
        return index(receivers)
    return chosen_components(receivers, sizes, "receivers")


def _entry(receivers: _Resolved, sizes: ModelShape) -> Entry:
    if receivers == "logits":
        return sizes.n_layers
    if isinstance(receivers, int):
        if not 0 < receivers <= sizes.n_layers:
            raise ValueError(
                f"expected a layer in 1..{sizes.n_layers} whose incoming residual stream is to be patched, got "
                f"{receivers}: {sizes.n_layers} is the final residual stream."
            )
        return receivers
    inputs = [read for component in receivers for read in _inputs(component, sizes)]
    if not inputs:
        raise ValueError('expected at least one receiver, got none: pass components, a layer or "logits".')
    return places_of(list(dict.fromkeys(inputs)), sizes)


def _inputs(component: Component, sizes: ModelShape) -> list[Component]:
    """The components whose outputs stand for this one's inputs: functions of the residual stream alone."""
    if component.matrix in ("W_O", "W_out"):
        raise ValueError(
            f"expected receivers that read the residual stream, got {component}, which reads what its own head or MLP "
            f"makes of it: use the head, its W_Q, W_K or W_V, or the MLP."
        )
    if component.part in ("MLP", "N") or component.matrix is not None:
        return [component]
    chosen = range(sizes.n_heads) if component.part == "ATTN" else [component.index]
    return [Component(component.layer, "H", head, matrix) for matrix in ("W_Q", "W_K", "W_V") for head in chosen]


def _leads(sender: Component, entry: Entry, parallel: bool) -> bool:
    """Whether what the sender writes can reach the receivers' inputs."""
    if isinstance(entry, int):
        return sender.layer < entry
    to_own_mlp = sender.part in ("H", "ATTN") and not parallel
    return any(
        sender.layer < layer_of(name) or (to_own_mlp and sender.layer == layer_of(name) and ".attn." not in name)
        for name in entry
    )


def _linked(model: Model, chosen: Sequence[Component], receivers: _Resolved) -> tuple[list[Component], Entry]:
    """The senders from which a path leads to a receiver, and where the receivers' inputs are changed."""
    entry, parallel = _entry(receivers, shape(model)), is_parallel(model)
    linked = [sender for sender in chosen if _leads(sender, entry, parallel)]
    if not linked:
        shown = ", ".join(str(sender) for sender in chosen[:5]) or "none"
        named = str(receivers) if isinstance(receivers, int | str) else ", ".join(str(c) for c in receivers[:5])
        raise ValueError(
            f"expected a sender below a receiver, got senders {shown} and receivers {named}, between which there is no "
            "path: choose receivers in later layers (in parallel blocks, an MLP does not read its own layer's heads)."
        )
    return linked, entry
