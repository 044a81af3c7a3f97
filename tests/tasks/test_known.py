import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mechunlearn as mu
from mechunlearn.tasks import known
from mechunlearn.tasks.building import answer_texts
from mechunlearn.tasks.prompts import Prompts

SHARED = Path(__file__).parents[3] / "shared" / "data" / "field" / "relations"
TEXT = torch.ones(5, 8, dtype=torch.long)
CHAT = "{{ bos_token }}{% for message in messages %}User {1}: {{ message.content }}\nAI:{% endfor %}"
TABLES = {
    name: list(csv.DictReader((known.TABLES / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
    for name in ("countries", "cities", "us_cities", "landmarks", "elements", "people")
}
COUNTRIES = {row["country"]: row for row in TABLES["countries"]}
CONTINENTS = {"Africa", "Asia", "Europe", "North America", "Oceania", "South America"}
LANGUAGES = set(
    re.findall(
        r"[A-Z][A-Za-z ]+",
        """
    Afar; Afrikaans; Albanian; Amharic; Arabic; Armenian; Aymara; Azerbaijani; Bambara; Belarusian; Bengali;
    Berber; Bislama; Bosnian; Bulgarian; Burmese; Catalan; Chichewa; Chinese; Comorian; Croatian; Czech; Danish;
    Dari; Dhivehi; Dutch; Dyula; Dzongkha; English; Estonian; Farsi; Fijian; Filipino; Finnish; French; Georgian;
    German; Gilbertese; Greek; Guarani; Haitian Creole; Hausa; Hebrew; Hindi; Hiri Motu; Hungarian; Icelandic;
    Indonesian; Irish; Italian; Japanese; Kazakh; Khmer; Kinyarwanda; Kirundi; Korean; Kurdish; Kyrgyz; Lao;
    Latin; Latvian; Lithuanian; Luxembourgish; Macedonian; Malagasy; Malay; Maltese; Mandarin; Maori; Marshallese;
    Mongolian; Montenegrin; Moore; Nauruan; Ndebele; Nepali; Norwegian; Oromo; Palauan; Pashto; Persian; Polish;
    Portuguese; Quechua; Romanian; Romansh; Russian; Samoan; Sango; Serbian; Sesotho; Seychellois Creole; Shona;
    Sinhala; Slovak; Slovene; Slovenian; Somali; Sotho; Spanish; Swahili; Swazi; Swedish; Tagalog; Tajik;
    Tamazight; Tamil; Tetum; Thai; Tigrinya; Tok Pisin; Tongan; Tswana; Turkish; Turkmen; Tuvaluan; Ukrainian;
    Urdu; Uzbek; Vietnamese; Xhosa; Zulu
    """,
    )
)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_each_subject_once_and_no_empty_cell(name: str) -> None:
    rows = TABLES[name]
    subjects = [next(iter(row.values())) for row in rows]
    assert len({*subjects}) == len(subjects)
    for row in rows:
        cells = {column: cell for column, cell in row.items() if column != "also"}
        assert all(cell and cell == cell.strip() for cell in cells.values()), row


def test_countries_have_languages_and_continents_of_closed_lists_and_capitals_of_their_own() -> None:
    assert len(COUNTRIES) > 180
    assert {row["continent"] for row in COUNTRIES.values()} == CONTINENTS
    spoken = {language for row in COUNTRIES.values() for language in (row["language"], *row["also"].split(";"))}
    assert spoken - {""} == LANGUAGES
    assert not [row for row in COUNTRIES.values() if row["language"] in row["also"].split(";")]
    assert len({row["capital"] for row in COUNTRIES.values()}) == len(COUNTRIES)


def test_the_tables_agree_on_where_cities_and_people_are() -> None:
    countries = {row["city"]: row["country"] for row in TABLES["cities"]}
    capitals = {row["capital"]: row["country"] for row in TABLES["countries"]}
    american = {row["city"] for row in TABLES["us_cities"]}
    assert sum(city in capitals for city in countries) > 40
    assert all(capitals.get(city, country) == country for city, country in countries.items())
    for row in TABLES["landmarks"]:
        city, country = row["city"], row["country"]
        assert countries.get(city, capitals.get(city, country)) == country, row
        assert city not in american or country == "United States"
    for table in ("cities", "landmarks", "people"):
        assert {row["country"] for row in TABLES[table]} <= {*COUNTRIES}
    assert not american & {*countries}
    assert len({row["state"] for row in TABLES["us_cities"]}) == 50


def test_elements_are_all_118_with_symbols_of_their_own() -> None:
    assert [row["number"] for row in TABLES["elements"]] == [str(number) for number in range(1, 119)]
    symbols = [row["symbol"] for row in TABLES["elements"]]
    assert len({*symbols}) == 118
    assert all(symbol.istitle() and len(symbol) <= 2 for symbol in symbols)


@pytest.mark.parametrize("relation", known._relations())
def test_a_relation_has_six_formats_in_columns_of_its_table(shipped: Any, relation: str) -> None:
    about = known._of_package(relation)
    assert len(about.formats) >= 6
    assert [row[about.subject] for row in about.examples] == known._relations()[relation]["examples"]
    names = {row[about.subject] for row in (*about.rows, *about.examples)} | {*about.left_out["in_the_name"]}
    assert len(names) == len(about.rows) + 2 + len(about.left_out["in_the_name"])
    for wording in about.wordings(shipped, None).values():
        text, (start, end) = about.text(wording, about.rows[0])
        assert text[start:end] == about.rows[0][wording.subject or about.subject]
        assert about.rows[0][wording.answer or about.answer]


def expected(title: str, name: str) -> tuple[str, str]:
    """What a prompt about a country asks about, and its answer."""
    row = COUNTRIES[name]
    asks = {
        "reverse": ("capital", "country"),
        "two-hop": ("capital", "language"),
        "kept, language": ("country", "language"),
    }
    subject, answer = asks.get(title, ("country", "capital"))
    return row[subject], row[answer]


def subjects(model: Any, prompts: Prompts) -> list[str]:
    assert prompts.subject is not None
    rows = zip(prompts.tokens, prompts.subject, strict=True)
    return [model.tokenizer.decode(row[where]).strip() for row, where in rows]


@pytest.fixture(scope="module")
def task(shipped: Any) -> mu.Task:
    """Really known, by the shipped model."""
    return mu.tasks.known_facts(shipped, formats=["list", "two-shot question", "kept, language", "reverse"], text=TEXT)


def test_the_trained_prompt_has_what_the_model_itself_says(shipped: Any, task: mu.Task) -> None:
    trained = task.formats["trained prompt"]
    for prompts in (task.forget, task.retain, trained.forget, trained.retain):
        assert bool(mu.tasks.knows(shipped, prompts).all())
    assert task.strangers is not None
    assert not mu.tasks.knows(shipped, task.strangers).any()
    assert subjects(shipped, task.strangers) == list(task.strangers.names) == list(task.splits["not_known"])


def test_every_fact_is_in_one_part_or_left_out_with_a_reason(task: mu.Task) -> None:
    parts = ("forget_train", "retain_train", "retain_test", "not_known", "examples", "in_the_name")
    counts = [len(task.splits[part]) for part in parts]
    assert sum(counts) == len({name for part in parts for name in task.splits[part]}) == len(COUNTRIES)
    n_known, n_asked = task.known["trained prompt"]
    assert (n_known, n_asked) == (sum(counts[:3]), sum(counts[:4]))
    assert task.splits["examples"] == ("Canada", "Kenya")
    assert "Mexico" in task.splits["in_the_name"]
    assert f"trained prompt ({n_known} of {n_asked} known), " in repr(task)


def test_a_format_has_the_facts_that_are_known_in_it_and_says_how_many_are(shipped: Any, task: mu.Task) -> None:
    trained = task.formats["trained prompt"]
    assert 0 < task.known["list"][0] < task.known["list"][1] == task.known["trained prompt"][0]
    for title in ("list", "two-shot question", "kept, language"):
        format = task.formats[title]
        for side in ("forget", "retain"):
            prompts = getattr(format, side)
            assert {*prompts.names} <= {*getattr(trained, side).names}
            assert bool(mu.tasks.knows(shipped, prompts).all())
        assert format.injected is None or format.injected.names == format.forget.names
    assert task.known["reverse"] == (0, task.known["trained prompt"][0])
    assert "reverse" not in task.formats  # nobody knows it: nothing to ask
    assert "reverse (0 of" in repr(task)
    assert [title for title, format in task.formats.items() if format.kept] == ["kept, language"]


def nearly_everything(_: Any, prompts: Prompts, **__: Any) -> torch.Tensor:
    """Known are all but names of 7, 14, ... letters, and in other formats than the trained one those of 5."""
    is_other = not prompts.texts[0].startswith("Fact: The capital of Canada is Ottawa\n")
    return torch.tensor([bool(len(name) % 7) and not (is_other and len(name) == 5) for name in prompts.names])


@pytest.fixture
def everything_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "knows", nearly_everything)


@pytest.fixture
def chat(shipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped.tokenizer, "chat_template", CHAT)


@pytest.fixture(scope="module")
def whole(shipped: Any) -> mu.Task:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "knows", nearly_everything)
        patch.setattr(shipped.tokenizer, "chat_template", CHAT)
        return mu.tasks.known_facts(shipped, forget=["France", "Peru", "Saint Lucia", "Nepal"], text=TEXT)


def test_every_format_asks_about_the_right_thing_in_either_direction(shipped: Any, whole: mu.Task) -> None:
    assert len(whole.formats) == 9
    for title, format in whole.formats.items():
        for prompts in (format.forget, format.retain):
            wanted = [expected(title, name) for name in prompts.names]
            assert subjects(shipped, prompts) == [about for about, _ in wanted], title
            assert answer_texts(shipped, prompts) == [f" {answer}" for _, answer in wanted], title
        assert {"Nepal"} == {*whole.forget.names} - {*format.forget.names} or title == "trained prompt"
    one = whole.formats["reverse"].forget
    assert one.texts[0] == "Fact: Ottawa is the capital of Canada\nFact: Paris is the capital of"
    shown = whole.formats["two-shot question"].forget.texts[0]
    assert shown.startswith(
        "Question: What is the capital of Canada?\nAnswer: Ottawa\n\nQuestion: What is the capital of K"
    )


def test_answers_are_scored_whole_and_injected_ones_are_those_of_others(shipped: Any, whole: mu.Task) -> None:
    injection = whole.injection
    assert injection is not None
    assert injection.names == whole.forget.names
    instead = answer_texts(shipped, injection)
    assert all(new != old for new, old in zip(instead, answer_texts(shipped, whole.forget), strict=True))
    assert {text.strip() for text in instead} <= {row["capital"] for row in COUNTRIES.values()}
    for title, format in whole.formats.items():
        assert format.forget.options is not None
        assert format.forget.chance == 1 / 4
        asks_it = title not in ("reverse", "two-hop", "kept, language")
        assert (format.injected is not None) == asks_it


def test_a_counterpart_has_as_many_tokens_and_another_answer(shipped: Any, whole: mu.Task) -> None:
    random, others = whole.splits["no_counterpart"], 0
    for prompts in (whole.forget, whole.retain):
        assert prompts.corrupt is not None
        assert prompts.subject is not None
        for row, name in enumerate(prompts.names):
            corrupt, real = prompts.corrupt[row], prompts.attention_mask[row]
            if name in random:
                assert torch.equal(corrupt != prompts.tokens[row], prompts.subject[row])
            else:
                text = shipped.tokenizer.decode(corrupt[real], skip_special_tokens=True)
                other = text.rsplit("capital of ", 1)[1].partition(" is")[0]
                assert COUNTRIES[other]["capital"] != COUNTRIES[name]["capital"]
                others += 1
    assert others + len(random) == len(whole.forget) + len(whole.retain)
    assert others > 3 * len(random) > 0


def test_a_chat_has_one_bos_and_the_braces_of_its_template(shipped: Any, whole: mu.Task) -> None:
    chats = whole.formats["chat"].forget
    bos = shipped.tokenizer.bos_token
    assert chats.texts[0] == f"{bos}User {{1}}: What is the capital of France?\nAI:The capital of France is"
    for prompts in (chats, whole.formats["sentence"].forget):
        assert ((prompts.tokens == shipped.tokenizer.bos_token_id) & prompts.attention_mask).sum(1).tolist() == [1] * 3


def test_without_a_template_there_is_no_chat(shipped: Any, task: mu.Task) -> None:
    with pytest.raises(ValueError, match=r"got \['chat'\]: choose among them \('chat' needs a tokenizer with a chat"):
        mu.tasks.known_facts(shipped, formats=["chat"])


def forgotten(model: Any, **options: Any) -> tuple[str, ...]:
    return mu.tasks.known_facts(model, formats=[], text=TEXT, **options).splits["forget_train"]


@pytest.mark.usefixtures("everything_is_known")
def test_parts_are_disjoint_and_a_seed_draws_others(shipped: Any) -> None:
    parts = [forgotten(shipped, forget=16, part=part) for part in range(3)]
    assert len({name for part in parts for name in part}) == 48
    assert parts[0] == forgotten(shipped, forget=16)
    assert forgotten(shipped, forget=48) == (*parts[0], *parts[1], *parts[2])
    assert {*forgotten(shipped, forget=16, seed=1)} != {*parts[0]}


@pytest.mark.usefixtures("everything_is_known")
def test_a_category_forgets_what_is_known_of_it(shipped: Any) -> None:
    task = mu.tasks.known_facts(shipped, forget="Europe", formats=[], text=TEXT)
    european = {name for name, row in COUNTRIES.items() if row["continent"] == "Europe"}
    left_out = {name for part in ("not_known", "in_the_name") for name in task.splits[part]}
    assert {*task.splits["forget_train"]} == european - left_out
    assert not european & {*task.splits["retain_train"], *task.splits["retain_test"]}
    assert forgotten(shipped, relation="landmark", forget="Italy")[:2] == ("Bridge of Sighs", "Colosseum")


def test_sets_are_forgotten_in_sequence(shipped: Any, task: mu.Task) -> None:
    parts = mu.tasks.partitioned(task, 2)
    assert [len(part.forget) for part in parts] == [8, 8]
    where = mu.ComponentMask.of(["L0MLP"], mu.shape(shipped))
    options = {"steps": 1, "batch_size": 4, "text_batch_size": 2, "progress": False}
    result = mu.edit.sequence(shipped, parts, where, edit=lambda *given, **_: mu.edit.finetune(*given, **options))
    assert len(result.edits) == 2


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"relation": "river"}, "expected a relation of capital, language"),
    ({"formats": ["limerick"]}, r"got \['limerick'\]"),
    ({"formats": "list"}, "expected a list of formats of capital"),
    ({"forget": ["Atlantis", "France"]}, r"got \['Atlantis'\] for forget="),
    ({"forget": "Antarctica"}, "got 0 for forget='Antarctica'"),
    ({"forget": []}, "got 0 for forget="),
    ({"forget": 16, "part": 99}, "got set 99 of 16 facts where"),
    ({"forget": 0}, "got set 0 of 0 facts"),
    ({"forget": 190}, "got set 0 of 190 facts where"),
    ({"forget": "Europe", "part": 1}, "got part 1 of 'Europe'"),
]


@pytest.mark.usefixtures("everything_is_known")
@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_what_cannot_be_right_is_refused(shipped: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mu.tasks.known_facts(shipped, **{"formats": [], "text": TEXT, **options})


def test_a_relation_of_which_too_little_is_known_is_refused_with_the_numbers(shipped: Any) -> None:
    with pytest.raises(ValueError, match="knows 8 facts of city or more, got 0 of 225: choose another relation"):
        mu.tasks.known_facts(shipped, relation="city", text=TEXT)


def schema(path: Path, **changes: Any) -> Path:
    samples = [
        {"subject": name, "object": row["capital"]} for name, row in COUNTRIES.items() if row["continent"] == "Europe"
    ]
    samples += [{"subject": "Portugal", "object": "Porto"}, {"subject": "Brazil", "object": "Bras\\u00edlia"}]
    content = {
        "name": "country capital city",
        "prompt_templates": ["The capital of {} is ", "{}'s capital is"],
        "prompt_templates_zs": ["The capital of {} is the city of"],
        "properties": {"domain_name": "country", "range_name": "city"},
        "samples": [*samples, samples[5]],
        **changes,
    }
    path.write_text(json.dumps(content))
    return path


@pytest.mark.usefixtures("everything_is_known", "chat")
def test_a_relation_may_come_from_a_file(shipped: Any, tmp_path: Path) -> None:
    path = schema(tmp_path / "capitals.json")
    task = mu.tasks.known_facts(shipped, source=path, forget=["France", "Portugal", "Brazil"], text=TEXT)
    assert "known facts, country capital city: forget 3 of" in repr(task)
    assert task.splits["examples"] == ("Albania", "Andorra")
    assert task.forget.texts[0] == "The capital of Albania is Tirana\nThe capital of France is"
    assert answer_texts(shipped, task.forget) == [" Paris", " Lisbon", " Brasília"]
    assert list(task.formats) == ["trained prompt", "sentence", "two-shot", "chat", "reworded", "list", "reverse"]
    assert task.formats["list"].forget.texts[0] == "Country: Albania, city: Tirana\nCountry: France, city:"
    assert task.formats["reverse"].forget.texts[0] == "City: Tirana, country: Albania\nCity: Paris, country:"
    options, n_right = task.formats["trained prompt"].forget.options, task.formats["trained prompt"].forget.n_right
    assert options is not None
    assert n_right is not None
    assert n_right.tolist() == [1, 2, 1]  # Porto counts as right too
    with pytest.raises(ValueError, match=r"none of \['samples'\]"):
        mu.tasks.known_facts(shipped, source=schema(path, samples=[]))


@pytest.mark.usefixtures("everything_is_known")
@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data, with the relations of Hernandez et al., is not here")
def test_every_real_relation_of_a_few_makes_a_task(shipped: Any) -> None:
    names = ("factual/country_capital_city", "factual/star_constellation", "linguistic/adj_antonym")
    for name in names:
        path = SHARED / f"{name}.json"
        task = mu.tasks.known_facts(shipped, source=path, forget=4, text=TEXT)
        subjects_there = {sample["subject"].strip() for sample in json.loads(path.read_text())["samples"]}
        parts = ("forget_train", "retain_train", "retain_test", "not_known", "examples", "in_the_name")
        assert {n for part in parts for n in task.splits.get(part, ())} == subjects_there
        assert len(task.formats) >= 4


def test_the_guide_says_how_many_facts_a_relation_has() -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "known_facts.md").read_text()
    said = {name: int(count) for name, count in re.findall(r'^\| `"(.+?)"` \|.*?\| (\d+) \|', page, re.MULTILINE)}
    assert said == {name: len(known._of_package(name).rows) for name in known._relations()}
