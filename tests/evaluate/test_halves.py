"""Who is attacked with is never tested."""

import pytest
import tiny

from mechunlearn.evaluate.attacks.exam import check_apart, halves


def test_a_whole_sport_is_tested_on_the_athletes_that_were_not_trained(shipped):
    import mechunlearn as mu

    task = mu.tasks.sports_facts(shipped, forget="basketball")
    trained, tested = halves(task)
    assert trained.names == task.splits["forget_train"]
    assert tested.names == task.splits["forget_test"]


def test_single_athletes_are_split_in_halves_by_name(shipped):
    import mechunlearn as mu

    task = mu.tasks.sports_facts(shipped, forget=5)
    for seed in range(3):
        trained, tested = halves(task, format="question", seed=seed)
        assert {*trained.names} | {*tested.names} == {*task.splits["forget_test"]}
        assert not {*trained.names} & {*tested.names}
        assert (len(trained), len(tested)) == (2, 3)
        check_apart(trained, tested)
    assert len({halves(task, seed=seed)[1].names for seed in range(8)}) > 1
    with pytest.raises(ValueError, match="expected an attack on other facts"):
        check_apart(task.forget, tested)


def test_too_few_facts_and_formats_that_are_missing_are_errors(shipped, llama):
    import mechunlearn as mu

    with pytest.raises(ValueError, match="at least two forgotten facts"):
        halves(mu.tasks.sports_facts(shipped, forget=1))
    with pytest.raises(ValueError, match="expected a format of the task"):
        halves(tiny.task(llama), format="poem")
