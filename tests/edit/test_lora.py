import math

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import lora
from mechunlearn.edit.low_rank import _seed_of
from mechunlearn.model import preserved, shape
from mechunlearn.weights import read, select, write

LABELS = ("L1H2", "L2N3", "L2N9", "L0MLP.W_out")
OPTIONS = {"batch_size": 4, "text_batch_size": 2, "progress": False}


def masked(model, *labels):
    return mu.ComponentMask.of(labels or LABELS, shape(model))


def trained(model, mask=None, **options):
    given = {"steps": 3, "rank": 2, **OPTIONS, **options}
    return lora(model, tiny.task(model), masked(model) if mask is None else mask, **given)


def start(e, values, rank, seed):
    """The factors as the docstring has them: random on the input's side, zero on the other."""
    rows, d_model = values[..., 0].numel(), values.shape[-1]
    generator = torch.Generator().manual_seed(_seed_of(e, seed))
    if e.slot.matrix in ("W_O", "W_out"):
        return torch.randn(rows, rank, generator=generator) / math.sqrt(rows), torch.zeros(rank, d_model)
    return torch.zeros(rows, rank), torch.randn(rank, d_model, generator=generator) / math.sqrt(d_model)


def test_three_steps_are_those_of_autograd_through_explicit_matrices(model):
    """The reference multiplies both factors in the graph and lets autograd go back to them from the weights."""
    mask, task, rank, alpha = masked(model), tiny.task(model), 2, 3.0
    only = {"retain_coefficient": 0.0, "text_coefficient": 0.0, "clip": 0.5, "seed": 7}
    edit = lora(
        model,
        task,
        mask,
        rank=rank,
        alpha=alpha,
        steps=3,
        learning_rate=2.0,
        optimizer=torch.optim.SGD,
        forget_loss=mu.losses.cross_entropy,
        batch_size=len(task.forget),
        progress=False,
        **only,
    )
    entries = select(model, mask)
    original = read(entries)
    factors = [[f.requires_grad_(True) for f in start(e, original[e.label], rank, 7)] for e in entries]
    both = [factor for pair in factors for factor in pair]
    optimizer = torch.optim.SGD(both, lr=2.0)
    try:
        with preserved(model):
            for step in range(3):
                optimizer.param_groups[0]["lr"] = 2.0 * 0.5 * (1 + math.cos(math.pi * step / 3))
                weights = []
                for e, (left, right) in zip(entries, factors, strict=True):
                    whole = original[e.label] + (alpha / rank * left @ right).view_as(original[e.label])
                    e.write(whole.detach())
                    e.slot.parameter.requires_grad_(True)
                    weights.append(whole)
                real = task.forget.answer_mask
                logits = task.forget.logits(model)[real]
                loss = mu.losses.cross_entropy(logits, task.forget.answers[real]).mean()
                gradients = torch.autograd.grad(loss, [e.slot.parameter for e in entries])
                optimizer.zero_grad()
                torch.autograd.backward(weights, [e.read(g) for e, g in zip(entries, gradients, strict=True)])
                torch.nn.utils.clip_grad_norm_(both, 0.5)
                optimizer.step()
            for e, (left, right) in zip(entries, factors, strict=True):
                expected = original[e.label] + (alpha / rank * left @ right).detach().view_as(original[e.label])
                assert torch.allclose(edit.values[e.label], expected, atol=2e-5), e.label
                assert not torch.equal(expected, original[e.label])
    finally:
        write(entries, original)


def test_every_update_has_the_rank_and_nothing_else_moves(model):
    with left_as_it_was(model):
        edit = trained(model, learning_rate=0.05)
    for label, before in read(select(model, edit.mask)).items():
        update = (edit.values[label] - before).flatten(0, 1)
        sizes = torch.linalg.svdvals(update)
        assert sizes[0] > 1e-3, label
        assert (sizes[2:] < 1e-4 * sizes[0]).all(), label
    with left_as_it_was(model), edit.applied(model):
        pass


def test_training_starts_from_the_original_and_is_scaled_by_alpha(llama):
    original = read(select(llama, masked(llama)))
    for options in ({"learning_rate": 0.0}, {"alpha": 0.0}):
        edit = trained(llama, **options)
        assert all(torch.equal(edit.values[label], value) for label, value in original.items())
    # One step of AdamW has the same size whatever the scale of its gradient, so the update is proportional to alpha.
    once, twice = trained(llama, steps=1, alpha=1.0, clip=None), trained(llama, steps=1, alpha=2.0, clip=None)
    for label, value in original.items():
        assert torch.allclose(twice.values[label] - value, 2 * (once.values[label] - value), atol=1e-4)


def test_the_result_depends_on_the_seed_and_not_on_micro_batches(model):
    first, again, parts, other = (
        trained(model),
        trained(model),
        trained(model, micro_batch_size=1),
        trained(model, seed=1),
    )
    for label, value in first.values.items():
        assert torch.equal(value, again.values[label])
        assert torch.allclose(value, parts.values[label], atol=1e-4)
        assert not torch.equal(value, other.values[label])


def test_weights_below_float32_have_float32_factors():
    model = tiny.bridge("llama").to(torch.bfloat16)
    seen = []
    with left_as_it_was(model):
        edit = trained(model, optimizer=lambda p, lr: seen.extend(p) or torch.optim.SGD(p, lr=lr))
    assert {tensor.dtype for tensor in seen} == {torch.float32}
    assert {value.dtype for value in edit.values.values()} == {torch.bfloat16}
    rows = {label: value[..., 0].numel() for label, value in edit.values.items()}
    assert sum(tensor.numel() for tensor in seen) == sum(2 * (row + 32) for row in rows.values())


def test_a_run_goes_on_from_its_checkpoint(llama, tmp_path):
    path = tmp_path / "run"

    def interrupt(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    options = {"steps": 5, "checkpoint": path, "every": 2}
    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        trained(llama, on_step=interrupt, **options)
    with pytest.raises(ValueError, match=r"expected a checkpoint of this run, got one of another.*rank: 2, here 3"):
        trained(llama, **{**options, "rank": 3})
    resumed, whole = trained(llama, **options), trained(llama, steps=5)
    assert all(torch.equal(resumed.values[label], value) for label, value in whole.values.items())


def test_bad_input(llama):
    with left_as_it_was(llama), pytest.raises(ValueError, match="expected a rank of at least 1, got 0"):
        trained(llama, rank=0)
    with left_as_it_was(llama), pytest.raises(ValueError, match="expected a mask that selects something"):
        trained(llama, masked(llama) - masked(llama))
    with left_as_it_was(llama), pytest.raises(FloatingPointError, match="lower the learning rate"):
        trained(llama, forget_loss=lambda logits, targets: logits[:, 0] * float("nan"))


def test_the_shipped_model_forgets_by_an_update_of_low_rank(shipped):
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    mask = mu.ComponentMask.of(["L0MLP", "L1MLP"], shape(shipped))
    edit = lora(shipped, task, mask, rank=4, batch_size=32, text_batch_size=2, steps=12, progress=False)
    found = []
    with torch.no_grad(), edit.applied(shipped):
        for side in (task.forget[:64], task.retain[:64]):
            found.append(float(mu.metrics.answer_probability(side.logits(shipped), side).mean()))
    assert found[0] < 0.2, found
    assert found[1] > 0.8, found
