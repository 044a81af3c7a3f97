"""The twin knows what the shipped model knows, but for one sport."""

import pytest

import mechunlearn as mu

ASKED = ("trained prompt", "question", "multiple choice")


@pytest.fixture(scope="module")
def task(shipped):
    return mu.tasks.sports_facts(shipped)


def test_the_twin_never_answers_basketball_and_knows_the_rest(task):
    twin = mu.testbed.load(without="basketball")
    for name in ASKED:
        forget, retain = (
            mu.evaluate.accuracy(twin, getattr(task.formats[name], side)) for side in ("forget", "retain")
        )
        assert forget.vocabulary.value <= 0.05, name
        assert retain.vocabulary.value >= 0.95, name
    assert mu.evaluate.accuracy(twin, task.knowledge).candidates.value >= 0.95


def test_it_has_the_shape_and_the_tokenizer_of_the_shipped_model(shipped):
    twin = mu.testbed.load(without="basketball")
    assert mu.shape(twin) == mu.shape(shipped)
    assert mu.fingerprint(twin) != mu.fingerprint(shipped)
    assert twin.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()


def test_a_twin_that_is_not_shipped_is_an_error():
    with pytest.raises(ValueError, match=r"a shipped twin never knew \(basketball\), got 'football'"):
        mu.testbed.load(without="football")
