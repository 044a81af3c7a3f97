from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import learn_weight_mask
from mechunlearn.edit.weight_masks import distance_from_one, mask_value
from mechunlearn.model import preserved, shape
from mechunlearn.weights import read, select

plain = torch.optim.SGD
OPTIONS = {"batch_size": 4, "text_batch_size": 2, "progress": False, "optimizer": plain}
LABELS = ("L1H2", "L2N3", "L0MLP.W_in")


def masked(model, *labels):
    return mu.ComponentMask.of(labels or LABELS, shape(model))


def trained(model, mask=None, **options):
    given = {"steps": 3, "learning_rate": 5.0, **OPTIONS, **options}
    return learn_weight_mask(model, tiny.task(model), masked(model) if mask is None else mask, **given)


def test_numbers_lie_in_0_to_1_and_move_for_masked_weights_alone(model):
    with left_as_it_was(model):
        learned = trained(model, learning_rate=100.0)
    assert learned.n_moved > 0
    assert all(bool(((value >= 0) & (value <= 1)).all()) for value in learned.numbers.values())
    assert {k: v.shape for k, v in learned.numbers.items()} == {k: v.shape for k, v in learned.original.items()}
    assert any(bool((value == 0).any()) for value in learned.numbers.values()), "clamped at 0"
    with left_as_it_was(model), learned.edit().applied(model):
        pass


def test_one_step_is_the_gradient_times_the_weight():
    """By hand: m = clamp(1 - rate * weight * d loss / d weight)."""
    model = tiny.bridge("llama")
    mask = masked(model, "L1H2", "L0MLP")
    task = tiny.task(model)
    n = len(task.forget)
    options = {
        "retain_coefficient": 0.0,
        "text_coefficient": 0.0,
        "forget_coefficient": 1.0,
        "penalty_coefficient": 0.0,
    }
    learned = trained(model, mask, steps=1, learning_rate=0.5, batch_size=n, **options)
    entries = select(model, mask)
    with preserved(model):
        for e in entries:
            e.slot.parameter.requires_grad_(True)
        logits = task.forget.logits(model)
        real = task.forget.answer_mask
        loss = mu.losses.log_one_minus_probability(logits[real], task.forget.answers[real]).mean()
        gradients = torch.autograd.grad(loss, [e.slot.parameter for e in entries])
        for e, gradient in zip(entries, gradients, strict=True):
            weight = e.read(e.slot.parameter.detach())
            expected = (1 - 0.5 * weight * e.read(gradient)).clamp(0, 1)
            assert torch.allclose(learned.numbers[e.label], expected, atol=1e-6)


def test_the_penalty_pulls_as_it_says(llama):
    """Without any data term, the sum of values is driven to 0 and the distance from 1 leaves all as it is."""
    none = {"forget_coefficient": 1e-12, "retain_coefficient": 0.0, "text_coefficient": 0.0, "learning_rate": 1.0}
    smaller = trained(llama, penalty=mask_value, penalty_coefficient=10.0, steps=1, **none)
    kept = trained(llama, penalty=distance_from_one, penalty_coefficient=10.0, steps=1, **none)
    assert all(bool((value == 0).all()) for value in smaller.numbers.values())
    assert kept.n_moved == 0
    count = sum(value.numel() for value in kept.numbers.values())
    assert kept.history[0]["penalty"] == 0.0
    assert smaller.history[0]["penalty"] == pytest.approx(10.0 * count)


def test_the_same_seed_gives_the_same_numbers(llama):
    first, second = trained(llama), trained(llama)
    assert all(torch.equal(first.numbers[label], second.numbers[label]) for label in first.numbers)


def test_discretizing_sets_exactly_k_weights_to_zero(model):
    learned = trained(model)
    for k in (1, 7, learned.n_moved):
        edit = learned.discretize(k=k)
        changed = sum(int((edit.values[label] != value).sum()) for label, value in learned.original.items())
        assert changed == k
        assert all(bool(((v == learned.original[label]) | (v == 0)).all()) for label, v in edit.values.items())
        with left_as_it_was(model), edit.applied(model):
            assert not torch.equal(read(select(model, learned.mask))["L1.W_O"], learned.original["L1.W_O"]) or k < 100


def test_the_control_sets_exactly_k_of_the_same_weights_to_zero(model):
    learned = trained(model)
    edits = [learned.zeroed_at_random(k=40, seed=seed) for seed in (0, 0, 1)]
    zeros = [torch.cat([(edit.values[label] == 0).flatten() for label in learned.numbers]) for edit in edits]
    assert [int(where.sum()) for where in zeros] == [40, 40, 40]
    assert torch.equal(zeros[0], zeros[1])
    assert not torch.equal(zeros[0], zeros[2])
    with pytest.raises(ValueError, match=r"k must lie in 1..\d+ \(all numbers of the mask\), got 0"):
        learned.zeroed_at_random(k=0)


def test_the_numbers_by_unit_follow_the_gradient_of_a_hook_that_scales_the_unit(model):
    """The reference multiplies z of the head and the neuron's activation by a leaf that autograd goes back to."""
    task, mask = tiny.task(model), masked(model, "L1H2", "L2N3")
    only = {"forget_coefficient": 1.0, "retain_coefficient": 0.0, "text_coefficient": 0.0, "penalty_coefficient": 0.0}
    options = {
        "steps": 1,
        "learning_rate": 0.05,
        "batch_size": len(task.forget),
        "forget_loss": mu.losses.gradient_ascent,
    }
    learned = trained(model, mask, by_unit=True, **options, **only)
    leaves = torch.ones(2, requires_grad=True)

    def scale(value, hook, unit, leaf):
        factor = torch.ones(value.shape[2]).index_put((torch.tensor(unit),), leaves[leaf])
        return value * (factor[:, None] if value.ndim == 4 else factor)

    hooks = [
        ("blocks.1.attn.hook_z", partial(scale, unit=2, leaf=0)),
        ("blocks.2.mlp.hook_post", partial(scale, unit=3, leaf=1)),
    ]
    with preserved(model):
        real = task.forget.answer_mask
        logits = task.forget.logits(model, hooks=hooks)[real]
        mu.losses.gradient_ascent(logits, task.forget.answers[real]).mean().backward()
    expected = (1 - 0.05 * leaves.grad).clamp(0, 1)
    found = torch.cat([learned.numbers[label].flatten() for label in ("L1.W_O", "L2.W_out")])
    assert torch.allclose(found, expected, atol=1e-5)
    assert leaves.grad.abs().min() > 1e-5


def test_the_smallest_numbers_go_first(llama):
    learned = trained(llama)
    edits = learned.edit_sizes([5, 20])
    removed = {k: {label: value == 0 for label, value in edit.values.items()} for k, edit in edits.items()}
    assert all(bool((removed[20][label] | ~removed[5][label]).all()) for label in removed[5])
    flat = torch.cat([value.flatten() for value in learned.numbers.values()])
    taken = torch.cat([removed[20][label].flatten() for label in learned.numbers])
    assert flat[taken].max() <= flat[~taken].min()
    border = float(flat.sort().values[20])
    assert learned.discretize(threshold=border).provenance["mask"]["removed"] == int((flat < border).sum())


def test_by_unit_a_number_scales_what_a_head_or_a_neuron_writes(model):
    """The reference scales z and the neuron's activation by hooks."""
    mask = masked(model, "L1H2", "L2N3")
    learned = trained(model, mask, by_unit=True, learning_rate=0.05)
    assert {label: tuple(v.shape) for label, v in learned.numbers.items()} == {
        "L1.W_O": (1, 1, 1),
        "L2.W_out": (1, 1, 1),
    }
    head, neuron = (float(learned.numbers[label]) for label in ("L1.W_O", "L2.W_out"))
    prompts = tiny.prompts(model, n=2)

    def scale(value, hook, unit, by):
        scaled = value.clone()
        scaled[:, :, unit] *= by
        return scaled

    hooks = [
        ("blocks.1.attn.hook_z", partial(scale, unit=2, by=head)),
        ("blocks.2.mlp.hook_post", partial(scale, unit=3, by=neuron)),
    ]
    with preserved(model), torch.no_grad():
        expected = prompts.logits(model, hooks=hooks)
        with learned.edit().applied(model):
            assert torch.allclose(prompts.logits(model), expected, atol=1e-5)


def test_numbers_of_a_bfloat16_model_are_kept_in_float32():
    model = tiny.bridge("llama").to(torch.bfloat16)
    learned = trained(model, masked(model, "L1H2"), learning_rate=1e-3)
    assert {value.dtype for value in learned.numbers.values()} == {torch.float32}
    assert learned.n_moved > 0
    assert {value.dtype for value in learned.edit().values.values()} == {torch.bfloat16}


def test_an_interrupt_leaves_the_model_as_it_was(llama):
    def interrupt(row):
        raise KeyboardInterrupt

    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        trained(llama, on_step=interrupt)


def test_bad_input(llama, unchecked):
    learned = trained(llama, masked(llama, "L1H2"))
    with pytest.raises(ValueError, match=r"k must lie in 1..\d+ \(the numbers that moved, of 1024\), got 100000"):
        learned.discretize(k=100000)
    with pytest.raises(ValueError, match=r"expected exactly one of k and threshold"):
        learned.discretize()
    with pytest.raises(ValueError, match=r"expected a threshold above the smallest number"):
        learned.discretize(threshold=0.0)
    with pytest.raises(ValueError, match=r"expected a mask with a W_O or a W_out for numbers by unit"):
        trained(llama, masked(llama, "L1H2.W_Q"), by_unit=True)
    with pytest.raises(ValueError, match=r"expected a mask that selects something"):
        trained(llama, mu.ComponentMask(frozenset(), shape(llama)))


def test_the_shipped_model_forgets_by_removing_weights(shipped):
    """Of MLPs 0 and 1; the control removes as many of their weights at random."""
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    mask = mu.ComponentMask.of(["L0MLP", "L1MLP"], shape(shipped))
    options = {"batch_size": 32, "text_batch_size": 2, "steps": 12, "learning_rate": 10.0, "progress": False}
    learned = learn_weight_mask(shipped, task, mask, **options)
    edits = {
        "learned": learned.edit(),
        "k": learned.discretize(k=20_000),
        "random k": learned.zeroed_at_random(k=20_000),
    }
    found = {}
    for name, edit in edits.items():
        with torch.no_grad(), edit.applied(shipped):
            found[name] = [
                float(mu.metrics.answer_probability(side.logits(shipped), side).mean())
                for side in (task.forget[:64], task.retain[:64])
            ]
    print(found)
    for name in ("learned", "k"):
        assert found[name][0] < 0.1, name
        assert found[name][1] > 0.8, name
    assert found["random k"][0] > 0.5
