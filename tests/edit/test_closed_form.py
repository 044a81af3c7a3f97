"""Each closed form against the problem that it solves, solved naively."""

from functools import partial

import pytest
import torch

from mechunlearn.edit.inject.solving import (
    directions,
    eigenvalues_below,
    in_null_space,
    least_squares,
    null_space,
    rank_one,
    smallest_eigenvalues,
)

D, D_MODEL, FACTS = 12, 5, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def covariance():
    keys = random(40, D) * torch.logspace(-2, 1, D, dtype=torch.float64)
    return keys.T @ keys / 40


KEYS, MOVES = random(FACTS, D, seed=1), random(FACTS, D_MODEL, seed=2)


def test_rank_one_is_the_smallest_change_that_gives_the_key_its_value(covariance):
    """Columns of D one by one: min d^T C d with key . d = m, by its Lagrange equations."""
    key, move = KEYS[0], MOVES[0]
    system = torch.zeros(D + 1, D + 1, dtype=torch.float64)
    system[:D, :D], system[:D, D], system[D, :D] = 2 * covariance, key, key
    right = torch.cat([torch.zeros(D, D_MODEL, dtype=torch.float64), move[None]])
    expected = torch.linalg.solve(system, right)[:D]
    found = rank_one(directions(covariance, key[None])[0], key, move)
    assert torch.allclose(found, expected, atol=1e-10)
    assert torch.allclose(key @ found, move)


def test_least_squares_is_the_minimum_of_its_two_terms(covariance):
    weight = 7.0
    root = torch.linalg.cholesky(weight * covariance).T
    stacked = torch.cat([root, KEYS]), torch.cat([torch.zeros(D, D_MODEL, dtype=torch.float64), MOVES])
    expected = torch.linalg.lstsq(*stacked, driver="gelsd").solution
    assert torch.allclose(least_squares(covariance, KEYS, MOVES, weight), expected, atol=1e-10)


def test_least_squares_writes_facts_fully_as_the_weight_goes_to_zero(covariance):
    assert torch.allclose(KEYS @ least_squares(covariance, KEYS, MOVES, 1e-9), MOVES, atol=1e-6)
    assert not torch.allclose(KEYS @ least_squares(covariance, KEYS, MOVES, 1e3), MOVES, atol=0.1)
    one = least_squares(covariance, KEYS[:1], MOVES[:1], 1e-9)
    assert torch.allclose(one, rank_one(directions(covariance, KEYS[:1])[0], KEYS[0], MOVES[0]), atol=1e-6)


@pytest.mark.parametrize("n_kept", [0, 4])
def test_the_change_in_the_null_space_solves_the_papers_equation(covariance, n_kept):
    """[P (K^T K + K_p^T K_p) + ridge I] D = P K^T R, with P made from eigenvectors one by one."""
    ridge, kept = 0.3, random(n_kept, D, seed=3)
    values, vectors = torch.linalg.eigh(covariance)
    projector = torch.zeros_like(covariance)
    for value, vector in zip(values, vectors.T, strict=True):
        if value < 0.5:
            projector += torch.outer(vector, vector)
    system = projector @ (KEYS.T @ KEYS + kept.T @ kept) + ridge * torch.eye(D, dtype=torch.float64)
    expected = torch.linalg.solve(system, projector @ KEYS.T @ MOVES)
    basis = null_space(covariance, partial(eigenvalues_below, threshold=0.5))
    assert 0 < basis.shape[1] < D
    assert torch.allclose(in_null_space(basis, KEYS, MOVES, ridge, kept), expected, atol=1e-10)


def test_keys_outside_the_null_space_keep_their_values(covariance):
    basis = null_space(covariance, partial(smallest_eigenvalues, share=0.1))
    taken = torch.linalg.eigh(covariance).eigenvectors[:, basis.shape[1] :]
    change = in_null_space(basis, KEYS, MOVES, 0.1, torch.empty(0, D, dtype=torch.float64))
    assert float((taken.T @ change).abs().max()) < 1e-12 < float(change.abs().max())


def test_eigenvalues_are_chosen_by_share_or_by_size():
    values = torch.tensor([-1e-9, 1.0, 2.0, 3.0, 14.0])
    assert smallest_eigenvalues(values, share=0.15).tolist() == [True, True, True, False, False]
    assert smallest_eigenvalues(values, share=0.049).tolist() == [True, False, False, False, False]
    assert eigenvalues_below(values, threshold=2.0).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(("threshold", "said"), [(-1.0, "got none"), (1e9, "got all")])
def test_a_null_space_of_nothing_or_everything_is_refused(covariance, threshold, said):
    with pytest.raises(ValueError, match=rf"{said}: its eigenvalues lie in .*choose another"):
        null_space(covariance, partial(eigenvalues_below, threshold=threshold))


def test_a_singular_covariance_is_refused():
    keys = random(D - 2, D)
    with pytest.raises(ValueError, match=r"expected a key covariance that can be inverted.*more text"):
        directions(keys.T @ keys, KEYS)
