"""From a bridge back to Hugging Face: a checkpoint on disk, or a copy for libraries that change a model."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechunlearn.model.classes import Model, architecture, device_of, is_bridge
from mechunlearn.model.matrices import innermost, slots
from mechunlearn.model.running import only_at


def save_huggingface(model: Model, path: str | Path) -> None:
    """Write the model as it is now as a folder that `AutoModelForCausalLM.from_pretrained(path)` loads.

    The folder holds the configuration, safetensors and, if the model has one, the tokenizer. It is written as
    `path` + `.partial` and renamed when it is complete.

    - The tokenizer is as TransformerLens has set it up: it may prepend a BOS where the original does not, so give other
      tools the original.
    - Fused QKV is put together from the split weights that TransformerLens uses.
    - No checkpoint holds rotary frequencies: those that `model.to(torch.bfloat16)` rounded are exact again after
      loading, so load a model in bfloat16 rather than convert it.

    ValueError for a `HookedTransformer`, a multimodal model that `AutoModelForCausalLM` does not know (Mistral 3),
    weights without a place in the Hugging Face model, or a path that is taken.
    """
    path = Path(path)
    _check_loadable(model)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"expected a new or empty folder, got {path}, which is taken: choose another, or remove it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a folder to write into, found none at {path.parent}: create it first.")
    _write(model, path)


def _check_loadable(model: Model) -> None:
    """ValueError unless `AutoModelForCausalLM` knows the class of the model's configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _huggingface_model(model).config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        raise ValueError(
            f"expected a model that AutoModelForCausalLM loads, got a {type(model.original_model).__name__}, whose "
            f"export it could not load again: save the Edit itself, and apply it after loading the original."
        )


def _write(model: Model, path: Path) -> None:
    empty, weights = _empty_copy(model), huggingface_weights(model)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        empty.save_pretrained(partial, state_dict=weights)
        if model.original_model.generation_config is not None:
            # As it is: `save_pretrained` refuses that of Llama 2 and Vicuna, a temperature without sampling.
            model.original_model.generation_config.to_json_file(partial / "generation_config.json")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def huggingface_weights(model: Model) -> dict[str, Tensor]:
    """Parameter name of the original Hugging Face model -> weight as it is now; ValueError if that cannot be exact."""
    expected = _empty_copy(model).state_dict()
    state = model.original_model.state_dict(keep_vars=True)
    present = {name.replace("._original_component", ""): tensor for name, tensor in state.items()}
    fused = {id(fused.whole): fused for fused in _fused(model)}
    used = {id(present[name]) for name in expected if name in present}
    used |= {id(part) for whole in fused.keys() & used for part in fused[whole].parts}
    lost = [name for name, tensor in present.items() if id(tensor) not in used and bool(tensor.any())]
    lost += [f"L{layer}.{matrix}" for (layer, matrix), slot in slots(model).items() if id(slot.parameter) not in used]
    wrong = [name for name in expected if name not in present or present[name].shape != expected[name].shape]
    if lost or wrong:
        raise ValueError(
            f"expected weights that the Hugging Face model has a place for, got {(lost + wrong)[:5]} without one: "
            f"export the model before its weights or modules are replaced, or save the Edit itself."
        )
    weights = {name: present[name].detach() for name in expected}
    for name in expected:
        if id(present[name]) in fused:  # the forward pass does not read it: its value is that of its parts
            weights[name] = fused[id(present[name])].value()
    _check_ties(model, weights)
    return weights


def n_parameters(model: Model) -> int:
    """How many parameters the model has, shared ones counted once: of a bridge, those of its Hugging Face model.

    A `HookedTransformer` counts biases that its architecture may not have, and an unembedding of its own.
    """
    if _wraps_huggingface(model):
        return sum(parameter.numel() for parameter in _empty_copy(model).parameters())
    return sum(parameter.numel() for parameter in model.parameters())


def _wraps_huggingface(model: Model) -> bool:
    return is_bridge(model) and hasattr(model.original_model, "save_pretrained")


def _empty_copy(model: Model) -> Any:
    """The Hugging Face model that the bridge was made from, with its configuration, on the meta device."""
    inner = _huggingface_model(model)
    with torch.device("meta"):
        empty = type(inner)(deepcopy(inner.config))
    return empty.to(next(inner.parameters()).dtype)


def _huggingface_model(model: Model) -> Any:
    if not _wraps_huggingface(model):
        raise ValueError(
            f"expected a TransformerBridge of a Hugging Face model, got a {type(model).__name__}, which holds "
            f"converted weights: pass TransformerBridge.boot_transformers(...) of the same model; an edit made on one "
            f"class applies to the other."
        )
    return model.original_model


@dataclass(frozen=True, eq=False)
class _Fused:
    """A fused parameter, which the forward pass of a bridge does not read, and those that it reads."""

    whole: nn.Parameter
    parts: Sequence[nn.Parameter]
    places: Sequence[Tensor]
    """For each part where its entries are in the flattened whole."""

    @torch.no_grad()
    def value(self) -> Tensor:
        whole = torch.empty_like(self.whole).flatten()
        for part, places in zip(self.parts, self.places, strict=True):
            whole[places.flatten().to(whole.device)] = part.flatten()
        return whole.view(self.whole.shape)


def _fused(model: Model) -> Iterator[_Fused]:
    places: dict[str, Sequence[Tensor]] = {}
    for block in model.blocks:
        inside = dict(innermost(block.mlp).named_parameters())
        if "gate_up_proj.weight" in inside:  # one below the other
            whole, halves = inside["gate_up_proj.weight"], (getattr(block.mlp, part) for part in ("gate", "in"))
            above_and_below = torch.arange(whole.numel()).view(whole.shape).tensor_split(2)
            yield _Fused(whole, [innermost(half).weight for half in halves], above_and_below)
        children = dict(block.attn.named_children())
        if "qkv" not in children:
            continue
        whole, *parts = (innermost(children[name]) for name in ("qkv", "q", "k", "v"))
        places = places or _places(model, block.attn, whole)
        for kind in places:
            yield _Fused(getattr(whole, kind), [getattr(part, kind) for part in parts], places[kind])


def _places(model: Model, attention: Any, whole: nn.Module) -> dict[str, Sequence[Tensor]]:
    """Kind of parameter -> where the entries of q, k and v are in the fused one: each architecture has its own order.

    The fused matrix is filled with the numbers of its entries, and TransformerLens splits it again.
    """
    own = dict(whole.named_parameters(recurse=False))
    try:
        for kind, parameter in own.items():
            numbers = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            setattr(whole, kind, nn.Parameter(numbers, requires_grad=False))
        with torch.device("meta"):  # what the new layers hold at first is thrown away
            parts = attention.split_qkv_matrix(attention.original_component)
        places: dict[str, Sequence[Tensor]] = {kind: [getattr(part, kind).long() for part in parts] for kind in own}
    finally:
        for kind, parameter in own.items():
            setattr(whole, kind, parameter)
    for kind, parameter in own.items():
        if not torch.equal(torch.cat([p.flatten() for p in places[kind]]).sort()[0], torch.arange(parameter.numel())):
            raise ValueError(
                f"expected a fused QKV whose entries are each one of q, k or v, got that of {architecture(model)}: "
                f"save the Edit itself, and apply it after loading."
            )
    return places


def _check_ties(model: Model, weights: dict[str, Tensor]) -> None:
    """ValueError if the configuration ties two weights that differ: only one of them would be written."""
    if not model.original_model.config.tie_word_embeddings:
        return
    for copy, source in (type(model.original_model)._tied_weights_keys or {}).items():
        if copy in weights and not torch.equal(weights[copy], weights[source]):
            raise ValueError(
                f"expected {copy} and {source} to be one weight, as the configuration says, got two that differ: "
                f"export the model before they are untied."
            )


@contextmanager
def exported(model: Model) -> Iterator[Any]:
    """Inside, a copy of the model as it is now, as `from_pretrained` loads it; after, its files are gone.

    The copy has the model's dtype and device and is in eval mode. ValueError for a `HookedTransformer`.
    """
    with tempfile.TemporaryDirectory(prefix="mechunlearn-") as folder:
        path, dtype = Path(folder) / "model", next(model.parameters()).dtype
        with _without_progress_bars():
            _write(model, path)
            # By its own class: `AutoModelForCausalLM` does not know every multimodal one.
            copy: Any = type(model.original_model).from_pretrained(path, dtype=dtype, local_files_only=True)
        yield copy.to(device_of(model)).eval()


def exported_logits(
    copy: Any, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], positions: Int[Tensor, "batch place"]
) -> Float[Tensor, "batch place d_vocab"]:
    """`logits_at` for a Hugging Face model: logits at `positions` alone. Padding may be left or right."""
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    with only_at(copy.get_output_embeddings(), positions):
        return copy(input_ids=tokens, attention_mask=mask.long(), position_ids=places, use_cache=False).logits


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
