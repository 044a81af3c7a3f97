"""The slow, obvious reference: one prompt, one draw, one token, one layer, one full forward pass."""

from dataclasses import replace

import pytest
import tiny
import torch
from state import left_as_it_was

from mechunlearn.localize import causal_tracing
from mechunlearn.localize.tracing import default_window
from mechunlearn.metrics import answer_log_probability, answer_probability
from mechunlearn.model import preserved, recording
from mechunlearn.model.running import embeddings
from mechunlearn.tasks.positions import ROLES, roles, subject

WINDOW, DRAWS, NOISE = 3, 2, 1.5


def drawn(model, prompts):
    """The noise of each draw on the i-th token of a subject."""
    with preserved(model):
        entries = embeddings(model, prompts.tokens, prompts.attention_mask)[subject(prompts)]
    generator = torch.Generator().manual_seed(0)
    longest = int(subject(prompts).sum(1).max())
    tokens = [torch.randn(DRAWS, entries.shape[-1], generator=generator) for _ in range(longest)]
    return NOISE * entries.std(correction=0) * torch.stack(tokens, 1)


@torch.no_grad()
def reference(model, one, noise, kind, layer, token, size=WINDOW, metric=answer_log_probability):
    """What restoring adds for one prompt and one draw."""
    n_layers = len(model.blocks)
    part = {"MLP": "hook_mlp_out", "ATTN": "hook_attn_out"}.get(kind, "hook_resid_post")
    window = range(max(0, layer - size // 2), min(n_layers, layer + (size + 1) // 2))
    names = [f"blocks.{i}.{part}" for i in ([layer] if kind == "residual" else window)]
    places = subject(one)[0].nonzero()[:, 0]

    def corrupt(value, hook):
        noisy = value.clone()
        noisy[0, places] += noise[: len(places)]
        return noisy

    def restore(value, hook, name):
        restored = value.clone()
        restored[0, token] = clean[name][0, token]
        return restored

    with preserved(model):
        with recording(model, names) as clean:
            one.logits(model)
        noisy = [("blocks.0.hook_resid_pre", corrupt)]
        hooks = [(name, lambda value, hook, name=name: restore(value, hook, name)) for name in names]
        return metric(one.logits(model, hooks=noisy + hooks), one) - metric(one.logits(model, hooks=noisy), one)


@pytest.mark.parametrize("kind", ["residual", "MLP", "ATTN"])
def test_effects_are_those_of_full_passes(model, kind):
    prompts = tiny.prompts(model, n=2)
    options = {"metric": answer_log_probability, "noise": NOISE, "draws": DRAWS, "window": WINDOW}
    with left_as_it_was(model):
        trace = causal_tracing(model, prompts, kinds=(kind,), batch_size=5, **options)
    noise = drawn(model, prompts)
    for i in range(2):
        one = prompts[[i]]
        first, last = int(subject(one)[0].int().argmax()), int(one.positions[0, 0])
        for layer in (0, 2):
            for token in range(first, last + 1, 2):
                expected = sum(reference(model, one, noise[d], kind, layer, token) for d in range(DRAWS)) / DRAWS
                assert torch.allclose(trace.effects[i, 0, layer, token], expected[0].double(), atol=2e-5), (
                    layer,
                    token,
                )
    assert trace.effects.abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["MLP", "ATTN"])
def test_windows_of_every_size_and_layer_are_those_of_full_passes(llama, kind):
    one = tiny.prompts(llama)[[0]]
    noise, token = drawn(llama, one), int(subject(one)[0].int().argmax())
    for size in (1, 2, 3):
        options = {"metric": answer_log_probability, "noise": NOISE, "draws": DRAWS, "window": size}
        trace = causal_tracing(llama, one, kinds=(kind,), **options)
        for layer in range(3):
            each = [reference(llama, one, noise[d], kind, layer, token, size) for d in range(DRAWS)]
            expected = (sum(each) / DRAWS)[0].double()
            assert torch.allclose(trace.effects[0, 0, layer, token], expected, atol=2e-5), (size, layer)


def test_without_noise_nothing_is_lost_or_restored(model):
    trace = causal_tracing(model, tiny.prompts(model), noise=0.0, draws=1, window=1)
    assert trace.total_effect.abs().max() < 1e-7
    assert trace.effects.abs().max() < 1e-7


def test_restoring_the_last_layer_at_the_last_token_restores_everything(model):
    trace = causal_tracing(model, tiny.prompts(model), window=1, draws=2, metric=answer_log_probability)
    last = trace.by_role[:, 0, -1, ROLES.index("last")]
    assert torch.allclose(last, trace.total_effect, atol=1e-5)
    assert trace.total_effect.abs().max() > 0.1


def test_tokens_before_the_subject_have_no_effect(llama):
    trace = causal_tracing(llama, tiny.prompts(llama), window=2, draws=2)
    assert torch.equal(trace.by_role[..., ROLES.index("before the subject")], torch.zeros(6, 3, 3).double())


def test_each_prompt_has_its_own_answer(llama):
    """The paper's code summed the probabilities of everybody's answers."""
    prompts = tiny.prompts(llama)
    trace = causal_tracing(llama, prompts, window=2, draws=1)
    for i in range(len(prompts)):
        alone = prompts[[i]]
        with preserved(llama), torch.no_grad():
            assert trace.clean[i] == pytest.approx(float(answer_probability(alone.logits(llama), alone)), abs=1e-6)


def test_scores_frame_and_plot(llama, tmp_path):
    prompts = tiny.prompts(llama)
    trace = causal_tracing(llama, prompts, window=2, draws=2)
    scores = trace.scores("MLP")
    place = roles(prompts)["last of the subject"].int().argmax(1)
    assert scores["L1MLP"] == pytest.approx(float(trace.effects[range(6), 1, 1, place].mean()), abs=1e-9)
    assert len(scores.top(k=1)) == 1
    frame = trace.to_frame()
    row = frame.loc[("MLP", 1, "last of the subject")]
    assert row["low"] <= row["effect"] <= row["high"]
    assert row["prompts"] == 6
    assert len(trace.plot("MLP").data[0].z) == len(ROLES)


def test_the_total_effect_has_an_interval_over_prompts(llama):
    trace = causal_tracing(llama, tiny.prompts(llama), window=1, draws=2, kinds=("residual",))
    mean, low, high = trace.total()
    each = trace.total_effect
    assert mean == pytest.approx(float((trace.clean - trace.corrupt).mean()), abs=1e-12)
    assert float(each.min()) <= low < mean < high <= float(each.max())
    _, narrow_low, narrow_high = trace.total(confidence=0.5)
    assert low < narrow_low < narrow_high < high
    # Resampling whole prompts: about the normal interval of the mean.
    half = 1.96 * float(each.std(correction=0)) / len(each) ** 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.25)
    first = {name: getattr(trace, name)[:1] for name in ("clean", "corrupt", "effects", "roles")}
    alone = replace(trace, **first)
    assert alone.total() == (float(each[0]),) * 3


def test_any_traced_kind_is_plotted_and_others_are_refused_by_name(llama):
    trace = causal_tracing(llama, tiny.prompts(llama), window=2, draws=1, kinds=("ATTN", "residual"))
    values = trace.by_role.nanmean(0)
    for figure, place in ((trace.plot(), 0), (trace.plot("ATTN"), 0), (trace.plot("residual"), 1)):
        assert torch.equal(torch.tensor(figure.data[0].z, dtype=torch.float64), values[place].T)
    assert trace.plot().layout.title.text.startswith("causal tracing: ATTN, windows of 2 layers: clean")
    for plot in (trace.plot, lambda kind: trace.plot_prompt(0, kind)):
        with pytest.raises(ValueError, match=r"expected a kind that was traced \(ATTN, residual\), got 'MLP'"):
            plot("MLP")
    with pytest.raises(ValueError, match=r"traced: ATTN, residual; .* got 'MLP' and 'last of the subject'"):
        trace.scores()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_plot_of_one_prompt_has_a_row_for_each_of_its_tokens(llama, padding):
    prompts = tiny.prompts(llama, padding=padding)
    trace = causal_tracing(llama, prompts, window=2, draws=1, kinds=("MLP", "residual"))
    lengths = (prompts.attention_mask.sum(1)).tolist()
    assert len(set(lengths)) > 1
    for prompt, length in enumerate(lengths):
        heat = trace.plot_prompt(prompt, "residual").data[0]
        here = {name: where[prompt][prompts.attention_mask[prompt]] for name, where in roles(prompts).items()}
        assert list(heat.y) == [
            f"{token}: {role}" for token in range(length) for role, where in here.items() if where[token]
        ]
        assert torch.equal(torch.tensor(heat.z, dtype=torch.float64), trace.effects[prompt, 1, :, : len(heat.y)].T)
    assert torch.equal(
        torch.tensor(trace.plot_prompt(0).data[0].z, dtype=torch.float64), trace.effects[0, 0, :, : lengths[0]].T
    ), "the first traced kind"
    for prompt in (-1, 6):
        with pytest.raises(ValueError, match=rf"expected the number of a prompt in 0\.\.5, got {prompt}"):
            trace.plot_prompt(prompt)


def test_the_default_window_is_ten_layers_or_a_third_of_them(llama):
    prompts = tiny.prompts(llama)
    default, one = causal_tracing(llama, prompts, draws=1), causal_tracing(llama, prompts, draws=1, window=1)
    assert default.settings == one.settings
    assert torch.equal(default.effects, one.effects)
    assert [default_window(n) for n in (1, 2, 3, 6, 12, 28, 30, 48)] == [1, 1, 1, 2, 4, 9, 10, 10]


def test_bad_input(llama, unchecked):
    prompts = tiny.prompts(llama)
    with pytest.raises(ValueError, match=r"window must lie in 1..3 \(the number of layers\), got 10"):
        causal_tracing(llama, prompts, window=10)
    with pytest.raises(ValueError, match=r"expected prompts that say where their subject is"):
        causal_tracing(llama, replace(prompts, subject=None), window=1)
    with pytest.raises(ValueError, match=r"expected noise of at least 0"):
        causal_tracing(llama, prompts, window=1, draws=0)
    with pytest.raises(ValueError, match=r"expected kinds among residual, MLP, ATTN, got \('head',\)"):
        causal_tracing(llama, prompts, window=1, kinds=("head",))
    trace = causal_tracing(llama, prompts, window=1, draws=1)
    with pytest.raises(ValueError, match=r"expected a kind that was traced and is a component .*'residual'"):
        trace.scores("residual")
    with pytest.raises(ValueError, match=r"expected prompts with a token inside the subject"):
        trace.scores("MLP", role="inside the subject")
