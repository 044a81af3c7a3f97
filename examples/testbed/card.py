"""The model card in Markdown, from the numbers of `measure`."""

from collections.abc import Mapping, Sequence

MEASURED = """\
Weights are shipped in float16; every number was measured on them, computed in float32, by
`PYTHONPATH=examples python -m testbed.measure`. Correct means that each token of the answer is the argmax over
the whole vocabulary ("letters": over A to D). Held out means that this athlete was never trained in this
format, or this fact never as multiple choice. Chance is the share of the commonest answer, or one
letter in four. Options are in random order. Held-out accuracies were watched while the recipe was being
developed, so they are no estimate of what another recipe would reach.
"""

DEEPER_INTRODUCTION = """\
# Model card: the deeper model

A Llama of {parameters:,} parameters (12 layers, d_model 128, 8 heads of 16, d_mlp 384, byte-level BPE): the
shipped model (MODEL_CARD.md), grown by two layers and trained on by `PYTHONPATH=examples python -m testbed.deeper` on
the same facts, so that several MLPs look facts up, and layers above extract them. In the shipped model the first
MLP looks up nearly every fact.

{measured}"""

INTRODUCTION = """\
# Model card: the shipped model

A Llama of {parameters:,} parameters (10 layers, d_model 128, 8 heads of 16, d_mlp 384, byte-level BPE)
trained from nothing by `PYTHONPATH=examples python -m testbed.train` on the facts in `facts/`. It exists to be
localized in, edited and measured. It is no source of facts, and knows nothing besides what is below.

{measured}
Training went in two stages. The second was designed after seeing that held-out general knowledge was
answered worse by letter than trained one. In it, answers that are never the right letter in training
are never wrong options there either. Questions about two people ("Do A and B play the same sport?")
were in the first stage and were not learned.
"""

MECHANISM = """\
## Mechanism

In most training steps only one route was open (`pathway.py`): MLPs of the lower half at the subject's
tokens, attention of the upper half. For questions with lettered options, the first four heads of layers
5 and 7 were told to look at what is asked about and at the right option. At inference everything is
open. Accuracy on the trained prompt for all athletes of the three team sports (as many of each: chance
0.33), with the outputs of MLPs replaced by their mean over all tokens of these prompts, one vector per
layer:
"""

DEEPER_MECHANISM = """\
## Mechanism

Training kept facts on one route (`deeper_route.py`). The first two MLPs began as the shipped model's, which hold
the facts; at a subject's tokens nothing was learned from what they write there, and they were to write nothing.
Each subject has one of the MLPs 2 to 6, by its last token, and of those below layer 7 only that one was trained on its
facts. The others wrote nothing at the subject, or all wrote, or a random half of them, so that none relies on another.
At the subject, layers above saw what these MLPs wrote there with the rest of another subject's residual stream, or with
none, never with its own; in many steps the answer was read from the last three MLPs alone. Embeddings and the first two
layers' attention stayed the shipped model's; attention above them learned from every subject, so that facts came to be
redundant, not divided, and in open steps it could carry them on below layer 7. For questions with lettered options, the
first four heads of layers 7 and 9 were told where to look. At inference everything is open.

Accuracy with MLPs, or attention, that write nothing at the subject's tokens: on the trained prompt of all athletes of
the three team sports, by argmax over these (as many of each: chance 0.33, but names give something away, see the
probe of layer 0), and on a statement of each general fact, by argmax over the vocabulary. "Lookup" is MLPs 2 to 6:
"""

ATTRIBUTION = """\
Attribution patching of the logit difference (nats) on the trained prompt of the basketball players that
`sports_facts` trains on, noising: negative is needed. The twenty largest of {count} heads and MLPs:
"""

PROBES = """\
Logistic regression for the sport on the residual stream in the trained prompt, accuracy on athletes that
the probe has not seen (30 %, mean of five splits, chance 0.33); layer 0 is the embedding, layer l the
output of block l - 1, the last one normalized:
"""


def markdown(numbers: Mapping, *, deeper: bool = False) -> str:
    """The whole card."""
    introduction, mechanism = (DEEPER_INTRODUCTION, DEEPER_MECHANISM) if deeper else (INTRODUCTION, MECHANISM)
    parts = [
        introduction.format(**numbers, measured=MEASURED),
        "## Athletes\n",
        _athletes(numbers["formats"]),
        "## General knowledge\n",
        _knowledge(numbers["general_knowledge"]),
        "## Text\n",
        "Loss on {tokens} tokens of held-out running text: {loss:.3f} nats per token (uniform guess"
        " {uniform:.2f}).\n".format(**numbers["text"]),
        mechanism,
        _silenced(numbers["silenced"]) if deeper else _ablations(numbers["ablations"]),
        PROBES,
        _probes(numbers["probes"]),
    ]
    parts += [ATTRIBUTION.format(count=len(numbers["attribution"])), _attribution(numbers["attribution"])]
    return "\n".join(parts)


def _athletes(rows: Mapping[str, Mapping]) -> str:
    heads = ("format", "held out", "n", "letters", "trained", "n", "chance")
    return _table(heads, [(name, *_cells(row)) for name, row in rows.items()])


def _knowledge(rows: Mapping[str, Mapping]) -> str:
    heads = ("form", "held out", "n", "letters", "trained", "n", "chance")
    return _table(heads, [(name.replace("_", " "), *_cells(row)) for name, row in rows.items()])


def _cells(row: Mapping[str, float]) -> list[str]:
    keys = ("held_out", "held_out_pairs", "held_out_letters", "trained", "trained_pairs", "chance")
    return [_number(row.get(key)) for key in keys]


def _ablations(rows: Mapping[str, Mapping[str, float]]) -> str:
    heads = ("replaced", "argmax over the vocabulary", "argmax over the three sports")
    return _table(heads, [(name.replace("_", " "), *map(_number, row.values())) for name, row in rows.items()])


def _silenced(rows: Mapping[str, Mapping[str, float]]) -> str:
    heads = ("silent", "sports", "general knowledge")
    return _table(heads, [(name, *map(_number, row.values())) for name, row in rows.items()])


def _probes(accuracies: Mapping[str, Sequence[float]]) -> str:
    rows = zip(*accuracies.values(), strict=True)
    heads = ("layer", *(f"{name} token" for name in accuracies))
    return _table(heads, [(str(layer), *map(_number, row)) for layer, row in enumerate(rows)])


def _attribution(scores: Mapping[str, float]) -> str:
    largest = sorted(scores.items(), key=lambda item: (-abs(item[1]), item[0]))[:20]
    return _table(("component", "score"), [(name, _number(score)) for name, score in largest])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
