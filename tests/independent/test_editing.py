"""Trained edits, step by step on a plain model with masked gradients; closed forms; what is exported."""

import math
from functools import partial

import pytest
import torch
from independent.agreement import assert_agree
from independent.facts import FACTS, padded, prompts_of
from independent.hooks import run
from transformers import AutoModelForCausalLM

import mechunlearn as mu

FORGET, RETAIN = FACTS[:2], FACTS[2:]
TEXT = torch.randint(5, 90, (3, 10), generator=torch.Generator().manual_seed(2))
COVERED = ["L1H2", "L2H1.W_O", "L1MLP.W_out", "L0N5", "L2MLP.W_in"]


def favoured(raw, facts):
    """The first fact with the model's own answer, so that its log-probability is above the cut-off of erasure."""
    first = facts[0]
    with torch.no_grad():
        best = int(run(raw, first.tokens)[0, -1].argmax())
    others = [token for token in first.candidates if token != best][:3]
    return [type(first)(first.clean, first.corrupt, [best, *others], first.subject), *facts[1:]]


def task_of(forget, retain):
    sides = {"forget": prompts_of(forget), "retain": prompts_of(retain)}
    return mu.Task(name="facts", **sides, formats={}, text=TEXT, text_test=TEXT)


def covered(raw, labels):
    """For each weight, which entries the labels name: heads by slices, neurons by a column and a row."""
    masks = {id(parameter): torch.zeros_like(parameter) for parameter in raw.model.parameters()}

    def cover(module, read=slice(None), give=slice(None)):
        mask = masks[id(module.weight)]
        (mask if raw.name == "gpt2" else mask.T)[read, give] = 1

    for label in labels:
        layer, (part, _, matrix) = int(label[1]), label[2:].partition(".")
        parts = raw.at(layer)
        if part[0] == "H":
            for name in ("W_Q", "W_K", "W_V"):
                if matrix in ("", name):
                    module, which = raw.reads(layer, name, int(part[1:]))
                    cover(module, give=which)
            if matrix in ("", "W_O"):
                cover(parts.o, read=raw.head(int(part[1:])))
        elif part[0] == "N":
            n = slice(int(part[1:]), int(part[1:]) + 1)
            for module in (parts.up, getattr(parts, "gate", parts.up)):
                cover(module, give=n)
            cover(parts.down, read=n)
        else:
            modules = {"W_in": parts.up, "W_gate": getattr(parts, "gate", parts.up), "W_out": parts.down}
            for name, module in modules.items():
                if matrix in ("", name):
                    cover(module)
    return masks


def answer_logits(raw, facts):
    return torch.stack([run(raw, fact.tokens)[0, -1] for fact in facts])


def answers(facts):
    return torch.tensor([fact.answer for fact in facts])


def log_p(raw, facts):
    return answer_logits(raw, facts).log_softmax(-1).gather(1, answers(facts)[:, None])[:, 0]


def text_loss(raw):
    return torch.nn.functional.cross_entropy(run(raw, TEXT)[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten())


def erasure(raw, facts, cutoff=-5.0):
    """-log(1 - p), of which tokens with log p below the cut-off are no part but in the count."""
    lp = log_p(raw, facts)
    return (-torch.log1p(-lp.exp()) * (lp >= cutoff)).sum() / len(facts)


def by_hand(raw, labels, loss, optimizer, steps, schedule, rate, clip=None):
    """Steps of an optimizer on a plain model, whose gradients are zeroed outside the mask."""
    masks = covered(raw, labels)
    parameters = [p for p in raw.model.parameters() if masks[id(p)].any()]
    stepper = optimizer(parameters, lr=rate)
    for step in range(steps):
        stepper.zero_grad()
        loss(raw).backward()
        for parameter in parameters:
            parameter.grad *= masks[id(parameter)]
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        stepper.param_groups[0]["lr"] = rate * schedule(step, steps)
        stepper.step()


def exported(edit, bridge, path):
    """The edited model as a checkpoint that transformers loads without the library."""
    edit.to_huggingface(bridge, path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def assert_same_change(edit, pair, path, edited, tolerance=1e-5):
    """What the edit changes in each weight of the exported checkpoint is what has been changed by hand."""
    found, start = dict(exported(edit, pair.bridge, path).named_parameters()), dict(pair.raw.model.named_parameters())
    names = [name for name, parameter in edited.model.named_parameters() if not parameter.equal(start[name])]
    assert names
    for name, parameter in edited.model.named_parameters():
        if name in names:
            assert_agree(found[name] - start[name], parameter - start[name], tolerance=tolerance)
        else:
            assert_agree(found[name], parameter, tolerance=1e-12)


def cosine(step, steps):
    return (1 + math.cos(math.pi * step / steps)) / 2


SETTINGS = {
    "defaults": (
        {},
        {"optimizer": partial(torch.optim.AdamW, weight_decay=0.0), "schedule": cosine, "clip": 1.0},
        (1, 1, 1),
    ),
    "SGD": (
        {"optimizer": torch.optim.SGD, "schedule": mu.edit.constant_schedule, "clip": None, "learning_rate": 0.05}
        | {"forget_coefficient": 0.5, "retain_coefficient": 2.0, "text_coefficient": 0.25},
        {"optimizer": torch.optim.SGD, "schedule": lambda step, steps: 1, "rate": 0.05},
        (0.5, 2.0, 0.25),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_finetune(pair, name, tmp_path):
    options, mine, (a, b, c) = SETTINGS[name]
    forget, edited = favoured(pair.raw, FORGET), pair.raw.copied()
    with torch.no_grad():
        above = log_p(pair.raw, forget) > -5
    assert above.any()
    mask = mu.ComponentMask.of(COVERED, mu.shape(pair.bridge))
    edit = mu.edit.finetune(pair.bridge, task_of(forget, RETAIN), mask, steps=3, progress=False, **options)

    def loss(raw):
        return a * erasure(raw, forget) - b * log_p(raw, RETAIN).mean() + c * text_loss(raw)

    by_hand(edited, COVERED, loss, steps=3, **({"rate": 1e-3} | mine))
    assert_same_change(edit, pair, tmp_path / "edited", edited)


def test_finetune_away_from_and_close_to_the_original(pair, tmp_path):
    """NPO on the forget side, KL to the original on the retain side."""
    forget, edited = FORGET, pair.raw.copied()
    with torch.no_grad():
        was, p0 = log_p(pair.raw, forget), answer_logits(pair.raw, RETAIN).log_softmax(-1)

    def loss(raw):
        npo = -(2 / 0.5) * torch.nn.functional.logsigmoid(-0.5 * (log_p(raw, forget) - was))
        kl = (p0.exp() * (p0 - answer_logits(raw, RETAIN).log_softmax(-1))).sum(-1)
        return npo.mean() + kl.mean()

    by_hand(edited, COVERED, loss, torch.optim.SGD, 3, lambda step, steps: 1, 0.05)
    losses = {"forget_loss": partial(mu.losses.npo, beta=0.5), "retain_loss": mu.losses.kl_to_original}
    options = {"optimizer": torch.optim.SGD, "schedule": mu.edit.constant_schedule, "clip": None, "learning_rate": 0.05}
    mask = mu.ComponentMask.of(COVERED, mu.shape(pair.bridge))
    task = task_of(forget, RETAIN)
    edit = mu.edit.finetune(pair.bridge, task, mask, steps=3, text_coefficient=0.0, progress=False, **options, **losses)
    assert_same_change(edit, pair, tmp_path / "edited", edited)


def test_gradient_mask(pair, tmp_path):
    """An optimizer with momentum and weight decay in a loop of one's own: outside the mask nothing moves."""
    edited, facts, decay = pair.raw.copied(), FORGET, 0.1
    masks = covered(edited, COVERED)
    parameters = [p for p in edited.model.parameters() if masks[id(p)].any()]
    velocity = [torch.zeros_like(p) for p in parameters]
    for _ in range(3):
        edited.model.zero_grad()
        log_p(edited, facts).mean().backward()
        for parameter, v in zip(parameters, velocity, strict=True):
            v.mul_(0.9).add_(parameter.grad + decay * parameter.detach())
            parameter.data -= 0.02 * v * masks[id(parameter)]
    mask = mu.ComponentMask.of(COVERED, mu.shape(pair.bridge))
    prompts = prompts_of(facts)
    with mu.edit.gradient_mask(pair.bridge, mask) as training:
        optimizer = torch.optim.SGD(training.parameters, lr=0.02, momentum=0.9, weight_decay=decay)
        for _ in range(3):
            logits = prompts.logits(pair.bridge)[:, 0].log_softmax(-1)
            optimizer.zero_grad()
            logits.gather(1, prompts.answers[:, :1]).mean().backward()
            optimizer.step()
    assert_same_change(training.edit(), pair, tmp_path / "edited", edited)


def test_learn_weight_mask(pair, tmp_path):
    """m starts at 1, moves by SGD with momentum, and is clamped to [0, 1]; the model computes with m * weight."""
    labels, forget, steps, rate = ["L1MLP.W_out", "L2H1.W_O"], favoured(pair.raw, FORGET), 3, 20.0
    edited, start = pair.raw.copied(), pair.raw.copied()
    masks, weights = covered(edited, labels), dict(start.model.named_parameters())
    moving = {name: p for name, p in edited.model.named_parameters() if masks[id(p)].any()}
    numbers = {name: torch.ones_like(p) for name, p in moving.items()}
    velocity = {name: torch.zeros_like(p) for name, p in moving.items()}
    for step in range(steps):
        edited.model.zero_grad()
        loss = 0.3 * erasure(edited, forget) - log_p(edited, RETAIN).mean() + text_loss(edited)
        loss.backward()
        for name, parameter in moving.items():
            gradient = (parameter.grad * weights[name].detach() - 1e-3) * masks[id(parameter)]  # penalty: 1 - m
            velocity[name] = 0.9 * velocity[name] + gradient
            numbers[name] = (numbers[name] - rate * cosine(step, steps) * velocity[name]).clamp(0, 1)
            parameter.data = weights[name].detach() * torch.where(masks[id(parameter)] > 0, numbers[name], 1)
    assert any(((number > 0) & (number < 1)).any() for number in numbers.values())
    mask = mu.ComponentMask.of(labels, mu.shape(pair.bridge))
    options = {"steps": steps, "learning_rate": rate, "penalty_coefficient": 1e-3, "progress": False}
    learned = mu.edit.learn_weight_mask(pair.bridge, task_of(forget, RETAIN), mask, **options)
    assert_same_change(learned.edit(), pair, tmp_path / "edited", edited)


def test_edits_without_training(pair, tmp_path):
    mask = mu.ComponentMask.of(COVERED, mu.shape(pair.bridge))
    zeroed = mu.edit.zeroed(pair.bridge, mask)
    for name, factor in (("whole", 1.0), ("half", 0.5), ("negated", -1.0)):
        edited = pair.raw.copied()
        masks = covered(edited, COVERED)
        for parameter in edited.model.parameters():
            parameter.data = parameter.data * (1 - factor * masks[id(parameter)])
        edit = zeroed if name == "whole" else mu.edit.scaled(pair.bridge, zeroed, factor)
        assert_same_change(edit, pair, tmp_path / name, edited)


def test_applied_edits_and_their_export_give_the_same_logits(pair, tmp_path):
    mask = mu.ComponentMask.of(COVERED, mu.shape(pair.bridge))
    edit = mu.edit.scaled(pair.bridge, mu.edit.zeroed(pair.bridge, mask), 0.5)
    tokens, real = padded([fact.clean for fact in FACTS])
    checkpoint = exported(edit, pair.bridge, tmp_path / "edited")
    with torch.no_grad(), edit.applied(pair.bridge):
        found = pair.bridge(tokens, attention_mask=real.long())
    with torch.no_grad():
        for i, fact in enumerate(FACTS):
            assert_agree(found[i, : len(fact.clean)], checkpoint(fact.tokens).logits[0])


def fisher_by_hand(raw, facts):
    """The squared gradient of each prompt's loss, averaged over the prompts."""
    total = {name: torch.zeros_like(p) for name, p in raw.model.named_parameters()}
    for fact in facts:
        raw.model.zero_grad()
        (-log_p(raw, [fact]).mean()).backward()
        for name, parameter in raw.model.named_parameters():
            total[name] += parameter.grad**2 / len(facts)
    return total


def test_dampened(pair, tmp_path):
    edited, selection, dampening = pair.raw.copied(), 1.5, 0.8
    on_forget, on_retain = (fisher_by_hand(pair.raw.copied(), facts) for facts in (FORGET, RETAIN))
    masks = covered(edited, COVERED)
    for name, parameter in edited.model.named_parameters():
        chosen = (on_forget[name] > selection * on_retain[name]) & (masks[id(parameter)] > 0)
        factor = (dampening * on_retain[name] / on_forget[name]).clamp(max=1)
        parameter.data = torch.where(chosen, parameter * factor, parameter)
    mask = mu.ComponentMask.of(COVERED, mu.shape(pair.bridge))
    options = {"selection": selection, "dampening": dampening}
    edit = mu.edit.dampened(pair.bridge, task_of(FORGET, RETAIN), mask, **options)
    assert_same_change(edit, pair, tmp_path / "edited", edited)


def gradients_of(raw, facts, sign=1.0):
    raw.model.zero_grad()
    (-sign * log_p(raw, facts).mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in raw.model.named_parameters()}


SCORED = ["L1H2", "L1H3", "L2H1.W_O", "L1MLP.W_out", "L0N5", "L2MLP", "L0H0.W_K"]


def summed(raw, label, of):
    """The sum of a function of each weight's name and value over the weights that a component covers."""
    masks = covered(raw, [label])
    return sum((of(name, p) * masks[id(p)]).sum() for name, p in raw.model.named_parameters())


def test_saliency(pair):
    raw, shape = pair.raw.copied(), {"components": SCORED}
    each = [gradients_of(raw, [fact]) for fact in FORGET]
    mean = gradients_of(raw, FORGET)
    retain, gamma = gradients_of(raw, RETAIN), 0.5
    forget_prompts, retain_prompts = prompts_of(FORGET), prompts_of(RETAIN)
    expected = {
        "gradient_times_weight": lambda n, w: mean[n] * w,
        "snip": lambda n, w: (mean[n] * w).abs(),
        "fisher": lambda n, w: sum(g[n] ** 2 for g in each) / len(each),
        "wagle": lambda n, w: ((w - retain[n] / gamma) * mean[n]).abs(),
    }
    for method, of in expected.items():
        extra = ([retain_prompts], {"gamma": gamma}) if method == "wagle" else ([], {})
        scores = getattr(mu.localize, method)(pair.bridge, forget_prompts, *extra[0], **extra[1], **shape)
        assert_agree([scores[label] for label in SCORED], [summed(raw, label, of) for label in SCORED])
