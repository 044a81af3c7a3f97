import pytest
import tiny
import torch

from mechunlearn.evaluate import continuations, extraction_strength
from mechunlearn.evaluate.generation import _strength
from mechunlearn.tasks import Format, build
from mechunlearn.tasks.prompts import IGNORED, Prompts


def scored(*rows: str) -> list[float]:
    """Each row is an answer: "y" for a token that is the argmax, "n" for one that is not."""
    longest = max(map(len, rows))
    answers = torch.full((len(rows), longest), IGNORED)
    logits = torch.zeros(len(rows), longest, 10)
    for i, row in enumerate(rows):
        for j, letter in enumerate(row):
            answers[i, j] = j
            logits[i, j, j if letter == "y" else 9] = 1.0
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    places = torch.arange(longest).expand(len(rows), -1)
    return _strength(logits, Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool), places, answers)).tolist()


def test_four_examples_by_hand():
    """T = 4: k = 0, 1, 2 and 4 (nothing is right), so ES = 1, 3/4, 1/2 and its floor 1/4."""
    expected = [(strength - 1 / 4) / (1 - 1 / 4) for strength in (1, 3 / 4, 1 / 2, 1 / 4)]
    assert expected == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert scored("yyyy", "nyyy", "ynyy", "nnnn") == pytest.approx(expected)


def test_what_is_right_before_the_last_wrong_token_does_not_count():
    assert scored("yyyn", "yyny", "nyny") == [0.0, 0.0, 0.0]


def test_the_floor_is_that_of_each_answers_own_length():
    assert scored("yyy", "nyy", "nny", "yyyyy", "nyyyy", "nn", "ny") == [1.0, 0.5, 0.0, 1.0, 0.75, 0.0, 0.0]


def test_one_token_is_said_or_not():
    assert scored("y", "n", "ynyy") == pytest.approx([1.0, 0.0, 1 / 3])


@pytest.fixture(params=["right", "left"])
def changed(request, llama):
    """Four prompts whose answers are what the model says, up to one token of another kind."""
    texts = ["w4 w5 w6", "w7 w8", "w9 w10 w11 w12", "w13"]
    said = [text.split() for text in continuations(llama, build(llama, texts, [" w4"] * 4), 4)]
    assert all(len(words) == 4 for words in said)
    for row, place in ((1, 0), (2, 1), (3, 3)):
        said[row][place] = "w50" if said[row][place] != "w50" else "w51"
    return build(llama, texts, [" " + " ".join(words) for words in said], padding=request.param)


def by_generation(model, prompts) -> list[float]:
    """(ES - 1/T) / (1 - 1/T), with ES by its definition: for each k, generate the rest."""
    found = []
    for row in range(len(prompts)):
        one = prompts[[row]]
        answer = one.answers[0].tolist()
        start = one.tokens[0, : int(one.positions[0, 0]) + 1].tolist()
        length = len(answer)
        enough = [k for k in range(length) if greedy(model, start + answer[:k], length - k) == answer[k:]]
        strength = 1 - min([*enough, length - 1]) / length
        found.append((strength - 1 / length) / (1 - 1 / length))
    return found


def greedy(model, tokens, count):
    for _ in range(count):
        logits = model(torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long))
        tokens = [*tokens, int(logits[0, -1].argmax())]
    return tokens[len(tokens) - count :]


def test_it_agrees_with_generation_whatever_the_batch_and_the_padding(llama, changed):
    task = tiny.task(llama)
    task = type(task)(**{**vars(task), "formats": {"toy": Format(changed, changed)}})
    expected = by_generation(llama, changed)
    assert expected[0] == 1.0
    assert expected[3] == 0.0
    for size in (1, 3, 4):
        found = extraction_strength(llama, task, batch_size=size)
        assert found.per_example.tolist() == pytest.approx(expected)
    assert (found.chance, found.unit) == (0.0, "share")
