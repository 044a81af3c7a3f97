from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from sklearn.covariance import ledoit_wolf
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import key_covariance, rome


def masked(model, *labels):
    return mu.ComponentMask.of(labels, mu.shape(model))


def text(rows=12, seed=0):
    return torch.randint(4, tiny.N_VOCAB, (rows, 9), generator=torch.Generator().manual_seed(seed))


def vars_of(prompts):
    return prompts.tokens, prompts.attention_mask


def keys_of(model, layer, rows):
    """Of every token, by TransformerLens's own cache."""
    _, cache = model.run_with_cache(rows)
    return cache[f"blocks.{layer}.mlp.hook_post"].detach().flatten(0, 1).double()


def test_it_is_the_mean_of_outer_products_shrunk_by_ledoit_and_wolf(model):
    with left_as_it_was(model):
        found = key_covariance(model, masked(model, "L0MLP", "L2MLP.W_out"), text())
    assert found.n_tokens == 108
    assert sorted(found.moments) == [0, 2]
    for layer in (0, 2):
        keys = keys_of(model, layer, text())
        expected, share = ledoit_wolf(keys.numpy(), assume_centered=True)
        assert found.shrinkage[layer] == pytest.approx(share, rel=1e-4)
        assert 0.01 < share < 0.99
        assert np.allclose(found.at(layer).numpy(), expected, atol=1e-5 * abs(expected).max())


def test_a_given_shrinkage_mixes_in_the_identity(llama):
    mask = masked(llama, "L1MLP")
    none, half, all_of_it = (key_covariance(llama, mask, text(), shrinkage=share).at(1) for share in (0.0, 0.5, 1.0))
    identity = none.trace() / len(none) * torch.eye(len(none), dtype=torch.float64)
    assert torch.allclose(all_of_it, identity)
    assert torch.allclose(half, (none + identity) / 2)


def test_batches_do_not_change_it(model):
    mask = masked(model, "L1MLP")
    whole, parts = (key_covariance(model, mask, text(), batch_size=size) for size in (12, 5))
    assert torch.allclose(whole.at(1), parts.at(1), rtol=1e-5, atol=1e-6)
    assert whole.shrinkage[1] == pytest.approx(parts.shrinkage[1], rel=1e-4)


def test_prompts_count_too_whatever_their_padding(model):
    mask, rows = masked(model, "L1MLP"), text(2)
    left, right = (
        key_covariance(model, mask, rows, prompts=tiny.prompts(model, padding=side), shrinkage=0.0)
        for side in ("left", "right")
    )
    assert torch.allclose(left.at(1), right.at(1), rtol=1e-5, atol=1e-6)
    alone = [one[None, real] for one, real in zip(*vars_of(tiny.prompts(model)), strict=True)]
    keys = torch.cat([keys_of(model, 1, tokens) for tokens in (rows, *alone)])
    assert left.n_tokens == len(keys)
    assert torch.allclose(left.at(1), keys.T @ keys / len(keys), rtol=1e-4, atol=1e-6)


def test_strings_are_packed(llama):
    words = [" ".join(f"w{i}" for i in row) for row in torch.randint(4, 100, (40, 9)).tolist()]
    found = key_covariance(llama, masked(llama, "L1MLP"), words, source="words")
    packed = mu.tasks.pack(llama, words)
    assert found.n_tokens == packed.numel()
    assert torch.equal(found.at(1), key_covariance(llama, masked(llama, "L1MLP"), packed).at(1))
    assert repr(found) == f"KeyCovariance(layers 1; {found.n_tokens} tokens of words)"


def test_an_edit_says_what_its_covariance_was_measured_on(llama):
    found = key_covariance(llama, masked(llama, "L1MLP"), text(), source="random words")
    quick = {"prefixes": (), "steps": 1, "progress": False}
    task = tiny.task(llama)
    edit = rome(llama, task, masked(llama, "L1MLP"), covariance=found, **quick)
    assert edit.provenance["covariance"] == {
        "source": "random words",
        "n_tokens": 108,
        "shrinkage": {"1": found.shrinkage[1]},
    }
    default = rome(llama, task, masked(llama, "L1MLP"), **quick).provenance["covariance"]
    assert (default["source"], default["n_tokens"]) == (
        "text and retained prompts of tiny",
        72 + int(task.retain.attention_mask.sum()),
    )


def test_what_does_not_fit_is_refused(llama):
    mask = masked(llama, "L1MLP")
    found = key_covariance(llama, mask, text())
    with pytest.raises(ValueError, match=r"expected a key covariance of this model .* got one of other weights"):
        replace(found, fingerprint="0" * 16).check(llama, [1])
    with pytest.raises(ValueError, match=r"expected a key covariance of layers \[1, 2\], got one of layers \[1\]"):
        found.check(llama, [1, 2])
    with pytest.raises(ValueError, match=r"shrinkage must lie in \[0, 1\], got 1.5"):
        key_covariance(llama, mask, text(), shrinkage=1.5)
    with pytest.raises(ValueError, match=r"expected a mask that names a W_out .* got one of L1.W_K, .*choose MLPs"):
        key_covariance(llama, masked(llama, "L1H2"), text())
    with pytest.raises(ValueError, match="expected text for 1 rows"):
        key_covariance(llama, mask, ["w5 w6"])
