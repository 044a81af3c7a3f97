import math
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import Component
from mechunlearn.losses import cross_entropy, log_one_minus_probability
from mechunlearn.model import slots
from mechunlearn.weights import select

MASKS = (["L1H2"], ["L0H3.W_K", "L2H0.W_V"], ["L1MLP"], ["L2N3", "L2N60"], ["L2ATTN", "L1MLP.W_out"])
finetune = partial(mu.edit.finetune, steps=3, batch_size=6, text_batch_size=4, progress=False)


def masked(model, *labels):
    return mu.ComponentMask.of(labels, mu.shape(model))


def difference(one, other):
    return max(float((one.values[label] - other.values[label]).abs().max()) for label in one.values)


def size(edit, model):
    """How far it moved, at most, in any entry."""
    return max(
        float((edit.values[e.label] - e.read(e.slot.parameter.detach())).abs().max()) for e in select(model, edit.mask)
    )


@pytest.mark.parametrize("labels", MASKS, ids=lambda labels: "+".join(labels))
def test_finetuning_moves_only_masked_weights_and_leaves_the_model(model, labels):
    mask = masked(model, *labels)
    with left_as_it_was(model):
        edit = finetune(model, tiny.task(model), mask)
        assert edit.n_parameters == mask.n_parameters
        moved = {e.label: edit.values[e.label] != e.read(e.slot.parameter.detach()) for e in select(model, mask)}
        assert all(entries.float().mean() > 0.5 for entries in moved.values())
        with edit.applied(model):
            for e in select(model, mask):
                assert torch.equal(e.read(e.slot.parameter.detach()), edit.values[e.label])


def test_frozen_weights_get_no_gradient_and_no_optimizer_state(model):
    mask = masked(model, "L1H2", "L2MLP")
    covered = sum(e.units.sum() * e.slot.view(e.slot.parameter)[0].numel() for e in select(model, mask))
    made = []

    def optimizer(parameters, *, lr):
        made.append(torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0))
        return made[0]

    def look(row):
        inside = {id(e.slot.parameter) for e in select(model, mask)}
        assert all(p.grad is None for p in model.parameters() if id(p) not in inside)
        assert all(not p.requires_grad for p in model.parameters() if id(p) not in inside)

    finetune(model, tiny.task(model), mask, optimizer=optimizer, on_step=look)
    state = [value for entry in made[0].state.values() for name, value in entry.items() if name != "step"]
    assert sum(value.numel() for value in state) == 2 * int(covered)


def test_the_result_does_not_depend_on_where_the_run_starts(model):
    """Layers below the lowest localized one are run once and cached: the same as running everything."""
    task = tiny.task(model)
    low = finetune(model, task, masked(model, "L2MLP", "L0N1"), learning_rate=0.0)
    assert size(low, model) == 0.0
    cached = finetune(model, task, masked(model, "L2MLP"))
    history = finetune(model, task, masked(model, "L2MLP", "L0N1"), steps=1).history
    assert cached.history[0]["forget"] == pytest.approx(history[0]["forget"], rel=1e-5)
    assert cached.history[0]["text"] == pytest.approx(history[0]["text"], rel=1e-5)


def test_the_same_seed_gives_the_same_edit_bit_for_bit(model):
    task, mask = tiny.task(model), masked(model, "L1MLP")
    first, second = (finetune(model, task, mask, batch_size=3, seed=5) for _ in range(2))
    other = finetune(model, task, mask, batch_size=3, seed=6)
    assert difference(first, second) == 0.0
    assert difference(first, other) > 0.0


def test_one_step_of_sgd_is_the_gradient_of_the_written_loss(llama):
    task, mask = tiny.task(llama), masked(llama, "L1MLP.W_out", "L0H1.W_Q")
    coefficients = {"forget_coefficient": 0.5, "retain_coefficient": 2.0, "text_coefficient": 3.0}
    edit = finetune(
        llama,
        task,
        mask,
        steps=1,
        learning_rate=0.1,
        clip=None,
        optimizer=torch.optim.SGD,
        text_batch_size=6,
        **coefficients,
    )

    def mean_loss(prompts, loss):
        logits = llama(prompts.tokens, attention_mask=prompts.attention_mask.long())
        chosen = logits[torch.arange(len(prompts))[:, None], prompts.positions]
        return loss(chosen[prompts.answer_mask], prompts.answers[prompts.answer_mask]).mean()

    text_logits = llama(task.text[:, :-1]).flatten(0, 1)
    total = (
        0.5 * mean_loss(task.forget, log_one_minus_probability)
        + 2.0 * mean_loss(task.retain, cross_entropy)
        + 3.0 * cross_entropy(text_logits, task.text[:, 1:].flatten()).mean()
    )
    for e in select(llama, mask):
        gradient = torch.autograd.grad(total, e.slot.parameter, retain_graph=True)[0]
        expected = e.read(e.slot.parameter.detach()) - 0.1 * e.read(gradient)
        assert torch.allclose(edit.values[e.label], expected, atol=1e-6), e.label


def test_the_schedule_is_a_cosine_and_gradients_are_clipped(llama):
    history = finetune(llama, tiny.task(llama), masked(llama, "L1MLP"), steps=4, learning_rate=0.01).history
    expected = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert [row["learning_rate"] for row in history] == pytest.approx(expected)
    clipped = finetune(
        llama,
        tiny.task(llama),
        masked(llama, "L1MLP"),
        steps=1,
        learning_rate=1.0,
        clip=1e-3,
        optimizer=torch.optim.SGD,
    )
    moved = torch.cat(
        [(clipped.values[e.label] - e.read(e.slot.parameter.detach())).flatten() for e in select(llama, clipped.mask)]
    )
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_erasing_lowers_the_answer_and_injecting_raises_the_other_one(llama):
    task, mask = tiny.task(llama), mu.localize.everything(llama)
    probability = mu.metrics.answer_probability
    erased = finetune(llama, task, mask, steps=20, learning_rate=3e-3)
    injected = finetune(llama, task, mask, steps=20, learning_rate=3e-3, inject=True)
    for edit, prompts, grows in ((erased, task.forget, False), (injected, task.injection, True)):
        before = mu.evaluate.measure(llama, prompts, [probability])[0].value
        with edit.applied(llama):
            after = mu.evaluate.measure(llama, prompts, [probability])[0].value
        assert (after > before) is grows


def test_masters_are_float32_whatever_the_models_dtype(architecture):
    """A learning rate too small for bfloat16 still adds up over the steps."""
    model = tiny.bridge(architecture).to(torch.bfloat16)
    task, mask = tiny.task(model), masked(model, "L1MLP", "L0H2")
    dtypes = []

    def optimizer(parameters, *, lr):
        dtypes.extend(p.dtype for p in parameters)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    one = finetune(model, task, mask, steps=1, learning_rate=4e-5, optimizer=optimizer)
    many = finetune(model, task, mask, steps=40, learning_rate=4e-5)
    assert set(dtypes) == {torch.float32}
    assert all(value.dtype == torch.bfloat16 for value in many.values.values())

    def share(edit):
        parts = [(edit.values[e.label] != e.read(e.slot.parameter.detach())).flatten() for e in select(model, mask)]
        return torch.cat(parts).float().mean()

    assert share(one) < 0.1 < share(many)


@pytest.mark.parametrize("place", ["forget", "retain", "text"])
def test_a_loss_that_is_not_finite_stops_restores_and_says_where(model, place):
    calls = []

    def breaks(logits, targets):
        calls.append(1)
        return cross_entropy(logits, targets) * (float("nan") if len(calls) == 3 else 1.0)

    with left_as_it_was(model), pytest.raises(FloatingPointError, match=rf"got nan from {place} \(breaks\) at step 2"):
        finetune(model, tiny.task(model), masked(model, "L1MLP", "L0H2"), **{f"{place}_loss": breaks})


@pytest.mark.parametrize("place", ["forget_loss", "on_step", "optimizer"])
def test_an_interrupt_anywhere_leaves_the_model_as_it_was(model, place):
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == (1 if place == "optimizer" else 2):
            raise KeyboardInterrupt

    def loss(logits, targets):
        interrupted()
        return cross_entropy(logits, targets)

    function = loss if place == "forget_loss" else interrupted
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        finetune(model, tiny.task(model), masked(model, "L1H2", "L2MLP"), **{place: function})


def test_history_has_a_row_per_step(llama):
    rows = []
    edit = finetune(llama, tiny.task(llama), masked(llama, "L1MLP"), on_step=rows.append)
    assert list(edit.history) == rows
    assert set(rows[0]) == {"step", "forget", "retain", "text", "gradient_norm", "learning_rate"}


def test_a_mask_of_every_neuron_trains_like_the_mlp(llama):
    neurons = [str(Component(1, "N", n)) for n in range(mu.shape(llama).d_mlp)]
    task = tiny.task(llama)
    one, other = (finetune(llama, task, masked(llama, *labels)) for labels in (["L1MLP"], neurons))
    assert difference(one, other) < 1e-6
    assert slots(llama)[1, "W_in"].parameter.grad is None


def test_injection_trains_on_the_injected_answers(llama):
    task, mask = tiny.task(llama), masked(llama, "L1MLP")
    edit = finetune(llama, task, mask, inject=True)
    assert edit.provenance["terms"]["inject"] == [1.0, "cross_entropy", 6]
    with pytest.raises(ValueError, match=r"expected a task with prompts to inject, got none: replace\(task"):
        finetune(llama, replace(task, injection=None), mask, inject=True)


def test_a_loss_that_averages_is_refused(model):
    def averaged(logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets)

    message = r"expected averaged to give one value per token.*got \(\): do not average"
    with left_as_it_was(model), pytest.raises(ValueError, match=message):
        finetune(model, tiny.task(model), masked(model, "L1MLP"), retain_loss=averaged)


class Explodes(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("inf")


def test_a_gradient_that_is_not_finite_stops_before_the_step(model):
    def explodes(logits, targets):
        return cross_entropy(Explodes.apply(logits), targets)

    with left_as_it_was(model), pytest.raises(FloatingPointError, match=r"expected a finite gradient.*at step 0"):
        finetune(model, tiny.task(model), masked(model, "L1MLP"), steps=1, text_loss=explodes)


def test_gradients_are_recorded_where_a_notebook_has_turned_them_off(model):
    task, mask = tiny.task(model), masked(model, "L1MLP")
    expected = finetune(model, task, mask)
    scores = mu.localize.attribution_patching(model, task.forget).tensor
    with torch.no_grad():
        assert difference(expected, finetune(model, task, mask)) == 0.0
        assert torch.equal(scores, mu.localize.attribution_patching(model, task.forget).tensor)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got torch.inference_mode: leave it"):
        finetune(model, task, mask)


def test_a_users_hook_below_the_trained_layers_counts(model):
    """The cached input of the lowest trained layer is what the user's own hooks make of it."""
    task = tiny.task(model)

    def steer(value, hook):
        return value + value.roll(1, dims=-1)

    plain = finetune(model, task, masked(model, "L1MLP"), steps=1).history[0]["retain"]
    model.add_hook("blocks.1.hook_resid_pre", steer)
    try:
        cached = finetune(model, task, masked(model, "L1MLP"), steps=1).history[0]["retain"]
        whole = finetune(model, task, masked(model, "L1MLP", "L0N1"), steps=1).history[0]["retain"]
    finally:
        model.reset_hooks()
    assert cached == pytest.approx(whole, rel=1e-5)
    assert abs(cached - plain) > 1e-4


@pytest.mark.parametrize(("option", "value"), [("steps", 0), ("micro_batch_size", -1), ("batch_size", 0)])
def test_sizes_out_of_range_are_refused(llama, option, value):
    with pytest.raises(ValueError, match=f"must be 1 or more, got {value}"):
        finetune(llama, tiny.task(llama), masked(llama, "L1MLP"), **{option: value})


def test_seeds_and_terms_draw_their_own_orders(llama):
    task = tiny.task(llama)
    task = replace(task, retain=task.forget)

    def order(seed, term):
        seen = []

        def look(logits, targets):
            seen.append(targets.tolist())
            return cross_entropy(logits, targets)

        finetune(llama, task, masked(llama, "L1MLP"), seed=seed, batch_size=2, **{f"{term}_loss": look})
        return seen

    orders = [order(seed, term) for seed in (0, 1) for term in ("forget", "retain")]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])
