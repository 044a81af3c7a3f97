"""The audit's numbers by hand, its words, and what it says where something is missing."""

import math
import pickle
import re
from dataclasses import replace
from functools import partial

import jaxtyping
import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.auditing import Plan, audit, full, quick
from mechunlearn.auditing.verdict import Audit, random_controls
from mechunlearn.curve import Curve
from mechunlearn.evaluate import Cell, Report, Result

NAMES = tuple(f"fact {i}" for i in range(60))
KINDS = {"clean": "clean", "question": "asked", "probe": "latent", "relearning": "attack", "text loss": "damage"}
VALUES = {
    "original": {"clean": 0.9, "question": 0.8, "probe": 1.0, "relearning": 0.9},
    "edit": {"clean": 0.25, "question": 0.3, "probe": 0.9, "relearning": 0.6},
    "random": {"clean": 0.8, "question": 0.8, "probe": 1.0, "relearning": 0.8},
    "never knew": {"clean": 0.1, "question": 0.3, "probe": 0.6, "relearning": 0.18},
}


def cell(row: str, test: str, value: float) -> Cell:
    sense = "a probe" if test == "probe" else "nats" if test == "text loss" else "accuracy"
    return Cell(row, test, 0, Result(torch.full((len(NAMES),), value), sense, 0.05, "share", NAMES))


def made(*rows: str, **failed: str) -> Audit:
    """An audit with these rows; `failed`: row -> a test without a result."""
    cells = [cell(row, test, value) for row in rows for test, value in VALUES[row].items()]
    cells += [cell(row, "text loss", 1.5) for row in rows]
    broken = [
        replace(each, result=None, error="ValueError: no") if failed.get(each.row) == each.test else each
        for each in cells
    ]
    return Audit(Report(tuple(broken), dict.fromkeys(rows, 7), {}), KINDS)


def found(audited: Audit, row: str, test: str) -> mu.auditing.Finding:
    return next(each for each in audited.findings if (each.row, each.test) == (row, test))


def test_left_recovered_taught_and_net_by_hand():
    audited = made(*VALUES)
    left = {test: found(audited, "edit", test).left.value for test in KINDS if test != "text loss"}
    assert left == pytest.approx({"clean": 0.15 / 0.8, "question": 0.0, "probe": 0.75, "relearning": 0.42 / 0.72})
    own = found(audited, "edit", "relearning").recovery
    assert own is not None
    assert (own.recovered.value, own.taught.value, own.net.value) == pytest.approx((0.4375, 0.1, 0.3375))
    assert found(audited, "edit", "probe").recovery is None
    assert [found(audited, row, "relearning").left.value for row in ("original", "never knew")] == pytest.approx([1, 0])


def attacked(facts: tuple[float, ...], nobody: tuple[float, ...]) -> Result:
    """An attack with budgets 0, 1 and 2, and what it finds about nobody there."""
    rows = [torch.tensor([each] * len(NAMES)) for each in (facts, nobody)]
    curves = [Curve(("0", "1", "2"), values, "accuracy", 0.05, "steps") for values in rows]
    control = Result(curves[1].per_prompt[:, 0], "accuracy", curve=curves[1])
    return Result.strongest(curves[0], "accuracy", names=NAMES, control=control)


def test_an_attack_counts_by_what_it_finds_beyond_its_control():
    """By hand, facts less nobody: original .8, .9, .9; edit .1, 0, .5; never knew 0, .1, 0. Before: .8, .1 and 0.

    The attack makes the edit say it of anybody after one step (1.0 of both), which is not what counts.
    """
    found = {
        "original": attacked((1.0, 1.0, 1.0), (0.2, 0.1, 0.1)),
        "edit": attacked((0.1, 1.0, 0.9), (0.0, 1.0, 0.4)),
        "never knew": attacked((0.0, 0.9, 0.8), (0.0, 0.8, 0.8)),
    }
    cells = [Cell(row, "relearning", 0, each) for row, each in found.items()]
    cells += [Cell(row, "clean", 0, Result(torch.ones(len(NAMES)), "accuracy", 0.05, names=NAMES)) for row in found]
    audited = Audit(Report(tuple(cells), dict.fromkeys(found, 7), {}), KINDS)
    edit = next(each for each in audited.findings if (each.row, each.test) == ("edit", "relearning"))
    assert edit.value.value == pytest.approx(1.0)
    assert edit.left.value == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
    assert edit.recovery is not None
    own = edit.recovery
    assert (own.recovered.value, own.taught.value, own.net.value) == pytest.approx((0.5, 0.125, 0.375))


def test_the_table_has_a_row_for_each_model_and_the_worst_case():
    table = made(*VALUES).table
    assert list(table.index) == list(VALUES)
    assert list(table.columns) == ["clean", "question", "probe", "relearning", "worst case", "by"]
    assert table.loc["edit", "relearning"] == pytest.approx(0.6)
    assert table.loc["edit", "worst case"] == pytest.approx(0.75)
    assert table.loc["edit", "by"] == "probe"
    assert table.loc["never knew", "worst case"] == pytest.approx(0.0)


def test_the_frame_is_tidy():
    frame = made(*VALUES).to_frame().set_index(["row", "test"])
    assert len(frame) == 16
    assert frame.loc[("edit", "relearning"), "net"] == pytest.approx(0.3375)
    assert math.isnan(frame.loc[("edit", "probe"), "net"])
    assert {"value low", "left high", "recovered low", "taught high", "net reason", "sense"} <= set(frame.columns)


def test_the_verdict_names_what_still_finds_the_facts():
    verdict = made(*VALUES).verdict
    assert verdict.startswith("Not gone: it is found when asked, in hidden states, under attack.")
    assert "Asked as trained, 0.19 [" in verdict
    assert "The worst of 2 ways to ask: 0.19 [" in verdict
    assert "The worst of 1 reading of hidden states: 0.75 [" in verdict
    assert "The worst of 1 attack: 0.58 [" in verdict
    assert "At a random place of as many weights, the same edit leaves 0.88 [" in verdict


def test_where_nothing_is_found_the_verdict_does_not_say_gone():
    nothing = [replace(cell("edit", test, value)) for test, value in VALUES["never knew"].items()]
    rows = ("original", "never knew")
    cells = [cell(row, test, value) for row in rows for test, value in VALUES[row].items()]
    verdict = Audit(Report((*cells, *nothing), dict.fromkeys((*rows, "edit"), 7), {}), KINDS).verdict
    assert verdict.startswith("None of 4 tests and attacks finds more than in a model without the knowledge.")
    assert "Others might" in verdict


def test_without_a_model_that_never_knew_chance_stands_in_and_the_audit_says_so():
    audited = made("original", "edit", "random")
    assert found(audited, "edit", "clean").left.value == pytest.approx(0.2 / 0.85)
    own = found(audited, "edit", "relearning").recovery
    assert own is not None
    assert own.recovered.value == pytest.approx(0.35 / 0.85)
    assert math.isnan(own.net.value)
    text = audited.to_markdown()
    assert "no model that never knew was given" in text
    assert "no edit at random places" not in text
    assert "there is no edit at random places" in made("original", "edit", "never knew").to_markdown()


@pytest.mark.parametrize("row", ["original", "edit", "never knew"])
def test_a_test_that_failed_says_so_and_loses_nothing_else(row):
    audited = made(*VALUES, **{row: "relearning"})
    failed, other = found(audited, "edit", "relearning"), found(audited, "edit", "probe")
    assert math.isnan(failed.left.value)
    assert failed.left.reason == f"failed on {row}"
    assert other.left.value == pytest.approx(0.75)
    text = audited.to_markdown()
    assert "| failed |" in text
    assert f"failed: {row}, relearning: ValueError: no" in text
    assert "No answer from relearning" in audited.verdict
    assert audited.table.loc["edit", "by"] == "probe"


def test_markdown_shows_every_row_and_says_what_the_numbers_mean():
    text = made(*VALUES).to_markdown()
    assert "| found by | kind | original | edit | random | never knew | chance |" in text
    assert "| relearning | attack | 0.900 | 0.600 | 0.800 | 0.180 | 0.050 |" in text
    assert "| fraction left | edit | random | never knew |" in text
    assert re.search(r"\| worst of 2 ways to ask \| 0.19 \[.*\], clean \| 1.00 \[.*\], question \|", text)
    assert re.search(r"\| relearning \| 0.58 \[.*\] \| 0.44 \[.*\] \| 0.10 \[.*\] \| 0.34 \[.*\] \|", text)
    assert "net = recovered - taught" in text
    assert "text loss" in text


def test_the_page_opens_with_the_verdict_the_worst_cases_and_one_picture(tmp_path):
    audited = made(*VALUES)
    audited.to_html(tmp_path / "audit.html", title="Basketball")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    places = [
        page.index(text)
        for text in (
            "<h1>Basketball</h1>",
            "<strong>Not gone: it is found when asked",
            "worst of 2 ways to ask",
            'id="plot-0"',
            '<h2 id="table">Table</h2>',
            'id="plot-1"',
        )
    ]
    assert places == sorted(places)
    points = {trace.name: dict(zip(trace.y, trace.x, strict=True)) for trace in audited.plot().data}
    assert set(points) == {"edit", "random", "never knew"}
    for row, values in points.items():
        assert values == {test: found(audited, row, test).left.value for test in values}
        assert list(values) == ["clean", "question", "probe", "relearning"]


def test_one_number_of_many_needs_more_to_count():
    """Of ten ways to ask, one at 0.13 where 0.05 is chance would count alone, by its own interval."""
    kinds = {"clean": "clean"} | {f"question {i}": "asked" for i in range(9)}
    rows = {"original": 0.9, "edit": 0.05, "never knew": 0.05}
    cells = [cell(row, test, value) for row, value in rows.items() for test in kinds]
    some = torch.zeros(len(NAMES))
    some[:9] = 0.9
    cells = [c if (c.row, c.test) != ("edit", "question 4") else replace(c, result=result_of(some)) for c in cells]
    own = found(Audit(Report(tuple(cells), dict.fromkeys(rows, 7), {}), kinds), "edit", "question 4")
    assert own.left.value == own.of_many.value > 0
    assert own.of_many.low < own.left.low


def test_what_is_clear_counts_though_another_test_leaves_more_but_less_surely():
    """Eight probes: one of a single fact at 1.0, whose interval reaches 0, and one of sixty at 0.6, whose does not."""
    kinds = {"clean": "clean"} | {f"probe {i}": "latent" for i in range(8)}
    rows = {"original": 1.0, "edit": 0.05, "never knew": 0.05}
    cells = [cell(row, test, value) for row, value in rows.items() for test in kinds]
    few = {("edit", "probe 1"): 0.6}
    few_facts = Result(torch.ones(1), "accuracy", 0.05, "share", NAMES[:1])
    cells = [replace(c, result=few_facts) if (c.row, c.test) == ("edit", "probe 0") else c for c in cells]
    cells = [
        replace(c, result=result_of(torch.full((60,), few[c.row, c.test]))) if (c.row, c.test) in few else c
        for c in cells
    ]
    audited = Audit(Report(tuple(cells), dict.fromkeys(rows, 7), {}), kinds)
    assert found(audited, "edit", "probe 0").of_many.low <= 0 < found(audited, "edit", "probe 1").of_many.low
    assert audited.verdict.startswith("Not gone: it is found in hidden states.")


def result_of(values: torch.Tensor) -> Result:
    return Result(values, "accuracy", 0.05, "share", NAMES)


asked = partial(mu.evaluate.in_format, name="trained prompt", side="forget")


def small(task) -> Plan:
    """Two tests of the task and one that always fails."""

    def broken(model, task):
        raise ValueError("not today")

    other = partial(mu.evaluate.in_format, name="question", side="forget")
    return Plan(asked, {"question": other}, {}, {"same": asked, "broken": broken}, {"text loss": mu.evaluate.text_loss})


def edited(model, label="L1MLP"):
    mask = mu.ComponentMask.of([label], mu.shape(model))
    return mu.edit.zeroed(model, mask)


def test_an_audit_runs_everything_and_leaves_the_models_as_they_were(llama):
    never, task = tiny.bridge("llama", seed=1), tiny.task(llama)
    others = {"other": edited(llama, "L2MLP")}
    with left_as_it_was(llama), left_as_it_was(never):
        found = audit(llama, task, edited(llama), budget=small, never_knew=never, others=others, progress=False)
    assert list(found.table.index) == ["original", "edit", "other", "never knew"]
    values = {test: float(found.table.loc["edit", test]) for test in ("clean", "same", "question", "broken")}
    assert values["same"] == values["clean"] != values["question"]
    assert math.isnan(values["broken"])
    assert "ValueError: not today" in repr(found)
    assert found.report.table.loc["edit", "text loss"] > 0


def test_an_edit_of_another_model_is_refused_before_anything_runs(llama):
    def never_run(model, task):
        raise AssertionError

    plan = Plan(never_run, {}, {}, {}, {})
    with pytest.raises(ValueError, match="expected the weights that the edit was made for"):
        audit(tiny.bridge("llama", seed=1), tiny.task(llama), edited(llama), budget=lambda task: plan, progress=False)


def steps(model, task, mask, **options):
    return mu.edit.finetune(model, task, mask, steps=2, progress=False, **options)


def test_with_an_editor_the_edit_is_made_again_at_random_places(llama):
    """By that editor, options included, on as many weights; with other weights as the result."""
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))
    still = partial(steps, learning_rate=0.0)
    with left_as_it_was(llama):
        found = audit(llama, task, still(llama, task, mask), editor=still, budget=small, progress=False)
    assert list(found.table.index) == ["original", "edit", "random"]
    assert found.report.weights["random"] == found.report.weights["edit"] > 0
    for test in ("clean", "question"):  # a rate of 0 is the editor's own option
        assert found.table.loc["random", test] == pytest.approx(float(found.table.loc["original", test]))
    assert found.random_note == ""
    assert "random places" not in found.to_markdown()
    others = {"by hand": steps(llama, task, mu.localize.random_like(mask, llama, seed=0))}
    edit = steps(llama, task, mask)
    moved = audit(llama, task, edit, editor=steps, budget=small, others=others, progress=False).table
    assert moved.loc["random", "clean"] == moved.loc["by hand", "clean"] != moved.loc["original", "clean"]


def test_a_loaded_edit_is_audited_as_fully_as_a_fresh_one(llama, tmp_path):
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))
    fresh = steps(llama, task, mask)
    fresh.save(tmp_path / "edit")
    rows = [
        audit(llama, task, edit, editor=steps, budget=small, progress=False)
        for edit in (fresh, mu.Edit.load(tmp_path / "edit"))
    ]
    numbers = [found.to_frame().query("row == 'random'")[["test", "value", "left"]] for found in rows]
    assert len(numbers[0]) == 4
    assert numbers[0].equals(numbers[1])
    assert [found.random_note for found in rows] == ["", ""]


def test_of_several_edits_each_is_made_again_with_its_seed_on_a_mask_of_its_own(llama):
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))
    edits = [steps(llama, task, mask, seed=seed) for seed in (3, 1)]
    rows, note = random_controls(llama, task, edits, partial(steps, seed=7), count=2)
    assert note == ""
    assert list(rows) == ["random 1", "random 2"]
    masks = [[mu.localize.random_like(mask, llama, seed=seed) for seed in pair] for pair in ((0, 1), (2, 3))]
    controls = {name: row for name, row in rows.items() if isinstance(row, tuple)}
    assert [[edit.mask for edit in row] for row in controls.values()] == masks
    assert [edit.provenance["seed"] for edit in controls["random 1"]] == [3, 1]
    expected = steps(llama, task, masks[1][1], seed=1)
    assert all(torch.equal(controls["random 2"][1].values[label], value) for label, value in expected.values.items())


def test_without_an_editor_the_control_is_left_out_and_the_audit_says_so_and_how_to_get_it(llama, tmp_path):
    found = audit(llama, tiny.task(llama), edited(llama), budget=small, progress=False)
    assert list(found.table.index) == ["original", "edit"]
    text = found.to_markdown()
    assert "there is no edit at random places, so nothing says whether the place matters (no editor was given" in text
    assert "editor=..., the function that made the edit, with its options" in repr(found)
    found.report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "random places" in page
    assert "no editor was given: pass editor=..." in page


def test_an_audit_says_why_there_is_no_edit_at_random_places(llama):
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))
    edit, everywhere = steps(llama, task, mask), steps(llama, task, mu.localize.everything(llama))

    def out_of_memory(model, task, mask):
        raise torch.OutOfMemoryError("no")

    cases = (
        (everywhere, steps, 1, "ValueError: expected a pool with other components"),
        (edit, out_of_memory, 1, "OutOfMemoryError: no"),
        (edit, steps, 0, "random=0 was passed"),
    )
    for edit, editor, random, why in cases:
        found = audit(llama, task, edit, editor=editor, budget=small, random=random, progress=False)
        assert list(found.table.index) == ["original", "edit"]
        assert f"there is no edit at random places, so nothing says whether the place matters ({why}" in repr(found)


def test_what_is_made_before_an_editor_fails_is_kept(llama):
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))
    calls = []

    def once(model, task, mask):
        calls.append(mask)
        if len(calls) > 1:
            raise FloatingPointError("diverged")
        return steps(model, task, mask)

    rows, note = random_controls(llama, task, steps(llama, task, mask), once, count=2)
    assert (list(rows), note) == (["random 1"], "FloatingPointError: diverged")


def test_where_only_other_edits_are_there_a_note_says_why(llama):
    found = audit(llama, tiny.task(llama), edited(llama), budget=small, others={"random": edited(llama, "L2MLP")})
    assert "random places: no editor was given" in found.to_markdown()


def test_a_control_that_is_another_edit_is_called_one_and_in_what_it_differs(llama):
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))
    edit = steps(llama, task, mask, seed=4)
    other = partial(steps, learning_rate=0.5, forget_loss=mu.losses.npo)
    found = audit(llama, task, edit, editor=other, budget=small, progress=False)
    for text in (found.to_markdown(), found.random_note):
        assert "the control is another edit than the audited one: it differs in terms.forget ([1.0, " in text
        assert "; learning_rate (0.5; the edit: 0.001)" in text
    assert "seed" not in found.random_note
    renamed = audit(llama, replace(task, name="x"), edit, editor=steps, budget=small, progress=False)
    assert renamed.random_note.endswith('it differs in task ("x"; the edit: "tiny")')
    by_hand = audit(llama, task, edited(llama), editor=steps, budget=small, progress=False)
    assert (
        'differs in editor ("finetune"; the edit: "zeroed"); text_length (null; the edit: none)' in by_hand.random_note
    )


def test_numbers_that_an_editor_finds_on_its_mask_do_not_make_another_edit(llama):
    """Those of the covariance, of mean ablation, and which prefixes a seed draws; and how options were searched."""
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP.W_out"], mu.shape(llama))
    searched = steps(llama, task, mask)
    searched = replace(searched, provenance={**searched.provenance, "search": {"trials": 3}})
    rome = partial(mu.edit.rome, steps=2, progress=False)
    task = replace(task, injection=task.forget if task.injection is None else task.injection)
    cases = ((searched, steps), (mu.edit.mean_ablated(llama, task, mask), mu.edit.mean_ablated))
    for edit, editor in (*cases, (rome(llama, task, mask, seed=1), rome)):
        rows, note = random_controls(llama, task, edit, editor, count=1)
        assert list(rows) == ["random"]
        assert note == ""


def test_a_bad_editor_is_an_error_before_any_test_runs(llama):
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))

    def never_run(model, task):
        raise AssertionError

    def without_seed(model, task, mask):
        return steps(model, task, mask)

    edit, plan = steps(llama, task, mask), Plan(never_run, {}, {}, {}, {})
    learned = partial(mu.edit.learn_weight_mask, steps=1, progress=False)
    cases = (
        (edit, "finetune", r"called as editor\(model, task, mask\), got str \('finetune' is not a callable"),
        (edit, lambda model, task: edit, r"called as editor\(model, task, mask\), got <lambda> \(too many"),
        ([edit], without_seed, r"called as editor\(model, task, mask, seed=0\), got without_seed"),
        (edit, partial(mu.edit.finetune, stepz=2), "got finetune"),
        (edit, partial(steps, stepz=2), "stepz"),
        (edit, learned, r"got learn_weight_mask, which returns LearnedMask: wrap it"),
        (edit, lambda model, task, mask: edit, "edits the place of the edit again"),
    )
    jaxtyping.config.update("jaxtyping_disable", True)  # which would be the first to refuse what cannot be called
    try:
        for edits, editor, message in cases:
            with pytest.raises((ValueError, TypeError), match=message):
                audit(llama, task, edits, editor=editor, budget=lambda task: plan, progress=False)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_an_edit_carries_no_functions_and_can_be_sent(llama):
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))
    edit = steps(llama, task, mask, until=lambda row: False)
    assert not any(callable(value) for value in vars(edit).values())
    sent = pickle.loads(pickle.dumps(edit))
    assert all(torch.equal(edit.values[label], value) for label, value in sent.values.items())
    assert (sent.mask, sent.fingerprint, sent.provenance["seed"]) == (edit.mask, edit.fingerprint, 0)


def test_a_format_without_candidates_is_scored_by_whole_answers(llama):
    task = tiny.task(llama)
    bare = replace(task.forget, candidates=None)
    plan = quick(replace(task, formats={**task.formats, "spelled": mu.tasks.Format(bare, bare)}))
    assert {"spelled", "retain, spelled"} <= set(plan.tests)
    assert all(plan.tests[name].func is mu.evaluate.whole_answers for name in ("spelled", "retain, spelled"))


def test_names_that_are_taken_are_refused(llama):
    with pytest.raises(ValueError, match="got random=-1"):
        audit(llama, tiny.task(llama), edited(llama), random=-1, progress=False)
    for name in ("edit", "never knew", "random"):
        others = {name: edited(llama)}
        with pytest.raises(ValueError, match=f"got '{name}': rename it"):
            audit(llama, tiny.task(llama), edited(llama), editor=steps, others=others, progress=False)
    with pytest.raises(ValueError, match="each column of an audit once, got 'x' twice"):
        _ = Plan(asked, {"x": asked}, {}, {"x": asked}, {}).tests


@pytest.mark.parametrize("budget", [quick, full])
def test_a_task_without_formats_has_no_audit(llama, budget):
    with pytest.raises(ValueError, match="expected a format of the task"):
        budget(replace(tiny.task(llama), formats={}))


@pytest.mark.parametrize("budget", [quick, full])
def test_both_budgets_have_every_kind_of_test(llama, budget):
    task = tiny.task(llama)
    plan = budget(task)
    assert set(plan.kinds.values()) == {"clean", "asked", "latent", "attack", "damage"}
    assert list(plan.tests) == list(plan.kinds)
    assert "question" in plan.asked
    assert "retain, question" in plan.damage
    assert "other knowledge" not in budget(replace(task, knowledge=None)).damage


def test_a_forget_set_that_is_too_small_to_split_says_so_in_the_cells_of_attacks(llama):
    task = tiny.task(llama)
    one = task.formats["trained prompt"].forget[:1]
    task = replace(task, forget=one, formats={"trained prompt": mu.tasks.Format(one, task.retain)})
    plan = quick(task)
    chosen = replace(plan, latent={}, damage={}, attacks={"few-shot": plan.attacks["few-shot"]})
    found = audit(llama, task, edited(llama), budget=lambda task: chosen, progress=False)
    assert "expected at least two forgotten facts" in found.report.errors["error"].iloc[0]
    assert not any(math.isnan(value) for value in found.table["clean"].tolist())
