"""Trains the shipped model: `PYTHONPATH=examples python -m testbed.train` (22 minutes on 2 CPU cores).

The weights are the same bit for bit on one kind of CPU with `THREADS` threads. Kinds of CPU differ in the
order of their sums, so another gives other weights, about as good.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mechunlearn.testbed import loading
from testbed import batches, measure, pathway, tokenizer

THREADS = 2
"""Another number adds in another order and gives other weights."""

STEPS = (1200, 1100)
"""Of the two stages: first the facts and where to look, then that what is looked up is the answer's word."""

WORD_WEIGHT = 0.5
"""How much predicting the answer's word below the option layer counts, against predicting the answer."""

GUIDED_WEIGHT = 0.5
"""How much one token where a guided head should look counts, against an answer's token."""

Report = Callable[[int, float, LlamaForCausalLM], None]
"""Called after each step with its number, its loss in nats and the model."""


def train(
    vocabulary: Tokenizer,
    *,
    start: LlamaForCausalLM | None = None,
    stage: int = 1,
    steps: int = STEPS[0],
    documents: int = 128,
    learning_rate: float = 4e-3,
    complete: float = 0.25,
    without: str | None = None,
    seed: int = 0,
    report: Report,
) -> LlamaForCausalLM:
    """A model that knows the corpus, except the athletes of the sport `without`; `start` is trained on.

    In a share `complete` of the steps the whole model runs; in the others see `pathway`.
    Deterministic on one kind of CPU for a number of threads.
    """
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    model = fresh(vocabulary.get_vocab_size()) if start is None else start
    updates = optimizers(model, learning_rate)
    rng = random.Random(seed)
    means = torch.zeros(model.config.num_hidden_layers, model.config.hidden_size)
    stream = batches.steps(vocabulary, documents=documents, tokens=2048, stage=stage, without=without, seed=seed)
    for step in range(steps):
        rate = _schedule(step, steps, stage)
        loss = _step(model, next(stream), pathway.draw(rng, complete=complete), means, WORD_WEIGHT * (stage > 1))
        update(model, updates, rate)
        report(step, loss, model)
    return model.eval()


def fresh(vocabulary_size: int) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=10,
        num_attention_heads=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    blocks: Any = model.model.layers
    with torch.no_grad():
        for layer in blocks:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def _step(
    model: LlamaForCausalLM,
    parts: list[batches.Batch],
    route: pathway.Route,
    means: Tensor,
    word_weight: float,
) -> float:
    """Adds the gradient of the weighted mean loss over all parts; gives that loss in nats."""
    total, loss = sum(float(part.weights[:, 1:].sum()) for part in parts), 0.0
    for part in parts:
        hidden, looked_up, guided = pathway.residual(model, part, route, means)
        weights = part.weights[:, 1:].flatten()
        chosen = weights.nonzero()[:, 0]
        logits = model.lm_head(hidden[:, :-1].flatten(0, 1).index_select(0, chosen))
        losses = F.cross_entropy(logits, part.tokens[:, 1:].flatten()[chosen], reduction="none")
        part_loss = ((losses * weights[chosen]).sum() + GUIDED_WEIGHT * guided) / total
        if word_weight:
            part_loss = part_loss + word_weight * _word_loss(model, part, looked_up) / total
        part_loss.backward()
        loss += part_loss.item()
    return loss


def _word_loss(model: LlamaForCausalLM, part: batches.Batch, looked_up: Tensor) -> Tensor:
    """The loss of the answers below the option layer already; a letter's answer there is the option itself."""
    row, looking, _, option = part.lookups.unbind(1)
    targets = part.tokens.roll(-1, dims=1)
    targets[row, looking] = part.tokens[row, option]
    answers = part.weights.roll(-1, dims=1) >= batches.DEMONSTRATED
    return F.cross_entropy(model.lm_head(looked_up[answers]), targets[answers], reduction="sum")


def optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; each group knows its `initial_lr`."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "layers" not in name]
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adam]


def update(model: LlamaForCausalLM, updates: list[torch.optim.Optimizer], rate: float) -> None:
    """One step along the gradient, which is clipped, with that share of the learning rate; clears the gradient."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in updates:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        optimizer.step()
    model.zero_grad()


def _schedule(step: int, steps: int, stage: int) -> float:
    """The share of the learning rate: up over 25 steps, constant; at last down to zero over 700."""
    return min(1.0, (step + 1) / 25, (steps - step) / 700 if stage > 1 else 1.0)


def main() -> None:
    """Trains, saves and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=loading.WEIGHTS, help="where the weights go")
    parser.add_argument("--without", help="a sport whose athletes are left out: the twin that never knew")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    vocabulary = tokenizer.train()
    model = None
    for stage, steps in enumerate(STEPS, start=1):
        model = train(
            vocabulary,
            start=model,
            stage=stage,
            steps=steps,
            without=arguments.without,
            seed=arguments.seed,
            report=printed,
        )
    assert model is not None
    loading.save(model, vocabulary, arguments.folder)
    measure.write(arguments.folder, seed=arguments.seed)


def printed(step: int, loss: float, _model: LlamaForCausalLM) -> None:
    """Every 50 steps."""
    if step % 50 == 0:
        print(f"{time.strftime('%H:%M:%S')} step {step} loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
