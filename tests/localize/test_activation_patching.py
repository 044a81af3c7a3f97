"""The slow, obvious reference: for every component one full forward pass with one hook."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import Component
from mechunlearn.localize import activation_patching, activation_patching_by_position
from mechunlearn.localize.replacement import gaussian, mean_over, resample, zero
from mechunlearn.metrics import answer_log_probability, logit_difference
from mechunlearn.model import preserved, recording, shape, site
from mechunlearn.tasks.positions import ROLES, answer, everywhere, roles, subject, subject_last

KINDS = ("L1H2", "L1H2.W_Q", "L0H3.W_K", "L2H0.W_V", "L2H1.W_O", "L2H3.W_Q", "L1ATTN", "L2ATTN", "L0MLP", "L2MLP")
NEURONS = ("L1MLP.W_in", "L2MLP.W_out", "L1N7", "L2N5")


def kinds(model):
    gate = ("L1MLP.W_gate",) if shape(model).gated else ()
    return [Component.parse(label) for label in KINDS + NEURONS + gate]


def unit_of(component, sizes):
    if component.part == "H":
        return component.index * sizes.units(component.matrix or "W_O") // sizes.n_heads
    return component.index


@torch.no_grad()
def reference(model, prompts, component, metric, replacement=resample, where=everywhere):
    """Effect of the component for each prompt: everything is run."""
    sizes = shape(model)
    name, unit = site(component, sizes), unit_of(component, sizes)
    with preserved(model):
        with recording(model, [name]) as own:
            before = metric(prompts.logits(model), prompts)
        new = replacement(model, prompts, own)[name]
        rows, tokens = (where(prompts) & prompts.attention_mask).nonzero(as_tuple=True)

        def put(value, hook):
            patched = value.clone()
            if unit is None:
                patched[rows, tokens] = new[rows, tokens]
            else:
                patched[rows, tokens, unit] = new[rows, tokens, unit]
            return patched

        return (metric(prompts.logits(model, hooks=[(name, put)]), prompts) - before).double()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_every_kind_of_component_has_the_effect_of_a_full_pass(model, direction):
    prompts = tiny.prompts(model, n=3)
    patched = prompts if direction == "noising" else prompts.exchanged()
    with left_as_it_was(model):
        scores = activation_patching(model, prompts, components=kinds(model), direction=direction)
    for place, component in enumerate(scores.components):
        expected = reference(model, patched, component, logit_difference)
        assert torch.allclose(scores.per_prompt[:, place], expected, atol=2e-5), component
        assert expected.abs().max() > 1e-3, component


def test_answers_of_several_tokens_and_left_padding(model):
    prompts = tiny.prompts(model, n=4, answer=3, padding="left")
    chosen = ["L0H1", "L1MLP", "L2H2", "L2MLP", "L2ATTN", "L2N3"]
    scores = activation_patching(model, prompts, components=chosen, metric=answer_log_probability)
    for place, component in enumerate(scores.components):
        expected = reference(model, prompts, component, answer_log_probability)
        assert torch.allclose(scores.per_prompt[:, place], expected, atol=2e-5), component


@pytest.mark.parametrize("replacement", [zero, "mean", gaussian(std=0.5)], ids=["zero", "mean", "noise"])
def test_other_replacements(llama, replacement):
    prompts = tiny.prompts(llama)
    given = mean_over(tiny.prompts(llama, seed=9)) if replacement == "mean" else replacement
    chosen = ["L0H1", "L1MLP", "L1ATTN", "L2N3", "L0H0.W_K"]
    scores = activation_patching(llama, prompts, components=chosen, replacement=given)
    for place, component in enumerate(scores.components):
        expected = reference(llama, prompts, component, logit_difference, given)
        assert torch.allclose(scores.per_prompt[:, place], expected, atol=2e-5), component
        assert expected.abs().max() > 1e-3


def test_a_positional_mean_is_that_of_each_position(llama):
    prompts = tiny.prompts(llama, n=12)[[0, 6]]  # of one length
    name = "blocks.1.hook_mlp_out"
    with recording(llama, [name]) as own, torch.no_grad():
        prompts.logits(llama)
    values = {name: own[name]}
    found = mean_over(prompts, positional=True)(llama, prompts, values)[name]
    assert torch.allclose(found[1], own[name].mean(0), atol=1e-6)
    with pytest.raises(ValueError, match=r"expected a reference set and prompts that all have one length"):
        mean_over(tiny.prompts(llama), positional=True)(llama, prompts, values)


MEAN = "mean_over(positional=False, with_bos=False, batch_size=64)"


@pytest.mark.parametrize("replacement", ["zero", "mean"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_bos_keeps_its_values_and_is_in_no_mean_unless_asked_for(llama, replacement, padding):
    prompts, name = tiny.prompts(llama, n=4, padding=padding), "blocks.1.attn.hook_z"
    with recording(llama, [name]) as own, torch.no_grad():
        prompts.logits(llama)
    own, real = own[name], prompts.attention_mask
    bos = real & (prompts.tokens == 1)
    assert bos.sum(1).tolist() == [1] * 4
    for with_bos in (False, True):
        chosen = partial(zero, with_bos=with_bos) if replacement == "zero" else mean_over(prompts, with_bos=with_bos)
        found = chosen(llama, prompts, {name: own})[name]
        mean = own[real if with_bos else real & ~bos].mean(0) * (replacement == "mean")
        assert torch.allclose(found[real & ~bos], mean.expand_as(found[real & ~bos]), atol=1e-6)
        assert torch.allclose(found[bos], mean.expand_as(own[bos]) if with_bos else own[bos], atol=1e-6)


def test_where_prompts_have_no_bos_nothing_is_left_out(llama):
    tokens = torch.tensor([[5, 7, 9], [6, 7, 8]])
    prompts, name = mu.Prompts.of(tokens, [4, 4]), "blocks.1.hook_mlp_out"
    values = {name: torch.ones(2, 3, 32)}
    assert not zero(llama, prompts, values)[name].any()
    means = [mean_over(prompts, with_bos=with_bos)(llama, prompts, values)[name] for with_bos in (False, True)]
    assert torch.equal(*means)


@pytest.mark.parametrize("positional", [False, True])
def test_a_mean_over_batches_of_the_reference_is_the_same(llama, positional):
    prompts = tiny.prompts(llama, n=12)
    prompts = prompts[[0, 6]] if positional else prompts
    name = "blocks.1.attn.hook_z"
    values = {name: torch.zeros(*prompts.tokens.shape, 4, 8)}
    with full_rows(llama) as rows:
        found = [mean_over(prompts, positional=positional, batch_size=n)(llama, prompts, values)[name] for n in (64, 1)]
    torch.testing.assert_close(*found)
    assert rows == [len(prompts), *[1] * len(prompts)]
    with pytest.raises(ValueError, match="batch_size of at least 1"):
        mean_over(prompts, batch_size=0)


@contextmanager
def full_rows(model):
    """How many rows each forward has."""
    rows = []
    with model.blocks[0].register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0]))):
        yield rows


@pytest.mark.parametrize("where", [subject, subject_last, answer])
def test_a_patch_at_some_tokens(llama, where):
    prompts = tiny.prompts(llama)
    chosen = ["L0H1", "L1MLP", "L1ATTN", "L1N3", "L0H0.W_K"]
    scores = activation_patching(llama, prompts, components=chosen, where=where)
    for place, component in enumerate(scores.components):
        expected = reference(llama, prompts, component, logit_difference, where=where)
        assert torch.allclose(scores.per_prompt[:, place], expected, atol=2e-5), component


def test_positions_are_patched_one_group_at_a_time(model):
    prompts = tiny.prompts(model, n=3)
    chosen = ["L0H1", "L1MLP", "L1H0.W_V"]
    with left_as_it_was(model):
        scores = activation_patching_by_position(model, prompts, components=chosen)
    assert scores.positions == ROLES
    for role in ROLES:
        for place, component in enumerate(scores.components):
            expected = reference(model, prompts, component, logit_difference, where=lambda p, role=role: roles(p)[role])
            assert torch.allclose(scores.at(role).per_prompt[:, place], expected, atol=2e-5), (component, role)


def test_a_patch_before_the_first_difference_has_no_effect(llama):
    scores = activation_patching_by_position(llama, tiny.prompts(llama), components=["L0MLP", "L1H1"])
    assert torch.equal(scores.at("before the subject").tensor, torch.zeros(2).double())


def test_roles_divide_the_prompt(llama):
    for padding in ("left", "right"):
        prompts = tiny.prompts(llama, padding=padding)
        masks = torch.stack(list(roles(prompts).values()))
        assert torch.equal(masks.sum(0).bool(), prompts.attention_mask)
        assert masks.sum(0).max() == 1
        assert torch.equal((roles(prompts)["last of the subject"]).sum(1), torch.ones(len(prompts)).long())
        assert torch.equal(roles(prompts)["last"], answer(prompts))


def test_noise_does_not_depend_on_batches_or_padding(llama):
    options = {"components": ["L0H1", "L1MLP"], "replacement": gaussian(std=1.0, seed=3)}
    one = activation_patching(llama, tiny.prompts(llama), **options).per_prompt
    two = activation_patching(llama, tiny.prompts(llama, padding="left"), batch_size=2, **options).per_prompt
    other = activation_patching(llama, tiny.prompts(llama), components=["L0H1", "L1MLP"], replacement=gaussian(std=1.0))
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, other.per_prompt, atol=1e-3)


def test_bad_input(llama, unchecked):
    prompts = tiny.prompts(llama)
    plain = mu.Prompts.of(prompts.tokens, prompts.answers[:, 0], attention_mask=prompts.attention_mask)
    with pytest.raises(ValueError, match=r"expected prompts with a corrupted counterpart"):
        activation_patching(llama, plain, metric=answer_log_probability)
    with pytest.raises(ValueError, match=r"expected prompts that say where their subject is, got none for all"):
        activation_patching(llama, replace(prompts, subject=None), where=subject)
    with pytest.raises(ValueError, match=r"expected direction .* got 'both'"):
        activation_patching(llama, prompts, direction="both")
    with pytest.raises(ValueError, match=r"expected a batch_size of at least 1, got 0"):
        activation_patching(llama, prompts, batch_size=0)
    with pytest.raises(ValueError, match=r"expected one of the positions .*, got 'first'"):
        activation_patching_by_position(llama, prompts, components=["L0MLP"]).at("first")
    with pytest.raises(ValueError, match=r"expected .* to give one value per prompt"):
        activation_patching(llama, prompts, metric=lambda logits, p: logits.mean())


def test_settings_tell_two_replacements_apart(llama):
    def settings(replacement):
        scores = activation_patching(llama, tiny.prompts(llama), components=["L0MLP"], replacement=replacement)
        return scores.settings["replacement"]

    assert settings(gaussian(std=0.1)) == "gaussian(std=0.1, seed=0)"
    assert settings(gaussian(std=5.0, seed=3)) == "gaussian(std=5.0, seed=3)"
    assert settings(mean_over(tiny.prompts(llama, seed=9))) == MEAN
    assert settings(resample) == "resample"


def test_an_ablation_does_not_denoise(llama, unchecked):
    for replacement in (zero, gaussian(std=1.0), mean_over(tiny.prompts(llama))):
        with pytest.raises(ValueError, match=r"expected a replacement from the clean run for denoising, got"):
            activation_patching(llama, tiny.prompts(llama), direction="denoising", replacement=replacement)


def test_groups_must_be_the_same_for_all_prompts(llama, unchecked):
    def absolute(prompts):
        return {
            str(i): prompts.attention_mask & (torch.arange(prompts.tokens.shape[1]) == i)
            for i in range(prompts.tokens.shape[1])
        }

    prompts = tiny.prompts(llama, n=12)
    with pytest.raises(ValueError, match=r"expected the same groups of tokens for all prompts, got \d+ in one batch"):
        activation_patching_by_position(llama, prompts, components=["L0MLP"], positions=absolute, batch_size=1)
    one_length = prompts[[0, 6]]
    scores = activation_patching_by_position(llama, one_length, components=["L0MLP"], positions=absolute, batch_size=1)
    assert len(scores.positions) == one_length.tokens.shape[1]
