from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import learn_weight_mask_in_place, weight_masks
from mechunlearn.edit.weight_masks import distance_from_original, magnitude
from mechunlearn.model import preserved, shape, slots
from mechunlearn.weights import read, select

LABELS = ("L1H2", "L2N3", "L0MLP.W_in")
OPTIONS = {"batch_size": 4, "text_batch_size": 2, "progress": False}


def masked(model, *labels):
    return mu.ComponentMask.of(labels or LABELS, shape(model))


def trained(model, mask=None, **options):
    given = {"steps": 3, "learning_rate": 0.1, **OPTIONS, **options}
    return learn_weight_mask_in_place(model, tiny.task(model), masked(model) if mask is None else mask, **given)


def test_one_step_is_a_step_of_the_weights_clamped_between_zero_and_the_original():
    model = tiny.bridge("llama")
    mask, task = masked(model, "L1H2", "L0MLP"), tiny.task(model)
    none = {"retain_coefficient": 0.0, "text_coefficient": 0.0, "penalty_coefficient": 0.0}
    options = {"steps": 1, "learning_rate": 0.5, "batch_size": len(task.forget), "forget_coefficient": 1.0}
    learned = trained(model, mask, **options, **none)
    entries = select(model, mask)
    with preserved(model):
        for e in entries:
            e.slot.parameter.requires_grad_(True)
        real = task.forget.answer_mask
        logits = task.forget.logits(model)[real]
        loss = mu.losses.log_one_minus_probability(logits, task.forget.answers[real]).mean()
        gradients = torch.autograd.grad(loss, [e.slot.parameter for e in entries])
        for e, gradient in zip(entries, gradients, strict=True):
            original = e.read(e.slot.parameter.detach())
            moved = original - 0.5 * e.read(gradient)
            expected = [
                min(max(w, min(0, w0)), max(0, w0)) / w0 for w, w0 in zip(flat(moved), flat(original), strict=True)
            ]
            assert torch.allclose(learned.numbers[e.label].flatten(), torch.tensor(expected), atol=1e-5)
    assert learned.n_moved > 100


def flat(tensor):
    return tensor.flatten().tolist()


def test_at_every_step_weights_lie_between_zero_and_what_they_were_and_nothing_else_moves(model):
    mask = masked(model)
    original, inside = read(select(model, mask)), []

    def look(row):
        for label, value in read(select(model, mask)).items():
            low, high = original[label].clamp(max=0), original[label].clamp(min=0)
            inside.append(bool(((value >= low) & (value <= high)).all()))

    with left_as_it_was(model):
        learned = trained(model, learning_rate=5.0, on_step=look)
    assert len(inside) == 3 * len(original)
    assert all(inside)
    assert any(bool((value == 0).any()) for value in learned.numbers.values()), "clamped at 0"
    assert any(bool((value == 1).any()) for value in learned.numbers.values()), "clamped at 1"
    assert all(torch.equal(learned.original[label], value) for label, value in original.items())
    with left_as_it_was(model), learned.discretize(k=5).applied(model):
        pass


def test_weights_of_a_part_move_as_those_of_the_whole(model):
    """Scattered units are trained in a copy, others where they are: the same first step."""
    whole = trained(model, masked(model, "L1MLP", "L1ATTN"), steps=1)
    part = trained(model, masked(model, "L1H2", "L1N3", "L1N40"), steps=1)
    group = shape(model).n_heads // shape(model).n_kv_heads
    for label, value in part.numbers.items():
        head = 2 // group if label in ("L1.W_K", "L1.W_V") else 2
        units = [head] if label[3:] in ("W_Q", "W_K", "W_V", "W_O") else [3, 40]
        assert torch.equal(value, whole.numbers[label][units]), label


def test_weights_that_are_zero_have_the_number_one():
    model = tiny.bridge("llama")
    with torch.no_grad():
        slots(model)[1, "W_O"].view(slots(model)[1, "W_O"].parameter.detach())[2, :4] = 0.0
    learned = trained(model, learning_rate=5.0)
    assert torch.equal(learned.numbers["L1.W_O"][0, :4], torch.ones(4, 32))
    assert learned.numbers["L1.W_O"][0, 4:].min() == 0


def test_the_penalty_pulls_as_it_says(llama):
    none = {"forget_coefficient": 1e-12, "retain_coefficient": 0.0, "text_coefficient": 0.0, "learning_rate": 1.0}
    kept = trained(llama, penalty=distance_from_original, penalty_coefficient=10.0, steps=1, **none)
    smaller = trained(llama, penalty=magnitude, penalty_coefficient=0.01, steps=1, **none)
    assert kept.n_moved == 0
    assert kept.history[0]["penalty"] == 0.0
    total = sum(float(value.abs().sum()) for value in smaller.original.values())
    assert smaller.history[0]["penalty"] == pytest.approx(0.01 * total, rel=1e-5)
    for label, value in smaller.numbers.items():
        size = smaller.original[label].abs()
        assert torch.allclose(value * size, (size - 0.01).clamp(min=0), atol=1e-6)


def test_the_same_seed_gives_the_same_numbers(llama):
    first, second = trained(llama), trained(llama)
    assert all(torch.equal(first.numbers[label], second.numbers[label]) for label in first.numbers)


def test_a_run_goes_on_from_its_checkpoint(llama, tmp_path):
    path = tmp_path / "run"

    def interrupt(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    options = {"steps": 5, "checkpoint": path, "every": 2}
    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        trained(llama, on_step=interrupt, **options)
    assert path.exists()
    resumed, whole = trained(llama, **options), trained(llama, steps=5)
    assert all(torch.equal(resumed.numbers[label], value) for label, value in whole.numbers.items())


def test_a_bfloat16_model_is_trained_in_bfloat16():
    model = tiny.bridge("llama").to(torch.bfloat16)
    seen = []
    with left_as_it_was(model):
        learned = trained(
            model, masked(model, "L1MLP"), optimizer=lambda p, lr: seen.extend(p) or torch.optim.SGD(p, lr=lr)
        )
    assert {tensor.dtype for tensor in seen} == {torch.bfloat16}
    parameters = {e.slot.parameter.data_ptr() for e in select(model, learned.mask)}
    assert {tensor.data_ptr() for tensor in seen} == parameters, "trained where they are, not in a copy"
    assert learned.n_moved > 0


def test_bad_input(llama, unchecked):
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"expected a mask that selects something"):
        trained(llama, masked(llama) - masked(llama))
    with left_as_it_was(llama), pytest.raises(FloatingPointError, match=r"lower the learning rate"):
        trained(llama, penalty=lambda w, w0: w * float("nan"))
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"expected .*injected answers other than the true"):
        task = tiny.task(llama)
        learn_weight_mask_in_place(llama, replace(task, injection=task.forget), masked(llama), inject=True, **OPTIONS)


def test_the_shipped_model_forgets_by_removing_weights(shipped):
    """Of MLPs 0 and 1; the control removes as many of their weights at random."""
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    mask = mu.ComponentMask.of(["L0MLP", "L1MLP"], shape(shipped))
    options = {"batch_size": 32, "text_batch_size": 2, "steps": 12, "progress": False}
    learned = learn_weight_mask_in_place(shipped, task, mask, **options)
    edits = {
        "learned": learned.edit(),
        "k": learned.discretize(k=60_000),
        "random k": learned.zeroed_at_random(k=60_000),
    }
    found = {}
    for name, edit in edits.items():
        with torch.no_grad(), edit.applied(shipped):
            found[name] = [
                float(mu.metrics.answer_probability(side.logits(shipped), side).mean())
                for side in (task.forget[:64], task.retain[:64])
            ]
    for name in ("learned", "k"):
        assert found[name][0] < 0.2, found
        assert found[name][1] > 0.9, found
    assert found["random k"][1] < found["random k"][0] + 0.3, found


def test_an_optimizer_that_moves_its_tensors_elsewhere_trains_too(shipped):
    """bitsandbytes makes them contiguous, and so a copy of a matrix that the model holds transposed."""
    pytest.importorskip("bitsandbytes")
    task = mu.tasks.sports_facts(shipped, forget=["LeBron James"])
    options = {"steps": 4, "batch_size": 4, "text_batch_size": 2, "progress": False, "learning_rate": 1e-3}
    options |= {"optimizer": mu.edit.adamw_8bit}
    learned = learn_weight_mask_in_place(shipped, task, mu.ComponentMask.of(["L0MLP"], mu.shape(shipped)), **options)
    assert abs(learned.history[0]["forget"] - learned.history[-1]["forget"]) > 1e-4


def test_heads_apart_are_trained_where_they_are(model):
    """Not in a copy: a tensor for each run of heads, in the memory of the matrix, where a run has no gaps there."""
    memory = {slot.parameter.untyped_storage().data_ptr() for slot in slots(model).values()}
    seen: list[torch.Tensor] = []

    def optimizer(parameters, *, lr):
        if all(tensor.untyped_storage().nbytes() for tensor in parameters):  # or it is one that is gathered
            seen.extend(parameters)
        return torch.optim.SGD(parameters, lr=lr)

    mask = mu.ComponentMask.of(["L1H0.W_Q", "L1H2.W_Q", "L1H3.W_Q", "L2N3", "L2N5"], mu.shape(model))
    options = {"steps": 1, "batch_size": 4, "text_batch_size": 2, "progress": False}
    learned = learn_weight_mask_in_place(model, tiny.task(model), mask, optimizer=optimizer, **options)
    assert {tensor.untyped_storage().data_ptr() for tensor in seen} <= memory
    runs = {"W_Q": [1, 2], "W_in": [1, 1], "W_gate": [1, 1], "W_out": [1, 1]}
    units = [(runs[matrix], slots(model)[layer, matrix].weight[0]) for layer, matrix in mask.shape.entries(mask)]
    assert sorted(map(len, seen)) == sorted(n for sizes, unit in units if unit.is_contiguous() for n in sizes)
    assert learned.numbers["L1.W_Q"].shape[0] == 3


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW])
def test_neurons_in_many_places_are_gathered_for_each_step_only(llama, monkeypatch, tmp_path, optimizer):
    """The same bits as weights trained where they are; nothing is in memory between steps; a checkpoint holds them."""
    module = weight_masks
    mask = mu.ComponentMask.of([f"L{layer}N{n}" for layer in (0, 1) for n in range(1, 20, 2)], mu.shape(llama))
    options = {"steps": 4, "batch_size": 4, "text_batch_size": 2, "progress": False, "learning_rate": 0.05}
    learn = partial(learn_weight_mask_in_place, llama, tiny.task(llama), mask, optimizer=optimizer, **options)
    there, seen, sizes = learn(), [], []
    monkeypatch.setattr(module, "_RUNS", 1)
    monkeypatch.setattr(module._Gathered, "__post_init__", _noted(module._Gathered.__post_init__, seen))
    with left_as_it_was(llama):
        gathered = learn(on_step=lambda _: sizes.append(sum(part.tensor.untyped_storage().nbytes() for part in seen)))
    assert len(seen) == 6
    assert sizes == [0] * 4
    assert there.n_moved > 0
    assert all(torch.equal(there.numbers[label], gathered.numbers[label]) for label in there.numbers)
    stopped = partial(learn, checkpoint=tmp_path / "run.safetensors", every=1)
    stopped(until=lambda row: row["step"] == 1)
    resumed = stopped()
    assert resumed.history == gathered.history
    assert all(torch.equal(there.numbers[label], resumed.numbers[label]) for label in there.numbers)


def _noted(make, seen):
    def made(part):
        make(part)
        seen.append(part)

    return made
