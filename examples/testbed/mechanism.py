"""Where the shipped model looks facts up: ablations and probes on the trained prompt.

Only the athletes of the three team sports count, which are equally many: chance is one in three.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from testbed import corpus
from testbed.batches import ANSWER, Batch, batches, examples
from testbed.documents import Athlete

TEAM_SPORTS = ("football", "baseball", "basketball")


def ablations(model: LlamaForCausalLM, vocabulary: Tokenizer) -> dict[str, dict[str, float]]:
    """Accuracy on the trained prompt with MLPs replaced by their mean output.

    By argmax over the vocabulary and over the three sports. The mean is over all tokens of these
    prompts, one vector per layer.
    """
    prompts = _prompts(vocabulary)
    layers = model.config.num_hidden_layers
    lower, upper = range(layers // 2), range(layers // 2, layers)
    blocks: Any = model.model.layers
    means = _mean_outputs(model, prompts)

    def accuracy(chosen: Iterable[int], at_subject: bool | None = None) -> dict[str, float]:
        writes = {blocks[layer].mlp: means[layer] for layer in chosen}
        return _accuracies(model, vocabulary, prompts, writes, at_subject=at_subject)

    return {
        "none": accuracy(()),
        "upper_mlps": accuracy(upper),
        "upper_mlps_at_subject": accuracy(upper, at_subject=True),
        "lower_mlps_at_subject": accuracy(lower, at_subject=True),
        "lower_mlps_elsewhere": accuracy(lower, at_subject=False),
        **{f"mlp_{layer}_at_subject": accuracy([layer], at_subject=True) for layer in lower},
    }


def silenced(
    model: LlamaForCausalLM, vocabulary: Tokenizer, groups: Mapping[str, tuple[str, Iterable[int]]]
) -> dict[str, dict[str, float]]:
    """Accuracy with parts of each group, "mlp" or "self_attn" of some layers, writing nothing at the subject's tokens.

    On the trained prompt by argmax over the three sports, on a statement of each general fact by argmax over the
    vocabulary.
    """
    blocks: Any = model.model.layers
    facts = [corpus.knowledge_documents(fact)[0] for fact in corpus.general_knowledge()]
    asked = {
        "sports": _prompts(vocabulary),
        "vocabulary": batches(examples(vocabulary, facts, random.Random(0)), 4096),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (part, layers) in groups.items():
        silent = {getattr(blocks[layer], part): torch.zeros(model.config.hidden_size) for layer in layers}
        found[name] = {
            sense: _accuracies(model, vocabulary, prompts, silent, at_subject=True)[sense]
            for sense, prompts in asked.items()
        }
    return found


def probes(model: LlamaForCausalLM, vocabulary: Tokenizer, *, seeds: int = 5) -> dict[str, list[float]]:
    """Accuracy on unseen athletes of a logistic regression for the sport, at two tokens.

    One number for each point of the residual stream, the embedding first, the mean over `seeds` splits.
    """
    subject, final, sports = _residuals(model, vocabulary)
    return {
        "subject": [_probe(states, sports, seeds) for states in subject],
        "final": [_probe(states, sports, seeds) for states in final],
    }


@contextmanager
def replaced(writes: Mapping[nn.Module, Float[Tensor, " d_model"]], where: Bool[Tensor, "batch pos"]) -> Iterator[None]:
    """Within it, each MLP or attention layer writes its vector at the tokens of `where`."""
    with ExitStack() as stack:
        for module, value in writes.items():

            def write(_module, _inputs, output, value=value):
                if isinstance(output, tuple):  # attention's, with its pattern
                    return torch.where(where[..., None], value, output[0]), *output[1:]
                return torch.where(where[..., None], value, output)

            stack.callback(module.register_forward_hook(write).remove)
        yield


@torch.no_grad()
def _accuracies(
    model: LlamaForCausalLM,
    vocabulary: Tokenizer,
    prompts: list[Batch],
    writes: Mapping[nn.Module, Float[Tensor, " d_model"]],
    *,
    at_subject: bool | None,
) -> dict[str, float]:
    """With outputs `replaced` everywhere, or only at, or only outside, the subject."""
    sports = torch.tensor([vocabulary.encode(f" {sport}").ids[-1] for sport in TEAM_SPORTS])
    correct: dict[str, list[bool]] = {"vocabulary": [], "sports": []}
    for batch in prompts:
        subject = batch.subjects > 0
        where = torch.ones_like(subject) if at_subject is None else subject == at_subject
        with replaced(writes, where):
            logits = model(batch.tokens).logits[:, :-1]
        is_answer = batch.weights[:, 1:] == ANSWER
        logits, answers = logits[is_answer], batch.tokens[:, 1:][is_answer]
        correct["vocabulary"] += (logits.argmax(-1) == answers).tolist()
        correct["sports"] += (sports[logits[:, sports].argmax(-1)] == answers).tolist()
    return {name: float(np.mean(values)) for name, values in correct.items()}


@torch.no_grad()
def _mean_outputs(model: LlamaForCausalLM, prompts: list[Batch]) -> Float[Tensor, "layer d_model"]:
    sums = torch.zeros(model.config.num_hidden_layers, model.config.hidden_size)
    count = 0
    blocks: Any = model.model.layers
    with ExitStack() as stack:
        for index, layer in enumerate(blocks):

            def add(_module, _inputs, output, index=index):
                sums[index] += output[real].sum(0)

            stack.callback(layer.mlp.register_forward_hook(add).remove)
        for batch in prompts:
            real = batch.tokens != model.config.pad_token_id
            model(batch.tokens)
            count += int(real.sum())
    return sums / count


@torch.no_grad()
def _residuals(
    model: LlamaForCausalLM, vocabulary: Tokenizer
) -> tuple[Float[Tensor, "layer prompt d_model"], Float[Tensor, "layer prompt d_model"], list[int]]:
    """At the subject's last token and right before the answer, and the answers' tokens."""
    subject, final, sports = [], [], []
    for batch in _prompts(vocabulary):
        states = torch.stack(model(batch.tokens, output_hidden_states=True).hidden_states)
        rows = torch.arange(len(batch.tokens))
        answer = (batch.weights == ANSWER).int().argmax(-1)
        last = batch.tokens.shape[1] - 1 - (batch.subjects > 0).int().flip(-1).argmax(-1)
        subject.append(states[:, rows, last])
        final.append(states[:, rows, answer - 1])
        sports += batch.tokens[rows, answer].tolist()
    return torch.cat(subject, 1), torch.cat(final, 1), sports


def _probe(states: Float[Tensor, "prompt d_model"], sports: list[int], seeds: int) -> float:
    scores = []
    for seed in range(seeds):
        fit, test, fit_sports, test_sports = train_test_split(
            states.numpy(), sports, test_size=0.3, random_state=seed, stratify=sports
        )
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        scores.append(probe.fit(fit, fit_sports).score(test, test_sports))
    return float(np.mean(scores))


def _prompts(vocabulary: Tokenizer) -> list[Batch]:
    documents = [corpus.sport_document(athlete, "fact", random.Random(0)) for athlete in _team_athletes()]
    return batches(examples(vocabulary, documents, random.Random(0)), 4096)


def _team_athletes() -> list[Athlete]:
    return [athlete for athlete in corpus.athletes() if athlete.sport in TEAM_SPORTS]
