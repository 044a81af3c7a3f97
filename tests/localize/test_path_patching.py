"""The slow, obvious reference: two full forwards, with every component's output frozen by a hook in the first.

First forward: base run, the senders write what they write in the other run, every other attention output (and MLP
output, unless MLPs respond) is held at the base run's value; what the receivers read is recorded. Second forward:
the base run with the receivers reading that.
"""

from dataclasses import replace

import pytest
import tiny
import torch
from conftest import shared
from state import left_as_it_was

from mechunlearn.components import Component, heads, layers
from mechunlearn.localize import path_effect, path_patching
from mechunlearn.metrics import answer_log_probability, is_top_of_candidates, logit_difference
from mechunlearn.model import logits_at, recording, shape

CASES = {
    "logits": (["L0H1", "L1H2", "L2H3", "L0MLP", "L2MLP", "L1ATTN"], "logits"),
    "a layer": (["L0H1", "L1H2", "L0MLP", "L1MLP"], 2),
    "a query": (["L0H1", "L1H2", "L0MLP"], ["L2H1.W_Q"]),
    "a key": (["L0H3", "L1MLP"], ["L2H1.W_K"]),
    "two heads": (["L0H1", "L0MLP", "L1H0"], ["L1H3", "L2H0"]),
    "an mlp": (["L0H1", "L1H2", "L0MLP"], ["L1MLP"]),
    "a value and an mlp": (["L0H1", "L0MLP", "L1MLP"], ["L1H2.W_V", "L2MLP"]),
}


def run(model, prompts, hooks=(), names=(), logits=True):
    """Values at hook points in a full forward."""
    with torch.no_grad(), recording(model, names) as found:
        given = logits_at(model, prompts.tokens, prompts.attention_mask, prompts.positions, hooks=list(hooks))
    return found, given


def write(name, value):
    return name, lambda own, hook: value


def frozen(model, prompts, other, senders, through_mlps):
    """Hooks of the first forward."""
    sizes = shape(model)
    names = [f"blocks.{i}.{n}" for i in range(sizes.n_layers) for n in ("attn.hook_z", "hook_mlp_out")]
    base, its = run(model, prompts, names=names)[0], run(model, other, names=names)[0]
    hooks = []
    for layer in range(sizes.n_layers):
        z, mlp = (f"blocks.{layer}.{n}" for n in ("attn.hook_z", "hook_mlp_out"))
        held = base[z].clone()
        here = [s for s in senders if s.layer == layer]
        for sender in here:
            if sender.part == "ATTN":
                held = its[z].clone()
            elif sender.part == "H":
                held[:, :, sender.index] = its[z][:, :, sender.index]
        # z decides what attention gives; everything of this layer's attention is thereby frozen.
        hooks.append(write(z, held))
        if any(s.part == "MLP" for s in here):
            hooks.append(write(mlp, its[mlp]))
        elif not through_mlps:
            hooks.append(write(mlp, base[mlp]))
    return hooks


def reference(model, prompts, senders, receivers, direction="noising", metric=logit_difference, through_mlps=False):
    sizes = shape(model)
    senders = [Component.parse(str(s)) for s in senders]
    base, other = prompts, prompts.corrupted()
    base, other = (base, other) if direction == "noising" else (other, base)
    first = frozen(model, base, other, senders, through_mlps)
    own = metric(run(model, base)[1], base)
    if receivers == "logits":
        return (metric(run(model, base, first)[1], base) - own).double()
    if isinstance(receivers, int):
        name = f"blocks.{receivers}.hook_resid_pre"
        residual = run(model, base, first, [name])[0][name]
        return (metric(run(model, base, [write(name, residual)])[1], base) - own).double()
    second = []
    for receiver in (Component.parse(r) for r in receivers):
        if receiver.part == "MLP":
            # The MLP itself must run to show what it makes of its input: hold all but it.
            name = f"blocks.{receiver.layer}.hook_mlp_out"
            value = run(model, base, [h for h in first if h[0] != name], [name])[0][name]
            second.append(write(name, value))
            continue
        for matrix in [receiver.matrix] if receiver.matrix else ["W_Q", "W_K", "W_V"]:
            name = f"blocks.{receiver.layer}.attn.hook_{matrix[-1].lower()}"
            unit = receiver.index * sizes.units(matrix) // sizes.n_heads
            value = run(model, base, first, [name])[0][name]

            def put(found, hook, value=value, unit=unit):
                found = found.clone()
                found[:, :, unit] = value[:, :, unit]
                return found

            second.append((name, put))
    return (metric(run(model, base, second)[1], base) - own).double()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("through_mlps", [False, True], ids=["direct", "through mlps"])
def test_each_sender_agrees_with_two_full_forwards(model, case, through_mlps):
    senders, receivers = CASES[case]
    prompts = tiny.prompts(model, n=4)
    scores = path_patching(model, prompts, senders=senders, receivers=receivers, through_mlps=through_mlps)
    for place, sender in enumerate(senders):
        expected = reference(model, prompts, [sender], receivers, through_mlps=through_mlps)
        assert torch.allclose(scores.per_prompt[:, place], expected, rtol=1e-4, atol=1e-5), sender
    assert float(scores.tensor.abs().max()) > 1e-4, "nothing to compare"


@pytest.mark.parametrize("receivers", ["logits", ["L2H1", "L2MLP"]], ids=["logits", "components"])
@pytest.mark.parametrize("through_mlps", [False, True], ids=["direct", "through mlps"])
def test_senders_together_agree_with_two_full_forwards(model, receivers, through_mlps):
    prompts, senders = tiny.prompts(model, n=4), ["L0H1", "L0H2", "L0MLP", "L1H3", "L1MLP"]
    found = path_effect(model, prompts, senders, receivers, direction="denoising", through_mlps=through_mlps)
    expected = reference(model, prompts, senders, receivers, "denoising", through_mlps=through_mlps)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_all_senders_to_the_logits_are_the_whole_difference_but_for_the_embeddings(gpt2):
    """With every head, MLP and equal embeddings at the last token, the final residual stream is the other run's."""
    prompts = tiny.prompts(gpt2)
    found = path_effect(gpt2, prompts, layers, "logits")
    other = prompts.corrupted()
    whole = logit_difference(run(gpt2, other)[1], other) - logit_difference(run(gpt2, prompts)[1], prompts)
    assert torch.equal(prompts.tokens.gather(1, prompts.positions), other.tokens.gather(1, prompts.positions))
    assert torch.allclose(found, whole.double(), atol=1e-4)


def test_both_directions_are_supported_and_metrics_of_several_tokens(llama):
    prompts = tiny.prompts(llama, answer=3)
    scores = path_patching(
        llama, prompts, senders=["L0H1"], receivers=["L2H0.W_V"], metric=answer_log_probability, direction="denoising"
    )
    expected = reference(llama, prompts, ["L0H1"], ["L2H0.W_V"], "denoising", answer_log_probability)
    assert torch.allclose(scores.per_prompt[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_paths_to_the_logits_of_every_answer_token(llama, padding):
    """Answers of one and three tokens: only their positions run."""
    prompts, senders = tiny.prompts(llama, answer=3, padding=padding), ["L0H1", "L0MLP"]
    for through_mlps in (False, True):
        scores = path_patching(
            llama, prompts, senders=senders, metric=answer_log_probability, through_mlps=through_mlps
        )
        for place, sender in enumerate(senders):
            expected = reference(
                llama, prompts, [sender], "logits", metric=answer_log_probability, through_mlps=through_mlps
            )
            assert torch.allclose(scores.per_prompt[:, place], expected, atol=1e-5)


def test_a_head_and_its_w_o_and_an_mlp_and_its_w_out_send_the_same(llama):
    scores = path_patching(llama, tiny.prompts(llama), senders=["L1H2", "L1H2.W_O", "L1MLP", "L1MLP.W_out"])
    assert scores["L1H2"] == pytest.approx(scores["L1H2.W_O"], abs=1e-7)
    assert scores["L1MLP"] == pytest.approx(scores["L1MLP.W_out"], abs=1e-7)


def test_a_metric_may_be_true_or_false(llama):
    def as_numbers(logits, prompts):
        return is_top_of_candidates(logits, prompts).double()

    prompts, senders = tiny.prompts(llama), ["L0H1", "L0MLP", "L1MLP", "L2MLP"]
    for receivers in ("logits", ["L2MLP"]):
        linked = [sender for sender in senders if receivers == "logits" or sender != "L2MLP"]
        found = path_patching(llama, prompts, senders=linked, receivers=receivers, metric=is_top_of_candidates)
        for place, sender in enumerate(linked):
            expected = reference(llama, prompts, [sender], receivers, metric=as_numbers)
            assert torch.equal(found.per_prompt[:, place], expected)
        if receivers == "logits":
            assert found.per_prompt.any(), "no answer changes: nothing to compare"


def test_receivers_may_be_an_iterator(llama):
    prompts, labels = tiny.prompts(llama, n=2), ["L2H1.W_Q", "L2MLP"]
    listed = path_patching(llama, prompts, receivers=labels)
    found = path_patching(llama, prompts, receivers=(label for label in labels))
    assert found.settings["receivers"] == labels == listed.settings["receivers"]
    assert torch.equal(found.per_prompt, listed.per_prompt)
    assert torch.equal(
        path_effect(llama, prompts, ["L0H1"], iter(labels)), path_effect(llama, prompts, ["L0H1"], labels)
    )
    with pytest.raises(ValueError, match="got senders L2H0 and receivers L1H0, L0MLP, between"):
        path_patching(llama, prompts, senders=["L2H0"], receivers=iter(["L1H0", "L0MLP"]))


def test_an_attention_layer_as_receiver_is_all_its_heads(llama):
    prompts = tiny.prompts(llama)
    every = [f"L2H{h}" for h in range(4)]
    parts = path_patching(llama, prompts, receivers=every, senders=["L0MLP"])
    whole = path_patching(llama, prompts, receivers=["L2ATTN"], senders=["L0MLP"])
    assert parts["L0MLP"] == pytest.approx(whole["L0MLP"], abs=1e-6)


def test_the_matrices_and_neurons_of_an_mlp_receive_what_the_mlp_receives(llama):
    prompts, senders = tiny.prompts(llama), ["L0MLP"]
    whole = path_patching(llama, prompts, receivers=["L1MLP"], senders=senders)["L0MLP"]
    matrices = path_patching(llama, prompts, receivers=["L1MLP.W_in", "L1MLP.W_gate"], senders=senders)["L0MLP"]
    neurons = path_patching(llama, prompts, receivers=[f"L1N{n}" for n in range(64)], senders=senders)["L0MLP"]
    assert whole == pytest.approx(matrices, abs=1e-6) == pytest.approx(neurons, abs=1e-6)


def test_senders_without_a_path_score_zero(model):
    scores = path_patching(model, tiny.prompts(model), receivers=["L1H2"])
    assert all(scores[c] == 0 for c in scores if c.layer >= 1)
    assert all(scores[c] != 0 for c in scores if c.layer == 0)


def test_equal_runs_have_no_effect(model):
    prompts = tiny.prompts(model)
    scores = path_patching(model, replace(prompts, corrupt=prompts.tokens), receivers=["L2H1"])
    assert float(scores.tensor.abs().max()) < 1e-6


def test_the_model_is_left_as_it_was(model):
    prompts = tiny.prompts(model, n=2)
    with left_as_it_was(model):
        path_patching(model, prompts, receivers=["L2H1", "L1MLP"], through_mlps=True)
        path_patching(model, prompts)

    def failing(logits, prompts):
        raise KeyboardInterrupt

    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        path_patching(model, prompts, metric=failing)


def test_direct_paths_run_nothing_below_the_lowest_receiver(llama):
    passes = []
    handles = [
        block.mlp.register_forward_hook(lambda m, i, o, layer=layer: passes.append(layer))
        for layer, block in enumerate(llama.blocks)
    ]
    try:
        path_patching(llama, tiny.prompts(llama, n=2), senders=["L0H1", "L0MLP"], receivers="logits")
        to_logits, passes = passes, []
        path_patching(llama, tiny.prompts(llama, n=2), senders=["L0H1", "L0MLP"], receivers=["L2H0"])
    finally:
        for handle in handles:
            handle.remove()
    assert to_logits == [0, 1, 2] * 2, "one forward of each run"
    assert set(passes[6:]) <= {2}


def test_bad_input_is_refused(llama, unchecked):
    prompts = tiny.prompts(llama)
    with pytest.raises(ValueError, match="expected a sender below a receiver, got senders L2H0 and receivers L1H0"):
        path_patching(llama, prompts, senders=["L2H0"], receivers=["L1H0"])
    with pytest.raises(ValueError, match="expected a sender below a receiver"):
        path_effect(llama, prompts, heads, ["L0H0"])
    with pytest.raises(ValueError, match=r"expected senders that write .* got L1H0.W_Q"):
        path_patching(llama, prompts, senders=["L1H0.W_Q"])
    with pytest.raises(ValueError, match=r"expected receivers that read the residual stream, got L2H0.W_O"):
        path_patching(llama, prompts, receivers=["L2H0.W_O"])
    with pytest.raises(ValueError, match="expected a component of a model with 3 layers"):
        path_patching(llama, prompts, receivers=["L9H0"])
    with pytest.raises(ValueError, match=r"expected a layer in 1..3 .* got 4"):
        path_patching(llama, prompts, receivers=4)
    with pytest.raises(ValueError, match=r'expected components, a layer or "logits" as receivers, got .logit.'):
        path_patching(llama, prompts, receivers="logit")
    for call in (
        lambda: path_patching(llama, prompts, receivers=True),
        lambda: path_effect(llama, prompts, heads, True),
    ):
        with pytest.raises(ValueError, match=r'expected components, a layer or "logits" as receivers, got True'):
            call()
    with pytest.raises(ValueError, match="expected at least one component as receivers"):
        path_patching(llama, prompts, receivers=[])
    with pytest.raises(ValueError, match="corrupted counterpart"):
        path_patching(llama, replace(prompts, corrupt=None))
    with pytest.raises(ValueError, match='expected direction "noising"'):
        path_patching(llama, prompts, direction="noise")


def test_an_mlp_in_parallel_blocks_does_not_read_its_own_layers_heads():
    neox = shared("bridge", "neox")
    with pytest.raises(ValueError, match="in parallel blocks, an MLP does not read"):
        path_patching(neox, tiny.prompts(neox), senders=["L1H0"], receivers=["L1MLP"])
    llama = shared("bridge", "llama")
    assert path_patching(llama, tiny.prompts(llama), senders=["L1H0"], receivers=["L1MLP"])["L1H0"] != 0
