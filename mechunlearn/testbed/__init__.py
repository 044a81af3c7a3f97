"""The shipped model: a small Llama that knows athletes and general knowledge, see MODEL_CARD.md."""

from mechunlearn.testbed.shipped import bridge, hooked, load, load_huggingface

__all__ = ["bridge", "hooked", "load", "load_huggingface"]
