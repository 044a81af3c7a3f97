"""The reference: a full forward pass with the same change made by hooks."""

import pytest
import torch
from state import left_as_it_was

from mechunlearn.model import logits_at, preserved
from mechunlearn.model.suffix import base_run, continued

TOKENS = torch.randint(4, 100, (3, 9), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([9, 6, 4])
MASK = torch.arange(9) < LENGTHS[:, None]
POSITIONS = torch.stack([LENGTHS - 2, LENGTHS - 1], 1)
ROWS = torch.tensor([2, 0, 0, 1])


def full(model, hooks=()):
    return logits_at(model, TOKENS[ROWS], MASK[ROWS], POSITIONS[ROWS], hooks=hooks)


def noise(like, seed=1):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def run(model):
    with preserved(model):
        return base_run(model, TOKENS, MASK, POSITIONS)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_an_unchanged_copy_gives_the_runs_logits(model, run, layer):
    with left_as_it_was(model), preserved(model), torch.no_grad():
        found = continued(model, run, ROWS, layer)
    assert torch.allclose(found, run.logits[ROWS], atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_changed_residual_is_that_of_a_full_pass(model, run, layer):
    changed = run.residuals[layer][ROWS] + noise(run.residuals[layer][ROWS])
    with preserved(model), torch.no_grad():
        found = continued(model, run, ROWS, layer, residual=changed)
        expected = full(model, [(f"blocks.{layer}.hook_resid_pre", lambda value, hook: changed)])
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, run.logits[ROWS], atol=1e-3)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_changed_attention_output_is_that_of_a_changed_z(model, run, layer):
    """W_O is applied by hand to what the hook changes."""
    z_name = f"blocks.{layer}.attn.hook_z"
    with preserved(model), torch.no_grad():
        reference = base_run(model, TOKENS, MASK, POSITIONS, names=[z_name])
        changed = reference.values[z_name] + noise(reference.values[z_name])
        other = base_run(model, TOKENS, MASK, POSITIONS, hooks=[(z_name, lambda value, hook: changed)])
        expected = full(model, [(z_name, lambda value, hook: changed[ROWS])])
        found = continued(model, run, ROWS, layer, attention=other.attention[layer][ROWS])
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, run.logits[ROWS], atol=1e-3)


@pytest.mark.parametrize(
    "name", ["hook_resid_pre", "attn.hook_q", "attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out"]
)
@pytest.mark.parametrize("layer", [0, 2])
def test_hooks_see_the_copies(model, run, layer, name):
    hook = (f"blocks.{layer}.{name}", lambda value, hook: value + noise(value))
    with preserved(model), torch.no_grad():
        found, expected = continued(model, run, ROWS, layer, hooks=[hook]), full(model, [hook])
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, run.logits[ROWS], atol=1e-3)


@pytest.mark.parametrize("layer", [0, 2])
def test_hooks_after_a_given_attention_see_the_copies(model, run, layer):
    for name in ("hook_attn_out", "hook_mlp_out"):
        hook = (f"blocks.{layer}.{name}", lambda value, hook: value + noise(value))
        with preserved(model), torch.no_grad():
            found = continued(model, run, ROWS, layer, attention=run.attention[layer][ROWS], hooks=[hook])
            expected = full(model, [hook])
        assert torch.allclose(found, expected, atol=1e-5), name


def test_layers_below_and_a_given_attention_do_not_run(model, run):
    ran = []

    def count(value, hook):
        ran.append(hook.name)

    names = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_q", "blocks.2.mlp.hook_post"]
    with preserved(model), torch.no_grad(), model.hooks(fwd_hooks=[(name, count) for name in names]):
        continued(model, run, ROWS, 1, attention=run.attention[1][ROWS])
    assert len(ran) == 1


def test_an_interrupt_leaves_the_model_as_it_was(model, run):
    def interrupt(value, hook):
        raise KeyboardInterrupt

    with left_as_it_was(model), preserved(model), pytest.raises(KeyboardInterrupt):
        continued(model, run, ROWS, 1, hooks=[("blocks.2.attn.hook_q", interrupt)])


def test_a_users_own_hook_counts_once(model):
    """It changed the base run already; where a copy enters, it must not change it again."""
    hook = ("blocks.1.hook_resid_pre", lambda value, hook: value * 1.5 + 0.1)
    with preserved(model), torch.no_grad(), model.hooks(fwd_hooks=[hook]):
        own = base_run(model, TOKENS, MASK, POSITIONS)
        for layer in (1, 2, 3):
            assert torch.allclose(continued(model, own, ROWS, layer), full(model), atol=1e-5)
