"""A TransformerLens model that answers the requests of lm-evaluation-harness; imported only where that is used."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from mechunlearn.evaluate.generation import greedy
from mechunlearn.model import Model, check_model, device_of, logits_at, preserved
from mechunlearn.model.classes import at_least_float32
from mechunlearn.model.tokens import encode, pad_token
from mechunlearn.tasks.building import padded

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


Tokens: TypeAlias = tuple[int, ...]


class HarnessModel(TemplateLM):
    """The model as it is now, with edits and hooks, as the harness takes it: a subclass, since it takes nothing else.

    For example `lm_eval.simple_evaluate(HarnessModel(model), tasks=["mmlu"])`. Text begins with BOS where the model
    expects one (`cfg.default_prepend_bos`), as everywhere in this package. The harness itself leaves that to the
    tokenizer, which adds none for GPT-2, so published numbers may differ a little. An input longer than the context
    loses its beginning, with a warning. Generation is greedy. It keeps keys and values of earlier tokens, except inside
    hooks, which are given all tokens at every step.
    """

    def __init__(self, model: Model, *, batch_size: int = 16) -> None:
        super().__init__()
        check_model(model)
        self.model = model
        self.tokenizer = model.tokenizer
        self.batch_size = batch_size
        self.max_length = int(model.cfg.n_ctx)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS if there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        if add_special_tokens is False:
            return self.tokenizer.encode(string, add_special_tokens=False)
        return list(encode(self.model, string).tokens)

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log probability of each continuation, in nats, and whether each of its tokens is the argmax."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = True) -> list[float]:
        """Log probability of each whole text, in nats; one longer than the context goes through it in windows.

        BOS (else EOS) is what the first token follows, and is not itself scored.
        """
        windows = [(i, window) for i, request in enumerate(requests) for window in self._windows(*request.args)]
        scores = self._loglikelihood_tokens([(("", ""), *window) for _, window in windows])
        totals = [0.0] * len(requests)
        for (i, _), (value, _) in zip(windows, scores, strict=True):
            totals[i] += value
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations, each up to a stop string, EOS or the largest number of tokens."""
        with preserved(self.model), torch.no_grad():
            batches = _batches(requests, self.batch_size)
            return [text for batch in batches for text in self._continued([request.args for request in batch])]

    def _loglikelihood_tokens(
        self, requests: "Sequence[tuple[tuple[str, str], list[int], list[int]]]", **options: Any
    ) -> list[tuple[float, bool]]:
        """Requests that differ in nothing but their last token, such as A, B, C and D, share a forward."""
        inputs = [self._fitted(context, continuation) for _, context, continuation in requests]
        sharing: dict[tuple[Tokens, int], list[int]] = {}
        for i, (tokens, n) in enumerate(inputs):
            sharing.setdefault((tokens[:-1], n), []).append(i)
        groups = sorted(sharing.values(), key=lambda group: -len(inputs[group[0]][0]))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(inputs)
        with preserved(self.model), torch.no_grad():
            for batch in _batches(groups, self.batch_size):
                rows = self._logits([inputs[group[0]] for group in batch])
                for i, logits in [(i, logits) for logits, group in zip(rows, batch, strict=True) for i in group]:
                    tokens, n = inputs[i]
                    targets = torch.tensor(tokens[-n:], device=logits.device)
                    chosen = at_least_float32(logits[:n]).log_softmax(-1).gather(-1, targets[:, None])
                    scores[i] = float(chosen.sum()), bool((logits[:n].argmax(-1) == targets).all())
        return scores

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[Tokens, int]:
        """The last tokens that the model can predict with its context, and how many of them to score."""
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"expected a continuation of 1 to {self.max_length} tokens (the model's context), got "
                f"{len(continuation)}: choose another task or model."
            )
        return _last((*context, *continuation), self.max_length + 1), len(continuation)

    def _logits(self, inputs: Sequence[tuple[Tokens, int]]) -> Float[Tensor, "batch place d_vocab"]:
        """The logits that predict the last n tokens of each row; rows with fewer are filled up."""
        tokens, mask = _padded(self.model, [tokens[:-1] for tokens, _ in inputs])
        longest = max(n for _, n in inputs)
        places = [(len(t) - 1 - n + torch.arange(longest)).clamp(max=len(t) - 2) for t, n in inputs]
        return logits_at(self.model, tokens, mask, torch.stack(places).to(tokens.device))

    def _windows(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        options = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
        return map(make_disjoint_window, get_rolling_token_windows(tokens, **options))

    def _continued(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        settings = [self._settings(options) for _, options in requests]
        pairs = zip(requests, settings, strict=True)
        rows = [_last(self.tok_encode(text), self.max_length - n) for (text, _), (_, n) in pairs]
        said = greedy(self.model, rows, [n for _, n in settings], lambda i, new: self._finished(new, settings[i][0]))
        return [_before(self._text(tokens), stops) for tokens, (stops, _) in zip(said, settings, strict=True)]

    def _settings(self, options: dict[str, Any]) -> tuple[list[str], int]:
        """Stop strings, and the largest number of tokens."""
        settings: Any = normalize_gen_kwargs(options)
        if settings["do_sample"]:
            raise ValueError("expected a task that generates greedily, got one that samples: set do_sample to False.")
        n = settings["max_gen_toks"]
        if not 1 <= n < self.max_length:
            raise ValueError(
                f"expected to generate 1 to {self.max_length - 1} tokens (the model's context less one), got {n}: set "
                f"max_gen_toks in the task's generation_kwargs."
            )
        return [stop for stop in settings["until"] if stop], n

    def _finished(self, tokens: list[int], stops: list[str]) -> bool:
        text = self._text(tokens)
        return tokens[-1] == self.eot_token_id or any(stop in text for stop in stops)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _padded(model: Model, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Tokens and mask, padded on the right."""
    tokens, mask = padded(rows, pad_token(model), "right")
    return tokens.to(device_of(model)), mask.to(device_of(model))


def _before(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _last(tokens: Sequence[int], n: int) -> Tokens:
    """The last n tokens, with a warning where there are more."""
    if len(tokens) > n:
        cut = len(tokens) - n
        warnings.warn(
            f"a text longer than the model's context: {cut} tokens at its beginning were left out", stacklevel=3
        )
    return tuple(tokens[-n:])
