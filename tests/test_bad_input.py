"""Bad input: the message says what was expected, what came and what to do; the model stays bit-identical."""

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from conftest import shared
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import Component
from mechunlearn.model import slots

finetune = partial(mu.edit.finetune, steps=1, batch_size=4, text_batch_size=2, progress=False)


def masked(model, *labels):
    return mu.ComponentMask.of(labels, mu.shape(model))


def refused(*parts):
    """pytest.raises(ValueError) whose message has all the parts: expected, got, remedy."""
    return pytest.raises(ValueError, match="(?s)" + ".*".join(parts))


def test_a_metric_that_needs_one_token_refuses_longer_answers(model):
    with (
        left_as_it_was(model),
        refused("expected answers of one token", "got answers of up to 3", "use answer_log_prob"),
    ):
        mu.localize.attribution_patching(model, tiny.prompts(model, answer=3))


def test_a_metric_of_the_wrong_shape_is_refused(model):
    def averaged(logits, prompts):
        return logits.mean()

    with (
        left_as_it_was(model),
        refused("expected averaged to give one value per prompt", r"got \(\)", "do not average"),
    ):
        mu.localize.attribution_patching(model, tiny.prompts(model), metric=averaged)


def test_a_metric_that_gives_nan_is_refused(model):
    def undefined(logits, prompts):
        values = logits[:, 0, 0].clone()
        values[3] = float("nan")
        return values

    with left_as_it_was(model), refused("expected finite values of undefined", r"NaN.*\[3\]", "check the metric"):
        mu.localize.attribution_patching(model, tiny.prompts(model), metric=undefined)


def test_a_metric_without_a_gradient_is_refused(model):
    def detached(logits, prompts):
        return (logits[:, 0, 0].detach() + 0 * logits[:, 0, 0]).detach().requires_grad_(True)

    with (
        left_as_it_was(model),
        refused("expected a metric that depends on", "detached has no", "computed from"),
    ):
        mu.localize.attribution_patching(model, tiny.prompts(model), metric=detached)


def test_a_metric_that_cannot_be_differentiated_is_refused(model):
    def share(logits, prompts):
        return mu.metrics.is_top_of_candidates(logits, prompts).float()

    with left_as_it_was(model), refused("expected a metric with a gradient", "from share", "use logit_difference"):
        mu.localize.attribution_patching(model, tiny.prompts(model), metric=share)


def test_a_direction_that_does_not_exist_is_refused(llama, unchecked):
    with refused('expected direction "noising" or "denoising"', "got 'noise'"):
        mu.localize.attribution_patching(llama, tiny.prompts(llama), direction="noise")


def test_prompts_without_a_corrupted_side_are_refused(model):
    prompts = replace(tiny.prompts(model), corrupt=None)
    with left_as_it_was(model), refused("expected prompts with a corrupted counterpart", "got none", "pass corrupt="):
        mu.localize.attribution_patching(model, prompts)


def test_prompts_without_candidates_are_refused_by_a_metric_that_needs_them(model):
    prompts = replace(tiny.prompts(model), candidates=None)
    with left_as_it_was(model), refused("expected prompts with candidate answers", "got none", "pass candidates"):
        mu.evaluate.accuracy(model, prompts)


@pytest.mark.parametrize("label", ["L3H0", "L0H4", "L9MLP", "L1N9999"])
def test_a_component_outside_the_model_is_refused(model, label):
    outside = [Component.parse(label)]
    with (
        left_as_it_was(model),
        refused("expected a component of a model with 3 layers, 4 heads", f"got {label}", "made for"),
    ):
        mu.localize.attribution_patching(model, tiny.prompts(model), components=outside)
    with refused("expected a component", f"got {label}", "made for another model"):
        masked(model, label)


def test_a_mask_that_selects_nothing_is_refused(model):
    nothing = masked(model, "L1MLP") - masked(model, "L1MLP")
    for call in (finetune, lambda m, t, mask: mu.edit.gradient_mask(m, mask).__enter__()):
        with left_as_it_was(model), refused("expected a mask that selects something", "got an empty one", "check what"):
            call(model, tiny.task(model), nothing)


def test_a_mask_of_another_model_is_refused(model):
    other = replace(mu.shape(model), n_layers=7)
    mask = mu.ComponentMask.of(["L1MLP"], other)
    with left_as_it_was(model), refused("expected a mask made for this model", "n_layers=7", "localize on the model"):
        finetune(model, tiny.task(model), mask)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_processed_bridge_is_refused_for_editing(architecture):
    model = tiny.bridge(architecture)
    mask = masked(model, "L1MLP")
    task = tiny.task(model)
    model.enable_compatibility_mode(disable_warnings=True)
    with left_as_it_was(model), refused("expected unprocessed weights", "got folded", "boot_transformers"):
        finetune(model, task, mask)


def test_a_bridge_in_compatibility_mode_without_processing_is_accepted():
    model = tiny.bridge("llama")
    model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    finetune(model, tiny.task(model), masked(model, "L1MLP"))


@pytest.mark.classes
def test_a_folded_hooked_transformer_is_refused_for_editing():
    model = shared("hooked", "llama")
    before = model.cfg.normalization_type
    task, mask = tiny.task(model), masked(model, "L1MLP")
    try:
        model.cfg.normalization_type = "RMSPre"
        with left_as_it_was(model), refused("expected unprocessed weights", "no_processing"):
            finetune(model, task, mask)
    finally:
        model.cfg.normalization_type = before


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_refused_for_editing(dtype):
    model = tiny.bridge("llama")
    task, mask = tiny.task(model), masked(model, "L1MLP")
    parameter = slots(model)[1, "W_in"].parameter
    parameter.requires_grad_(False)
    parameter.data = (parameter * 100).to(dtype)
    with left_as_it_was(model), refused("expected float16, bfloat16", rf"got {dtype} in L1 W_in", "load it in"):
        finetune(model, task, mask)


def test_a_mixture_of_experts_is_refused(llama):
    llama.cfg.num_experts = 8
    try:
        with (
            left_as_it_was(llama),
            refused("expected a dense model", "got a mixture of 8 experts", "use a dense model"),
        ):
            mu.shape(llama)
    finally:
        llama.cfg.num_experts = None


def test_something_that_is_no_model_is_refused():
    with refused("expected a TransformerBridge", "got LlamaForCausalLM", "boot_transformers"):
        mu.shape(tiny.huggingface("llama"))


@pytest.mark.parametrize(("wrap", "inside"), [(torch.compile, "_orig_mod"), (torch.nn.DataParallel, "module")])
def test_a_model_inside_another_module_is_refused_with_the_remedy(llama, wrap, inside):
    with pytest.raises(ValueError, match=rf"expected the model itself, got .* pass model.{inside}"):
        mu.shape(wrap(llama))


def test_weights_that_cannot_be_trained_are_refused():
    offloaded = tiny.bridge("llama")
    offloaded.blocks[2].mlp.to("meta")
    with torch.inference_mode():
        made = tiny.bridge("llama")
    for model, why in ((offloaded, "offloaded"), (made, "made under torch.inference_mode")):
        with pytest.raises(ValueError, match=rf"expected weights in memory .* {why}.*: load"):
            mu.shape(model)


@pytest.mark.parametrize("tokens", [[1, 5, 6], torch.tensor([1, 5, 6])], ids=["list", "tensor"])
def test_tokens_of_one_dimension_are_refused(tokens, unchecked):
    with pytest.raises(ValueError, match=r"expected tokens of shape \[batch, pos\].*pass \[tokens\]"):
        mu.tasks.Prompts.of(tokens, [4])


def test_an_unknown_architecture_is_admitted_only_by_the_self_test():
    model = tiny.bridge("llama")
    model.cfg.architecture = "SomethingForCausalLM"
    with left_as_it_was(model):
        assert mu.shape(model).n_layers == 3

    broken = tiny.bridge("llama")
    broken.cfg.architecture = "SomethingForCausalLM"
    weight = slots(broken)[2, "W_O"].parameter
    permuted = torch.nn.Parameter(weight.detach().clone())
    broken.blocks[2].attn.o.original_component.forward = lambda x: x @ permuted.T
    with refused("passes the self-test", "got SomethingForCausalLM", "Use one of the tested ones"):
        mu.shape(broken)


def test_an_edit_of_other_weights_is_refused(model):
    edit = finetune(model, tiny.task(model), masked(model, "L1MLP"))
    weight = slots(model)[0, "W_O"].parameter
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[0] += 1.0
    try:
        for apply in (edit.apply, lambda m: edit.applied(m).__enter__()):
            with (
                left_as_it_was(model),
                refused("expected the weights that the edit was made for", "got others", "load"),
            ):
                apply(model)
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_an_edit_cannot_be_applied_twice(llama):
    edit = finetune(llama, tiny.task(llama), masked(llama, "L1MLP"))
    with edit.applied(llama), refused("expected the weights that the edit was made for"):
        edit.apply(llama)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"k": 0}, r"k must lie in 1\.\.12 .*, got 0"),
        ({"k": 13}, r"k must lie in 1\.\.12 .*, got 13"),
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\].*, got 0.0"),
        ({"fraction": 1.5}, r"fraction must lie in \(0, 1\].*, got 1.5"),
        ({"parameters": 3}, "expected a rule that selects at least one component"),
        ({"threshold": 1e9}, "expected a rule that selects at least one component"),
        ({}, "expected exactly one of k, fraction, threshold and parameters, got none"),
        ({"k": 1, "fraction": 0.5}, "expected exactly one of"),
    ],
)
def test_a_selection_out_of_range_is_refused(llama, rule, message):
    scores = mu.localize.random(llama, seed=0, components=mu.components.heads)
    with pytest.raises(ValueError, match=message):
        scores.top(**rule)


def test_every_edit_is_checked_before_anything_is_evaluated(llama):
    task, calls = tiny.task(llama), []
    good = finetune(llama, task, masked(llama, "L1MLP"))
    edits = {"good": good, "of other weights": replace(good, fingerprint="0")}
    with refused("expected the weights that the edit was made for"):
        mu.evaluate.compare(llama, task, edits, metrics={"x": lambda *_: calls.append(1)}, progress=False)
    assert calls == []


def test_a_test_that_returns_no_result_is_an_error_in_its_cell(llama):
    report = mu.evaluate.compare(llama, tiny.task(llama), {}, metrics={"mine": lambda *_: 0.5}, progress=False)
    assert "expected a test (model, task) -> Result for the column 'mine'" in report.cells[0].error
    assert "returns float: wrap the number" in report.cells[0].error


def test_a_row_that_is_named_original_is_refused(llama):
    edit = finetune(llama, tiny.task(llama), masked(llama, "L1MLP"))
    with left_as_it_was(llama), refused('other than "original"', "rename"):
        mu.evaluate.compare(llama, tiny.task(llama), {"original": edit}, progress=False)


def test_a_format_that_the_task_lacks_is_refused(llama):
    with refused("expected a format of the task", "trained prompt, question", "got 'poem'"):
        mu.evaluate.in_format(llama, tiny.task(llama), name="poem", side="forget")


@pytest.mark.parametrize("where", ["metric", "hook"])
def test_an_interrupt_while_localizing_leaves_the_model_as_it_was(model, where):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    metric = interrupt if where == "metric" else mu.metrics.logit_difference
    handle = None
    if where == "hook":
        handle = model.blocks[1].register_forward_hook(interrupt)
    try:
        with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
            mu.localize.attribution_patching(model, tiny.prompts(model), metric=metric)
    finally:
        if handle is not None:
            handle.remove()


def test_an_interrupt_in_a_test_puts_the_original_weights_back(model):
    def interrupt(model, task):
        raise KeyboardInterrupt

    task = tiny.task(model)
    edit = finetune(model, task, masked(model, "L1MLP", "L2H0"))
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt), edit.applied(model):
        interrupt(model, task)
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        mu.evaluate.compare(model, task, {"edit": edit}, metrics={"interrupted": interrupt}, progress=False)
