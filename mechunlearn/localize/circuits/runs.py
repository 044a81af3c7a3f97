"""The metric of a model in which sets of components, or of edges, are replaced at once; many sets share a batch."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from mechunlearn.arguments import check
from mechunlearn.components import Component, ModelShape
from mechunlearn.components.edge import Edge, mask_of, sources
from mechunlearn.localize.options import ReplacingOptions
from mechunlearn.localize.replacement import replacement_values
from mechunlearn.localize.sites import passes, places_of
from mechunlearn.metrics import checked
from mechunlearn.model import Hook, Model, base_run, continued, device_of, preserved, recording, shape
from mechunlearn.model.edge_runs import EdgeCircuits
from mechunlearn.model.edges import contributions, edges_of, source_outputs, source_sites
from mechunlearn.model.running import computed_in
from mechunlearn.tasks.positions import Where, everywhere
from mechunlearn.tasks.prompts import Prompts

Removed: TypeAlias = Sequence[Set[Component]]
"""Sets of components, each of which is replaced in a run of its own."""


def circuit_values(
    model: Model, prompts: Prompts, removed: Removed, options: ReplacingOptions, where: Where = everywhere
) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt circuit"]]:
    """The metric of the whole model, and of the model with each of these sets of components replaced at some tokens.

    Cost: 2F (one for the replacement's values), and for each set the part of F from its lowest layer on.
    """
    metric, replacement, batch_size = options["metric"], options["replacement"], options["batch_size"]
    check("noising", batch_size, metric=metric, replacement=replacement, where=where)
    places = _Places(removed, shape(model), device_of(model))
    # Sets that start late come first, so that a pass, which starts at the lowest layer of its rows, runs few layers.
    late_first = places.lowest.argsort(descending=True, stable=True)
    whole, values = [], []
    with preserved(model), computed_in(model, options["compute_dtype"]), torch.no_grad():
        for batch in tqdm(prompts.on(model).batches(batch_size), "circuits", leave=False, disable=None):
            run = base_run(model, batch.tokens, batch.attention_mask, batch.positions, names=places.names)
            source = replacement_values(replacement, model, batch, run.values)
            tokens = where(batch) & batch.attention_mask
            whole.append(checked(metric, run.logits, batch).double())
            by_circuit = whole[-1].new_zeros(len(batch), len(removed))
            for place, row in passes([len(removed), len(batch)], batch_size, tokens.device):
                circuits = late_first.to(row.device)[place]
                hooks = places.hooks(source, tokens, circuits, row)
                layer = int(places.lowest[circuits.cpu()].min())
                # The run's own attention output holds for the lowest layer unless something inside it is replaced.
                inside = any(name.startswith(f"blocks.{layer}.attn.") for name, _ in hooks)
                attention = None if inside else run.attention[layer][row]
                logits = continued(model, run, row, layer, attention=attention, hooks=hooks)
                by_circuit[row, circuits] = checked(metric, logits, batch.rows(row)).double()
            values.append(by_circuit)
    return torch.cat(whole).cpu(), torch.cat(values).cpu()


def edge_circuit_values(
    model: Model, prompts: Prompts, removed: Sequence[Set[Edge]], options: ReplacingOptions
) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt circuit"]]:
    """`circuit_values` for sets of edges. Cost: 2F, and a forward for each set."""
    metric, replacement, batch_size = options["metric"], options["replacement"], options["batch_size"]
    sizes = shape(model)
    masks = torch.stack([mask_of(edges, sizes) for edges in removed])
    masks = _pruned(masks, edges_of(model), sizes).to(device_of(model))
    whole, values = [], []
    with preserved(model), computed_in(model, options["compute_dtype"]), torch.no_grad():
        circuits = EdgeCircuits(model)
        for batch in tqdm(prompts.on(model).batches(batch_size), "edge circuits", leave=False, disable=None):
            with recording(model, source_sites(sizes)) as own:
                whole.append(checked(metric, batch.logits(model), batch).double())
            other = contributions(model, source_outputs(model, replacement_values(replacement, model, batch, own)))
            by_circuit = whole[-1].new_zeros(len(batch), len(masks))
            for circuit, row in passes([len(masks), len(batch)], batch_size, by_circuit.device):
                copies = batch.rows(row)
                inputs = copies.tokens, copies.attention_mask, copies.positions
                logits = circuits.logits(*inputs, other[:, row], masks[circuit])
                by_circuit[row, circuit] = checked(metric, logits, copies).double()
            values.append(by_circuit)
    return torch.cat(whole).cpu(), torch.cat(values).cpu()


def _pruned(
    removed: Bool[Tensor, "circuit source destination"], existing: Bool[Tensor, "source destination"], sizes: ModelShape
) -> Bool[Tensor, "circuit source destination"]:
    """Also removed: the edges from sources that no edge of their circuit enters, until all that are left are entered.

    Such a source would compute on replacements alone: of zeros or means, something that no run contains. Edges that no
    circuit removes stay: they carry the circuit's own run in all.
    """
    inputs = torch.zeros_like(existing)
    for row, source in enumerate(sources(sizes)):
        if isinstance(source, Component):
            ends = [source] if source.part == "MLP" else [replace(source, matrix=m) for m in ("W_Q", "W_K", "W_V")]
            inputs[row] = mask_of([Edge("embed", end) for end in ends], sizes)[0]
    removable = removed.any(0)
    while True:
        entered = (existing & ~removed).any(1)
        dead = ~(entered[:, None] & inputs).any(2)
        dead[:, 0] = False  # the embedding is entered by the tokens
        after = removed | (dead[:, :, None] & removable)
        if torch.equal(after, removed):
            return removed
        removed = after


class _Places:
    """Where sets of components are in the model: hook points, and heads or neurons there."""

    def __init__(self, removed: Removed, sizes: ModelShape, device: torch.device) -> None:
        components = sorted(set().union(*removed))
        self.lowest = torch.tensor([min(component.layer for component in chosen) for chosen in removed])
        self._chosen: dict[str, Tensor] = {}
        for name, units in places_of(components, sizes).items():
            members = {column: torch.tensor([components[column] in chosen for chosen in removed]) for column in units}
            is_whole = None in units.values()
            chosen = torch.stack(list(members.values())).any(0) if is_whole else _by_unit(members, units)
            self._chosen[name] = chosen.to(device)

    @property
    def names(self) -> list[str]:
        """The hook points."""
        return list(self._chosen)

    def hooks(
        self, source: dict[str, Tensor], tokens: Bool[Tensor, "prompt pos"], circuits: Tensor, row: Tensor
    ) -> list[Hook]:
        """Hooks that replace, in each row (a copy of a prompt), the outputs of its circuit at some tokens."""
        hooks: list[Hook] = []
        for name, chosen in self._chosen.items():
            units = chosen[circuits][:, None]
            if bool(units.any()):
                where = tokens[row] & units if units.ndim == 2 else tokens[row][:, :, None] & units
                hooks.append((name, partial(_put, source=source[name][row], where=where)))
        return hooks


def _by_unit(
    members: Mapping[int, Bool[Tensor, "circuit"]], units: Mapping[int, int | None]
) -> Bool[Tensor, "circuit unit"]:
    numbers = {column: unit for column, unit in units.items() if unit is not None}
    chosen = torch.zeros(len(next(iter(members.values()))), max(numbers.values()) + 1, dtype=torch.bool)
    for column, unit in numbers.items():
        chosen[:, unit] |= members[column]  # query heads that share a KV head share its unit
    return chosen


def _put(value: Tensor, hook: object, *, source: Tensor, where: Bool[Tensor, "row pos *unit"]) -> Tensor:
    if where.ndim == 3:
        where = pad(where, (0, value.shape[2] - where.shape[2]))
    return torch.where(where.view(*where.shape, *[1] * (value.ndim - where.ndim)), source, value)
