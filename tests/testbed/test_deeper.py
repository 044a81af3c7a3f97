"""The deeper model: what it knows, where, and that its routes are what they say."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from testbed import batches, corpus, deeper, deeper_route, llama, measure, mechanism
from testbed.deeper_route import FIRST, LAST, OPTION_LAYER, SUBJECT_LAYER, UPPER, Route

import mechunlearn as mu
from mechunlearn.testbed.loading import DEEPER_WEIGHTS, load_huggingface

EVERY = [
    Route(closed, others, rest, only_last)
    for closed in (False, True)
    for others in (frozenset(range(UPPER)), frozenset({1, 3, 4}), frozenset())
    for rest in ("own", "shuffled", "none")
    for only_last in (False, True)
]

CARD = json.loads((DEEPER_WEIGHTS.parent / "deeper_card.json").read_text())


@pytest.fixture(scope="module")
def source():
    return load_huggingface()


@pytest.fixture(scope="module")
def batch(source):
    documents = [corpus.sport_document(person, "fact", random.Random(0)) for person in corpus.athletes()[:6]]
    return batches.batches(batches.examples(source[1].backend_tokenizer, documents, random.Random(0)), 4096)[0]


def test_the_weights_are_small():
    assert sum(path.stat().st_size for path in DEEPER_WEIGHTS.iterdir()) <= 8 * 2**20


def test_it_loads_with_two_layers_more_and_has_no_twin(shipped):
    model = mu.testbed.load(deeper=True)
    assert mu.shape(model).n_layers == mu.shape(shipped).n_layers + 2
    assert model.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"a shipped twin never knew \(none\), got 'basketball'"):
        mu.testbed.load(deeper=True, without="basketball")


def test_a_twin_does_not_take_the_models_place(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["deeper", "--without", "basketball"])
    with pytest.raises(SystemExit):
        deeper.main()
    assert "expected --folder with --without" in capsys.readouterr().err


@pytest.mark.parametrize("name", corpus.SPORT_FORMATS)
def test_sports_are_known_in_every_format_by_athletes_never_trained_in_it(name):
    """The bars of the shipped model, in `test_shipped`."""
    bar = 0.98 if name == "fact" else 0.95 if "multiple_choice" in name else 0.97
    assert CARD["formats"][name]["held_out"] >= bar


def test_positions_and_cities_are_known():
    others = [row["held_out"] for name, row in CARD["formats"].items() if name not in corpus.SPORT_FORMATS]
    assert len(others) == len(corpus.ATTRIBUTE_FORMATS)
    assert min(others) >= 0.94


def test_general_knowledge_is_known():
    assert CARD["general_knowledge"]["prompts"]["trained"] >= 0.98
    assert CARD["general_knowledge"]["multiple_choice"]["held_out"] >= 0.90


@pytest.mark.parametrize("facts", ["sports", "vocabulary"])
def test_any_of_several_mlps_looks_facts_up_and_nothing_else_does(facts):
    """Without them there is left, of sports, what names give away: a probe of the embedding reads it; of general facts,
    the commonest answer of each relation."""
    silenced = {name: accuracy[facts] for name, accuracy in CARD["silenced"].items()}
    answers = {}
    for fact in corpus.general_knowledge():
        answers.setdefault(fact.relation, Counter())[fact.answer] += 1
    guessed = sum(max(counts.values()) for counts in answers.values()) / len(corpus.general_knowledge())
    given_away = {"sports": CARD["probes"]["subject"][0], "vocabulary": guessed}[facts]
    assert silenced["none"] - silenced["MLPs below lookup"] <= 0.02
    assert silenced["none"] - silenced["MLPs above lookup"] <= 0.02
    assert silenced["all of lookup"] <= given_away + 0.15
    for layer in range(FIRST, UPPER):
        assert 0.90 <= silenced[f"MLP {layer}"] < silenced["none"]
        assert silenced[f"lookup but MLP {layer}"] >= 0.85


@torch.no_grad()
def test_without_an_mlp_its_own_subjects_suffer_most():
    model, vocabulary = load_huggingface(DEEPER_WEIGHTS)
    facts = [corpus.knowledge_documents(fact)[0] for fact in corpus.general_knowledge()]
    parts = batches.batches(batches.examples(vocabulary.backend_tokenizer, facts, random.Random(0)), 4096)
    for layer in range(FIRST, UPPER):
        mlp, correct = model.model.layers[layer].mlp, {True: [], False: []}
        for part in parts:
            with mechanism.replaced({mlp: torch.zeros(model.config.hidden_size)}, part.subjects > 0):
                answered = measure.is_correct(model, part)
            own = (deeper_route.own_mlp(part) == layer) & (part.subjects > 0)
            for is_own, is_right in zip(own.any(1).tolist(), answered, strict=True):
                correct[is_own].append(is_right)
        assert sum(correct[True]) / len(correct[True]) < sum(correct[False]) / len(correct[False]), layer


@torch.no_grad()
def test_attention_and_mlps_write_what_they_are_told_where_they_are_told(batch):
    model, _ = load_huggingface(DEEPER_WEIGHTS)
    where, told = batch.subjects > 0, torch.randn(model.config.hidden_size)
    layer = model.model.layers[2]
    seen = []
    with mechanism.replaced({layer.self_attn: told, layer.mlp: told}, where):
        layer.self_attn.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
        layer.mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        model(batch.tokens)
    for output in seen:
        assert torch.equal(output[where], told.expand(int(where.sum()), -1))
        assert not (output[~where] == told).any()
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["fact", "multiple_choice"])
def test_the_cards_numbers_are_the_models(name):
    """On 60 of the card's held-out pairs: within three standard errors and one flipped answer."""
    model, vocabulary = load_huggingface(DEEPER_WEIGHTS)
    people = [p for p in corpus.athletes() if (p.name, name) in corpus.held_out_pairs()][:60]
    documents = [corpus.sport_document(person, name, random.Random(1)) for person in people]
    expected = CARD["formats"][name]["held_out"]
    error = (expected * (1 - expected) / len(people)) ** 0.5
    found = measure.accuracy(model, vocabulary.backend_tokenizer, documents)
    assert abs(found - expected) <= 3 * error + 1 / len(people)


@torch.no_grad()
def test_grown_it_computes_what_the_shipped_model_does(source, batch):
    expected = source[0](batch.tokens).logits
    assert torch.allclose(deeper.grown(source[0]).eval()(batch.tokens).logits, expected, atol=1e-4)


@torch.no_grad()
def test_the_default_route_is_the_model(batch):
    model, _ = load_huggingface(DEEPER_WEIGHTS)
    hidden, _, _ = deeper_route.residual(model, batch, Route())
    assert torch.allclose(model.lm_head(hidden), model(batch.tokens).logits, atol=1e-4)


def test_only_a_subjects_own_mlp_learns_from_what_it_writes_there(batch):
    """By any route, where every token is of one subject: the others get no gradient from what is predicted."""
    model, _ = load_huggingface(DEEPER_WEIGHTS)
    named = replace(batch, subjects=torch.ones_like(batch.subjects))
    owners = {*deeper_route.own_mlp(named).flatten().tolist()}
    assert 1 < len(owners) <= UPPER - FIRST
    for route in EVERY:
        hidden, _, first = deeper_route.residual(model, named, route)
        weights = [layer.mlp.down_proj.weight for layer in model.model.layers[:UPPER]]
        gradients = torch.autograd.grad(hidden.square().sum(), weights, retain_graph=True, allow_unused=True)
        learn = {index for index, each in enumerate(gradients) if each is not None and (each != 0).any()}
        assert learn == (set() if route.closed and route.only_last else owners), route  # then nothing is written at all
        gradients = torch.autograd.grad(first, weights, allow_unused=True)
        assert [each is not None and bool((each != 0).any()) for each in gradients[:FIRST]] == [True] * FIRST


@torch.no_grad()
def test_only_the_others_that_a_route_has_write_at_a_subject(batch, monkeypatch):
    """Where all subjects have the same MLP, and every token is a subject's, another set of weights shows who writes."""
    model, _ = load_huggingface(DEEPER_WEIGHTS)
    monkeypatch.setattr(deeper_route, "own_mlp", lambda batch: torch.full_like(batch.tokens, 4))
    named = replace(batch, subjects=torch.ones_like(batch.subjects))
    routes = [Route(closed=closed, others=frozenset({1, 3}), rest="none") for closed in (False, True)]
    expected = [deeper_route.residual(model, named, route)[0] for route in routes]
    for index, layer in enumerate(model.model.layers[:UPPER]):
        weight = layer.mlp.down_proj.weight.clone()
        layer.mlp.down_proj.weight.normal_()
        found = [deeper_route.residual(model, named, route)[0] for route in routes]
        layer.mlp.down_proj.weight.copy_(weight)
        same = [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
        assert same == [index not in (1, 3, 4)] * 2, index


def test_others_write_in_open_steps_only_and_all_of_them_in_half_of_those():
    rng = random.Random(0)
    routes = [deeper_route.draw(rng, open_share=0.4) for _ in range(2000)]
    opened = [route for route in routes if not route.closed]
    assert all(not route.others for route in routes if route.closed)
    assert len(opened) / len(routes) == pytest.approx(0.4, abs=0.04)
    complete = sum(route.others == frozenset(range(UPPER)) for route in opened)
    assert complete / len(opened) == pytest.approx(0.5, abs=0.06)
    assert not any(route.rest == "own" for route in routes)


def test_a_subject_has_the_mlp_of_its_last_token(batch):
    """Worked out row by row."""
    found = deeper_route.own_mlp(batch)
    for tokens, subjects, own in zip(batch.tokens, batch.subjects, found, strict=True):
        for subject in {*subjects.tolist()} - {0}:
            last = int((subjects == subject).nonzero().max())
            expected = FIRST + int(tokens[last]) % (UPPER - FIRST)
            assert {*own[subjects == subject].tolist()} == {expected}


@torch.no_grad()
def test_above_lookup_nothing_of_a_subject_is_seen_but_what_its_own_mlp_wrote(batch, monkeypatch):
    """Noise in the rest of its residual stream, added by the last attention below, matters only where that is seen."""
    model, _ = load_huggingface(DEEPER_WEIGHTS)
    last, attention = model.model.layers[UPPER - 1], llama.attention
    last.mlp.down_proj.weight.zero_()  # it would read the noise
    noise = 5 * torch.randn(*batch.tokens.shape, model.config.hidden_size) * (batch.subjects > 0)[..., None]

    def noisy(module, *arguments):
        return attention(module, *arguments) + (noise if module is last.self_attn else 0.0)

    for rest, same in (("none", True), ("own", False)):
        monkeypatch.setattr(llama, "attention", attention)
        expected, _, _ = deeper_route.residual(model, batch, Route(closed=True, rest=rest))
        monkeypatch.setattr(llama, "attention", noisy)
        found, _, _ = deeper_route.residual(model, batch, Route(closed=True, rest=rest))
        assert torch.allclose(found, expected, atol=1e-4) == same


@torch.no_grad()
def test_the_rest_is_shuffled_among_subjects_tokens(batch):
    hidden, looked_up = torch.randn(2, *batch.tokens.shape, 8)
    at_subject = batch.subjects > 0
    found = deeper_route._replaced(hidden, looked_up, batch, Route(rest="shuffled"))
    assert torch.equal(found[~at_subject], hidden[~at_subject])
    rest, expected = (each[at_subject].sum(1).sort().values for each in (found - looked_up, hidden - looked_up))
    assert torch.allclose(rest, expected, atol=1e-4)
    assert not torch.allclose(found[at_subject], hidden[at_subject])


@torch.no_grad()
def test_closed_attention_below_sees_a_subject_only_from_within_it(batch):
    """Other names change nothing at later tokens until the upper half."""
    model, _ = load_huggingface(DEEPER_WEIGHTS)
    other = replace(batch, tokens=torch.where(batch.subjects > 0, batch.tokens.roll(1, 0), batch.tokens))
    for layer in model.model.layers[UPPER:]:
        layer.self_attn.o_proj.weight.zero_()
    elsewhere = batch.subjects == 0
    for closed in (True, False):
        one, two = (deeper_route.residual(model, each, Route(closed=closed))[0] for each in (batch, other))
        assert torch.equal(one[elsewhere], two[elsewhere]) == closed


@torch.no_grad()
def test_guided_heads_are_scored_where_the_batch_says(source):
    """The mean negative log-attention of the first heads, worked out from the model's own attention."""
    model, vocabulary = load_huggingface(DEEPER_WEIGHTS)
    documents = [corpus.sport_document(p, "multiple_choice", random.Random(0)) for p in corpus.athletes()[:3]]
    batch = batches.batches(batches.examples(vocabulary.backend_tokenizer, documents, random.Random(0)), 4096)[0]
    model.set_attn_implementation("eager")
    attentions = model(batch.tokens, output_attentions=True).attentions
    expected = 0.0
    for row, looking, subject, option in batch.lookups.tolist():
        for layer, looked_at in ((SUBJECT_LAYER, subject), (OPTION_LAYER, option)):
            expected -= float(attentions[layer][row, :4, looking, looked_at].log().mean())
    assert len(batch.lookups)
    assert float(deeper_route.residual(model, batch, Route())[1]) == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_with_the_last_alone_attention_reaches_the_answer_through_them_only(batch):
    model, _ = load_huggingface(DEEPER_WEIGHTS)
    for layer in model.model.layers[LAST:]:
        layer.mlp.down_proj.weight.zero_()
    hidden, _, _ = deeper_route.residual(model, batch, Route(closed=True, only_last=True))
    assert not hidden.any()


@pytest.mark.nightly
def test_training_twice_gives_the_same_bits(source):
    weights = []
    for _ in range(2):
        model = deeper.trained_on(
            source[0],
            source[1].backend_tokenizer,
            rounds=((1, 0.25), (1, 0.5)),
            documents=8,
            report=lambda *_: None,
        )
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    begun = deeper.grown(source[0]).state_dict()
    moved = {name for name, value in begun.items() if not torch.allclose(value, weights[0][name], rtol=1e-3)}
    assert "model.embed_tokens.weight" not in moved
    assert not any("layers.0.self_attn" in name or "layers.1.self_attn" in name for name in moved)
    assert "model.layers.2.mlp.down_proj.weight" in moved
