"""Losses that compare with the unedited model, or act on residual streams: against whole runs, prompt by prompt."""

from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn import losses
from mechunlearn.identity import name_of
from mechunlearn.training import Term, fit, terms
from mechunlearn.weights import read, select, write

LABELS = ("L1MLP", "L0H1.W_Q")
ZERO_AT_THE_START = ("kl_to_original", "representation_matching")
"""Their gradient is 0 until something else moves the model."""
LOSSES = (
    losses.cross_entropy,
    partial(losses.log_one_minus_probability, cutoff=-20.0),
    losses.gradient_ascent,
    losses.weighted_gradient_ascent,
    losses.maximum_entropy,
    losses.cross_entropy_unlearning,
    losses.satimp,
    losses.kl_to_original,
    partial(losses.undial, beta=3.0),
    losses.npo,
    partial(losses.simnpo, beta=0.5),
    losses.dpo,
    losses.rmu,
    losses.representation_matching,
)


def name(loss):
    return name_of(loss)


def alternative(model, prompts):
    """Other answers to the same prompts, of two tokens each."""
    generator = torch.Generator().manual_seed(9)
    answers = [
        f" w{a} w{b}" for a, b in torch.randint(4, tiny.N_VOCAB, (len(prompts), 2), generator=generator).tolist()
    ]
    return mu.tasks.build(model, prompts.texts, answers)


def trained(model, prompts, loss, *, other, rate=0.02, steps=2, labels=LABELS, micro=None):
    """The values after some steps of SGD, on a model that is given back as it was."""
    entries = select(model, mu.ComponentMask.of(labels, mu.shape(model)))
    before = read(entries)
    terms = [Term("term", prompts, loss, 1.0, len(prompts), other)]
    if name(loss) in ZERO_AT_THE_START:
        terms.append(Term("more", other, losses.cross_entropy, 1.0, len(other)))
    options = {"steps": steps, "learning_rate": rate, "optimizer": torch.optim.SGD, "clip": None, "progress": False}
    try:
        with mu.model.differentiable(model):
            fit(model, entries, terms, micro_batch_size=micro, **options)
        return read(entries)
    finally:
        write(entries, before)


def whole_run(model, prompts, layer):
    """Logits and the residual stream after `layer`, one prompt at a time, without padding."""
    for i in range(len(prompts)):
        real = prompts.attention_mask[i]
        tokens, places = prompts.tokens[i][real][None], prompts.positions[i] - int(real.int().argmax())
        count = int(prompts.answer_mask[i].sum())
        kept = {}
        hooks = [(f"blocks.{layer}.hook_resid_post", lambda value, hook, kept=kept: kept.update(residual=value))]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
        at = places[:count]
        yield logits[0, at], prompts.answers[i][:count], kept["residual"][0, at]


def slowly(model, original, prompts, loss, other):
    """The mean loss, from whole runs; `original` holds those of the unedited model."""
    names = losses.needs(loss)
    total, units = torch.zeros(()), 0
    rows = [whole_run(model, prompts, 1), original[0], whole_run(model, other, 1), original[1]]
    for (logits, targets, residual), (logits0, _, residual0), (la, ta, _), (la0, _, _) in zip(*rows, strict=True):

        def summed(found, answers):
            return found.log_softmax(-1).gather(1, answers[:, None]).sum()[None]

        given = {
            "logits": logits,
            "targets": targets,
            "residual": residual,
            "original_logits": logits0.detach(),
            "original_residual": residual0.detach(),
            "length": torch.tensor([len(targets)]),
            "log_probability": summed(logits, targets),
            "original_log_probability": summed(logits0, targets).detach(),
            "alternative_log_probability": summed(la, ta),
            "original_alternative_log_probability": summed(la0, ta).detach(),
        }
        values = loss(**{key: given[key] for key in names})
        total, units = total + values.sum(), units + len(values)
    return total / units


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_two_steps_are_the_gradient_of_the_written_loss(model, loss):
    """The second step is where the model and the unedited one differ. The rate makes steps of about 0.01.

    Where gradients are as small as the tiny Gemmas', the rate magnifies their rounding, which depends on the CPU.
    """
    prompts = tiny.prompts(model, answer=3, seed=3)
    other = alternative(model, prompts)
    entries = select(model, mu.ComponentMask.of(LABELS, mu.shape(model)))
    before = read(entries)
    with torch.no_grad():
        original = [list(whole_run(model, each, 1)) for each in (prompts, other)]
    rate = 0.0
    try:
        for step in range(2):
            for e in entries:
                e.slot.parameter.requires_grad_(True)
            value = slowly(model, original, prompts, loss, other)
            if name(loss) in ZERO_AT_THE_START:
                value = value + slowly(model, original[::-1], other, losses.cross_entropy, prompts)
            gradients = torch.autograd.grad(value, [e.slot.parameter for e in entries])
            rate = rate or 0.01 / max(float(gradient.abs().max()) for gradient in gradients)
            for e, gradient in zip(entries, gradients, strict=True):
                e.write(e.read(e.slot.parameter.detach()) - rate / (1 + step) * e.read(gradient))  # cosine schedule
        expected = read(entries)
    finally:
        for e in entries:
            e.slot.parameter.requires_grad_(False)
        write(entries, before)
    with left_as_it_was(model):
        found = trained(model, prompts, loss, other=other, rate=rate)
    assert max(float((expected[label] - value).abs().max()) for label, value in before.items()) > 5e-3
    assert max(float((expected[label] - value).abs().max()) for label, value in found.items()) < 2e-5 + 5e-6 * rate


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("how", ["padding", "micro", "pieces", "filling", "higher"])
def test_padding_micro_batches_and_pieces_of_logits_do_not_matter(llama, loss, how, monkeypatch):
    labels = ("L1MLP",) if how == "higher" else LABELS  # `higher`: runs start at layer 1
    made = {side: tiny.prompts(llama, answer=3, seed=3, padding=side) for side in ("right", "left")}
    other = {side: alternative(llama, prompts) for side, prompts in made.items()}
    expected = trained(llama, made["right"], loss, labels=labels, other=other["right"])
    side, micro, prompts = "left" if how == "padding" else "right", None, None
    if how == "micro":
        micro = 2
    if how == "pieces":
        monkeypatch.setitem(terms.LOGITS_AT_ONCE, "cpu", 2 * llama.cfg.d_vocab)
    if how == "filling":  # what stands at masked places is anything
        prompts = made["right"]
        noise = torch.randint(4, tiny.N_VOCAB, prompts.tokens.shape, generator=torch.Generator().manual_seed(1))
        tokens = torch.where(prompts.attention_mask, prompts.tokens, noise)
        prompts = mu.tasks.Prompts(
            tokens,
            prompts.attention_mask,
            torch.nn.functional.pad(prompts.positions, (0, 2)),
            torch.nn.functional.pad(prompts.answers, (0, 2), value=-100),
            texts=prompts.texts,
        )
    if how == "higher":
        made[side] = made[side][range(len(made[side]))]
        micro = 4
    found = trained(llama, prompts or made[side], loss, labels=labels, other=other[side], micro=micro)
    assert max(float((found[label] - expected[label]).abs().max()) for label in expected) < 2e-6


def test_an_answer_to_prefer_is_asked_for(llama):
    prompts = tiny.prompts(llama)
    with pytest.raises(ValueError, match=r"expected an alternative answer for each of the 6 term prompts.*got 0: give"):
        trained(llama, prompts, losses.dpo, other=None)
