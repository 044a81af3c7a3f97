import json
from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import PAPER_PRODUCT, learn_weight_mask, search
from mechunlearn.losses import cross_entropy, log_one_minus_probability
from mechunlearn.tasks import validation_split
from mechunlearn.weights import Edit, read, select

finetune = partial(mu.edit.finetune, steps=1, batch_size=4, text_batch_size=2, progress=False)
quick = partial(search, progress=False)
STAGES = ({"learning_rate": (1e-3, 3e-2, 1e-2)}, {"forget_coefficient": (0.5, 1.0, 4.0)})


def masks(model):
    shape = mu.shape(model)
    return {"one": mu.ComponentMask.of(["L1MLP"], shape), "other": mu.ComponentMask.of(["L0H1", "L2N3"], shape)}


@cache
def split(model):
    return validation_split(tiny.task(model), share=0.3)


def score(model, task):
    asked = task.formats["trained prompt"]
    found = [
        mu.evaluate.measure(model, side, [mu.metrics.answer_probability])[0] for side in (asked.forget, asked.retain)
    ]
    return found[1].value - found[0].value


def same(one, other):
    return one.mask == other.mask and all(torch.equal(one.values[label], other.values[label]) for label in one.values)


class Shift:
    """An editor without training, for what the search itself does: every weight times 1 + learning_rate * coefficient.

    It diverges where `diverges(mask, options, task)` says so."""

    def __init__(self, diverges=lambda mask, options, task: False):
        self.calls, self.diverges, self.stop_at = [], diverges, None

    def __getstate__(self):
        return {"diverges": self.diverges}  # its value; what it counts is none of it

    def __call__(self, model, task, mask, *, learning_rate=0.0, forget_coefficient=1.0):
        options = {"learning_rate": learning_rate, "forget_coefficient": forget_coefficient}
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(options)
        if self.diverges(mask, options, task):
            raise FloatingPointError(f"diverged at {learning_rate}")
        values = {k: v * (1 + learning_rate * forget_coefficient) for k, v in read(select(model, mask)).items()}
        return Edit(mask, values, mu.fingerprint(model), {"editor": "shift"})


def weight(model, task):
    """The mean absolute weight of L1's W_in: depends on the edit of mask "one" alone."""
    return float(mu.model.slots(model)[1, "W_in"].parameter.detach().abs().mean())


def test_a_search_is_the_loop_written_out(llama):
    """Two stages for two masks, against loops and a maximum by hand; then the edit of the final task."""
    validation, where = split(llama), masks(llama)
    with left_as_it_was(llama):
        found = quick(llama, validation, where, score=score, edit=finetune, stages=STAGES)

    def scored(mask, **options):
        with finetune(llama, validation.trials, mask, **options).applied(llama):
            return score(llama, validation.trials)

    for name, mask in where.items():
        first = {rate: scored(mask, learning_rate=rate) for rate in STAGES[0]["learning_rate"]}
        rate = max(first, key=first.__getitem__)
        second = {c: scored(mask, learning_rate=rate, forget_coefficient=c) for c in STAGES[1]["forget_coefficient"]}
        own = [trial for trial in found.trials if trial.mask == name]
        assert [trial.score for trial in own] == [*first.values(), *second.values()]
        assert [trial.stage for trial in own] == [1, 1, 1, 2, 2, 2]
        if max(second.values()) > first[rate]:
            assert found.best[name] == {
                "learning_rate": rate,
                "forget_coefficient": max(second, key=second.__getitem__),
            }
        assert same(found.edits[name], finetune(llama, validation.final, mask, **found.best[name]))
        assert found.edits[name].provenance["search"]["trials"] == 6


def test_a_search_runs_on_every_model_and_leaves_it_as_it_was(model):
    where = masks(model)
    edit = Shift(lambda mask, options, task: options["learning_rate"] == 3e-2)
    with left_as_it_was(model):
        found = quick(model, split(model), where, score=weight, edit=edit, stages=STAGES)
    assert found.best["one"] == {"learning_rate": 1e-2, "forget_coefficient": 4.0}
    assert same(found.edits["one"], Shift()(model, None, where["one"], learning_rate=1e-2, forget_coefficient=4.0))


def test_scores_are_of_the_edited_model_on_the_validation_facts_alone(llama):
    validation, seen = split(llama), []

    def look(model, task):
        seen.append((mu.fingerprint(model), task))
        return 0.0

    found = quick(llama, validation, masks(llama), score=look, edit=finetune, stages=STAGES[:1])
    assert all(task is validation.trials for _, task in seen)
    assert len({print for print, _ in seen}) == 6
    assert mu.fingerprint(llama) not in {print for print, _ in seen}
    assert {name: best["learning_rate"] for name, best in found.best.items()} == {"one": 1e-3, "other": 1e-3}, "a tie"


def test_the_default_is_the_papers_search_with_as_many_trials_for_every_mask(llama):
    edit = Shift()
    found = quick(llama, split(llama), masks(llama), score=weight, edit=edit)
    rates, coefficients = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4), (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
    assert found.table.groupby("mask").size().to_dict() == {"one": 12, "other": 12}
    first = found.table[(found.table["mask"] == "one") & (found.table["stage"] == 1)]
    second = found.table[(found.table["mask"] == "one") & (found.table["stage"] == 2)]
    assert tuple(first["learning_rate"]) == rates
    assert set(first["forget_coefficient"]) == {1.0}
    assert set(second["learning_rate"]) == {1e-4}
    assert tuple(second["forget_coefficient"]) == coefficients
    assert found.best["one"] == {"learning_rate": 1e-4, "forget_coefficient": 5.0}
    assert len(edit.calls) == 2 * (12 - 1) + 2, "coefficient 1 at the chosen rate is not run again; two last edits"

    every = quick(llama, split(llama), masks(llama), score=weight, edit=Shift(), stages=PAPER_PRODUCT)
    tried = [(trial.options["learning_rate"], trial.options["forget_coefficient"]) for trial in every.trials]
    assert tried == [*product(rates, coefficients)] * 2


def test_trials_that_diverge_are_recorded_and_count(llama):
    def diverges(mask, options, task):
        return "L1MLP" not in map(str, mask) or options["learning_rate"] * options["forget_coefficient"] > 0.02

    edit = Shift(diverges)
    with left_as_it_was(llama):
        found = quick(llama, split(llama), masks(llama), score=weight, edit=edit, stages=STAGES)
    table = found.table.set_index(["mask", "stage"])
    assert found.table.groupby(["mask", "stage"]).size().tolist() == [3, 3, 3, 3]
    assert table.loc[("one", 1), "failure"].notna().tolist() == [False, True, False]
    assert table.loc[("one", 1), "failure"].iloc[1] == "diverged at 0.03"
    assert found.best["one"] == {"learning_rate": 1e-2}
    assert table.loc[("one", 2), "learning_rate"].tolist() == [1e-2] * 3
    assert table.loc[("other", 2), "learning_rate"].tolist() == [1e-3] * 3, "nothing to choose: the first of the grid"
    assert table.loc["other", "score"].isna().all()
    assert set(found.edits) == set(found.best) == {"one"}
    assert found.failures == {"other": "all 6 trials failed, the last so: diverged at 0.001"}


def test_a_last_edit_that_diverges_is_recorded(llama):
    validation = split(llama)
    edit = Shift(lambda mask, options, task: task is validation.final and "L1MLP" in map(str, mask))
    found = quick(llama, validation, masks(llama), score=weight, edit=edit, stages=STAGES)
    assert set(found.edits) == {"other"}
    assert found.failures["one"].startswith("with the best options, on the final task: diverged at 0.03")


def test_a_score_that_is_not_finite_is_a_failed_trial(llama):
    def undefined(model, task):
        return float("nan") if weight(model, task) > bound else weight(model, task)

    bound = weight(llama, None) * 1.02
    found = quick(llama, split(llama), masks(llama), score=undefined, edit=Shift(), stages=STAGES[:1])
    assert found.best["one"] == {"learning_rate": 1e-2}
    assert found.trials[1].failure == "the score of the edited model is nan."


def test_training_that_diverges_is_recorded_with_its_step(llama):
    grid = ({"learning_rate": (1e-3, 1e30)},)
    edit = partial(finetune, steps=4, clip=None)
    with left_as_it_was(llama):
        found = quick(llama, split(llama), masks(llama), score=score, edit=edit, stages=grid)
    failed = [trial for trial in found.trials if trial.mask == "one"][1]
    assert failed.score is None
    assert "lower the learning rate" in failed.failure
    assert found.best["one"] == {"learning_rate": 1e-3}


@pytest.mark.parametrize("stop_at", [0, 1, 6, 11, 12, 13])
def test_an_interrupted_search_goes_on_and_gives_the_same(llama, tmp_path, stop_at):
    where, edit = masks(llama), Shift(lambda mask, options, task: options["learning_rate"] == 3e-2)
    run = partial(quick, llama, split(llama), where, score=weight, edit=edit, stages=STAGES)
    whole = run()
    needed = len(edit.calls)
    assert needed == 14
    edit.calls, edit.stop_at = [], stop_at
    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path / "search")
    edit.stop_at = None
    found = run(folder=tmp_path / "search")
    assert len(edit.calls) == needed, "no finished trial was run again"
    assert found.trials == whole.trials
    assert all(same(found.edits[name], whole.edits[name]) for name in where)
    again = run(folder=tmp_path / "search")
    assert len(edit.calls) == needed
    assert again.trials == whole.trials
    assert all(same(again.edits[name], whole.edits[name]) for name in where)


def test_only_the_same_trial_is_taken_from_the_folder(llama, tmp_path):
    """Another model, task, mask, score or bound option is another trial; another grid is not."""
    where, edit, validation = masks(llama), Shift(), split(llama)
    run = partial(quick, score=weight, folder=tmp_path, stages=STAGES[:1])
    run(llama, validation, where, edit=edit)
    before = len(edit.calls)

    def fresh(*arguments, **options):
        start = len(edit.calls)
        run(*arguments, **{"edit": edit, **options})
        return len(edit.calls) - start

    assert before == 8
    assert fresh(llama, validation, where) == 0
    assert fresh(llama, validation, where, stages=({"learning_rate": (1e-3, 2e-3, 1e-2, 3e-2)},)) == 2
    assert fresh(llama, validation, {"third": mu.ComponentMask.of(["L0MLP"], mu.shape(llama))}) == 4
    assert fresh(llama, validation_split(tiny.task(llama), share=0.3, seed=3), where) == 6, "it is reported on the same"
    assert fresh(llama, validation, where, score=partial(score)) == 8
    assert fresh(llama, validation, where, edit=partial(edit, forget_coefficient=2.0)) == 8
    with edit(llama, validation.trials, where["one"], learning_rate=0.1).applied(llama):
        assert fresh(llama, validation, where) == 8


def test_losses_are_options_too_and_are_told_apart_in_the_folder(llama, tmp_path):
    grid = (
        {"forget_loss": (log_one_minus_probability, partial(log_one_minus_probability, cutoff=-2.0), cross_entropy)},
    )
    found = [
        quick(llama, split(llama), masks(llama), score=score, edit=finetune, stages=grid, folder=tmp_path)
        for _ in range(2)
    ]
    assert len(list(tmp_path.glob("trial-*.json"))) == 6
    assert [trial.score for trial in found[0].trials] == [trial.score for trial in found[1].trials]
    assert set(found[0].best) == {"one", "other"}


@pytest.mark.parametrize("with_folder", [False, True])
def test_closures_of_one_search_each_have_a_trial_of_their_own(llama, tmp_path, with_folder):
    """As options, editors and scores; also objects without a value, as long as no file depends on them."""

    def capped(cap):
        return lambda logits, targets: cross_entropy(logits, targets).clamp(max=cap)

    def counted(add):
        return lambda model, task: weight(model, task) + add

    grid = ({"forget_loss": (capped(0.5), capped(1e3)), "learning_rate": (3e-2,)},)
    folder = tmp_path if with_folder else None
    run = partial(quick, llama, split(llama), masks(llama), edit=finetune, stages=grid, folder=folder)
    scores = [trial.score for trial in run(score=counted(0)).trials]
    assert len({*scores[:2]}) == 2
    assert [trial.score for trial in run(score=counted(1)).trials] == pytest.approx([score + 1 for score in scores])
    bare = {"learning_rate": (1e-3,), "forget_coefficient": (object(), object())}
    edit, ran = Shift(), []

    def odd(model, task, mask, **options):
        ran.append(options)
        return edit(model, task, mask)

    run = partial(quick, llama, split(llama), masks(llama), score=weight, edit=odd, stages=(bare,), folder=folder)
    if with_folder:
        with pytest.raises(ValueError, match="got a object"):
            run()
        assert not ran
    else:
        run()
        assert len(ran) == 6  # two trials and the final edit of each mask


def test_a_damaged_result_is_refused_and_named(llama, tmp_path):
    run = partial(quick, llama, split(llama), masks(llama), score=weight, edit=Shift(), folder=tmp_path)
    run()
    path = sorted(tmp_path.glob("trial-*.json"))[0]
    whole = path.read_text()
    for damaged in (whole[:50], whole.replace('"score": 0.', '"score": 1.')):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=rf"corrupted or truncated one at .*{path.name}"):
            run()
    path.write_text(whole)
    assert json.loads(whole)["content"]["components"]
    run()


def test_what_cannot_be_searched_is_refused(llama, gpt2):
    run = partial(quick, llama, split(llama), edit=finetune, stages=STAGES)
    with left_as_it_was(llama):
        with pytest.raises(ValueError, match="expected at least one of masks, got none"):
            run({}, score=weight)
        with pytest.raises(ValueError, match="expected at least one of stages, got none"):
            run(masks(llama), score=weight, stages=())
        with pytest.raises(ValueError, match=r"expected values to try .* got none for \['learning_rate'\]"):
            run(masks(llama), score=weight, stages=({"learning_rate": ()},))
        with pytest.raises(ValueError, match="expected a mask made for this model"):
            run(masks(gpt2), score=weight)
        learn = partial(learn_weight_mask, steps=1, batch_size=2, text_batch_size=2, progress=False)
        with pytest.raises(ValueError, match="got learn_weight_mask, which returns LearnedMask: wrap it"):
            run(masks(llama), score=weight, edit=learn)


def test_a_score_that_is_no_number_is_refused(llama, unchecked):
    def result(model, task):
        return mu.evaluate.knowledge(model, replace(task, knowledge=task.forget))

    with left_as_it_was(llama), pytest.raises(ValueError, match="got Result from result: return one number, such as"):
        quick(llama, split(llama), masks(llama), score=result, edit=Shift())
