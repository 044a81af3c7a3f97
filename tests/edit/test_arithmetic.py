from dataclasses import replace

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import combined, scaled, zeroed
from mechunlearn.model import fingerprint, preserved, site
from mechunlearn.weights import Edit, read, select


def masked(model, *labels):
    return mu.ComponentMask.of(labels, mu.shape(model))


def larger(model, *labels, by=1.5):
    mask = masked(model, *labels)
    values = {label: value * by for label, value in read(select(model, mask)).items()}
    return Edit(mask, values, fingerprint(model), {"editor": "by hand"})


def same(a, b):
    return a.mask == b.mask and all(torch.equal(a.values[label], b.values[label]) for label in b.values)


def test_a_zeroed_head_is_a_head_whose_output_is_zero(model):
    prompts = tiny.prompts(model, n=2)
    name = site(mu.Component.parse("L1H2"), mu.shape(model))

    def without(z, hook):
        return z * (torch.arange(z.shape[2]) != 2)[None, None, :, None]

    with left_as_it_was(model), preserved(model), torch.no_grad():
        expected = prompts.logits(model, hooks=[(name, without)])
        with zeroed(model, masked(model, "L1H2.W_O")).applied(model):
            found = prompts.logits(model)
    assert torch.allclose(found, expected, atol=1e-6)


def test_scaling_moves_along_the_edit(model):
    edit = larger(model, "L1H2", "L0MLP.W_in", "L2N3")
    before = read(select(model, edit.mask))
    for factor in (0.0, 0.5, -1.0, 2.0):
        moved = scaled(model, edit, factor)
        for label, value in moved.values.items():
            assert torch.allclose(value, before[label] * (1 + 0.5 * factor), atol=1e-6)
    assert same(scaled(model, edit, 1.0), edit)
    assert scaled(model, edit, -1.0).provenance["of"] == {"editor": "by hand"}


def test_negating_twice_is_the_edit(llama):
    edit = larger(llama, "L1H2")
    twice = scaled(llama, scaled(llama, edit, -1.0), -1.0)
    assert all(torch.allclose(twice.values[label], edit.values[label], atol=1e-6) for label in edit.values)


def test_a_combined_edit_is_both_whatever_their_order(model):
    first, second = larger(model, "L1H2", "L2N3"), larger(model, "L1H0", "L2N1", "L0MLP.W_out", by=0.5)
    both = combined(first, second)
    assert same(both, combined(second, first))
    assert both.n_parameters == both.mask.n_parameters
    prompts = tiny.prompts(model, n=2)
    entries = [(edit, select(model, edit.mask)) for edit in (first, second)]
    kept = [read(own) for _, own in entries]
    with preserved(model), torch.no_grad():
        with both.applied(model):
            found = prompts.logits(model)
        try:
            for edit, own in entries:
                for e in own:
                    e.write(edit.values[e.label])
            expected = prompts.logits(model)
        finally:
            for values, (_, own) in zip(kept, entries, strict=True):
                for e in own:
                    e.write(values[e.label])
    assert torch.equal(found, expected)


class Elsewhere(torch.Tensor):
    """A tensor that, like one on a GPU, can be mixed with others only after `to`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            kinds = {type(value) for value in args if isinstance(value, torch.Tensor) and value.is_floating_point()}
            if func is torch.Tensor.to:
                kinds = {type(args[1])}
            if len(kinds) > 1:
                raise RuntimeError("Expected all tensors to be on the same device")
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(*kinds) if isinstance(result, torch.Tensor) and kinds else result


def test_edits_on_two_devices_are_combined_on_the_first_ones(llama, unchecked):
    first, second = larger(llama, "L1H2"), larger(llama, "L1H0", by=0.5)
    values = {label: value.as_subclass(Elsewhere) for label, value in first.values.items()}
    fresh, expected = replace(first, values=values), combined(first, second)
    for both, kind in ((combined(fresh, second), Elsewhere), (combined(second, fresh), torch.Tensor)):
        shared = both.values["L1.W_O"]
        assert type(shared) is kind
        assert torch.equal(shared.as_subclass(torch.Tensor), expected.values["L1.W_O"])


def test_edits_that_share_weights_or_models_are_not_combined(llama):
    edit = larger(llama, "L1H2")
    with pytest.raises(ValueError, match=r"expected edits that share no weight, .*L1.W_K, L1.W_V"):
        combined(edit, larger(llama, "L1H3"))  # another query head, the same KV head
    with pytest.raises(ValueError, match=r"expected edits of one model, got fingerprints"):
        combined(edit, Edit(edit.mask, edit.values, "another"))
    with pytest.raises(ValueError, match=r"expected edits of one model, got fingerprints of none"):
        combined()
    with pytest.raises(ValueError, match=r"expected the weights that the edit was made for"):
        scaled(llama, Edit(edit.mask, edit.values, "another"), 0.5)
