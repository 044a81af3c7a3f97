"""What "left as it was" means."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def state(model: Any) -> dict[str, Any]:
    """Everything that a call might leave behind: weights, flags, gradients, modes, hooks, cfg, patched methods."""
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    inner = getattr(model, "original_model", model)  # a bridge does not register all modules of its model
    modules |= {f"original_model.{name}": module for name, module in inner.named_modules()}
    hooks = {
        name: [list(found.values()) for found in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
        for name, m in modules.items()
    }
    return {
        "weights": {name: p.detach().clone() for name, p in parameters.items()},
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
        "memory": {name: (p.data_ptr(), p.stride()) for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {name: p.grad for name, p in parameters.items()},
        "training": {name: m.training for name, m in modules.items()},
        "hooks": hooks,
        "points": {name: (len(p.fwd_hooks), len(p.bwd_hooks)) for name, p in model.hook_dict.items()},
        "patched": [name for name, m in modules.items() if "forward" in m.__dict__],
        "cfg": {name: repr(value) for name, value in vars(model.cfg).items()},
    }


@contextmanager
def left_as_it_was(model: Any, *, moved: bool = False) -> Iterator[None]:
    """Asserts that the block, however it ends, changes nothing about the model; `moved`: but where weights are."""
    before = state(model)
    if moved:
        before.pop("memory")
    try:
        yield
    finally:
        after = state(model)
        for part in ("weights", "buffers"):
            for name, tensor in before[part].items():
                assert torch.equal(tensor, after[part][name]), f"{part} {name} changed"
            before.pop(part), after.pop(part)
        before_gradients, after_gradients = before.pop("gradients"), after.pop("gradients")
        assert all(before_gradients[name] is after_gradients[name] for name in before_gradients)
        for part, found in before.items():
            changed = [name for name in found if found[name] != after[part].get(name)] if part != "patched" else found
            assert found == after[part], f"{part} changed: {changed}"
