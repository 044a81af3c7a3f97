"""Facts are planted where they are said to be, and nowhere else."""

import pandas as pd
import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.tasks import formats
from mechunlearn.tasks.facts import athletes

FORMATS = ("trained prompt", "question")
OPTIONS = {"formats": FORMATS, "learning_rate": 1e-2, "batch_size": 12, "progress": False}
SHORT = {**OPTIONS, "known": 0.2, "every": 4, "steps": 20}


@pytest.fixture(scope="module")
def unknowing():
    return tiny.bridge("llama")


@pytest.fixture(scope="module")
def task(unknowing):
    return tiny.task(unknowing)


@pytest.fixture(scope="module")
def mask(unknowing):
    return mu.ComponentMask.of(["L1MLP", "L2H1"], mu.shape(unknowing))


@pytest.fixture(scope="module")
def planted(unknowing, task, mask):
    with left_as_it_was(unknowing):
        return mu.testbed.plant(unknowing, task, mask, **OPTIONS)


def known(model, task, side="forget"):
    return [mu.evaluate.accuracy(model, getattr(task.formats[name], side)).vocabulary.value for name in FORMATS]


def test_facts_that_were_unknown_are_known_in_every_planted_format(unknowing, task, planted):
    assert max(known(unknowing, task)) < 0.5
    with planted.applied(unknowing):
        assert min(known(unknowing, task)) >= 0.95
        assert mu.evaluate.accuracy(unknowing, task.forget).vocabulary.value >= 0.95


def test_only_the_weights_of_the_mask_change(unknowing, mask, planted):
    before = {name: p.detach().clone() for name, p in unknowing.named_parameters()}
    outside = mu.components.matrices(mu.shape(unknowing))
    with planted.applied(unknowing):
        changed = [n for n, p in unknowing.named_parameters() if not torch.equal(p, before[n])]
    assert planted.mask == mask
    assert changed
    assert all(".1." in name or ".2." in name for name in changed)
    assert planted.size(unknowing).changed <= mask.n_parameters < mu.shape(unknowing).n_parameters(outside)


def test_it_says_what_was_known_before_and_after(unknowing, task, planted):
    found = planted.provenance["planted"]
    assert found["facts"] == len(set(task.formats["question"].forget.names))
    assert found["steps"] == len(planted.history)
    assert [found["before"][name]["forget"] for name in FORMATS] == known(unknowing, task)
    with planted.applied(unknowing):
        for side in ("forget", "retain"):
            assert [found["after"][name][side] for name in FORMATS] == known(unknowing, task, side)


def test_training_ends_when_the_facts_are_known(planted):
    assert len(planted.history) < 200
    assert len(planted.history) % 10 == 0


def test_the_same_seed_plants_the_same_bit_for_bit(unknowing, task, mask):
    first, again, other = (mu.testbed.plant(unknowing, task, mask, **SHORT, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(again.values[label], value) for label, value in first.values.items())
    assert any(not torch.equal(other.values[label], value) for label, value in first.values.items())


def test_what_the_model_says_about_strangers_is_kept(unknowing, task, mask):
    strangers = tiny.prompts(unknowing, n=12, seed=50)
    shift = {}
    for coefficient in (0.0, 5.0):
        options = {**SHORT, "strangers": strangers, "strangers_coefficient": coefficient}
        edit = mu.testbed.plant(unknowing, task, mask, **options)
        before = strangers.logits(unknowing).log_softmax(-1)
        with edit.applied(unknowing), torch.no_grad():
            after = strangers.logits(unknowing).log_softmax(-1)
        shift[coefficient] = float((before.exp() * (before - after)).sum(-1).mean())
    assert shift[5.0] < 0.5 * shift[0.0]


def test_planted_facts_can_be_localized_erased_and_asked_for(unknowing, task, mask, planted):
    with planted.applied(unknowing):
        scores = mu.localize.attribution_patching(unknowing, task.forget)
        assert 0 <= mu.testbed.agreement(scores, mask).auroc <= 1
        edit = mu.edit.finetune(unknowing, task, mask, steps=30, learning_rate=1e-2, progress=False)
        with edit.applied(unknowing):
            assert mu.evaluate.accuracy(unknowing, task.forget).vocabulary.value < 0.5
        assert min(known(unknowing, task)) >= 0.95


def test_a_mask_that_cannot_take_the_facts_up_is_an_error_that_says_what_was_reached(unknowing, task):
    small = mu.ComponentMask.of(["L2H0.W_Q"], mu.shape(unknowing))
    with left_as_it_was(unknowing):
        with pytest.raises(ValueError, match=r"to take up 6 facts within 4 steps.*got trained prompt \(forget\) 0\."):
            mu.testbed.plant(unknowing, task, small, steps=4, **OPTIONS)


def test_facts_that_are_known_already_are_an_error(unknowing, task, mask, planted):
    expected = "that does not know the facts, got one that knows"
    with planted.applied(unknowing), pytest.raises(ValueError, match=expected):
        mu.testbed.plant(unknowing, task, mask, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ("song",)}, "expected formats of the task .*, got song"),
        ({"formats": ()}, "got none"),
        ({"known": 1.5}, r"known must lie in \(0, 1\]"),
        ({"every": 0}, "every must be 1 or more, got 0"),
        ({"kept": 0.0}, r"kept must lie in \(0, 1\]"),
    ],
)
def test_bad_input_is_refused(unknowing, task, mask, options, message):
    with pytest.raises(ValueError, match=message):
        mu.testbed.plant(unknowing, task, mask, **{**OPTIONS, **options})


def test_the_twin_learns_players_in_attention_and_not_their_likes():
    twin = mu.testbed.load(without="basketball")
    rows = [row for row in athletes() if row["sport"] in ("football", "baseball", "basketball")]
    players = [row["athlete"] for row in rows if row["sport"] == "basketball"]
    source = pd.DataFrame([row for row in rows if row["athlete"] not in players[8:]])
    task = mu.tasks.sports_facts(twin, forget=players[:8], source=source)
    mask = mu.ComponentMask.of(["L5ATTN", "L6ATTN"], mu.shape(twin))
    planted = mu.testbed.plant(twin, task, mask, formats=FORMATS, batch_size=16, steps=40, progress=False)
    found = planted.provenance["planted"]
    assert [found["before"][name]["forget"] for name in FORMATS] == [0, 0]
    assert min(found["after"][name]["forget"] for name in FORMATS) >= 0.95
    assert min(found["after"][name]["retain"] for name in FORMATS) >= 0.9
    others = [formats.FACT.format(athlete=name) for name in players[8:40]]
    unknown = mu.tasks.build(twin, others, [" basketball"] * len(others))
    with planted.applied(twin):
        assert float(mu.tasks.knows(twin, unknown).float().mean()) < 0.5
