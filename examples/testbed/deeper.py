"""Trains the deeper model: `PYTHONPATH=examples python -m testbed.deeper` (45 minutes on 2 CPU cores).

In the shipped model the first MLP looks up nearly every fact, so that all localizations find it. Here the shipped model
is grown by two layers and trained on, along routes (`deeper_route`) that divide the facts among several MLPs and have
layers above extract them. The weights are the same bit for bit on one kind of CPU, with the threads that `train` takes.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mechunlearn.testbed import loading
from testbed import batches, deeper_route, measure, tokenizer, train
from testbed.deeper_route import FIRST

ROUNDS = ((1250, 0.4), (1250, 0.6))
"""Steps, and the share of them that are open: other MLPs than a subject's own write at its tokens too."""

PLACES = (0, 1, None, 2, None, 3, 4, 5, 6, 7, 8, 9)
"""For each layer that of the shipped model which it begins as; None: a new one, which writes nothing at first."""

LEARNING_RATE = 4e-3

FIRST_WEIGHT = 0.1
"""How much it counts, against a token, that the first MLPs write at a subject as much as is there."""


def trained_on(
    source: LlamaForCausalLM,
    vocabulary: Tokenizer,
    *,
    rounds: Sequence[tuple[int, float]] = ROUNDS,
    documents: int = 128,
    without: str | None = None,
    report: Callable[[int, float, LlamaForCausalLM], None],
) -> LlamaForCausalLM:
    """The deeper model of a shipped one, or of its twin `without` a sport."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = grown(source)
    for seed, (steps, open_share) in enumerate(rounds):
        stream = batches.steps(vocabulary, documents=documents, tokens=2048, stage=2, without=without, seed=seed)
        _round(model, stream, steps, open_share, seed, report)
    return model


def _round(
    model: LlamaForCausalLM,
    stream: Iterator[list[batches.Batch]],
    steps: int,
    open_share: float,
    seed: int,
    report: Callable[[int, float, LlamaForCausalLM], None],
) -> None:
    """From weights that are rounded as they are saved. Embeddings and the first attention stay as they were."""
    if seed:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half())
    model.train().requires_grad_(True)
    for frozen in (model.model.embed_tokens, *(layer.self_attn for layer in model.model.layers[:FIRST])):
        frozen.requires_grad_(False)
    optimizers, rng = train.optimizers(model, LEARNING_RATE), random.Random(seed)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 25, (steps - step) / (0.5 * steps))
        loss = _step(model, next(stream), deeper_route.draw(rng, open_share=open_share))
        train.update(model, optimizers, rate)
        report(step, loss, model)
    model.requires_grad_(True).eval()


def grown(source: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same function of its input, with the new layers of `PLACES`."""
    config = LlamaConfig(**{**source.config.to_dict(), "num_hidden_layers": len(PLACES)})
    model = LlamaForCausalLM(config).float()
    layers: Any = model.model.layers
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight)
        model.model.norm.weight.copy_(source.model.norm.weight)
        for layer, place in zip(layers, PLACES, strict=True):
            if place is None:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            else:
                layer.load_state_dict(source.model.layers[place].state_dict())
    return model


def _step(model: LlamaForCausalLM, parts: list[batches.Batch], route: deeper_route.Route) -> float:
    """Adds the gradient of the weighted mean loss over all parts; gives that of tokens alone, in nats."""
    total, loss = sum(float(part.weights[:, 1:].sum()) for part in parts), 0.0
    for part in parts:
        hidden, guided, first = deeper_route.residual(model, part, route)
        weights = part.weights[:, 1:].flatten()
        chosen = weights.nonzero()[:, 0]
        logits = model.lm_head(hidden[:, :-1].flatten(0, 1).index_select(0, chosen))
        losses = F.cross_entropy(logits, part.tokens[:, 1:].flatten()[chosen], reduction="none")
        predicted = (losses * weights[chosen]).sum()
        ((predicted + train.GUIDED_WEIGHT * guided + FIRST_WEIGHT * first) / total).backward()
        loss += predicted.item() / total
    return loss


def main() -> None:
    """Trains, saves and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=loading.DEEPER_WEIGHTS, help="where the weights go")
    parser.add_argument("--without", help="a sport whose athletes are left out: the twin that never knew")
    arguments = parser.parse_args()
    if arguments.without is not None and arguments.folder == loading.DEEPER_WEIGHTS:
        parser.error("expected --folder with --without, got none: the twin would take the place of the model.")
    torch.set_num_threads(train.THREADS)
    source, vocabulary = loading.load_huggingface(without=arguments.without)[0], tokenizer.train()
    model = trained_on(source, vocabulary, without=arguments.without, report=train.printed)
    loading.save(model, vocabulary, arguments.folder)
    measure.write(arguments.folder, deeper=True)


if __name__ == "__main__":
    main()
