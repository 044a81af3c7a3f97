import math
from functools import partial
from itertools import islice

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn import losses
from mechunlearn.identity import name_of
from mechunlearn.weights import select

finetune = partial(mu.edit.finetune, steps=3, batch_size=6, text_batch_size=4, progress=False)


def masked(model, *labels):
    return mu.ComponentMask.of(labels, mu.shape(model))


def difference(one, other):
    return max(float((one.values[label] - other.values[label]).abs().max()) for label in one.values)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.kl_to_original], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("labels", [["L0MLP"], ["L2MLP"]], ids=lambda labels: labels[0])
def test_a_stream_of_text_trains_like_the_same_text_in_the_task(model, loss, labels):
    """Nothing is kept of a stream: what the unedited model says of it is computed while the weights have moved."""
    task, mask = tiny.task(model), masked(model, *labels)
    options = {"text_loss": loss, "text_batch_size": len(task.text), "steps": 4}
    kept = finetune(model, task, mask, **options)
    tokens = task.text.flatten().tolist() * 4
    with left_as_it_was(model):
        streamed = finetune(model, task, mask, text=[tokens[:50], tokens[50:]], text_length=12, **options)
    assert difference(kept, streamed) < 1e-5
    assert streamed.provenance["terms"]["text"][-1] == "stream"


@pytest.mark.parametrize("labels", [["L0MLP"], ["L2MLP"]], ids=lambda labels: labels[0])
def test_the_unedited_model_is_the_unedited_one_in_bfloat16_too(model, labels):
    """Autocast keeps what it made of the weights; a stream asks the unedited model while they have moved."""
    task, mask = tiny.task(model), masked(model, *labels)
    options = {"text_loss": losses.kl_to_original, "text_batch_size": len(task.text), "steps": 4}
    options |= {"compute_dtype": torch.bfloat16, "learning_rate": 0.5, "optimizer": torch.optim.SGD, "clip": None}
    options |= {"forget_coefficient": 0.0, "text_coefficient": 5.0}
    kept = finetune(model, task, mask, **options)
    tokens = task.text.flatten().tolist() * 4
    streamed = finetune(model, task, mask, text=[tokens], text_length=12, **options)
    for one, other in zip(kept.history, streamed.history, strict=True):
        assert one["text"] == pytest.approx(other["text"], rel=0.05, abs=1e-4)
    assert kept.history[-1]["text"] > 1e-3


def test_a_stream_is_read_as_far_as_it_is_used(llama):
    read = []

    def texts():
        for place in range(10**9):
            read.append(place)
            yield "w5 w6 w7 w8 w9 w10 w11"  # 8 tokens with BOS

    finetune(llama, tiny.task(llama), masked(llama, "L1MLP"), text=texts(), text_length=16)
    assert len(read) == 3 * 4 * 2  # steps, rows, texts in a row


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        (["w5 w6 w7"] * 10, 8, r"stream ended after 40 tokens \(5 whole rows of 8\): pass more text"),
        ([], 8, r"stream ended after 0 tokens"),
        (["w5 w6", "", "w7"], 2, r"expected texts with something in them, got an empty one at place 1"),
        ("w5 w6 w7 w8", 2, r"expected an iterable of texts.*got a string: pass \[text"),
        (["w5 w6"], 1, r"rows of 2 tokens or more, got rows of length 1"),
        (
            iter([{"text": "w5", "meta": {}}]),
            2,
            r"expected strings or tokens, got a record with text, meta at place 0: pass its",
        ),
    ],
)
def test_a_stream_that_ends_early_or_has_nothing_in_it_is_refused(llama, texts, length, message):
    with left_as_it_was(llama), pytest.raises(ValueError, match=message):
        finetune(llama, tiny.task(llama), masked(llama, "L1MLP"), text=texts, text_length=length)


def test_until_ends_the_training_after_the_step_that_it_saw(llama):
    seen = []

    def far_enough(row):
        seen.append(row["step"])
        return row["step"] == 1

    edit = finetune(llama, tiny.task(llama), masked(llama, "L1MLP"), steps=30, until=far_enough)
    assert seen == [0, 1]
    assert [row["step"] for row in edit.history] == [0, 1]
    assert edit.history[1]["learning_rate"] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi / 30)))


@pytest.mark.parametrize("editor", [mu.edit.finetune, mu.edit.learn_weight_mask], ids=lambda editor: editor.__name__)
def test_a_learning_rate_that_diverges_stops_restores_and_says_where(shipped, editor):
    rate = {mu.edit.finetune: 1.0, mu.edit.learn_weight_mask: 1e5}[editor]
    message = r"expected the (retain|text) loss not to diverge, got [\d.]+ at step \d+, after.*stopped; lower"
    task = few_facts(shipped)
    task.forget.logits(shipped)  # TransformerLens installs hooks of its own at the first forward
    with left_as_it_was(shipped), pytest.raises(FloatingPointError, match=message):
        editor(shipped, task, masked(shipped, "L0MLP", "L1MLP"), learning_rate=rate, progress=False)


def test_computing_in_bfloat16_is_near_computing_in_float32(model):
    task, mask = tiny.task(model), masked(model, "L1MLP", "L2H1")
    exact = finetune(model, task, mask, optimizer=torch.optim.SGD, learning_rate=0.1)
    with left_as_it_was(model):
        rough = finetune(model, task, mask, optimizer=torch.optim.SGD, learning_rate=0.1, compute_dtype=torch.bfloat16)
    moved = max(
        float((exact.values[e.label] - e.read(e.slot.parameter.detach())).abs().max()) for e in select(model, mask)
    )
    assert all(value.dtype == torch.float32 for value in rough.values.values())
    assert 0.0 < difference(exact, rough) < 0.1 * moved


def test_a_model_computes_in_no_more_than_its_own_dtype(architecture):
    model = tiny.bridge(architecture).to(torch.bfloat16)
    task, mask = tiny.task(model), masked(model, "L1MLP")
    assert difference(finetune(model, task, mask), finetune(model, task, mask, compute_dtype=torch.bfloat16)) == 0.0
    with pytest.raises(ValueError, match=r"compute_dtype must be None, the model's own \(torch.bfloat16\).*load the"):
        finetune(model, task, mask, compute_dtype=torch.float32)


def test_adamw_of_eight_bits_keeps_its_moments_in_bytes_and_moves_alike(shipped):
    """Blocks of 4,096 numbers and more are stored in bytes: the tiny models have none."""
    pytest.importorskip("bitsandbytes")
    task, mask = few_facts(shipped), masked(shipped, "L1MLP")
    made = []

    def optimizer(parameters, *, lr):
        made.append(mu.edit.adamw_8bit(parameters, lr=lr))
        return made[0]

    full = finetune(shipped, task, mask)
    eight = finetune(shipped, task, mask, optimizer=optimizer)
    moments = [value for state in made[0].state.values() for key, value in state.items() if key in ("state1", "state2")]
    assert {value.dtype for value in moments} == {torch.uint8}
    assert sum(value.numel() for value in moments) == 2 * mask.n_parameters
    moved = torch.cat([(full.values[e.label] - e.read(e.slot.parameter)).flatten() for e in select(shipped, mask)])
    rough = torch.cat([(eight.values[e.label] - e.read(e.slot.parameter)).flatten() for e in select(shipped, mask)])
    assert float(torch.corrcoef(torch.stack([moved, rough]).detach())[0, 1]) > 0.95


def test_a_loss_that_recovers_has_not_diverged(shipped):
    """The first steps take the text loss from 1.3 to about 5 nats; log(d_vocab) / 2 is 4."""
    edit = mu.edit.learn_weight_mask(
        shipped, few_facts(shipped), masked(shipped, "L0MLP", "L1MLP"), learning_rate=100.0, progress=False
    )
    losses = [row["text"] for row in edit.history]
    assert losses[-1] < losses[0] < max(losses) - 3.0


def few_facts(shipped):
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    return mu.tasks.Task("few", task.forget[:6], task.retain[:6], task.formats, task.text[:4], task.text_test[:4])


def test_the_first_rows_of_a_stream_are_those_that_packing_gives(llama):
    texts = ["w4 w5 w6", [7, 8, 9, 10], torch.tensor([11, 12])]
    rows = list(islice(mu.tasks.rows_of(llama, texts, length=5), 2))
    assert torch.stack(rows).tolist() == [[1, 4, 5, 6, 7], [8, 9, 10, 11, 12]]


def test_a_stream_of_datasets_is_a_stream_of_text(llama):
    """What `load_dataset(..., streaming=True)` gives, of rows at hand."""
    from datasets import Dataset

    rows = [{"text": f"w{5 + i % 40} w6 w7 w8", "meta": i} for i in range(200)]
    stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    streamed = finetune(llama, tiny.task(llama), masked(llama, "L1MLP"), text=(row["text"] for row in stream))
    direct = finetune(llama, tiny.task(llama), masked(llama, "L1MLP"), text=[row["text"] for row in rows])
    assert difference(streamed, direct) == 0.0


def wobbling(step, steps):
    return 0.5 if step % 2 else 1.25


SCHEDULES = {
    mu.edit.cosine_schedule: [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5],
    mu.edit.constant_schedule: [1, 1, 1, 1],
    partial(mu.edit.warmup_schedule, share=0.5, then=mu.edit.constant_schedule): [0.5, 1, 1, 1],
    partial(mu.edit.warmup_schedule, share=0.5): [0.5, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5],
    wobbling: [1.25, 0.5, 1.25, 0.5],
}


@pytest.mark.parametrize(("schedule", "factors"), SCHEDULES.items())
def test_the_rate_of_the_history_is_the_rate_of_the_step(llama, schedule, factors):
    """Against a loop that sets the rates by hand: they are those of the optimizer when it takes its steps."""
    rates, task, mask = [], tiny.task(llama), masked(llama, "L1MLP")

    class Noting(torch.optim.SGD):
        def step(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*arguments)

    edit = finetune(llama, task, mask, schedule=schedule, optimizer=Noting, steps=4, learning_rate=0.2)
    assert rates == [row["learning_rate"] for row in edit.history]
    assert rates == pytest.approx([0.2 * factor for factor in factors])
    assert edit.provenance["schedule"].startswith(name_of(schedule))


def halving(parameters, lr):
    optimizer = torch.optim.SGD(parameters, lr=lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


def before_each_step(parameters, lr):
    optimizer = torch.optim.SGD(parameters, lr=lr)
    optimizer.register_step_pre_hook(lambda own, *_: own.param_groups[0].update(lr=0.7 * lr))
    return optimizer


@pytest.mark.parametrize("optimizer", [halving, before_each_step, lambda p, lr: torch.optim.SGD(p, lr=3 * lr)])
def test_an_optimizer_with_rates_of_its_own_is_refused(llama, optimizer):
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"with the learning rate that it is given .*schedule="):
        finetune(llama, tiny.task(llama), masked(llama, "L1MLP"), optimizer=optimizer)


def test_what_is_done_in_on_step_does_not_reach_the_next_step(model):
    """Law: gradients, modes, flags, and whether gradients are recorded at all."""
    task, mask = tiny.task(model), masked(model, "L0ATTN", "L1MLP.W_out", "L2H1")

    def meddling(row):
        model.train()
        logits = task.retain.logits(model)
        if logits.requires_grad:
            (1e3 * logits).sum().backward()
        for parameter in model.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
        torch.set_grad_enabled(False)

    with left_as_it_was(model):
        plain = finetune(model, task, mask)
        for where in ("on_step", "until"):
            found = finetune(model, task, mask, **{where: meddling})
            assert found.history == plain.history
            assert all(torch.equal(found.values[label], plain.values[label]) for label in plain.values)
