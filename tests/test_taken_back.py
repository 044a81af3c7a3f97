"""The weights before an edit, while it is applied."""

import pytest
import torch
from state import left_as_it_was, state
from travelling import nudged

import mechunlearn as mu
from mechunlearn.weights import taken_back


def weights(model):
    return state(model)["weights"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_inside_are_the_weights_from_before_and_after_it_the_edited_ones(model):
    clean, found = weights(model), mu.fingerprint(model)
    with left_as_it_was(model), nudged(model).applied(model):
        edited = weights(model)
        assert not equal(clean, edited)
        with taken_back(model, found) as inner, taken_back(model, found):
            assert inner is model
            assert equal(weights(model), clean)
        assert equal(weights(model), edited)
        with pytest.raises(ArithmeticError), taken_back(model, found):
            raise ArithmeticError
        assert equal(weights(model), edited)


def test_of_edits_on_edits_those_since_are_taken_back(llama):
    """The second sets entries of the first: L1MLP holds L1MLP.W_in."""
    prints, seen = [mu.fingerprint(llama)], [weights(llama)]
    with left_as_it_was(llama), nudged(llama).applied(llama):
        prints.append(mu.fingerprint(llama)), seen.append(weights(llama))
        with nudged(llama, "L1MLP.W_in", seed=1).applied(llama):
            prints.append(mu.fingerprint(llama)), seen.append(weights(llama))
            for to in (0, 1, 2):
                with taken_back(llama, prints[to]):
                    assert equal(weights(llama), seen[to])
                    with taken_back(llama, prints[0]):
                        assert equal(weights(llama), seen[0])
                    assert equal(weights(llama), seen[to])
                assert equal(weights(llama), seen[2])
        assert equal(weights(llama), seen[1])


@pytest.mark.parametrize("first", [0, 1])
def test_an_edit_may_be_left_inside(llama, first):
    """Afterwards only the other one is there, as if it had been applied alone."""
    found, clean = mu.fingerprint(llama), weights(llama)
    edits = [nudged(llama, "L1MLP"), nudged(llama, "L2H1")]
    with edits[1 - first].applied(llama):
        alone = weights(llama)
    with left_as_it_was(llama):
        contexts = [edit.applied(llama) for edit in edits]
        for context in contexts:
            context.__enter__()
        with taken_back(llama, found):
            contexts[first].__exit__(None, None, None)
            assert equal(weights(llama), clean)
        assert equal(weights(llama), alone)
        contexts[1 - first].__exit__(None, None, None)


def test_other_weights_are_refused(llama):
    with left_as_it_was(llama), nudged(llama).applied(llama):
        edited = weights(llama)
        with pytest.raises(ValueError, match=r"expected a model that has the weights with the fingerprint 0 .*undo"):
            with taken_back(llama, "0"):
                pass
        assert equal(weights(llama), edited)
