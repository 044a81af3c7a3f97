import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import matrices
from mechunlearn.model import fingerprint, slots
from mechunlearn.weights import Edit, Entries, read, select


def masked(model, *labels):
    return mu.ComponentMask.of(labels, mu.shape(model))


def some_edit(model, *labels):
    """The mask's entries, each a little larger."""
    mask = masked(model, *labels)
    values = {label: value * 1.5 for label, value in read(select(model, mask)).items()}
    return Edit(mask, values, fingerprint(model), {"editor": "by hand"}, ({"step": 0, "loss": 1.0},))


LABELS = ("L1H2", "L0H3.W_K", "L2N3", "L0MLP.W_in")


def test_reading_then_writing_is_the_identity(model):
    with left_as_it_was(model):
        mask = masked(model, *LABELS)
        edit = Edit(mask, read(select(model, mask)), fingerprint(model))
        with edit.applied(model):
            pass


def test_an_edit_holds_exactly_the_entries_of_its_mask(model):
    edit = some_edit(model, *LABELS)
    assert edit.n_parameters == edit.mask.n_parameters == mu.shape(model).n_parameters(edit.mask)


def test_applied_changes_the_covered_entries_alone_and_takes_them_back(model):
    edit = some_edit(model, *LABELS)
    inside = {(e.slot.layer, e.slot.matrix): e for e in select(model, edit.mask)}
    before = {key: slot.parameter.detach().clone() for key, slot in slots(model).items()}
    with left_as_it_was(model), edit.applied(model):
        for key, slot in slots(model).items():
            moved = slot.view(slot.parameter.detach()) != slot.view(before[key])
            if key not in inside:
                assert not moved.any()
            else:
                assert moved[inside[key].units].all()
                assert not moved[~inside[key].units].any()


def test_apply_changes_the_model_for_good():
    model = tiny.bridge("gpt2")
    edit = some_edit(model, "L1H2")
    edit.apply(model)
    assert torch.equal(read(select(model, edit.mask))["L1.W_Q"], edit.values["L1.W_Q"])


def test_saving_and_loading_are_inverses(model, tmp_path):
    edit = some_edit(model, *LABELS)
    edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    assert again.mask == edit.mask
    assert again.fingerprint == edit.fingerprint
    assert dict(again.provenance) == dict(edit.provenance)
    assert [dict(row) for row in again.history] == [dict(row) for row in edit.history]
    assert all(torch.equal(again.values[label], edit.values[label]) for label in edit.values)
    with left_as_it_was(model), again.applied(model):
        pass


def test_an_edit_keeps_the_models_dtype():
    model = tiny.bridge("llama").to(torch.bfloat16)
    edit = some_edit(model, "L1H2")
    assert {value.dtype for value in edit.values.values()} == {torch.bfloat16}


def test_edits_of_all_components_cover_all_weights(model):
    shape = mu.shape(model)
    everything = mu.ComponentMask(frozenset(matrices(shape)), shape)
    assert sum(value.numel() for value in read(select(model, everything)).values()) == shape.n_parameters(everything)
    assert everything.n_parameters == mu.localize.everything(model).n_parameters


def test_overlapping_components_are_edited_once(llama):
    mask = masked(llama, "L1H2", "L1H3", "L1ATTN", "L0MLP", "L0N3")
    labels = [e.label for e in select(llama, mask)]
    assert len(labels) == len(set(labels))
    assert mask.n_parameters == masked(llama, "L1ATTN", "L0MLP").n_parameters


def test_a_failure_while_applied_takes_the_edit_back(model):
    with left_as_it_was(model), pytest.raises(RuntimeError), some_edit(model, *LABELS).applied(model):
        raise RuntimeError


@pytest.mark.parametrize("wrong", ["missing", "extra", "broadcastable", "nan"])
def test_values_that_are_not_those_of_the_mask_are_refused(llama, wrong):
    mask = masked(llama, "L1H2", "L2N3")
    values = read(select(llama, mask))
    if wrong == "missing":
        values.pop("L1.W_O")
    elif wrong == "extra":
        values["L0.W_O"] = values["L1.W_O"]
    elif wrong == "broadcastable":
        values["L1.W_O"] = values["L1.W_O"][:, :1]
    else:
        values["L1.W_O"] = values["L1.W_O"] * float("nan")
    with pytest.raises(ValueError, match=r"expected (values for exactly the entries|finite values).*(take|train)"):
        Edit(mask, values, fingerprint(llama))


def test_an_apply_that_is_interrupted_changes_nothing(llama, monkeypatch):
    edit = some_edit(llama, "L1H2", "L2N3")
    writes = []
    whole = Entries.write

    def failing(self, values):
        writes.append(1)
        if len(writes) == 3:
            raise KeyboardInterrupt
        whole(self, values)

    monkeypatch.setattr(Entries, "write", failing)
    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        edit.apply(llama)
