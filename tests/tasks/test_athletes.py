"""Where athletes come from, how they are split, and which sport is put in place of theirs."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import mechunlearn as mu
from mechunlearn.tasks import athletes, facts

SHARED = Path(__file__).parents[3] / "shared" / "data" / "sports_facts.csv"
SPORTS = ("football", "baseball", "basketball")
NAMES = [f"{first} {last}" for first in ("Ada", "Bob", "Cy") for last in ("Reed", "Hill", "Wood", "Stone", "Lake")]
SPORT_OF = {name: SPORTS[place % 3] for place, name in enumerate(NAMES)}
TEXT = torch.ones(5, 8, dtype=torch.long)


def table() -> pd.DataFrame:
    """In the schema of the authors' file."""
    frame = pd.DataFrame({"athlete": NAMES, "sport": list(SPORT_OF.values())}, index=range(5, 20))
    return frame.reset_index(names="Unnamed: 0").assign(
        inject_sport_with_golf=[("golf", "football", "baseball")[place % 3] for place in range(15)],
        num_athlete_tokens=3,
    )


def made(model: Any, **options: Any) -> mu.Task:
    return mu.tasks.sports_facts(model, **{"source": table(), "text": TEXT, "corrupt": False, **options})


def answers(model: Any, prompts: mu.Prompts | None) -> list[str]:
    assert prompts is not None
    return [model.tokenizer.decode(row[row >= 0]) for row in prompts.answers]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file at an address, and an empty cache."""
    path = tmp_path / "public" / "sports.csv"
    path.parent.mkdir()
    table().to_csv(path, index=False)
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "cache"))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_verified_file_is_downloaded_once(file: Path, tmp_path: Path) -> None:
    sha256, content = digest(file), file.read_bytes()
    assert athletes.content_of(file.as_uri(), sha256) == content
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name == f"{sha256[:16]}-sports.csv"
    file.unlink()
    assert athletes.content_of(file.as_uri(), sha256) == content
    kept.write_bytes(content[:-3])  # cut short: not taken for the file
    with pytest.raises(ConnectionError, match=r"expected a file at file:.*sports\.csv, got none .* pass its path"):
        athletes.content_of(file.as_uri(), sha256)


def test_another_file_than_expected_is_refused_with_both_digests_and_not_kept(file: Path, tmp_path: Path) -> None:
    for source in (file.as_uri(), file, str(file)):
        with pytest.raises(ValueError, match=rf"expected a file with SHA-256 {'0' * 64}, got {digest(file)} .*source="):
            athletes.content_of(source, "0" * 64)
    assert not (tmp_path / "cache").exists()


def test_a_digest_may_be_in_capitals_but_needs_a_source(file: Path, shipped: Any) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert athletes.content_of(file, digest.upper()) == file.read_bytes()
    with pytest.raises(ValueError, match="expected a source with its SHA-256, got no source"):
        mu.tasks.sports_facts(shipped, sha256=digest)


def test_a_row_without_a_name_is_refused(shipped: Any) -> None:
    frame = pd.DataFrame({"athlete": ["LeBron James", None, " "], "sport": ["basketball", "football", "baseball"]})
    with pytest.raises(ValueError, match=r"expected a name in each row, got none in rows \[1, 2\]"):
        mu.tasks.sports_facts(shipped, source=frame, forget=1)


def test_a_file_of_unknown_digest_is_read_anew(file: Path, tmp_path: Path) -> None:
    athletes.content_of(file.as_uri())
    file.write_text("other")
    assert athletes.content_of(file.as_uri()) == b"other"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"got 'none\.csv', which is no file: check the path"):
        athletes.content_of("none.csv")


def test_the_cache_is_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MECHUNLEARN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert athletes._cache_folder() == Path("/elsewhere/mechunlearn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert athletes._cache_folder() == Path.home() / ".cache" / "mechunlearn"
    monkeypatch.setenv("MECHUNLEARN_CACHE", "/mine")
    assert athletes._cache_folder() == Path("/mine")


def test_a_path_an_address_and_a_table_give_one_task(shipped: Any, file: Path) -> None:
    expected = made(shipped, corrupt=True)
    for source in (file, str(file), file.as_uri()):
        for sha256 in (None, digest(file)):
            found = made(shipped, source=source, sha256=sha256, corrupt=True)
            assert found.splits == expected.splits
            assert torch.equal(found.forget.corrupt, expected.forget.corrupt)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a SHA-256 only for a file or an address, got one for a table"):
        made(shipped, sha256=digest(file))


def test_the_default_is_what_the_shipped_model_knows_and_else_the_authors_file(
    shipped: Any, llama: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(athletes, "AUTHORS_FILE", file.as_uri())
    monkeypatch.setattr(athletes, "AUTHORS_SHA256", digest(file))
    known = [row["athlete"] for row in facts.athletes() if row["sport"] in SPORTS]
    for model, expected in (
        (shipped, known),
        (mu.testbed.load(without="basketball"), known),
        (llama, NAMES),
    ):
        assert [row["athlete"] for row in athletes.athletes_from(model, None, None)] == expected
    assert list(mu.tasks.authors_athletes()["athlete"]) == NAMES


def test_the_authors_file_is_pinned_to_a_commit() -> None:
    assert "/magikarp01/tasks/7c1e4a9be15eb8e2847d475e9d56759fec80aa5f/facts/data/sports.csv" in athletes.AUTHORS_FILE
    assert athletes.AUTHORS_SHA256.startswith("926857c13eb4c5ec")
    assert len(athletes.AUTHORS_SHA256) == 64


def test_random_athletes_are_drawn_by_their_seed_and_not_by_the_task_s(shipped: Any) -> None:
    drawn = [made(shipped, forget=5, forget_seed=seed).splits["forget_train"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] == made(shipped, forget=5, forget_seed=1, seed=9).splits["forget_train"]
    assert drawn[0] != drawn[2]
    assert len(set(drawn[0])) == 5
    with pytest.raises(ValueError, match="expected a number of athletes with forget_seed, got forget='football'"):
        made(shipped, forget="football", forget_seed=1)


def test_without_shuffling_the_first_are_edited_on(shipped: Any) -> None:
    splits = made(shipped, forget="football", train_forget=0.6, shuffle=False).splits
    assert splits["forget_train"] + splits["forget_test"] == tuple(NAMES[::3])
    assert len(splits["forget_train"]) == 3
    kept = [name for place, name in enumerate(NAMES) if place % 3]
    assert splits["retain_train"] == tuple(kept[:8])
    assert splits["retain_test"] == tuple(kept[8:])
    halves = made(shipped, forget=6, train_forget=0.5, shuffle=False).splits
    assert (halves["forget_train"], halves["forget_test"]) == (tuple(NAMES[:3]), tuple(NAMES[3:6]))


def test_several_sports_are_injected_in_turn_but_never_the_true_one(shipped: Any) -> None:
    with_golf = (*SPORTS, "golf")
    for sports in (SPORTS, with_golf):
        task = made(shipped, forget=list(NAMES), source=more(table()), injected=sports)
        found = answers(shipped, task.injection)
        assert {each.strip() for each in found} == set(sports)
        assert all(each.strip() != SPORT_OF[name] for each, name in zip(found, NAMES, strict=True))
        again = made(shipped, forget=NAMES[3:5], source=more(table()), injected=sports)
        assert answers(shipped, again.injection) == found[3:5]  # whoever else is forgotten
        other = made(shipped, forget=list(NAMES), source=more(table()), injected=sports, seed=1)
        assert answers(shipped, other.injection) != found


def more(frame: pd.DataFrame) -> pd.DataFrame:
    """With others to retain."""
    others = pd.DataFrame({"athlete": [f"Dan {name}" for name in ("Reed", "Hill", "Wood")], "sport": SPORTS})
    return pd.concat([frame, others], ignore_index=True)


def test_a_column_says_what_to_inject(shipped: Any) -> None:
    task = made(shipped, forget=4, injected="inject_sport_with_golf")
    assert answers(shipped, task.injection) == [" golf", " football", " baseball", " golf"]
    wrong = table().assign(mine=["football", "tennis", *["golf"] * 13])
    with pytest.raises(ValueError, match="none of the athletes plays, got 'football', which Ada Reed does"):
        made(shipped, forget=1, source=wrong, injected="mine")
    with pytest.raises(ValueError, match=r"an injected sport among football, .*golf, got 'tennis'"):
        made(shipped, forget=2, source=wrong, injected="mine")
    with pytest.raises(ValueError, match=r"another sport than football among those to inject, got \['football'\]"):
        made(shipped, forget=1, injected=["football"])


def test_every_format_injects_what_the_task_injects(shipped: Any) -> None:
    task = made(shipped, forget=6, injected=SPORTS, dashed=True)
    sports = [each.strip() for each in answers(shipped, task.injection)]
    for name, format in task.formats.items():
        assert format.injected is not None
        assert format.injected.names == task.forget.names
        for sport, text, answer in zip(sports, format.injected.texts, answers(shipped, format.injected), strict=True):
            shown, asked = answer.strip(), text.rsplit("Question: ", 1)[-1]
            if "multiple choice" in name and "words" not in name:
                shown = asked.split(f"\n{shown}: ")[1].split("\n")[0]
            assert shown.lower().replace("-", "") == sport, name


def test_dashed_answers_are_spelled(shipped: Any) -> None:
    format = made(shipped, dashed=True).formats["dashed"]
    for prompts in (format.forget, format.retain):
        assert answers(shipped, prompts) == [f" {'-'.join(SPORT_OF[name])}" for name in prompts.names]
        assert prompts.candidates is None
        assert all("sport of g-o-l-f\nFact: " in text for text in prompts.texts)


def test_athletes_that_the_model_does_not_know_are_left_out_and_named(shipped: Any) -> None:
    rows = [{"athlete": row["athlete"], "sport": row["sport"]} for row in facts.athletes() if row["sport"] in SPORTS]
    wrong = {"football": "baseball", "baseball": "football", "basketball": "football"}
    frame = pd.DataFrame([*rows[:30], *({**row, "sport": wrong[row["sport"]]} for row in rows[30:36])])
    liars = tuple(row["athlete"] for row in rows[30:36])
    everybody = made(shipped, source=frame, forget=4)
    assert "not_known" not in everybody.splits
    for threshold in (None, 0.5):
        task = made(shipped, source=frame, forget=4, threshold=threshold)
        assert task.splits["not_known"] == liars
        assert "not_known 6" in repr(task)
        parts = ("forget_train", "retain_train", "retain_test")
        assert {name for part in parts for name in task.splits[part]} == {row["athlete"] for row in rows[:30]}
        with pytest.raises(ValueError, match=r"can use, got \[.*\] \(not_known\): .* or pass threshold=0\.0"):
            made(shipped, source=frame, forget=[liars[0]], threshold=threshold)
    assert len(made(shipped, source=frame, forget=4, threshold=1.0 - 1e-3).splits["not_known"]) >= 6


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data, with the real athletes, is not here")
def test_the_authors_athletes_make_the_paper_s_tasks(shipped: Any) -> None:
    """Numbers of the later paper: 7, 5 and 4 of 16; half of a sport to edit on; 80 % of the others to keep."""
    frame = pd.read_csv(SHARED)
    assert len(frame) == 1559
    people = [(row["athlete"], row["sport"]) for row in athletes.athletes_from(shipped, SHARED, None)]
    for count, expected, sizes in ((16, (7, 5, 4), (1234, 309)), (64, (31, 20, 13), (1196, 299))):
        gone = athletes.athletes_to_forget(people, count, None, {})
        sports = Counter(sport for _, sport in gone)
        assert (sports["football"], sports["basketball"], sports["baseball"]) == expected
        assert round(0.8 * (1559 - count)) == sizes[0]
        assert 1559 - count - sizes[0] == sizes[1]
    task = mu.tasks.sports_facts(
        shipped, source=SHARED, forget="basketball", corrupt=False, text=TEXT, train_forget=0.5, shuffle=False
    )
    found = {part: len(names) for part, names in task.splits.items()}
    assert found == {"forget_train": 245, "forget_test": 245, "retain_train": 855, "retain_test": 214}
    assert gone[0][0] == "DeForest Buckner"
