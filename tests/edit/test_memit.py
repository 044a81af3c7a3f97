"""MEMIT and AlphaEdit: the loop over MLPs and each solution, against slow and obvious ones."""

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import alpha_edit, eigenvalues_below, key_covariance, memit, smallest_eigenvalues
from mechunlearn.edit.inject.facts import in_contexts
from mechunlearn.edit.inject.targets import FactInContexts, InjectOptions, target_move
from mechunlearn.model import differentiable, slots
from mechunlearn.model.mlp_values import adding_to_mlp, before_post_norm
from mechunlearn.weights import read, select

PREFIXES = ("w9 w8 w7", "w50")
SEARCH = InjectOptions(steps=4, learning_rate=0.5, kl_coefficient=0.0625, decay=0.5, clamp=0.75, stop_below=0.05)
TEXT = torch.randint(4, tiny.N_VOCAB, (20, 12), generator=torch.Generator().manual_seed(3))
"""More tokens than neurons."""
quick = {"prefixes": PREFIXES, "steps": 4, "clamp": 0.75, "progress": False}


def masked(model, *labels):
    return mu.ComponentMask.of(labels, mu.shape(model))


def facts(model, n=2, **options):
    return replace(tiny.task(model), injection=tiny.prompts(model, n=n, seed=6, **options))


def weight(model, layer):
    slot = slots(model)[layer, "W_out"]
    return slot.view(slot.parameter.detach())[:, 0]


def seen(model, fact, layer, last, move=None):
    """Key and output of `layer`, and the residual that leaves `last`: means over contexts, each run by itself."""
    keys, outputs, residuals = [], [], []
    contexts = in_contexts(model, fact, PREFIXES)
    for i in range(len(contexts)):
        one = contexts[[i]]
        assert one.subject is not None
        place = one.subject[0].nonzero()[-1]
        kept = []
        handle = model.blocks[layer].mlp.register_forward_hook(lambda module, x, y, kept=kept: kept.append(y))
        with adding_to_mlp(model, last, place, torch.zeros(model.cfg.d_model) if move is None else move):
            _, cache = model.run_with_cache(one.tokens)
        handle.remove()
        keys.append(cache[f"blocks.{layer}.mlp.hook_post"][0, place[0]].detach().double())
        outputs.append(kept[0][0, place[0]].detach())
        residuals.append(cache[f"blocks.{last}.hook_resid_post"][0, place[0]].detach())
    return tuple(torch.stack(values).mean(0) for values in (keys, outputs, residuals))


def by_hand(model, task, layers, solve):
    """Layer by layer, each an equal share of what is left; gives the new weights, and leaves them in the model."""
    each = [task.injection[[row]] for row in range(len(task.injection))]
    wanted = []
    for fact in each:
        residual = seen(model, fact, layers[-1], layers[-1])[2]
        with differentiable(model):
            move, _ = target_move(model, FactInContexts.of(model, fact, PREFIXES), layers[-1], residual, SEARCH)
        wanted.append(seen(model, fact, layers[-1], layers[-1], move)[2])
    for place, layer in enumerate(layers):
        keys, outputs, residuals = zip(*(seen(model, fact, layer, layers[-1]) for fact in each), strict=True)
        share = (torch.stack(wanted) - torch.stack(residuals)) / (len(layers) - place)
        moves = before_post_norm(model, layer, torch.stack(outputs), share).double()
        weight(model, layer).add_(solve(layer, torch.stack(keys), moves).to(share))
    return [weight(model, layer).clone() for layer in layers]


def agree(model, edit, task, solve, layers=(0, 1)):
    mask = masked(model, "L0MLP.W_out", "L1MLP.W_out")
    original = read(select(model, mask))
    with mu.edit.zeroed(model, mask).applied(model), torch.no_grad():  # puts the weights back afterwards
        for layer in layers:
            weight(model, layer).copy_(original[f"L{layer}.W_out"][:, 0])
        expected = by_hand(model, task, list(layers), solve)
    for layer, value in zip(layers, expected, strict=True):
        before = original[f"L{layer}.W_out"][:, 0]
        found = edit.values[f"L{layer}.W_out"][:, 0] - before
        assert float(found.abs().max()) > 1e-4
        assert torch.allclose(found, value - before, atol=2e-3 * float(found.abs().max()))


def test_memit_spreads_facts_by_least_squares(model):
    task, mask = facts(model), masked(model, "L0MLP.W_out", "L1MLP.W_out")
    covariance = key_covariance(model, mask, task.text)
    with left_as_it_was(model):
        edit = memit(model, task, mask, covariance=covariance, covariance_weight=3.0, **quick)

    def solve(layer, keys, moves):
        """The smallest of |K D - R|^2 + 3 trace(D^T C D), stacked to one least-squares problem."""
        root = torch.linalg.cholesky(3.0 * covariance.at(layer)).T
        right = torch.cat([torch.zeros(len(root), moves.shape[1], dtype=moves.dtype), moves])
        return torch.linalg.lstsq(torch.cat([root, keys]), right, driver="gelsd").solution

    agree(model, edit, task, solve)


def test_alpha_edit_spreads_facts_in_the_null_space(model):
    task, mask = facts(model), masked(model, "L0MLP.W_out", "L1MLP.W_out")
    covariance = key_covariance(model, mask, TEXT)
    free = partial(smallest_eigenvalues, share=0.2)
    options = {"covariance": covariance, "free": free, "ridge": 0.3, **quick}
    with left_as_it_was(model):
        edit = alpha_edit(model, task, mask, keep=task.retain, **options)

    def solve(layer, keys, moves):
        """The paper's equation with a whole projector."""
        values, vectors = torch.linalg.eigh(covariance.moments[layer].double())
        chosen = vectors[:, free(values)]
        projector = chosen @ chosen.T
        old = torch.stack([_last_key(model, task.retain[[row]], layer) for row in range(len(task.retain))])
        system = projector @ (keys.T @ keys + old.T @ old) + 0.3 * torch.eye(len(values), dtype=torch.float64)
        return torch.linalg.solve(system, projector @ keys.T @ moves)

    agree(model, edit, task, solve)


def _last_key(model, one, layer):
    _, cache = model.run_with_cache(one.tokens)
    return cache[f"blocks.{layer}.mlp.hook_post"][0, one.subject[0].nonzero()[-1, 0]].detach().double()


@pytest.mark.parametrize("editor", [memit, partial(alpha_edit, ridge=0.01)], ids=["memit", "alpha_edit"])
def test_the_edited_facts_are_believed(model, editor):
    task, mask = facts(model, answer=2), masked(model, "L0MLP", "L1MLP")
    options = {"covariance_weight": 0.01} if editor is memit else {"free": partial(smallest_eigenvalues, share=0.9)}
    options |= {"covariance": key_covariance(model, mask, TEXT), "steps": 15, "clamp": 5.0}
    edit = editor(model, task, mask, **{**quick, **options})
    before = mu.metrics.answer_log_probability(task.injection.logits(model), task.injection)
    with edit.applied(model):
        after = mu.metrics.answer_log_probability(task.injection.logits(model), task.injection)
    assert bool((after > before + 0.2).all())
    original = read(select(model, mask))
    moved = {label for label, value in edit.values.items() if not torch.equal(value, original[label])}
    assert moved == {"L0.W_out", "L1.W_out"}


def test_facts_that_are_kept_move_less(llama):
    task, mask = facts(llama), masked(llama, "L1MLP.W_out")
    options = {"ridge": 0.01, "free": partial(smallest_eigenvalues, share=0.5), **quick}
    keys = torch.stack([_last_key(llama, task.retain[[row]], 1) for row in range(len(task.retain))])
    moved = []
    for keep in (None, task.retain):
        edit = alpha_edit(llama, task, mask, keep=keep, **options)
        moved.append(float((keys @ (edit.values["L1.W_out"][:, 0] - weight(llama, 1)).double()).norm()))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("editor", [memit, partial(alpha_edit, free=partial(smallest_eigenvalues, share=0.5))])
def test_neurons_change_their_rows_alone(llama, editor):
    task, mask = facts(llama), masked(llama, "L0N1", "L0N2", "L0N9", "L0N30", "L1MLP.W_out")
    edit = editor(llama, task, mask, **quick)
    original = read(select(llama, mask))
    moved = {label for label, value in edit.values.items() if not torch.equal(value, original[label])}
    assert moved == {"L0.W_out", "L1.W_out"}
    assert len(edit.values["L0.W_out"]) == 4


def test_bad_input_is_refused(llama):
    task, mask = facts(llama), masked(llama, "L0MLP", "L1MLP")
    half = key_covariance(llama, masked(llama, "L0MLP"), task.text)
    unfit = key_covariance(llama, mask, task.text[:1], shrinkage=0.0)
    late = masked(llama, "L1MLP", "L2MLP")
    nowhere = replace(task.retain, subject=None)
    cases = [
        (memit, masked(llama, "L1H2"), {}, "expected a mask that names a W_out"),
        (memit, late, {}, "expected an MLP whose output at the subject reaches the answer, got that of layer 2"),
        (memit, mask, {"covariance": half}, r"covariance of layers \[0, 1\], got one of layers \[0\]"),
        (memit, mask, {"covariance": unfit}, "that can be inverted, got a singular one"),
        (memit, mask, {"covariance_weight": 0.0}, "covariance_weight must be above 0, got 0.0"),
        (alpha_edit, mask, {"ridge": -1.0}, "ridge must be above 0, got -1.0"),
        (alpha_edit, mask, {"keep": nowhere}, "expected facts to keep that say where their subject is"),
        (alpha_edit, mask, {"free": partial(eigenvalues_below, threshold=0.0)}, "got none: its eigenvalues lie in"),
        (alpha_edit, mask, {"free": partial(eigenvalues_below, threshold=1e9)}, "got all: its eigenvalues lie in"),
    ]
    for editor, where, options, message in cases:
        with left_as_it_was(llama), pytest.raises(ValueError, match=message):
            editor(llama, task, where, **quick, **options)


def test_a_null_space_of_fewer_tokens_than_neurons_is_an_error(llama):
    mask = masked(llama, "L0MLP.W_out")
    covariance = key_covariance(llama, mask, TEXT[:2])
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"more tokens of text than the 64 neurons .* got 24"):
        alpha_edit(llama, facts(llama), mask, covariance=covariance, **quick)
