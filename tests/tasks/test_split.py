from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch

from mechunlearn.tasks import Format, Validation, partitioned, validation_split


def named(prompts, letter):
    return replace(prompts, names=tuple(f"{letter}{i}" for i in range(len(prompts))))


@cache
def task(model, *, itself=False, n=10):
    """Facts f0 ... to forget and r0 ... to retain; tested on themselves, or on g0 ... and s0 ..."""
    made = tiny.task(model)
    forget, retain = (named(tiny.prompts(model, n=n, seed=seed), letter) for seed, letter in ((20, "f"), (21, "r")))
    injection = replace(tiny.prompts(model, n=n, seed=22), names=forget.names)

    def asked(seed):
        kept = named(tiny.prompts(model, n=7, seed=seed), "s")
        gone = tiny.prompts(model, n=n, seed=seed + 1)
        return Format(named(gone, "f" if itself else "g"), kept)

    formats = {"trained prompt": asked(30), "question": asked(40)}
    return replace(made, forget=forget, retain=retain, injection=injection, formats=formats)


def same_rows(some, every):
    """Each prompt is the one of that name in `every`."""
    for row, name in enumerate(some.names):
        one, other = some[[row]], every[[every.names.index(name)]]
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.answers, other.answers)
        assert torch.equal(one.corrupt, other.corrupt)


@pytest.mark.parametrize(("k", "sizes"), [(1, [10]), (3, [3, 3, 4]), (5, [2] * 5), (10, [1] * 10)])
def test_parts_partition_the_facts_in_order_with_their_injected_answers(llama, k, sizes):
    whole = task(llama)
    parts = partitioned(whole, k)
    assert [len(part.forget) for part in parts] == sizes
    assert tuple(name for part in parts for name in part.forget.names) == whole.forget.names
    for part in parts:
        same_rows(part.forget, whole.forget)
        same_rows(part.injection, whole.injection)
        assert part.injection.names == part.forget.names == part.splits["forget_train"]
        assert part.retain is whole.retain
        assert part.formats is whole.formats
    assert parts[0].name == f"tiny, part 1 of {k}"


def test_a_rehearsed_part_has_the_facts_before_it(llama):
    whole = task(llama)
    parts = partitioned(whole, 3, rehearse=True)
    assert [len(part.forget) for part in parts] == [3, 6, 10]
    for part in parts:
        assert part.forget.names == whole.forget.names[: len(part.forget)]
        same_rows(part.injection, whole.injection)


def test_prompts_of_one_fact_stay_in_one_part(llama):
    whole = task(llama, n=6)
    twice = replace(whole.forget, names=("a", "b", "a", "c", "b", "a"))
    parts = partitioned(replace(whole, forget=twice), 2)
    assert [part.forget.names for part in parts] == [("a",) * 3, ("b", "c", "b")]
    assert torch.equal(parts[0].injection.answers, whole.injection.answers[[0, 2, 5]])
    nameless = replace(whole, forget=replace(whole.forget, names=()), splits={"forget_train": ("as before",)})
    parts = partitioned(nameless, 3)
    assert [len(part.forget) for part in parts] == [2, 2, 2]
    assert parts[0].splits == nameless.splits


def test_what_cannot_be_partitioned_is_refused(llama):
    whole = task(llama)
    for k in (0, 11):
        with pytest.raises(ValueError, match=rf"k must lie in 1\.\.10 \(the number of facts to forget\), got {k}"):
            partitioned(whole, k)
    with pytest.raises(ValueError, match=r"one row for each of the 10 prompts to forget, got 4: give each"):
        partitioned(replace(whole, injection=whole.injection[:4]), 2)


def asked_about(task, side):
    return {name for asked in task.formats.values() for name in getattr(asked, side).names}


@pytest.mark.parametrize("itself", [False, True])
def test_no_reported_number_uses_a_validation_fact(llama, itself):
    whole = task(llama, itself=itself)
    split = validation_split(whole, share=0.3)
    for side, count in (("forget", 3), ("retain", 3)):
        validated = asked_about(split.trials, side)
        assert len(validated) == count
        assert validated <= set(getattr(whole, side).names)
        assert validated.isdisjoint(asked_about(split.final, side))
        assert validated | asked_about(split.final, side) >= asked_about(whole, side)
        assert set(split.final.splits[f"{side}_validation"]) == validated
        assert set(split.final.splits[f"{side}_test"]) == asked_about(split.final, side)
    for name, asked in split.final.formats.items():
        same_rows(asked.forget, whole.formats[name].forget)
        assert len(asked.forget) == (7 if itself else 10)
    assert split.final.forget is whole.forget
    assert split.final.retain is whole.retain
    assert split.trials.knowledge is None


@pytest.mark.parametrize("itself", [False, True])
def test_retained_validation_facts_are_never_trained_on(llama, itself):
    whole = task(llama, itself=itself)
    trials = validation_split(whole).trials
    validated = asked_about(trials, "retain")
    assert validated | set(trials.retain.names) == set(whole.retain.names)
    assert validated.isdisjoint(trials.retain.names)
    same_rows(trials.retain, whole.retain)
    same_rows(trials.formats["trained prompt"].retain, whole.retain)


def test_facts_to_forget_are_trained_on_only_where_the_task_tests_them_on_themselves(llama):
    apart, itself = (validation_split(task(llama, itself=itself), share=0.4).trials for itself in (False, True))
    assert set(apart.forget.names).isdisjoint(asked_about(apart, "forget"))
    assert len(apart.forget) == 6
    assert len(itself.forget) == 10
    assert asked_about(itself, "forget") < set(itself.forget.names)
    for trials in (apart, itself):
        assert trials.injection.names == trials.forget.names == trials.splits["forget_train"]
        same_rows(trials.injection, task(llama).injection)


def test_text_is_split_and_the_reported_text_stays(llama):
    whole = task(llama)
    split = validation_split(whole, share=0.5)
    rows = [tuple(row.tolist()) for row in torch.cat([split.trials.text, split.trials.text_test])]
    assert sorted(rows) == sorted(tuple(row.tolist()) for row in whole.text)
    assert len(split.trials.text_test) == 3
    assert split.final.text_test is whole.text_test


def test_the_seed_chooses_the_validation_facts(llama):
    whole = task(llama)
    drawn = [asked_about(validation_split(whole, share=0.4, seed=seed).trials, "forget") for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len(set(map(frozenset, drawn))) > 1


def test_a_split_that_leaks_is_refused(llama):
    whole = task(llama)
    split = validation_split(whole)
    with pytest.raises(ValueError, match=r"no reported number uses, got 10 to forget that both tasks test.*'g0'"):
        Validation(whole, whole)
    with pytest.raises(ValueError, match=r"that the trials do not train on, got 2 that they do, such as 'r\d'"):
        Validation(replace(split.trials, retain=whole.retain), split.final)
    with pytest.raises(ValueError, match=r"expected prompts with names, .* got none for retain: pass subjects"):
        validation_split(replace(whole, retain=replace(whole.retain, names=())))
    for share in (0.0, 0.97, 1.0):
        with pytest.raises(ValueError, match=rf"leaves something on both sides of the split, got {share} of 10"):
            validation_split(whole, share=share)


def test_sports_facts_split_by_what_they_test(shipped):
    """A whole sport is tested on other athletes than it is trained on; single athletes are tested on themselves."""
    from mechunlearn.tasks import sports_facts

    sport, athletes = (validation_split(sports_facts(shipped, forget=forget)) for forget in ("basketball", 16))
    assert asked_about(sport.trials, "forget").isdisjoint(sport.trials.forget.names)
    assert len(athletes.trials.forget) == 16
    assert len(asked_about(athletes.trials, "forget")) == 3
    assert all(len(asked.forget) == 13 for asked in athletes.final.formats.values())


def test_a_format_in_which_no_fact_is_left_is_named_and_not_asked(llama):
    """As one of `known_facts`, which asks only what the model knows in it."""
    whole = task(llama, itself=True)
    chosen = validation_split(whole, share=0.4).final.splits["forget_validation"]
    rows = [whole.forget.names.index(name) for name in chosen[:1]]
    few = replace(whole.formats["question"], forget=whole.formats["question"].forget[rows])
    split = validation_split(replace(whole, formats={**whole.formats, "few": few}), share=0.4)
    assert [*split.final.formats] == ["trained prompt", "question"]
    assert split.final.splits["formats_left_out"] == ("few",)
    with pytest.raises(ValueError, match=r"expected facts in 'trained prompt' besides .* of 10 to forget"):
        validation_split(replace(whole, formats={"trained prompt": few}), share=0.4)
