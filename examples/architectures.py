"""Which architectures work with which methods: tried on a tiny random model of each.

    python examples/architectures.py                          # all of them: writes the table of docs/models.md
    python examples/architectures.py --only BloomForCausalLM  # one: prints its row

A method works if it runs and, where that is cheap to tell, gives the numbers of plain runs. It may refuse, by a
ValueError before any prompt is run. Anything else is a fault, and the script fails.
"""

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

import mechunlearn as mu

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- made by examples/architectures.py -->", "<!-- end -->"

Sizes = dict[str, Any]

_HEADS: Sizes = {"num_hidden_layers": 3, "num_attention_heads": 4}
PLAIN: Sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128, **_HEADS}
"""The names that most configurations have."""
GROUPED: Sizes = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
GPT: Sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
SLIDING: Sizes = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS: Sizes = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, Sizes] = {
    "GPT2LMHeadModel": {**GPT, "n_inner": 64},
    "GPTNeoXForCausalLM": {**PLAIN, "rotary_pct": 0.5},
    "LlamaForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED,
    "GemmaForCausalLM": GROUPED,
    "Gemma2ForCausalLM": {**GROUPED, **SLIDING, "query_pre_attn_scalar": 8},
    "MistralForCausalLM": {**GROUPED, "sliding_window": 4},
    "Ministral3ForCausalLM": GROUPED,
    "Gemma3ForCausalLM": {**GROUPED, **SLIDING, "query_pre_attn_scalar": 8},
    "VaultGemmaForCausalLM": {**GROUPED, **SLIDING, "query_pre_attn_scalar": 8},
    "Phi3ForCausalLM": {**GROUPED, "sliding_window": 4},
    "OlmoForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
    "Olmo3ForCausalLM": {**GROUPED, **SLIDING},
    "Exaone4ForCausalLM": {**GROUPED, **SLIDING},
    "GraniteForCausalLM": {
        **GROUPED,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.25,
    },
    "SmolLM3ForCausalLM": {**GROUPED, "no_rope_layers": [1, 0, 1]},
    "GlmForCausalLM": GROUPED,
    "Glm4ForCausalLM": GROUPED,
    "SeedOssForCausalLM": GROUPED,
    "HunYuanDenseV1ForCausalLM": GROUPED,
    "Ernie4_5ForCausalLM": GROUPED,
    "HeliumForCausalLM": GROUPED,
    "NanoChatForCausalLM": GROUPED,
    "BitNetForCausalLM": GROUPED,
    "CohereForCausalLM": {**GROUPED, "logit_scale": 0.25},
    "Cohere2ForCausalLM": {**GROUPED, **SLIDING, "logit_scale": 0.25},
    "PhiForCausalLM": {**PLAIN, "partial_rotary_factor": 0.5},
    "StableLmForCausalLM": GROUPED,
    "Starcoder2ForCausalLM": {**GROUPED, "sliding_window": 4},
    "NemotronForCausalLM": GROUPED,
    "ArceeForCausalLM": GROUPED,
    "ApertusForCausalLM": GROUPED,
    "Jais2ForCausalLM": GROUPED,
    "OPTForCausalLM": {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "XGLMForCausalLM": {"d_model": 32, "ffn_dim": 128, "num_layers": 3, "attention_heads": 4},
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "GPTJForCausalLM": {**GPT, "n_inner": 64, "rotary_dim": 4},
    "CodeGenForCausalLM": {**GPT, "n_inner": 64, "rotary_dim": 4},
    "GPTNeoForCausalLM": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 4,
    },
    "GPTBigCodeForCausalLM": {**GPT, "n_inner": 64},
    "FalconForCausalLM": {"hidden_size": 32, **_HEADS, "multi_query": True, "parallel_attn": True},
    "MptForCausalLM": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},
    "OpenAIGPTLMHeadModel": GPT,
    "HrmTextForCausalLM": GROUPED,
    "ModernBertDecoderForCausalLM": PLAIN,
    "PersimmonForCausalLM": PLAIN,
    "BioGptForCausalLM": PLAIN,
    "Gemma4ForCausalLM": {**GROUPED, **SLIDING},
    "YoutuForCausalLM": GROUPED,
    "MixtralForCausalLM": {**GROUPED, **EXPERTS},
    "OlmoeForCausalLM": {**GROUPED, **EXPERTS},
    "Qwen2MoeForCausalLM": {**GROUPED, **EXPERTS},
    "Qwen3MoeForCausalLM": {**GROUPED, **EXPERTS},
    "GptOssForCausalLM": {**GROUPED, **EXPERTS},
    "GraniteMoeForCausalLM": {**GROUPED, **EXPERTS},
    "DeepseekV2ForCausalLM": {**GROUPED, **EXPERTS},
    "MambaForCausalLM": {"hidden_size": 32, "num_hidden_layers": 3},
    "Lfm2ForCausalLM": GROUPED,
    "Qwen3NextForCausalLM": {**GROUPED, **EXPERTS},
}
"""Class of transformers -> the sizes of its tiny model. None of them is multimodal."""


def huggingface(name: str, tokenizer: Any) -> PreTrainedModel:
    """A random model: three layers of width 32, every parameter away from its initial value."""
    kind: Any = getattr(transformers, name)
    special = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    config: PretrainedConfig = kind.config_class(vocab_size=len(tokenizer), **ARCHITECTURES[name], **special)
    if any(hasattr(config, part) for part in ("vision_config", "audio_config")):
        raise ValueError(f"expected a text model, got {name}: booting others makes TransformerLens install packages.")
    config.architectures = [name]
    torch.manual_seed(0)
    model = kind(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise) if parameter.ndim == 1 else parameter.copy_(0.2 * noise)
    return model.eval()


def booted(name: str, tokenizer: Any) -> Any:
    """The tiny model as a `TransformerBridge`."""
    from transformer_lens.model_bridge import TransformerBridge

    model = huggingface(name, tokenizer)
    return TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer, device="cpu")


@torch.no_grad()
def check_wrapped(model: Any, task: mu.Task) -> None:
    """That the bridge gives the logits of the model that it was made from."""
    name, tokens = model.original_model.config.architectures[0], task.forget.tokens[:1, :8]
    assert_close(model(tokens), huggingface(name, model.tokenizer)(tokens).logits)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-4)


# --- A task of random tokens, with prompts of three lengths ---


def prompts(n_vocabulary: int, seed: int, n: int = 4) -> mu.Prompts:
    generator = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(4, n_vocabulary, shape, generator=generator)

    clean, subject = tokens(n, 11), torch.zeros(n, 11, dtype=torch.bool)
    clean[:, 0], subject[:, 3:6] = 1, True
    real = torch.arange(11) < 11 - torch.arange(n)[:, None] % 3
    candidates = torch.stack([4 + torch.randperm(n_vocabulary - 4, generator=generator)[:3] for _ in range(n)])
    options = {"attention_mask": real, "candidates": candidates, "subject": subject}
    corrupt = clean.where(~subject, tokens(n, 11))
    found = mu.Prompts.of(clean * real, candidates[:, 0], corrupt=corrupt * real, **options)
    return replace(found, names=tuple(f"{seed}.{i}" for i in range(n)))


def task(n_vocabulary: int) -> mu.Task:
    forget, retain, asked, other = (prompts(n_vocabulary, seed) for seed in range(4))
    text = torch.randint(4, n_vocabulary, (8, 12), generator=torch.Generator().manual_seed(9))
    formats = {"trained prompt": mu.tasks.Format(asked, other)}
    return mu.Task("random", forget, retain, formats, text[:4], text[4:], injection=prompts(n_vocabulary, 4))


# --- What is tried, in groups: each (model, task) -> nothing ---

WRITERS = ("L0H1", "L1H2", "L0ATTN", "L2ATTN", "L0MLP", "L2MLP", "L1N7")
PARTS = (*WRITERS, "L1H2.W_Q")
EDGES = ("embed->L0H1.W_Q", "L0MLP->L1H2.W_K", "L0H1->L1MLP", "L1H2->logits")
TRAINED = {"steps": 1, "batch_size": 4, "text_batch_size": 2, "progress": False}
WRITTEN = {"prefixes": ("a",), "steps": 2, "progress": False}


def patching(model: Any, task: mu.Task) -> None:
    """One component, a set, a circuit, and causal tracing; of components also by plain runs with hooks."""
    scores = mu.localize.activation_patching(model, task.forget, components=PARTS)
    for column, label in enumerate(PARTS):
        assert_close(scores.per_prompt[:, column], by_hand(model, task.forget, label))
    mu.localize.activation_patching_by_position(model, task.forget, components=WRITERS)
    mu.localize.set_patching(model, task.forget, {"two": ["L0H1", "L1MLP"]})
    mu.localize.faithfulness(model, task.forget, mask(model, "L0H1", "L1MLP"), random_circuits=0)
    mu.localize.causal_tracing(model, task.forget, draws=1, window=2)


@torch.no_grad()
def by_hand(model: Any, prompts: mu.Prompts, label: str) -> torch.Tensor:
    """The effect of a component: what is at its hook point in the run of the corrupt prompts, put into whole runs."""
    component = mu.Component.parse(label)
    name = mu.model.site(component, mu.shape(model))
    rows = torch.arange(len(prompts))[:, None]

    def logits(tokens: torch.Tensor, hook: Callable[..., Any]) -> torch.Tensor:
        with model.hooks(fwd_hooks=[(name, hook)]):
            return model(tokens, attention_mask=prompts.attention_mask.long())[rows, prompts.positions]

    values: list[torch.Tensor] = []
    logits(prompts.corrupt, lambda value, hook: values.append(value))
    unit = slice(None) if component.index is None else component.index

    def put(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, :, unit] = values[0][:, :, unit]
        return value

    before, after = (logits(prompts.tokens, hook) for hook in (lambda value, hook: value, put))
    return mu.metrics.logit_difference(after, prompts) - mu.metrics.logit_difference(before, prompts)


def gradients(model: Any, task: mu.Task) -> None:
    """Estimates by gradients of activations and of weights; by RelP the neurons of a layer sum to its MLP."""
    localize = mu.localize
    for method in (localize.attribution_patching, localize.atp_star, localize.fisher, localize.snip):
        method(model, task.forget, components=PARTS)
    for method in (localize.integrated_gradients, localize.integrated_gradients_of_activations):
        method(model, task.forget, components=WRITERS, steps=2)
    neurons = [f"L0N{i}" for i in range(mu.shape(model).d_mlp)]
    whole = localize.relp(model, task.forget, components=["L0MLP"])
    if "ln2_post" not in dict(model.blocks[0].named_children()):
        assert_close(localize.relp(model, task.forget, components=neurons).per_prompt.sum(1), whole.per_prompt[:, 0])


def paths(model: Any, task: mu.Task) -> None:
    """Direct paths to the logits, and to a head and an MLP through MLPs that respond."""
    mu.localize.path_patching(model, task.forget, senders=WRITERS[:-1])
    receivers = ["L2H1", "L2MLP"]
    mu.localize.path_patching(model, task.forget, senders=WRITERS[:2], receivers=receivers, through_mlps=True)


def stream(model: Any, task: mu.Task) -> None:
    """Direct logit attribution, the logit lens, probes; the lens after the last layer is the model's output."""
    mu.localize.direct_logit_attribution(model, task.forget, components=WRITERS)
    lens = mu.localize.logit_lens(model, task.forget, components=["L1MLP"])
    with torch.no_grad():
        said = task.forget.logits(model)[:, 0].log_softmax(-1)
    assert_close(lens.log_probability[:, 3], said.gather(1, task.forget.answers)[:, 0])
    mu.localize.probes(model, task.forget, torch.tensor([0, 1, 0, 1]), seeds=1, folds=2)


def edges(model: Any, task: mu.Task) -> None:
    """Edge attribution, exact edges, circuits; a circuit without all edges of a head is that head patched."""
    shape = mu.shape(model)
    chosen = mu.localize.edge_attribution_patching(model, task.forget).edges
    mu.localize.edge_integrated_gradients(model, task.forget, edges=EDGES, steps=2)
    mu.localize.edge_patching(model, task.forget, edges=EDGES)
    circuit = mu.EdgeMask.of([edge for edge in chosen if str(edge.source) != "L1H2"], shape)
    found = mu.localize.edge_faithfulness(model, task.forget, circuit, random_circuits=0)
    patched = mu.localize.activation_patching(model, task.forget, components=["L1H2"])
    assert_close(found.alone[:, 1] - found.whole, patched.per_prompt[:, 0])  # after the empty circuit


def training(model: Any, task: mu.Task) -> None:
    """Fine-tuning, LoRA, a learned weight mask: inside the mask alone."""
    where = mask(model, "L1H1", "L0H2.W_K", "L1MLP", "L2N3")
    mu.edit.finetune(model, task, where, **TRAINED)
    mu.edit.lora(model, task, where, rank=2, **TRAINED)
    mu.edit.learn_weight_mask(model, task, where, **TRAINED)


def facts(model: Any, task: mu.Task) -> None:
    """ROME and MEMIT."""
    mu.edit.rome(model, task, mask(model, "L1MLP"), **WRITTEN)
    mu.edit.memit(model, task, mask(model, "L0MLP", "L1MLP"), **WRITTEN)


def tests(model: Any, task: mu.Task) -> None:
    """Relearning, a soft prompt, few shots, generation."""
    mu.evaluate.relearn(model, task, learning_rates=(0.01,), steps=1, at=(1,))
    mu.evaluate.soft_prompt(model, task, steps=2, restarts=1)
    mu.evaluate.continuations(model, task.forget, 3)
    mu.evaluate.lens_extraction(model, task, budget=8)


def export(model: Any, task: mu.Task) -> None:
    """A checkpoint of an edited model that transformers loads, with the same logits; relearning on such a copy."""
    edit, tokens = mu.edit.zeroed(model, mask(model, "L1H1", "L2MLP.W_in")), task.forget.tokens[:1, :8]
    with tempfile.TemporaryDirectory() as folder, edit.applied(model), torch.no_grad():
        mu.model.save_huggingface(model, Path(folder) / "model")
        copy = type(model.original_model).from_pretrained(Path(folder) / "model", attn_implementation="eager")
        assert_close(copy.eval()(tokens).logits, model(tokens))
    options = {"learning_rates": (0.01,), "steps": 1, "batch_size": 4, "text_batch_size": 2}
    mu.evaluate.relearn_lora(model, task, rank=2, **options)


def mask(model: Any, *labels: str) -> mu.ComponentMask:
    return mu.ComponentMask.of(labels, mu.shape(model))


GROUPS: tuple[Callable[[Any, mu.Task], None], ...] = (
    *(patching, gradients, paths, stream, edges),
    *(training, facts, tests, export),
)


# --- The table ---


class Row(NamedTuple):
    name: str
    works: Mapping[str, bool]
    """Group -> whether it works; empty if the model is refused."""
    reason: str
    faults: tuple[str, ...]
    """What neither works nor refuses."""


def row_of(name: str, tokenizer: Any, tried: tuple[Callable[[Any, mu.Task], None], ...] = GROUPS) -> Row:
    try:
        model = booted(name, tokenizer)
    except Exception as error:
        return Row(name, {}, f"TransformerLens: {str(error).split('. ')[0]}", ())
    try:
        mu.model.check_model(model)
    except ValueError as error:
        return Row(name, {}, _reason(error), ())
    given, works, reasons, faults = task(len(tokenizer)), {}, [], []
    with prompts_seen(model) as seen:
        for function in (check_wrapped, *tried):
            seen.clear()
            try:
                function(model, given)
            except ValueError as error:
                works[function.__name__] = False
                reasons.append(_reason(error))
                faults += [f"{name}: {function.__name__} refused after it had begun: {error}"] if any(seen) else []
            except Exception as error:
                works[function.__name__] = False
                faults.append(f"{name}: {function.__name__}: {type(error).__name__}: {error}")
    works = {function.__name__: works.get(function.__name__, True) for function in tried}
    return Row(name, works, "; ".join(dict.fromkeys(reasons)), tuple(faults))


@contextmanager
def prompts_seen(model: Any) -> Iterator[list[bool]]:
    """Inside, a forward of rows longer than those that a model is checked with is noted in the yielded list."""
    seen: list[bool] = []
    with model.embed.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1] > 7)):
        yield seen


def _reason(error: Exception) -> str:
    """What the model is or has, from a message that says what came and what to do."""
    text = re.sub(r"^[A-Za-z0-9_]+: ", "", str(error).split("got ", 1)[-1].split(", got ")[-1])
    return re.split(r"; use |\. Use |: use ", text)[0]


def table(rows: list[Row]) -> str:
    """Rows with the most that works first; the models that are refused below."""
    names = [function.__name__ for function in GROUPS]
    lines = [f"| architecture | {' | '.join(names)} | why not |", "|---" * (len(names) + 2) + "|"]
    for row in sorted(rows, key=lambda row: -sum(row.works.values())):
        cells = ["yes" if row.works.get(name) else "refused" if row.works else "-" for name in names]
        lines.append(f"| `{row.name}` | {' | '.join(cells)} | {row.reason} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=None)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    _, tokenizer = mu.testbed.load_huggingface()
    rows = [row_of(name, tokenizer) for name in arguments.only or ARCHITECTURES]
    print(table(rows))
    for fault in (fault for row in rows for fault in row.faults):
        print(f"FAULT {fault}")
    if any(row.faults for row in rows):
        sys.exit(1)
    if arguments.only is None:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(f"{before}{START}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
