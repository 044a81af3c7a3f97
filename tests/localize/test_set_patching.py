"""The slow, obvious reference: for every set one full forward pass in which hooks replace all of its members."""

import pickle
from dataclasses import replace

import pytest
import tiny
import torch
from full_pass import with_replaced
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import ComponentMask, neurons
from mechunlearn.localize import activation_patching, faithfulness, set_patching
from mechunlearn.localize.replacement import gaussian, mean_over, zero
from mechunlearn.metrics import answer_log_probability, logit_difference
from mechunlearn.model import shape
from mechunlearn.tasks.positions import answer, subject_last

SETS = {
    "heads of two layers": ["L1H2", "L1H0", "L2H1", "L0H3"],
    "neurons": ["L0N3", "L1N7", "L1N0", "L2N5", "L1N63"],
    "neurons of the last layer": ["L2N1", "L2N2"],
    "layers": ["L1ATTN", "L2MLP"],
    "an MLP and what reads it": ["L1MLP", "L2H0.W_K", "L2H1.W_V", "L2H3.W_Q"],
    "everything in between": ["L1H3.W_O", "L1MLP.W_in", "L1N4", "L2MLP.W_out", "L2ATTN"],
    "a head of its layer": ["L1H1", "L1ATTN"],
    "one": ["L1MLP"],
}


def reference(model, prompts, members, **options):
    """Effect of all members together for each prompt."""
    before = with_replaced(model, prompts, [], **options)
    return with_replaced(model, prompts, members, **options) - before


def assert_as_reference(found, model, prompts, **options):
    needed = found.sets if "where" not in options else ["heads of two layers", "layers", "one"]
    for place, (name, mask) in enumerate(found.sets.items()):
        expected = reference(model, prompts, map(str, mask), **options)
        assert torch.allclose(found.per_prompt[:, place], expected, atol=3e-5), name
        assert expected.abs().max() > 1e-3 or name not in needed, name  # the last layer acts on the last token only


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_every_set_has_the_effect_of_a_full_pass(model, direction):
    prompts = tiny.prompts(model, n=3)
    with left_as_it_was(model):
        found = set_patching(model, prompts, SETS, direction=direction)
    assert_as_reference(found, model, prompts if direction == "noising" else prompts.exchanged())


@pytest.mark.parametrize("replacement", [zero, "mean", gaussian(std=0.5)], ids=["zero", "mean", "noise"])
def test_other_replacements(model, replacement):
    prompts = tiny.prompts(model, n=3)
    given = mean_over(tiny.prompts(model, seed=9)) if replacement == "mean" else replacement
    found = set_patching(model, prompts, SETS, replacement=given)
    assert_as_reference(found, model, prompts, replacement=given)


@pytest.mark.parametrize("where", [subject_last, answer])
def test_a_patch_at_some_tokens(llama, where):
    prompts = tiny.prompts(llama, n=6, padding="left")
    found = set_patching(llama, prompts, SETS, where=where)
    assert_as_reference(found, llama, prompts, where=where)


def test_answers_of_several_tokens_and_left_padding(model):
    prompts = tiny.prompts(model, n=4, answer=3, padding="left")
    found = set_patching(model, prompts, SETS, metric=answer_log_probability)
    assert_as_reference(found, model, prompts, metric=answer_log_probability)


def test_a_set_of_one_is_activation_patching(llama):
    prompts, chosen = tiny.prompts(llama), ["L0H1", "L1H2.W_K", "L1MLP", "L2N5", "L2ATTN"]
    alone = activation_patching(llama, prompts, components=chosen)
    found = set_patching(llama, prompts, {label: [label] for label in chosen})
    assert torch.allclose(found.per_prompt, alone.per_prompt, atol=1e-5)
    pair = set_patching(llama, prompts, {"pair": chosen[:3:2]})
    assert abs(pair["pair"] - alone["L0H1"] - alone["L1MLP"]) > 1e-3  # effects do not add up


def test_all_neurons_of_a_layer_are_its_mlp(gpt2):
    """What a neuron's output replaces is the MLP's, but for the output bias, which both runs share."""
    sizes = shape(gpt2)
    sets = {"neurons": [c for c in neurons(sizes) if c.layer == 1], "MLP": ["L1MLP"]}
    found = set_patching(gpt2, tiny.prompts(gpt2), sets)
    assert torch.allclose(found.per_prompt[:, 0], found.per_prompt[:, 1], atol=1e-5)


def test_a_set_taken_out_is_the_model_without_that_circuit(llama):
    prompts = tiny.prompts(llama)
    circuit = ComponentMask.of(["L0H1", "L1MLP", "L2H2"], shape(llama))
    curve = faithfulness(llama, prompts, circuit, random_circuits=0)
    found = set_patching(llama, prompts, {"circuit": circuit})
    assert torch.allclose(found.per_prompt[:, 0], curve.without[:, 1] - curve.whole, atol=1e-6)
    assert found.sets["circuit"] is circuit


def test_layers_below_a_set_do_not_run_nor_attention_that_it_leaves_alone(llama):
    ran = []
    watched = {f"{kind}{i}": m for i, b in enumerate(llama.blocks) for kind, m in (("A", b.attn.q), ("M", b.mlp.out))}
    handles = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in watched.items()]
    try:
        for label, expected in (("L1N3", {"M1", "A2", "M2"}), ("L1H0", {"A1", "M1", "A2", "M2"}), ("L2MLP", {"M2"})):

            def metric(logits, prompts):
                ran.append("metric")
                return logit_difference(logits, prompts)

            ran.clear()
            set_patching(llama, tiny.prompts(llama, n=2), {"set": [label]}, metric=metric, replacement=zero)
            assert set(ran[ran.index("metric") + 1 : -1]) == expected, label
    finally:
        for handle in handles:
            handle.remove()


def test_the_model_is_left_as_it_was_when_the_metric_fails(model):
    def failing(logits, prompts):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("stop")
        return logit_difference(logits, prompts)

    calls: list[int] = []
    with left_as_it_was(model), pytest.raises(RuntimeError, match="stop"):
        set_patching(model, tiny.prompts(model), SETS, metric=failing)


def test_effects_are_a_mapping_with_intervals_over_prompts(llama, tmp_path):
    found = set_patching(llama, tiny.prompts(llama), SETS)
    assert list(found) == list(SETS)
    assert found["one"] == pytest.approx(float(found.per_prompt[:, -1].mean()))
    frame = found.to_frame()
    assert (frame["low"] <= frame["effect"]).all()
    assert (frame["effect"] <= frame["high"]).all()
    assert (frame["low"] < frame["high"]).all()
    assert frame["components"].tolist() == [len(members) for members in SETS.values()]
    assert frame.loc["neurons", "weights"] == 5 * 3 * 32
    assert len(found.plot().data[0].x) == len(SETS)
    assert "neurons (5 components): " in repr(found)


def test_a_difference_of_two_sets_is_paired_by_prompt(llama):
    found = set_patching(llama, tiny.prompts(llama), SETS)
    less = found.minus("one")
    assert less["one"] == 0
    assert torch.equal(less.per_prompt[:, 0], found.per_prompt[:, 0] - found.per_prompt[:, -1])
    with pytest.raises(ValueError, match=r"expected one of the sets heads of two layers, .* got 'two'"):
        found.minus("two")


def test_bad_input(llama, unchecked):
    prompts, mask = tiny.prompts(llama), ComponentMask.of(["L1MLP"], shape(llama))
    with pytest.raises(ValueError, match=r'expected a dict of named sets, got ComponentMask: pass \{"name": mask\}'):
        set_patching(llama, prompts, mask)
    with pytest.raises(ValueError, match=r"expected a dict of named sets, got \{\}"):
        set_patching(llama, prompts, {})
    with pytest.raises(ValueError, match=r"expected at least one component as the set 'none', got none"):
        set_patching(llama, prompts, {"none": mask - mask})
    with pytest.raises(
        ValueError, match=r"expected the set 'one' as a list, .* got 'L1MLP': put one component in a list"
    ):
        set_patching(llama, prompts, {"one": "L1MLP"})
    with pytest.raises(ValueError, match=r"expected sets of this model .* got 'other' of another one"):
        set_patching(llama, prompts, {"other": ComponentMask.of(["L1MLP"], replace(shape(llama), n_layers=7))})
    with pytest.raises(ValueError, match=r"expected prompts with a corrupted counterpart"):
        set_patching(llama, replace(prompts, corrupt=None), {"a": mask})
    with pytest.raises(ValueError, match=r"expected a replacement from the clean run for denoising, got zero"):
        set_patching(llama, prompts, {"a": mask}, direction="denoising", replacement=zero)


def test_found_neurons_matter_more_than_random_ones_on_the_shipped_model(shipped):
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    scores = mu.localize.attribution_patching(shipped, task.forget[:8], components=neurons)
    top = scores.top(k=50)
    control = mu.localize.random_like(top, shipped, seed=0)
    found = set_patching(shipped, task.forget[8:16], {"top": top, "control": control})
    assert found.minus("control").interval().loc["top", "high"] < -1


def test_effects_are_sent_to_another_process(llama):
    found = set_patching(llama, tiny.prompts(llama), {"one": ["L1MLP"]})
    sent = pickle.loads(pickle.dumps(found))
    assert (dict(sent), dict(sent.sets), sent.settings) == (dict(found), dict(found.sets), found.settings)
