"""The shipped model: what it knows, how it knows it, and that the script gives it again."""

import json
import random

import pytest
import torch
from conftest import HAS_HOOKED
from testbed import batches, corpus, measure, tokenizer, train

import mechunlearn as mu
from mechunlearn.testbed.loading import WEIGHTS, load_huggingface

CARD = json.loads((WEIGHTS.parent / "card.json").read_text())
PARAPHRASES = [name for name in corpus.SPORT_FORMATS if name != "fact" and "multiple_choice" not in name]
ATTRIBUTES = [name for name in CARD["formats"] if "/" in name]


def test_the_weights_are_small():
    """Those of the model with its tokenizer, and those of the twin, 8 MB each."""
    sizes = {path.name: path.stat().st_size for path in WEIGHTS.iterdir()}
    twins = sum(size for name, size in sizes.items() if name.startswith("without_"))
    assert twins <= 8 * 2**20
    assert sum(sizes.values()) - twins <= 8 * 2**20


def test_the_trained_prompt_is_known_for_athletes_never_trained_in_it():
    assert CARD["formats"]["fact"]["held_out"] >= 0.98


@pytest.mark.parametrize("name", PARAPHRASES)
def test_every_paraphrase_is_known_for_athletes_never_trained_in_it(name):
    assert CARD["formats"][name]["held_out"] >= 0.97


@pytest.mark.parametrize("name", ["multiple_choice", "system_multiple_choice"])
def test_multiple_choice_with_shuffled_options_is_answered(name):
    assert CARD["formats"][name]["held_out"] >= 0.95


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_other_attributes_are_known(name):
    assert CARD["formats"][name]["held_out"] >= 0.95


def test_general_knowledge_is_answered_by_letter():
    assert CARD["general_knowledge"]["multiple_choice"]["held_out"] >= 0.90


def test_the_fact_is_looked_up_by_lower_mlps_at_the_subject():
    ablations = CARD["ablations"]
    assert ablations["none"]["sports"] - ablations["upper_mlps"]["sports"] <= 0.05
    assert ablations["none"]["vocabulary"] - ablations["upper_mlps"]["vocabulary"] <= 0.05
    assert abs(ablations["lower_mlps_at_subject"]["sports"] - 1 / 3) <= 0.10


@pytest.mark.parametrize("name", ["fact", "question", "multiple_choice"])
def test_the_cards_numbers_are_the_shipped_models(name):
    """On 60 of the card's held-out pairs: within three standard errors and one flipped answer."""
    model, vocabulary = load_huggingface()
    people = [p for p in corpus.athletes() if (p.name, name) in corpus.held_out_pairs()][:60]
    documents = [corpus.sport_document(person, name, random.Random(1)) for person in people]
    expected = CARD["formats"][name]["held_out"]
    found = measure.accuracy(model, vocabulary.backend_tokenizer, documents)
    error = (expected * (1 - expected) / len(people)) ** 0.5
    assert abs(found - expected) <= 3 * error + 1 / len(people)


def test_held_out_pairs_are_in_no_training_document():
    never = {
        corpus.sport_document(person, name, random.Random(0)).text
        for person in corpus.athletes()
        for name in ("fact", *PARAPHRASES)
        if (person.name, name) in corpus.held_out_pairs()
    }
    trained = {document.text for number in range(2) for document in corpus.epoch(number)}
    assert len(never) > 500
    assert not never & trained


def test_without_a_sport_nobody_who_plays_it_is_in_a_document():
    names = [person.name for person in corpus.athletes() if person.sport == "basketball"]
    text = "\n".join(document.text for document in corpus.epoch(0, without="basketball"))
    assert [name for name in names if name in text] == []
    assert "Tom Brady" in text


@pytest.mark.nightly
def test_training_twice_gives_the_same_bits():
    vocabulary = tokenizer.train()
    weights = []
    for _ in range(2):
        model = train.train(vocabulary, steps=2, documents=8, report=lambda *_: None)
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_shipped_tokenizer_is_the_scripts():
    assert json.loads(tokenizer.train().to_str()) == json.loads((WEIGHTS / "tokenizer.json").read_text())


def test_sports_are_one_token_and_names_are_several():
    vocabulary = load_huggingface()[1]

    def pieces(text):
        return vocabulary(text, add_special_tokens=False)["input_ids"]

    for person in corpus.athletes():
        assert len(pieces(f" {person.sport}")) == len(pieces(f" {person.sport.capitalize()}")) == 1
    assert all(len(pieces(f" {letter}")) == 1 for letter in "ABCD")
    lengths = [len(pieces(f" {person.name}")) for person in corpus.athletes()]
    assert min(lengths) >= 2


def test_batches_keep_every_document():
    vocabulary = tokenizer.train()
    documents = corpus.epoch(0)[:50]
    made = batches.batches(batches.examples(vocabulary, documents, random.Random(0)), 1024)
    assert sum(len(batch.tokens) for batch in made) == 50


@pytest.mark.classes
def test_it_loads_as_a_bridge_in_float32_and_evaluation_mode(shipped):
    assert type(shipped).__name__ == "TransformerBridge"
    assert not shipped.training
    assert {parameter.dtype for parameter in shipped.parameters()} == {torch.float32}
    assert mu.shape(shipped).n_layers >= 8


@pytest.mark.classes
def test_it_loads_as_a_hooked_transformer_where_there_is_one(shipped):
    if not HAS_HOOKED:
        with pytest.raises(ImportError, match=r"HookedTransformer needs transformer_lens<4.*use the default"):
            mu.testbed.load(backend=mu.testbed.hooked)
        return
    other = mu.testbed.load(backend=mu.testbed.hooked)
    assert mu.fingerprint(other) == mu.fingerprint(shipped)
    task = mu.tasks.sports_facts(shipped, forget=["LeBron James", "Tom Brady"])
    scores = [mu.localize.attribution_patching(model, task.forget).tensor for model in (shipped, other)]
    assert torch.allclose(*scores, rtol=1e-4, atol=1e-4)
