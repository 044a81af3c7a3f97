"""The slow, obvious reference for edges: run the model with one destination's own input moved."""

from contextlib import ExitStack

import torch

from mechunlearn.components import Edge
from mechunlearn.model import logits_at, preserved, recording, shape, slots


def heads_of(model, z, layer):
    """What each head gives, before a post-norm, [batch, pos, head, d_model]."""
    slot = slots(model)[layer, "W_O"]
    return torch.einsum("bphw,hwd->bphd", z, slot.view(slot.parameter.detach()))


def site_of(source):
    if source == "embed":
        return "blocks.0.hook_resid_pre"
    return f"blocks.{source.layer}." + ("hook_mlp_out" if source.part == "MLP" else "attn.hook_z")


def change_to(model, source, own, value, *, first_order=False):
    """What the residual stream gains when the source's own output, and no other's, becomes the value at its site.

    Where a post-norm follows (Gemma 2), it normalizes the sum of all heads anew; to first order, its derivative acts.
    """
    if source == "embed" or source.part == "MLP":
        return value - own
    heads = heads_of(model, own, source.layer)
    change = (heads_of(model, value, source.layer) - heads)[:, :, source.index]
    post = dict(model.blocks[source.layer].named_children()).get("ln1_post")
    if post is None:
        return change
    whole = heads.sum(2)  # Gemma 2 has no output bias
    if first_order:
        with torch.enable_grad():
            return torch.autograd.functional.jvp(post, whole, change)[1].detach()
    return post(whole + change) - post(whole)


@torch.no_grad()
def at(model, prompts, name):
    with recording(model, [name]) as found:
        logits_at(model, prompts.tokens, prompts.attention_mask)
    return found[name]


def with_one_edge_moved(model, prompts, edge, change, metric, hooks=()):
    """The metric per prompt when the destination, and nothing else, reads `change` more."""
    destination = edge.destination
    with ExitStack() as stack:
        if destination == "logits":
            stack.callback(model.ln_final.register_forward_pre_hook(lambda m, a: (a[0] + change, *a[1:])).remove)
        elif destination.part == "MLP":
            norm = model.blocks[destination.layer].ln2
            stack.callback(norm.register_forward_pre_hook(lambda m, a: (a[0] + change, *a[1:])).remove)
        else:
            hooks = [*hooks, *reading_more(model, destination, change)]
        logits = logits_at(model, prompts.tokens, prompts.attention_mask, prompts.positions, hooks=hooks)
        return metric(logits, prompts)


def reading_more(model, destination, change):
    """Hooks by which one head's query, key or value is computed from a changed residual stream."""
    sizes = shape(model)
    slot = slots(model)[destination.layer, destination.matrix]
    unit = destination.index * slot.units // sizes.n_heads
    weight = slot.view(slot.parameter.detach())[unit]
    norm, seen = model.blocks[destination.layer].ln1, {}

    def see(residual, hook):
        seen["residual"] = residual

    def project(value, hook):
        before = seen["residual"]
        value = value.clone()
        value[:, :, unit] = value[:, :, unit] + (norm(before + change) - norm(before)) @ weight.T
        return value

    letter = destination.matrix[-1].lower()
    prefix = f"blocks.{destination.layer}."
    return [(prefix + "hook_resid_pre", see), (f"{prefix}attn.hook_{letter}", project)]


def slope(model, prompts, edge, metric, direction="noising", hooks=(), change=None):
    """d metric / d share of the source's change that reaches the destination, at 0, per prompt."""
    edge = Edge.parse(edge) if isinstance(edge, str) else edge
    patched, other = (prompts, prompts.corrupted()) if direction == "noising" else (prompts.corrupted(), prompts)
    change = change_of(model, patched, other, edge.source) if change is None else change
    with preserved(model):
        share = torch.zeros(len(prompts), 1, 1, requires_grad=True)
        values = with_one_edge_moved(model, patched, edge, share * change, metric, hooks)
        if not values.requires_grad:  # hooks that hold what the destination leads to
            return torch.zeros(len(prompts))
        return torch.autograd.grad(values.sum(), share)[0].flatten()


def change_of(model, patched, other, source, *, first_order=True):
    """What the source writes in the other run minus what it writes in the patched one; nothing at padding."""
    own, value = (at(model, prompts, site_of(source)) for prompts in (patched, other))
    change = change_to(model, source, own, value, first_order=first_order)
    return change.detach() * patched.attention_mask[..., None]


def some_edges(model):
    """Edges of every kind; those between a head and its own layer's MLP only where blocks are sequential."""
    labels = ["embed->L0H1.W_Q", "embed->L2H2.W_K", "L0H3->L1H2.W_V", "L0MLP->L2H1.W_Q", "L1H0->L2H0.W_K"]
    labels += ["embed->L0MLP", "L0H1->L1MLP", "L1MLP->L2MLP", "embed->logits", "L2H3->logits", "L2MLP->logits"]
    return labels + ([] if model.cfg.parallel_attn_mlp else ["L1H2->L1MLP"])
