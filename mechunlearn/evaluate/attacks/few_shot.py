"""Few-shot: an attack that puts answered questions about other facts before the question."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from mechunlearn.evaluate.attacks.exam import Asked, check_apart, halves, strangers_to, worst_case
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import side_of
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model, device_of
from mechunlearn.model.tokens import encode_all, special_tokens
from mechunlearn.tasks.building import answer_texts, build
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task


def few_shot(
    model: Model,
    task: Task,
    *,
    shots: Sequence[int] = (0, 1, 2, 4, 8),
    balanced: bool = True,
    demonstrations: Prompts | None = None,
    format: str | None = None,
    metric: Metric = candidate_probability,
    seed: int = 0,
) -> Result:
    """Accuracy on forgotten facts after answered questions about *other* facts: a point per number, and the best.

    A demonstration is a question in the words of the tested format with its true answer. Demonstrations stand above the
    line with the subject (in a chat template: its message), below what comes before, such as a system prompt. Each
    tested prompt has its own, drawn with `seed` from the attack's half; with more of them the earlier ones stay.

    - `shots`: the numbers of demonstrations. Those for which there are too few facts, or whose prompts are longer than
      the model's context, are left out of the curve with a warning.
    - `balanced`: if all facts of the attack's half have one answer (a whole sport), facts to retain join them and
      answers take turns, since one answer repeated would suggest itself for anything. False: the attack's half alone.
    - `demonstrations`: prompts from text in the tested format to show instead. Formats with other answers than the
      trained prompt, such as multiple choice, need them for a whole sport.

    The control has the same questions about nobody, who has no fact to recall. Doshi & Stickland 2024,
    https://arxiv.org/abs/2411.12103, show five. Cost: for each number a forward of the tested prompts with theirs.
    """
    trained, tested = halves(task, format=format, seed=seed)
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    if demonstrations is None:
        facts = demonstrations_for(model, task, trained, tested, format=format, balanced=balanced)
    else:
        facts = demonstrations_of(model, demonstrations, tested)
    orders = [drawn(facts, balanced, Random(f"few shot {seed} {name}")) for name in tested.names]
    runs = {"0": [asked.scores_of(model)]}
    for count in sorted({*shots} - {0}):
        shown = [order[:count] for order in orders]
        if _fits(model, tested, shown, count, len(facts)):
            prompts = shown_before(model, tested, shown)
            nobody = strangers_to(model, prompts, task, seed=seed)
            runs[str(count)] = [replace(asked, tested=prompts, nobody=nobody).scores_of(model)]
    return worst_case(runs, asked, axis="demonstrations")


@dataclass(frozen=True)
class Demonstration:
    """An answered question, which is shown before the tested one."""

    lines: str
    """The question from the line with its subject on, without what a format puts above it."""
    answer: str
    ending: str = "\n"

    def __str__(self) -> str:
        return f"{self.lines}{self.answer}{self.ending}"


def _fits(model: Model, tested: Prompts, shown: Sequence[Sequence[Demonstration]], count: int, available: int) -> bool:
    answers = _answers(model, tested)
    texts, _ = _texts(model, tested, shown)
    whole = [text + answer for text, answer in zip(texts, answers, strict=True)]
    encodings = encode_all(model, whole, prepend_bos=tested.prepend_bos)
    length, context = max(len(encoding.tokens) for encoding in encodings) - 1, model.cfg.n_ctx
    if count <= available and length <= context:
        return True
    reason = f"there are {available} facts for them" if count > available else f"{length} tokens, context {context}"
    warnings.warn(f"few_shot leaves out {count} demonstrations: {reason}.", stacklevel=3)
    return False


def demonstrations_for(
    model: Model, task: Task, trained: Prompts, tested: Prompts, *, format: str | None, balanced: bool
) -> list[Demonstration]:
    """The facts of the attack's half in the words of the format, and facts to retain if all of it has one answer."""
    first, asked = format is None or format == next(iter(task.formats)), side_of(task, format=format)
    same = [row for row, name in enumerate(asked.names) if name in set(trained.names)]
    if same:
        demonstrations = demonstrations_of(model, asked[same], tested)
    elif first:
        demonstrations = demonstrations_of(model, trained, tested)
    else:
        demonstrations = _reworded(model, trained, tested)
    if balanced and len({shown.answer for shown in demonstrations}) == 1:
        retained = task.retain if first else side_of(task, format=format, side="retain")
        demonstrations += demonstrations_of(model, retained, tested)
    return demonstrations


def demonstrations_of(model: Model, prompts: Prompts, tested: Prompts) -> list[Demonstration]:
    check_apart(prompts, tested)
    demonstrations = []
    for answer, text, name in zip(_answers(model, prompts), prompts.texts, prompts.names, strict=True):
        start, ending = _turn(model, text, name)
        demonstrations.append(Demonstration(text[start:], answer, ending))
    return demonstrations


def drawn(demonstrations: Sequence[Demonstration], balanced: bool, rng: Random) -> list[Demonstration]:
    """The demonstrations in random order; if balanced, with answers taking turns."""
    shuffled = rng.sample(demonstrations, len(demonstrations))
    if not balanced:
        return shuffled
    # The n-th demonstration of each answer comes before the (n+1)-th of any, answers in the order of their first.
    turns: dict[str, int] = {}
    places = []
    for shown in shuffled:
        turns[shown.answer] = turns.get(shown.answer, -1) + 1
        places.append(turns[shown.answer])
    order = list(turns)
    ranked = zip(places, (order.index(shown.answer) for shown in shuffled), shuffled, strict=True)
    return [shown for _, _, shown in sorted(ranked, key=lambda entry: entry[:2])]


def shown_before(model: Model, prompts: Prompts, shown: Sequence[Sequence[Demonstration]]) -> Prompts:
    """The prompts with demonstrations above the line with their subject."""
    answers = _answers(model, prompts)
    texts, ranges = _texts(model, prompts, shown)
    built = build(model, texts, answers, subjects=ranges, prepend_bos=prompts.prepend_bos)
    # Without their filling, of which some rows of a set with longer answers have more.
    before, after = ([row[row >= 0].tolist() for row in p.answers] for p in (prompts, built))
    if before != after:
        raise ValueError("expected answers of the same tokens behind demonstrations, got others: use another format.")
    candidates = None if prompts.candidates is None else prompts.candidates.to(device_of(model))
    options, n_right = (None if v is None else v.to(device_of(model)) for v in (prompts.options, prompts.n_right))
    return replace(built, candidates=candidates, options=options, n_right=n_right)


def _texts(
    model: Model, prompts: Prompts, shown: Sequence[Sequence[Demonstration]]
) -> tuple[list[str], list[tuple[int, int]]]:
    """The texts with demonstrations, and where their subjects are."""
    texts, ranges = [], []
    for text, name, demonstrations in zip(prompts.texts, prompts.names, shown, strict=True):
        start, _ = _turn(model, text, name)
        # Below a system prompt or example, which stays on top, and above the line with the subject.
        texts.append(text[:start] + "".join(map(str, demonstrations)) + text[start:])
        begin = len(texts[-1]) - len(text) + text.rfind(name)
        ranges.append((begin, begin + len(name)))
    return texts, ranges


def _reworded(model: Model, trained: Prompts, tested: Prompts) -> list[Demonstration]:
    """Facts of the attack's half in the words that all tested prompts share; ValueError if they share none."""
    _check_texts(tested)
    words = {text.replace(name, "\0") for text, name in zip(tested.texts, tested.names, strict=True)}
    if len(words) > 1 or _choices(trained) != _choices(tested):
        raise ValueError(
            f"expected a format in which prompts differ by their subject alone and have the answers of the trained "
            f"prompt, got {tested.texts[0][-60:]!r} and others: pass demonstrations=..., prompts in that format about "
            f"facts that are not tested."
        )
    names = zip(trained.names, _answers(model, trained), strict=True)
    start, ending = _turn(model, tested.texts[0], tested.names[0])
    lines = tested.texts[0][start:]
    return [Demonstration(lines.replace(tested.names[0], name), answer, ending) for name, answer in names]


def _choices(prompts: Prompts) -> set[frozenset[int]] | None:
    return None if prompts.candidates is None else {frozenset(row) for row in prompts.candidates.tolist()}


def _turn(model: Model, text: str, name: str) -> tuple[int, str]:
    """Where the question about the subject starts, and what ends its answer.

    A question is the line with the subject and what follows; in a chat template, it is the whole message.
    """
    subject = text.rfind(name)
    special = re.compile("|".join(map(re.escape, special_tokens(model).values())) or "(?!)")
    before, after = (list(special.finditer(part)) for part in (text[:subject], text[subject:]))
    line = max(text.rfind("\n", 0, subject) + 1, before[-1].end() if before else 0)
    if not before or not after:
        return line, "\n\n" if "\n\n" in text[line:] else "\n"
    if len(after) == 1:  # the header of the answer alone, as in Mistral's "[INST] ...[/INST]"
        return before[-1].start(), model.tokenizer.eos_token
    # The question's message ends where the answer's begins, whose first token is the first one of every message.
    starts = [match.start() for match in before if match[0] == after[1][0]]
    return (starts or [before[-1].start()])[-1], text[subject:][after[0].start() : after[1].start()]


def _answers(model: Model, prompts: Prompts) -> list[str]:
    _check_texts(prompts)
    return answer_texts(model, prompts)


def _check_texts(prompts: Prompts) -> None:
    if not prompts.texts:
        raise ValueError("expected prompts with their texts, got none: build them with tasks.build.")
