"""What holds for every editor that trains, at every step, whatever the optimizer does."""

from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import (
    LearnedMask,
    finetune,
    gradient_mask,
    learn_weight_mask,
    learn_weight_mask_in_place,
    lora,
)
from mechunlearn.losses import cross_entropy
from mechunlearn.model import fingerprint, slots
from mechunlearn.weights import read, select

MASKS = (["L1H2", "L2N3", "L0MLP.W_in"], ["L1H3.W_K", "L2H0.W_V", "L1H1.W_Q"])
OPTIONS = {"steps": 2, "batch_size": 6, "text_batch_size": 4, "progress": False}
TRAINERS = {
    "finetune": partial(finetune, **OPTIONS),
    "learn_weight_mask": partial(learn_weight_mask, **OPTIONS),
    "learn_weight_mask_in_place": partial(learn_weight_mask_in_place, **OPTIONS),
    "lora": partial(lora, rank=2, **OPTIONS),
}
every_trainer = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)


def masked(model, *labels):
    return mu.ComponentMask.of(labels, mu.shape(model))


def stale(parameters, *, lr):
    """AdamW with weight decay and the momentum of an earlier training."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
    for parameter in parameters:
        ones = torch.ones_like(parameter)
        optimizer.state[parameter] = {"step": torch.tensor(5.0), "exp_avg": ones, "exp_avg_sq": ones.clone()}
    return optimizer


def everything_in(model):
    """Every parameter and buffer of the model and, of a bridge, of the Hugging Face model inside."""
    inner = getattr(model, "original_model", model)
    named = [*model.named_parameters(), *model.named_buffers(), *inner.named_parameters(), *inner.named_buffers()]
    return {(id(tensor), name): tensor.detach() for name, tensor in named}


class Watched:
    """Compares, whenever it is called, all that the mask does not cover, bit for bit."""

    def __init__(self, model, mask):
        self.model, self.inside = model, select(model, mask)
        self.before = {key: tensor.clone() for key, tensor in everything_in(model).items()}
        self.units = {id(e.slot.parameter): e for e in self.inside}
        # GPT-2's fused qkv, which nothing reads, lies in the memory of q, k and v, which are compared themselves.
        self.memory = {e.slot.parameter.untyped_storage().data_ptr() for e in self.inside}
        self.moved_at = []

    def __call__(self, row):
        moved = False
        for key, tensor in everything_in(self.model).items():
            changed = tensor != self.before[key]
            if key[0] in self.units:
                e = self.units[key[0]]
                moved = moved or bool(e.slot.view(changed)[e.units].any())
                assert not e.slot.view(changed)[~e.units].any(), (row["step"], key[1])
            elif tensor.untyped_storage().data_ptr() not in self.memory:
                assert not changed.any(), (row["step"], key[1])
        self.moved_at.append(moved)


@every_trainer
@pytest.mark.parametrize("labels", MASKS, ids=lambda labels: "+".join(labels))
def test_weights_outside_the_mask_stay_bit_identical_at_every_step(model, train, labels):
    mask = masked(model, *labels)
    watched = Watched(model, mask)
    with left_as_it_was(model):
        train(model, tiny.task(model), mask, optimizer=stale, learning_rate=1e-2, on_step=watched)
    assert watched.moved_at == [True] * 2


def test_the_watch_sees_one_entry_beside_the_mask(model):
    """The control of the test above: it fails where a neighbour's weight moves."""
    mask = masked(model, "L1H2.W_Q")
    watched = Watched(model, mask)
    weight = slots(model)[1, "W_Q"].view(slots(model)[1, "W_Q"].parameter.detach())
    for head in (2, 1):
        kept = weight[head, 0, 0].clone()
        weight[head, 0, 0] += 1.0
        try:
            if head == 2:
                watched({"step": 0})
            else:
                with pytest.raises(AssertionError):
                    watched({"step": 1})
        finally:
            weight[head, 0, 0] = kept


def numbers(result):
    """What the optimizer moved: weights, or the numbers of a mask (in place it moves weights, and then divides)."""
    if isinstance(result, LearnedMask) and result.provenance["editor"] == "learn_weight_mask_in_place":
        return result.edit().values
    return result.numbers if isinstance(result, LearnedMask) else result.values


def difference(one, other):
    return max(float((numbers(one)[label] - numbers(other)[label]).abs().max()) for label in numbers(one))


def test_the_same_seed_gives_the_same_weight_mask_bit_for_bit(model):
    task, mask = tiny.task(model), masked(model, "L2H1", "L1H3.W_K")
    options = OPTIONS | {"batch_size": 3}
    first, second, other = (learn_weight_mask(model, task, mask, **options, seed=seed) for seed in (5, 5, 6))
    assert difference(first, second) == 0.0
    assert difference(first, other) > 0.0


def eight_bit(parameters, *, lr):
    """Of tensors of any size, and with moments in full precision, so that only how it uses memory is tested."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


ADAMW = partial(torch.optim.AdamW, weight_decay=0.0)
LAYOUTS = (["L0ATTN", "L1MLP"], ["L0H1.W_V", "L1H0.W_Q", "L1H2.W_O", "L2N3", "L2N40"])
BY_MEMORY = {"foreach": partial(ADAMW, foreach=True), "fused": partial(ADAMW, fused=True), "bitsandbytes": eight_bit}


@pytest.mark.parametrize("labels", LAYOUTS, ids=len)
@pytest.mark.parametrize("optimizer", BY_MEMORY.values(), ids=BY_MEMORY)
@every_trainer
def test_an_optimizer_that_goes_by_memory_gives_the_edit_of_one_that_goes_by_entries(
    model, tmp_path, train, optimizer, labels
):
    """Also where it goes on from a checkpoint. The matrices of GPT-2's fused QKV lie between each other in memory."""
    train = partial(train, model, tiny.task(model), masked(model, *labels), learning_rate=1e-3, clip=1.0)
    expected = train(optimizer=partial(ADAMW, foreach=False))
    stopped = partial(train, optimizer=optimizer, checkpoint=tmp_path / "run", every=1)
    with left_as_it_was(model):
        alike(train(optimizer=optimizer), expected)
        with pytest.raises(KeyboardInterrupt):
            stopped(on_step=interrupted)
        alike(stopped(), expected)


def interrupted(row):
    if row["step"] == 1:  # after the first step's checkpoint
        raise KeyboardInterrupt


def alike(found, expected):
    one, other = (value.numbers if isinstance(value, LearnedMask) else value.values for value in (found, expected))
    for label in one:
        torch.testing.assert_close(one[label], other[label], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("labels", LAYOUTS, ids=len)
@pytest.mark.parametrize("optimizer", BY_MEMORY.values(), ids=BY_MEMORY)
def test_in_your_own_loop_too(model, optimizer, labels):
    task, mask = tiny.task(model), masked(model, *labels)

    def trained(make):
        with gradient_mask(model, mask) as training:
            steps = make(training.parameters, lr=1e-3)
            for _ in range(2):
                steps.zero_grad()
                cross_entropy(task.forget.logits(model)[:, 0], task.forget.answers[:, 0]).mean().backward()
                steps.step()
        return training.edit()

    expected = trained(partial(ADAMW, foreach=False))
    with left_as_it_was(model):
        alike(trained(optimizer), expected)


def test_what_your_own_loop_moves_outside_the_mask_is_an_error(llama):
    other = slots(llama)[2, "W_in"].parameter
    with (
        pytest.raises(RuntimeError, match="moves nothing outside the mask, got a model with other weights"),
        gradient_mask(llama, masked(llama, "L0H1")),
        torch.no_grad(),
    ):
        kept = other[0, 0].clone()
        other[0, 0] += 1
    with torch.no_grad():
        other[0, 0] = kept


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_steps_too_small_for_bfloat16_add_up_in_the_masters(name):
    """With a learning rate of 1e-6, on weights whose neighbours in bfloat16 are 3.8e-6 away."""
    model = tiny.bridge(name).to(torch.bfloat16)
    mask, masters = masked(model, "L1MLP.W_out"), []
    with torch.no_grad():
        weight = slots(model)[1, "W_out"].parameter
        weight.copy_(0.0006 * weight.sign())

    def optimizer(parameters, *, lr):
        masters.append([(p, p.detach().clone()) for p in parameters])
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    options = {**OPTIONS, "learning_rate": 1e-6, "optimizer": optimizer}
    one = finetune(model, tiny.task(model), mask, **options | {"steps": 1})
    assert one.size(model).changed == 0
    ((master, before),) = masters.pop()
    assert master.dtype == torch.float32
    assert float((master - before).abs().max()) == pytest.approx(1e-6, rel=0.1)
    many = finetune(model, tiny.task(model), mask, **options | {"steps": 12})
    assert many.size(model).changed > 0.2 * mask.n_parameters

    with mu.edit.gradient_mask(model, mask) as training:  # the control: the same steps in bfloat16
        own = torch.optim.AdamW(training.parameters, lr=1e-6, weight_decay=0.0)
        for _ in range(12):
            own.zero_grad()
            tiny.prompts(model).logits(model).logsumexp(-1).sum().backward()
            own.step()
    assert training.edit().size(model).changed == 0


def test_a_mask_of_ones_is_no_edit(model):
    mask = masked(model, "L1H2", "L2N3", "L0MLP.W_in")
    original = read(select(model, mask))
    ones = {label: torch.ones_like(value) for label, value in original.items()}
    by_hand = LearnedMask(mask, ones, original, fingerprint(model))
    still = learn_weight_mask(model, tiny.task(model), mask, learning_rate=0.0, **OPTIONS)
    for edit in (by_hand.edit(), still.edit()):
        assert edit.size(model).changed == 0
        with left_as_it_was(model), edit.applied(model):
            assert fingerprint(model) == edit.fingerprint


def test_a_discretized_mask_changes_exactly_k_entries_of_the_model(model):
    mask = masked(model, "L1H2", "L2N3", "L0H3.W_K")
    learned = learn_weight_mask(model, tiny.task(model), mask, **OPTIONS, learning_rate=5.0)
    before = {key: slot.parameter.detach().clone() for key, slot in slots(model).items()}
    for k in (1, 10, learned.n_moved):
        edit = learned.discretize(k=k)
        assert edit.size(model).changed == k
        with edit.applied(model):
            found = [(slot.parameter.detach() != before[key]).sum() for key, slot in slots(model).items()]
        assert sum(map(int, found)) == k
