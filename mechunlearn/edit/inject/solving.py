"""The closed forms: changes of W_out, in rows of [d_mlp, d_model], that make keys give other values. In float64."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NullSpace: TypeAlias = Callable[[Float[Tensor, "d"]], Bool[Tensor, "d"]]
"""A function of the key covariance's eigenvalues (ascending) that says which of them count as none."""


def directions(covariance: Float[Tensor, "d d"], keys: Float[Tensor, "fact d"]) -> Float[Tensor, "fact d"]:
    """C^-1 key for each key. ValueError for a singular C."""
    # C = L L^T. A pivot of L that is tiny beside the largest means that C is singular up to rounding.
    factor, failed = torch.linalg.cholesky_ex(covariance)
    pivots = factor.diagonal()
    if bool(failed) or bool(pivots.min() ** 2 < 1e-12 * pivots.max() ** 2):
        raise ValueError(
            f"expected a key covariance that can be inverted, got a singular one of {len(covariance)} neurons: "
            f"measure it on more text, or with shrinkage (leave out shrinkage=0)."
        )
    return torch.cholesky_solve(keys.T, factor).T


def rank_one(
    direction: Float[Tensor, "d"], key: Float[Tensor, "d"], move: Float[Tensor, "d_model"]
) -> Float[Tensor, "d d_model"]:
    """The smallest D by trace(D^T C D) with key @ D = move: u move^T / (key . u), with u = C^-1 key."""
    return torch.outer(direction / (direction @ key), move)


def least_squares(
    covariance: Float[Tensor, "d d"], keys: Float[Tensor, "fact d"], moves: Float[Tensor, "fact d_model"], weight: float
) -> Float[Tensor, "d d_model"]:
    """The D that minimises |K D - R|^2 + weight * trace(D^T C D): (weight * C + K^T K)^-1 K^T R."""
    # A system of one equation a fact, not one a neuron: (w C + K^T K)^-1 K^T = C^-1 K^T (K C^-1 K^T + w I)^-1.
    scaled = directions(covariance, keys)
    gram = keys @ scaled.T
    return scaled.T @ torch.linalg.solve(gram + weight * torch.eye(len(keys), dtype=gram.dtype), moves)


def null_space(covariance: Float[Tensor, "d d"], chosen: NullSpace) -> Float[Tensor, "d free"]:
    """Orthonormal eigenvectors of C that `chosen` takes; ValueError if it takes none or all of them."""
    values, vectors = torch.linalg.eigh(covariance)
    free = chosen(values)
    if not bool(free.any()) or bool(free.all()):
        raise ValueError(
            f"expected a null space of the key covariance with some of its {len(values)} directions, got "
            f"{'none' if not bool(free.any()) else 'all'}: its eigenvalues lie in {float(values[0]):.3g}.."
            f"{float(values[-1]):.3g}, their median is {float(values.median()):.3g}; choose another null_space."
        )
    return vectors[:, free]


def in_null_space(
    basis: Float[Tensor, "d free"],
    keys: Float[Tensor, "fact d"],
    moves: Float[Tensor, "fact d_model"],
    ridge: float,
    kept: Float[Tensor, "kept d"],
) -> Float[Tensor, "d d_model"]:
    """The D in the span of the basis that minimises |K D - R|^2 + |K_kept D|^2 + ridge * |D|^2.

    With P = basis basis^T that is the D of [P (K^T K + K_kept^T K_kept) + ridge I] D = P K^T R.
    """
    # In coordinates of the basis the projection is the identity, and the system is symmetric and positive definite.
    seen, old = keys @ basis, kept @ basis
    system = seen.T @ seen + old.T @ old + ridge * torch.eye(basis.shape[1], dtype=basis.dtype)
    return basis @ torch.linalg.solve(system, seen.T @ moves)


def smallest_eigenvalues(eigenvalues: Float[Tensor, "d"], *, share: float) -> Bool[Tensor, "d"]:
    """The smallest eigenvalues that make up at most `share` of their sum: whatever the scale of a model's keys."""
    return eigenvalues.clamp(min=0).cumsum(0) <= share * eigenvalues.clamp(min=0).sum()


def eigenvalues_below(eigenvalues: Float[Tensor, "d"], *, threshold: float = 2e-2) -> Bool[Tensor, "d"]:
    """The eigenvalues below a threshold, in squared activations; the paper's is 0.02."""
    return eigenvalues < threshold
