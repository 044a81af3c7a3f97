"""A run that is killed goes on to the same bits."""

import os
import random
import signal
import time
from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn import files, losses
from mechunlearn.weights import read, select

STEPS = 8
MASK = ("L1MLP", "L0H1")
OPTIONS = {
    "steps": STEPS,
    "batch_size": 4,
    "text_batch_size": 3,
    "micro_batch_size": 3,
    "forget_loss": losses.npo,
    "text_loss": losses.kl_to_original,
    "progress": False,
}


def masked(model, *labels):
    return mu.ComponentMask.of(labels, mu.shape(model))


def texts():
    return (f"w{5 + i % 60} w{4 + i % 17} w{6 + i % 31}" for i in range(1000))


def same(one, other):
    assert one.history == other.history
    assert all(torch.equal(one.values[label], other.values[label]) for label in one.values)


def killed(run, when):
    """`run` in a process of its own, which is killed by SIGKILL after `when` seconds (or by itself)."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    if when is not None:
        time.sleep(when)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("stream", [False, True], ids=["task's text", "stream"])
def test_a_run_killed_at_any_time_and_started_again_gives_the_same_bits(llama, tmp_path, stream):
    """By the clock, so at any line of any step, also while a checkpoint is being written."""
    task, mask = tiny.task(llama, answer=2), masked(llama, *MASK)

    def run(path=None):
        text = {"text": texts(), "text_length": 12} if stream else {}
        return mu.edit.finetune(llama, task, mask, checkpoint=path, every=1, **text, **OPTIONS)

    expected = run()
    started = time.monotonic()
    run(tmp_path / "whole")
    whole, clock, kills = time.monotonic() - started, random.Random(0), 0
    while kills < 10:
        path = tmp_path / f"after {kills} kills"
        for _ in range(2):  # killed twice, and then left alone
            kills += killed(partial(run, path), clock.uniform(0.05, 0.7) * whole) != 0
        same(expected, run(path))
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_that_kills_itself_at_a_step_goes_on_from_there(llama, tmp_path, step):
    task, mask = tiny.task(llama, answer=2), masked(llama, *MASK)
    run = partial(mu.edit.finetune, llama, task, mask, checkpoint=tmp_path / "run", every=2, **OPTIONS)

    def dies(row):
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(partial(run, on_step=dies), None) == signal.SIGKILL
    seen = []
    same(mu.edit.finetune(llama, task, mask, **OPTIONS), run(on_step=seen.append))
    assert len(seen) == STEPS - step // 2 * 2


@pytest.mark.parametrize("before", ["writing", "replacing"])
def test_a_run_killed_while_it_writes_a_checkpoint_keeps_the_one_before(llama, tmp_path, monkeypatch, before):
    task, mask = tiny.task(llama), masked(llama, *MASK)
    run = partial(mu.edit.finetune, llama, task, mask, checkpoint=tmp_path / "run", every=2, **OPTIONS)
    name, calls = {"writing": "save_file", "replacing": "os.replace"}[before], []
    original = files.save_file if before == "writing" else files.os.replace

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            if before == "writing":
                (tmp_path / "run.partial").write_bytes(b"half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"mechunlearn.files.{name}", dies)
        assert killed(run, None) == signal.SIGKILL
    seen = []
    same(mu.edit.finetune(llama, task, mask, **OPTIONS), run(on_step=seen.append))
    assert len(seen) == STEPS - 4


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9), torch.optim.RMSprop])
def test_any_optimizer_goes_on(model, tmp_path, optimizer):
    task, mask = tiny.task(model), masked(model, *MASK)
    run = partial(mu.edit.finetune, model, task, mask, optimizer=optimizer, **{**OPTIONS, "steps": 4})
    interrupted(run, tmp_path / "run", at=2)
    with left_as_it_was(model):
        same(run(), run(checkpoint=tmp_path / "run", every=1))


def test_eight_bit_moments_and_float32_masters_go_on(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny.bridge("llama").to(torch.bfloat16)
    task, mask = tiny.task(model), mu.localize.everything(model)
    run = partial(mu.edit.finetune, model, task, mask, optimizer=mu.edit.adamw_8bit, **{**OPTIONS, "steps": 6})
    interrupted(run, tmp_path / "run", at=3)
    same(run(), run(checkpoint=tmp_path / "run", every=1))


def interrupted(run, path, *, at):
    def stops(row):
        if row["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path, every=1, on_step=stops)


def test_a_finished_run_is_not_run_again_and_an_ended_one_stays_ended(llama, tmp_path):
    task, mask, seen = tiny.task(llama), masked(llama, *MASK), []
    run = partial(mu.edit.finetune, llama, task, mask, checkpoint=tmp_path / "run", every=1, on_step=seen.append)
    same(run(**OPTIONS), run(**OPTIONS))
    assert len(seen) == STEPS
    ends = {"until": lambda row: row["step"] == 4, **OPTIONS, "seed": 1}
    run = partial(run, checkpoint=tmp_path / "ended")
    same(run(**ends), run(**ends))
    assert len(seen) == STEPS + 5


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "other kind"])
def test_a_damaged_checkpoint_is_refused(llama, tmp_path, damage):
    task, mask, path = tiny.task(llama), masked(llama, *MASK), tmp_path / "run"
    run = partial(mu.edit.finetune, llama, task, mask, checkpoint=path, every=1, **OPTIONS)
    edit = run()
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[-5] ^= 1
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, content))
    if damage == "other kind":
        edit.save(path)
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"expected an? (intact )?file with a Checkpoint, got"):
        run()


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"learning_rate": 1e-4}, "learning_rate: 0.001, here 0.0001"),
        ({"steps": 9}, "steps: 8, here 9"),
        ({"retain_loss": partial(losses.npo, beta=0.2)}, "terms: .*npo.beta=0.2"),
        ({"labels": ["L1MLP"]}, "mask_and_prompts"),
        ({"seeded": 5}, "mask_and_prompts"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(llama, tmp_path, other, shown):
    path = tmp_path / "run"
    mu.edit.finetune(llama, tiny.task(llama), masked(llama, *MASK), checkpoint=path, **OPTIONS, every=8)
    mask, task = masked(llama, *other.pop("labels", MASK)), tiny.task(llama, seed=other.pop("seeded", 0))
    with (
        left_as_it_was(llama),
        pytest.raises(ValueError, match=rf"checkpoint of this run, got one.*{shown}.*delete it"),
    ):
        mu.edit.finetune(llama, task, mask, checkpoint=path, **{**OPTIONS, **other})


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    first, second = tiny.bridge("llama"), tiny.bridge("llama", seed=3)
    path = tmp_path / "run"
    mu.edit.finetune(first, tiny.task(first), masked(first, *MASK), checkpoint=path, every=8, **OPTIONS)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(*(read(select(m, masked(m, *MASK))).values() for m in (first, second)), strict=True)
    )
    with pytest.raises(ValueError, match=r"checkpoint of this run, got one of another.*model: .*, here "):
        mu.edit.finetune(second, tiny.task(first), masked(second, *MASK), checkpoint=path, **OPTIONS)


def test_a_checkpoint_is_written_after_one_step_or_more(llama, tmp_path):
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        mu.edit.finetune(llama, tiny.task(llama), masked(llama, *MASK), checkpoint=tmp_path / "run", every=0)


def capped(cap):
    def loss(logits, targets):
        return losses.cross_entropy(logits, targets).clamp(max=cap)

    return loss


def slower(factor):
    return lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.1 * factor)


def scheduled(factor):
    return lambda step, steps: 0.2 * factor


@pytest.mark.parametrize(
    ("option", "make"),
    [("forget_loss", capped), ("text_loss", capped), ("optimizer", slower), ("schedule", scheduled)],
)
def test_functions_of_one_name_do_not_share_a_checkpoint(llama, tmp_path, option, make):
    """Law: every option that decides the result and is a function, whatever is bound to it."""
    options = {**OPTIONS, "steps": 2}
    run = partial(mu.edit.finetune, llama, tiny.task(llama), masked(llama, *MASK), checkpoint=tmp_path / "run", every=1)
    first = run(**{**options, option: make(1)})
    same(first, run(**{**options, option: make(1)}))
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"checkpoint of this run, got .*function"):
        run(**{**options, option: make(5)})


def test_a_checkpoint_that_went_further_than_the_run_may_go_is_refused(llama, tmp_path):
    run = partial(mu.edit.finetune, llama, tiny.task(llama), masked(llama, *MASK), checkpoint=tmp_path / "run", every=1)
    run(**OPTIONS)
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"checkpoint of at most 3 steps, .* got one of 8"):
        run(**OPTIONS, until=lambda row: row["step"] == 2)


def test_penalties_of_one_name_do_not_share_a_checkpoint(llama, tmp_path):
    def power(exponent):
        return lambda value: (1 - value) ** exponent

    options = {**OPTIONS, "steps": 1, "forget_loss": None, "checkpoint": tmp_path / "run", "every": 1}
    run = partial(mu.edit.learn_weight_mask, llama, tiny.task(llama), masked(llama, *MASK), **options)
    run(penalty=power(1))
    with pytest.raises(ValueError, match="checkpoint of this run"):
        run(penalty=power(2))


def test_a_stream_of_other_text_does_not_continue_a_checkpoint(llama, tmp_path):
    options = {**OPTIONS, "text_length": 12, "checkpoint": tmp_path / "run", "every": 1}
    run = partial(mu.edit.finetune, llama, tiny.task(llama), masked(llama, *MASK))
    same(run(text=texts(), **options), run(text=texts(), **options))
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"checkpoint of this run, got .*streams"):
        run(text=(text.replace("w5", "w6") for text in texts()), **options)


def test_a_loss_without_a_value_is_refused_where_there_is_a_checkpoint(llama, tmp_path):
    thing = object()

    def odd(logits, targets):
        assert thing is not None
        return losses.cross_entropy(logits, targets)

    run = partial(mu.edit.finetune, llama, tiny.task(llama), masked(llama, *MASK))
    options = {**OPTIONS, "steps": 1, "retain_loss": odd}
    run(**options)
    with left_as_it_was(llama), pytest.raises(ValueError, match="that a file can be recognised by, got a object"):
        run(**options, checkpoint=tmp_path / "run")
