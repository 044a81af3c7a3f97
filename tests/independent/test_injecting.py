"""Closed forms: what ROME and MEMIT write, the move that they search for, the second moment of keys, mean ablation."""

from types import SimpleNamespace

import pytest
import torch
from independent.agreement import assert_agree
from independent.architectures import MAKERS, Raw, random_model
from independent.hooks import recorded, run
from transformer_lens.model_bridge import TransformerBridge

import mechunlearn as mu

LAYER = 1
TEXTS, SUBJECTS = (
    ["Fact: LeBron James plays the sport of", "Fact: Larry Bird plays the sport of"],
    ["LeBron James", "Larry Bird"],
)
PREFIX = "Yesterday it rained.\n"
TEXT = torch.randint(5, 3000, (30, 10), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=list(MAKERS))
def pair(request):
    """As elsewhere, but with a vocabulary as large as that of the tokenizer, since these methods need texts."""
    loaded, tokenizer = mu.testbed.load_huggingface()
    # In float64, transformers gives NaN where padding is longer than a layer's window.
    wide = {"window": 16} if request.param == "gemma2" else {}
    huggingface = random_model(request.param, loaded.config.vocab_size, **wide)
    raw = Raw(request.param, huggingface).copied()
    options = {"hf_model": huggingface, "tokenizer": tokenizer, "device": "cpu", "dtype": torch.float64}
    bridge = TransformerBridge.boot_transformers(f"local/{request.param}", **options)
    injection = mu.tasks.build(bridge, TEXTS, [" golf", " hockey"], subjects=SUBJECTS)
    truth = mu.tasks.build(bridge, TEXTS, [" basketball", " basketball"], subjects=SUBJECTS)
    texts = {"formats": {}, "text": TEXT, "text_test": TEXT}
    task = mu.Task(name="facts", forget=truth, retain=truth, injection=injection, **texts)
    mask = mu.ComponentMask.of([f"L{LAYER}MLP.W_out"], mu.shape(bridge))
    covariance = mu.edit.key_covariance(bridge, mask, TEXT, prompts=truth, shrinkage=0.1)
    found = {"raw": raw, "bridge": bridge, "tokenizer": tokenizer, "task": task, "mask": mask, "covariance": covariance}
    return SimpleNamespace(**found)


def rows_of(prompts):
    """Each prompt's own tokens, and where its subject ends."""
    for tokens, real, subject in zip(prompts.tokens, prompts.attention_mask, prompts.subject, strict=True):
        first = int(real.nonzero()[0])
        yield tokens[real.bool()][None], int(subject.nonzero()[-1]) - first


def keys_of(raw, tokens):
    with torch.no_grad():
        return recorded(raw, tokens, [(raw.at(LAYER).down, "in")])[0][0]


def second_moment(pair, shrinkage=0.1):
    retain = [tokens for tokens, _ in rows_of(pair.task.retain)]
    keys = torch.cat([keys_of(pair.raw, tokens) for tokens in [*TEXT[:, None], *retain]])
    moment = keys.T @ keys / len(keys)
    return (1 - shrinkage) * moment + shrinkage * moment.diagonal().mean() * torch.eye(len(moment))


def change_of(pair, edit):
    """What an edit adds to W_out, as [what it reads, what it gives]."""
    down = pair.bridge.blocks[LAYER].mlp.out.weight
    as_rows = (lambda w: w) if pair.raw.name == "gpt2" else (lambda w: w.T)
    before = as_rows(down.detach().clone())
    with edit.applied(pair.bridge):
        return as_rows(down.detach().clone()) - before


def test_second_moment_of_keys(pair):
    assert_agree(pair.covariance.at(LAYER), second_moment(pair))
    assert pair.covariance.n_tokens == TEXT.numel() + sum(tokens.shape[1] for tokens, _ in rows_of(pair.task.retain))


def moved(raw, move, at):
    """A change that adds a move to what W_out gives at one token, before a post-norm."""

    def function(out):
        return out + torch.zeros_like(out).index_put((torch.tensor(0), torch.tensor(at)), move)

    return [(raw.at(LAYER).down, "out", function)]


def searched(raw, fact, scale, *, steps, clamp, kl=None):
    """The move after some steps of Adam from 0, with its norm held; `kl`: tokens of "{subject} is a", and its place."""
    tokens, at, answer = fact
    move = torch.zeros_like(scale, requires_grad=True)
    adam = torch.optim.Adam([move], lr=0.5)
    for _ in range(steps):
        loss = -run(raw, tokens, moved(raw, move, at))[0, -1].log_softmax(-1)[answer]
        loss = loss + 0.5 * move.norm() / scale.norm() ** 2
        if kl:
            before, now = (run(raw, kl[0], moved(raw, m, kl[1]))[0, -1].log_softmax(-1) for m in (0 * move, move))
            loss = loss + 100 * (now.exp() * (now - before)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            move *= (clamp * scale.norm() / move.norm()).clamp(max=1)
    raw.model.zero_grad()
    return move.detach()


def adds_at(raw, module, side, tokens, at):
    with torch.no_grad():
        return recorded(raw, tokens, [(module, side)])[0][0, at]


def one_fact(pair):
    """The first fact alone: as a task, and as tokens, where its subject ends, and its answer."""
    injection = pair.task.injection[:1]
    ((tokens, at),) = rows_of(injection)
    return mu.Task(**{**vars(pair.task), "injection": injection}), (tokens, at, int(injection.answers[0, 0]))


ALONE = {"prefixes": [], "stop_below": 1e-9, "progress": False}


def test_rome(pair):
    """One fact by itself: the key, the move, the change of rank one, and the answer's probability with the move."""
    raw, (task, fact) = pair.raw, one_fact(pair)
    tokens, at, answer = fact
    options = {**ALONE, "steps": 6, "clamp": 0.8, "kl_coefficient": 0.0, "covariance": pair.covariance}
    edit = mu.edit.rome(pair.bridge, task, pair.mask, **options)
    change, key = change_of(pair, edit), keys_of(raw, tokens)[at]
    u = torch.linalg.solve(second_moment(pair), key)
    move = key @ change
    assert_agree(change, torch.outer(u, move) / (key @ u))
    with torch.no_grad():
        p = run(raw, tokens, moved(raw, move, at))[0, -1].softmax(-1)[answer]
        assert float(p) > 1.1 * float(run(raw, tokens)[0, -1].softmax(-1)[answer])
    assert edit.provenance["probabilities"] == pytest.approx([float(p)], rel=1e-4)
    scale = adds_at(raw, raw.at(LAYER).down, "out", tokens, at)
    assert_agree(move, searched(raw, fact, scale, steps=6, clamp=0.8))


def test_what_else_follows_the_subject_is_held(pair):
    """After its own tokens in the prompt, here with a space before them."""
    task, (tokens, at, answer) = one_fact(pair)
    options = {**ALONE, "steps": 3, "kl_coefficient": 100.0, "covariance": pair.covariance}
    change = change_of(pair, mu.edit.rome(pair.bridge, task, pair.mask, **options))
    scale = adds_at(pair.raw, pair.raw.at(LAYER).down, "out", tokens, at)
    subject = pair.tokenizer(" " + SUBJECTS[0])["input_ids"]
    is_a = torch.tensor([subject + pair.tokenizer(" is a", add_special_tokens=False)["input_ids"]])
    fact, kl = (tokens, at, answer), (is_a, len(subject) - 1)
    expected = searched(pair.raw, fact, scale, steps=3, clamp=4.0, kl=kl)
    without = searched(pair.raw, fact, scale, steps=3, clamp=4.0)
    assert (expected - without).abs().max() > 0.01 * expected.abs().max()
    assert_agree(keys_of(pair.raw, tokens)[at] @ change, expected, tolerance=1e-3)  # the KL is computed in float32


def test_rome_in_several_contexts(pair):
    """The key is the mean over the prompt by itself and after each prefix."""
    task, (tokens, at, _) = one_fact(pair)
    options = {"prefixes": [PREFIX], "steps": 2, "progress": False, "covariance": pair.covariance}
    change = change_of(pair, mu.edit.rome(pair.bridge, task, pair.mask, **options))
    longer = torch.tensor([pair.tokenizer(PREFIX + TEXTS[0])["input_ids"]])
    key = (keys_of(pair.raw, tokens)[at] + keys_of(pair.raw, longer)[at - tokens.shape[1]]) / 2
    u = torch.linalg.solve(second_moment(pair), key)
    assert_agree(change, torch.outer(u, key @ change) / (key @ u))


def test_memit(pair):
    """Two facts at once into one MLP: the least-squares solution for what the residual stream lacks."""
    raw, injection, weight = pair.raw, pair.task.injection, 3.0
    options = {**ALONE, "steps": 3, "covariance_weight": weight, "kl_coefficient": 0.0, "covariance": pair.covariance}
    change = change_of(pair, mu.edit.memit(pair.bridge, pair.task, pair.mask, **options))
    rows = [(*row, int(answer)) for row, answer in zip(rows_of(injection), injection.answers[:, 0], strict=True)]
    keys = torch.stack([keys_of(raw, tokens)[at] for tokens, at, _ in rows])
    left = (weight * second_moment(pair) + keys.T @ keys) @ change
    lacking = torch.linalg.lstsq(keys.T, left).solution
    assert_agree(left, keys.T @ lacking)
    assert_agree(lacking, torch.stack([taken_back(raw, fact, memit_move(raw, fact)) for fact in rows]), tolerance=1e-4)


def memit_move(raw, fact):
    scale = adds_at(raw, raw.blocks[LAYER + 1], "in", *fact[:2])
    return searched(raw, fact, scale, steps=3, clamp=1.5)


@torch.no_grad()
def taken_back(raw, fact, move):
    """What W_out must give more: the move, or behind a post-norm what `before_post_norm` says of the stream's gain."""
    if raw.name != "gemma2":
        return move
    norm = raw.at(LAYER).mlp_adds
    out = adds_at(raw, raw.at(LAYER).down, "out", *fact[:2])
    gain, w = norm.forward(out + move) - norm.forward(out), 1 + norm.weight
    s = (out.pow(2).mean() + norm.eps).sqrt()
    return gain * s * w / (w**2 + 0.01 * w.pow(2).mean())


def test_mean_ablated(pair):
    """W' = u (m W) with u = (E[a a^T] + 0.02 * mean of its diagonal)^-1 m, over the tokens of the text."""
    mask = mu.ComponentMask.of([f"L{LAYER}MLP"], mu.shape(pair.bridge))
    change = change_of(pair, mu.edit.mean_ablated(pair.bridge, pair.task, mask, shrinkage=0.02))
    a, weight = (
        torch.cat([keys_of(pair.raw, row[None]) for row in TEXT]),
        pair.raw.rows(pair.raw.at(LAYER).down).detach(),
    )
    moment, mean = a.T @ a / len(a), a.mean(0)
    u = torch.linalg.solve(moment + 0.02 * moment.diagonal().mean() * torch.eye(len(moment)), mean)
    assert_agree(change, torch.outer(u, mean @ weight) - weight)
