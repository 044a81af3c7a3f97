"""The same work by the library and by others on SmolLM2, a real pretrained model: the same numbers, then the time.

    python benchmarks/real_peers.py                          all parts that the installed TransformerLens allows
    python benchmarks/real_peers.py attribution patching     some of: attribution, patching, training, edges

TransformerLens 4 runs the first three. `edges` is against auto-circuit, which needs TransformerLens 3.9 (see
`benchmarks` in pyproject.toml). A process per contender, alternating, one thread, CPU seconds. Facts are capitals that
the model says; localizations have those with answers of one token and prompts of 16, so that nobody needs padding.
"""

import re
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from contenders import Prepare, costs
from edges import prune_scores
from torch import Tensor

import mechunlearn as mu
from mechunlearn.losses import cross_entropy, log_one_minus_probability
from mechunlearn.metrics import logit_difference

ROUNDS = 3
FEW = 4
"""Prompts of the parts that run the model often, or need much memory elsewhere; 12 otherwise."""
LENGTH = 16
POSITIONS = (14, 15)
"""The subject's one token and the last token; before them both runs are the same."""
LAYERS = range(4, 30, 7)
"""The layers whose heads and MLPs are patched exactly, spread evenly: a patch in a low layer costs us most."""
MLPS = ["L6MLP", "L7MLP", "L9MLP", "L12MLP", "L18MLP", "L20MLP", "L22MLP"]
RANK, ALPHA = 8, 16.0
LEARNING_RATE = 1e-5
STEPS = 2
"""Timed steps, after a first one that warms up."""
BATCH, TEXT_ROWS = 8, 2
"""Forget prompts, and as many retain prompts; rows of 64 tokens of text, others in each step."""


def main() -> None:
    torch.set_num_threads(1)
    four = version("transformer_lens") >= "4"
    parts = {"attribution": attribution, "patching": patching, "training": training} if four else {"edges": edges}
    chosen = sys.argv[1:] or list(parts)
    if not set(chosen) <= set(parts):
        raise SystemExit(f"expected parts among {', '.join(parts)} with this TransformerLens, got {', '.join(chosen)}.")
    task = mu.tasks.known_facts(mu.testbed.smollm2(), relation="capital", forget=12, formats=[])
    print(f"TransformerLens {version('transformer_lens')}, SmolLM2, float32, one thread")
    for name in chosen:
        parts[name](task)


def report(contenders: Mapping[str, Prepare], against: Mapping[str, str], **how: Any) -> None:
    """A table of Markdown: what each takes and, for a peer, how often its time and memory ours are."""
    measured = costs(contenders, rounds=ROUNDS, **how)
    print("\n| | CPU s | ours, x of it | peak MiB | ours, x of it |\n| --- | --- | --- | --- | --- |")
    for name, cost in measured.items():
        ours = measured.get(against.get(name, ""))
        time_ratio = "" if ours is None else f"{ours.seconds / cost.seconds:.2f}"
        memory_ratio = "" if ours is None else f"{ours.mebibytes / cost.mebibytes:.2f}"
        print(f"| {name} | {cost.seconds:.2f} | {time_ratio} | {cost.mebibytes:,.0f} | {memory_ratio} |")
    print(flush=True)


def check_same(what: str, ours: Tensor, theirs: Tensor, *, tolerance: float = 1e-4) -> None:
    """Before anything is timed: ValueError unless the numbers are the same up to rounding."""
    difference = float((ours.double() - theirs.double()).abs().max())
    print(f"{what}: {len(ours):,} numbers of up to {float(ours.abs().max()):.3g} differ by at most {difference:.1e}")
    if difference > tolerance * max(1.0, float(ours.abs().max())):
        raise ValueError(f"expected the same numbers from {what}, got a difference of {difference:.2g}.")


def prompts(task: mu.Task, count: int) -> mu.Prompts:
    """Known facts of one length with one-token answers, from either side of the task."""
    facts = mu.tasks.joined(task.forget, task.retain)
    alike = (facts.attention_mask.sum(1) == LENGTH) & (facts.answer_mask.sum(1) == 1)
    return facts[alike.nonzero()[:count, 0]]


def difference_at_end(facts: mu.Prompts, logits: Tensor) -> Tensor:
    """The metric of every contender, from the logits of all positions."""
    return logit_difference(logits[:, -1:], facts)


# Attribution patching: clean values minus corrupt ones, times the gradient in the corrupt run, of all heads and MLPs.


def attribution(task: mu.Task) -> None:
    facts = prompts(task, 12)
    ours, recipe = "`attribution_patching`", "hooks and `run_with_cache` of TransformerLens"
    contenders: dict[str, Any] = {
        ours: partial(our_attribution, facts),
        recipe: partial(hooked_attribution, facts),
        f"{recipe}, weights frozen": partial(hooked_attribution, facts, frozen=True),
        "`transformer_lens` `attribution_patch`, nodes": partial(their_attribution, facts),
        "plain Hugging Face model, 2F + 1B": partial(two_forwards_one_backward, facts),
    }
    runs = {name: prepare() for name, prepare in contenders.items() if not name.startswith("plain")}
    numbers = {name: run() for name, run in runs.items()}
    for name in list(runs)[1:]:
        check_same(f"attribution, {name}", numbers[ours], numbers[name])
    del runs
    report(contenders, {name: ours for name in contenders if name != ours})


def our_attribution(facts: mu.Prompts) -> Callable[[], Tensor]:
    model = mu.testbed.smollm2()
    method = partial(mu.localize.attribution_patching, model, facts, direction="denoising")
    return lambda: method().tensor


def hooked_attribution(facts: mu.Prompts, *, frozen: bool = False) -> Callable[[], Tensor]:
    """The recipe of TransformerLens' demo, at heads and MLPs only, without the gradients of the clean run, too.

    The demo computes weight gradients as well, since parameters require them; with `frozen` they do not.
    """
    model = mu.testbed.smollm2()
    model.requires_grad_(not frozen)
    names = [f"blocks.{layer}.{point}" for layer in range(30) for point in ("attn.hook_z", "hook_mlp_out")]

    def run() -> Tensor:
        with torch.no_grad():
            _, clean = model.run_with_cache(facts.tokens, names_filter=lambda name: name in names)
        corrupt: dict[str, Tensor] = {}
        slopes: dict[str, Tensor] = {}
        forward = [("blocks.0.hook_resid_pre", lambda value, hook: value.requires_grad_())] if frozen else []
        forward += [(name, partial(_keep, into=corrupt, name=name)) for name in names]
        backward = [(name, partial(_keep, into=slopes, name=name)) for name in names]
        with model.hooks(fwd_hooks=forward, bwd_hooks=backward):
            difference_at_end(facts, model(facts.corrupt)).sum().backward()
        model.zero_grad()
        products = [((clean[name] - corrupt[name]) * slopes[name]).sum((0, 1, -1)).reshape(-1) for name in names]
        return torch.cat(products) / len(facts)

    return run


def _keep(value: Tensor, hook: object, *, into: dict[str, Tensor], name: str) -> None:
    into[name] = value.detach()


def their_attribution(facts: mu.Prompts) -> Callable[[], Tensor]:
    """A call for each pair: it runs them one by one, and its metric does not see which. It scores each position."""
    from transformer_lens.tools.analysis import attribution_patch

    model, pairs = mu.testbed.smollm2(), facts.batches(1)

    def run() -> Tensor:
        sums = torch.zeros(30, 10)
        for pair in pairs:
            found = attribution_patch(model, pair.tokens, pair.corrupt, lambda y, p=pair: difference_at_end(p, y).sum())
            for node, score in found.node_scores.items():
                if node.layer is not None:
                    sums[node.layer, 9 if node.head is None else node.head] += score
        return sums.flatten() / len(pairs)

    return run


def two_forwards_one_backward(facts: mu.Prompts) -> Callable[[], object]:
    """The arithmetic that must be done: gradients of activations alone, logits at the last position."""
    model, _ = mu.testbed.smollm2_huggingface()
    model.requires_grad_(False)

    def run() -> None:
        with torch.no_grad():
            model(facts.tokens, logits_to_keep=1)
        embedded = model.get_input_embeddings()(facts.corrupt).requires_grad_()
        difference_at_end(facts, model(inputs_embeds=embedded, logits_to_keep=1).logits).sum().backward()

    return run


# Exact patching: a clean value in the corrupt run, each site alone.


def patching(task: mu.Task) -> None:
    facts = prompts(task, FEW)
    ours, theirs = "`activation_patching`, heads", "`get_act_patch_attn_head_out_all_pos`"
    ours_mlp, theirs_mlp = "`activation_patching_by_position`, MLPs", "`get_act_patch_mlp_out`"
    contenders: dict[str, Any] = {
        ours: partial(our_heads, facts),
        theirs: partial(their_patching, facts, "get_act_patch_attn_head_out_all_pos", ("layer", "head"), range(9)),
        ours_mlp: partial(our_mlps, facts),
        theirs_mlp: partial(their_patching, facts, "get_act_patch_mlp_out", ("layer", "pos"), POSITIONS),
    }
    pairs = {theirs: ours, theirs_mlp: ours_mlp}
    for name, own in pairs.items():
        check_same(f"exact patching, {name}", contenders[own]()(), contenders[name]()())
    report(contenders, pairs)


def our_heads(facts: mu.Prompts) -> Callable[[], Tensor]:
    model = mu.testbed.smollm2()
    heads = [head for head in mu.components.heads(mu.shape(model)) if head.layer in LAYERS]
    method = partial(mu.localize.activation_patching, model, facts, components=heads, direction="denoising")
    return lambda: method().tensor


def our_mlps(facts: mu.Prompts) -> Callable[[], Tensor]:
    model = mu.testbed.smollm2()
    mlps = [f"L{layer}MLP" for layer in LAYERS]
    by_position = mu.localize.activation_patching_by_position
    method = partial(by_position, model, facts, components=mlps, positions=_columns, direction="denoising")
    return lambda: method().tensor.flatten()


def _columns(facts: mu.Prompts) -> dict[str, Tensor]:
    columns = torch.arange(facts.tokens.shape[1]).expand_as(facts.tokens)
    return {str(place): columns == place for place in POSITIONS}


def their_patching(facts: mu.Prompts, function: str, axes: tuple[str, str], second: Any) -> Callable[[], Tensor]:
    """A forward of all prompts and all positions' logits for each site; less the metric of the corrupt run, as ours."""
    from pandas import DataFrame
    from transformer_lens import patching as tools

    model = mu.testbed.smollm2()
    sites = DataFrame([(layer, place) for layer in LAYERS for place in second], columns=list(axes))

    def metric(logits: Tensor) -> Tensor:
        return difference_at_end(facts, logits).mean()

    @torch.no_grad()
    def run() -> Tensor:
        _, clean = model.run_with_cache(facts.tokens)
        patch = getattr(tools, function)
        patched = patch(model, facts.corrupt, clean, metric, index_axis_names=None, index_df=sites)
        return patched - metric(model(facts.corrupt))

    return run


# A training step: erase by log(1 - p), retain and text by cross-entropy, clipped at 1, AdamW without weight decay.


@dataclass(frozen=True)
class Trained:
    """What is trained, for both sides."""

    parts: list[str] | None
    """Labels; None: every matrix of every layer."""
    low_rank: bool = False

    def mask(self, model: Any) -> mu.ComponentMask:
        shape = mu.shape(model)
        return mu.localize.everything(model) if self.parts is None else mu.ComponentMask.of(self.parts, shape)

    def modules(self) -> str:
        """A pattern of the same matrices' names in the Hugging Face model."""
        if self.parts is None:
            return r".*\.(q|k|v|o|gate|up|down)_proj"
        layers = "|".join(part.removeprefix("L").removesuffix("MLP") for part in self.parts)
        return rf".*\.layers\.({layers})\.mlp\.(gate|up|down)_proj"


def training(task: mu.Task) -> None:
    assert isinstance(task.text, Tensor)
    text = task.text[: TEXT_ROWS * (STEPS + 1)]  # each row once, as text that is streamed
    task = replace(task, forget=task.forget[:BATCH], retain=task.retain[:BATCH], text=text)
    few, all_parts, low_rank = Trained(MLPS), Trained(None), Trained(MLPS, low_rank=True)
    for what, trained in {"7 MLPs": few, "everything": all_parts, "7 MLPs, rank 8": low_rank}.items():
        ours = f"`{'lora' if trained.low_rank else 'finetune'}`, {what}, a step"
        theirs = f"{'peft LoRA' if trained.low_rank else 'plain Hugging Face model'}, torch AdamW, {what}, a step"
        check_training(what, task, trained)
        contenders = {ours: partial(our_steps, task, trained), theirs: partial(their_steps, task, trained)}
        report(contenders, {theirs: ours}, warm_up=False, own_clock=True)


def check_training(what: str, task: mu.Task, trained: Trained) -> None:
    """The losses of the first step, and of the second where both sides start from the same weights."""
    first = replace(task, text=task.text[:TEXT_ROWS])  # type: ignore[index]  # a tensor
    count = 1 if trained.low_rank else 2  # LoRA's factors are drawn at random
    history = our_edit(mu.testbed.smollm2(), first, trained, steps=count).history
    ours = [float(row[name]) for row in history for name in ("forget", "retain", "text")]
    step = their_step(first, trained)
    theirs = [value for _ in range(count) for value in step(0)]
    check_same(f"losses of {what}", torch.tensor(ours), torch.tensor(theirs))


def our_edit(model: Any, task: mu.Task, trained: Trained, **options: Any) -> mu.edit.Edit:
    method = partial(mu.edit.lora, rank=RANK, alpha=ALPHA) if trained.low_rank else mu.edit.finetune
    sizes = {"batch_size": BATCH, "text_batch_size": TEXT_ROWS}
    how = {"learning_rate": LEARNING_RATE, "schedule": mu.edit.constant_schedule, "progress": False}
    return method(model, task, trained.mask(model), **sizes, **how, **options)


def our_steps(task: mu.Task, trained: Trained) -> Callable[[], float]:
    model = mu.testbed.smollm2()

    def run() -> float:
        ends: list[float] = []
        our_edit(model, task, trained, steps=STEPS + 1, on_step=lambda row: ends.append(time.process_time()))
        return (ends[-1] - ends[0]) / STEPS

    return run


def their_steps(task: mu.Task, trained: Trained) -> Callable[[], float]:
    step = their_step(task, trained)

    def run() -> float:
        ends = []
        for number in range(STEPS + 1):
            step(number)
            ends.append(time.process_time())
        return (ends[-1] - ends[0]) / STEPS

    return run


def their_step(task: mu.Task, trained: Trained) -> Callable[[int], list[float]]:
    """A step of a loop as one writes it: a whole forward for each term, logits of all positions, one optimizer."""
    model, parameters = prepared(trained)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    assert isinstance(task.text, Tensor)
    texts = [mu.tasks.as_prompts(rows) for rows in task.text.split(TEXT_ROWS)]

    def step(number: int) -> list[float]:
        terms = ((task.forget, log_one_minus_probability), (task.retain, cross_entropy), (texts[number], cross_entropy))
        optimizer.zero_grad()
        losses = []
        for batch, loss in terms:
            logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long()).logits
            real = batch.answer_mask
            of_answers = logits[torch.arange(len(batch))[:, None], batch.positions][real]
            value = loss(of_answers, batch.answers[real]).mean()
            value.backward()
            losses.append(value.item())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return losses

    return step


def prepared(trained: Trained) -> tuple[Any, list[Tensor]]:
    """The plain model, or peft's, and the parameters that are trained; the others have no gradients."""
    model, _ = mu.testbed.smollm2_huggingface()
    if trained.low_rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=trained.modules(), lora_dropout=0.0)
        model = get_peft_model(model, config)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(re.fullmatch(trained.modules(), name.removesuffix(".weight"))))
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


# Edge attribution patching: all edges.


def edges(task: mu.Task) -> None:
    """On the same weights with keys and values repeated for each query head: auto-circuit takes no grouped ones."""
    facts = prompts(task, FEW)
    bridge, hooked = mu.testbed.bridge, mu.testbed.hooked
    at_once, theirs = "`edge_attribution_patching`, bridge, one batch", "auto-circuit, mask gradient"
    contenders: dict[str, Prepare] = {
        at_once: partial(our_edges, facts, bridge, batch_size=len(facts)),
        "the same, `HookedTransformer`": partial(our_edges, facts, hooked, batch_size=len(facts)),
        "the same, bridge, default batches": partial(our_edges, facts, bridge),
        theirs: partial(their_edges, facts),
    }
    check_same("EAP of one prompt", our_edges(facts[:1], bridge)(), their_edges(facts[:1])())
    report(contenders, {theirs: at_once})


def ungrouped() -> tuple[Any, Any]:
    """SmolLM2 with nine heads of keys and values, every third one new: the same logits."""
    from transformers import LlamaForCausalLM

    grouped, tokenizer = mu.testbed.smollm2_huggingface()
    config, weights = deepcopy(grouped.config), grouped.state_dict()
    group, config.num_key_value_heads = config.num_attention_heads // config.num_key_value_heads, 9
    config.max_position_embeddings = 128  # a `HookedTransformer` has a mask of all positions squared in each layer
    for name in [name for name in weights if name.endswith(("k_proj.weight", "v_proj.weight"))]:
        weights[name] = weights[name].unflatten(0, (3, -1)).repeat_interleave(group, 0).flatten(0, 1)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model, tokenizer


def our_edges(facts: mu.Prompts, backend: Callable[..., Any], **options: Any) -> Callable[[], Tensor]:
    model = backend(*ungrouped())
    method = partial(mu.localize.edge_attribution_patching, model, facts, **options)
    return lambda: method().values_in_order


def their_edges(facts: mu.Prompts) -> Callable[[], Tensor]:
    """Its scores have the other sign: what the answer needs is positive. In our order: by source, then destination."""
    find = prune_scores(mu.testbed.hooked(*ungrouped()), facts, mask_val=0.0)

    def run() -> Tensor:
        found, rows = find(), []
        for layer in range(30):
            heads = torch.stack([found[f"blocks.{layer}.hook_{kind}_input"] for kind in "qkv"], 1).flatten(0, 1)
            rows += [*heads, found[f"blocks.{layer}.hook_mlp_in"]]
        rows.append(found["blocks.29.hook_resid_post"])
        # A row has a number for each source below its destination.
        table = torch.full((len(rows), len(rows[-1])), torch.nan)
        for row, scores in zip(table, rows, strict=True):
            row[: len(scores)] = scores
        return -table.T[~table.T.isnan()]

    return run


if __name__ == "__main__":
    main()
