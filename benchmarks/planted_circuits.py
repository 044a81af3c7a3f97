"""Every edge method on circuits written into the weights of a small GPT-2, and single effects behind saturation.

    python benchmarks/planted_circuits.py

The circuits are those of `tests/planted_circuit.py`: induction in four layers, once with soft attention and once with a
saturated softmax, and copying next to decoys, which push a softmax that is nearly saturated; three seeds of noise
weights and prompts each. AUROC: the probability that a planted edge scores higher (by size) than another; then how many
planted edges are among as many top edges. Prints Markdown.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mechunlearn import localize
from mechunlearn.components import ComponentScores, EdgeScores, matrices

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import planted_circuit

SATURATED = {"sharpness": 30.0, "anchor": 5.0, "kinds": (1, 3)}
SEEDS = range(3)


def main() -> None:
    torch.set_num_threads(1)
    edge_table()
    print()
    share_table()
    print()
    decoy_table()


def edge_table() -> None:
    methods: dict[str, Callable[..., EdgeScores]] = {
        "`edge_patching`": localize.edge_patching,
        "`edge_integrated_gradients`, 5 steps": localize.edge_integrated_gradients,
        "`edge_attribution_patching`, noising": localize.edge_attribution_patching,
        "`edge_attribution_patching`, denoising": partial(localize.edge_attribution_patching, direction="denoising"),
        "`edge_clean_corrupted`": localize.edge_clean_corrupted,
        "`edge_integrated_gradients_of_activations`, 2 steps": partial(
            localize.edge_integrated_gradients_of_activations, steps=2
        ),
        "`edge_integrated_gradients_of_activations`, 10 steps": partial(
            localize.edge_integrated_gradients_of_activations, steps=10
        ),
        "random": random,
    }
    kinds = ("soft", planted_with({})), ("saturated", planted_with(SATURATED)), ("decoys", decoyed())
    print(f"| method | {' | '.join(f'{name}: AUROC | of {len(made[0].edges)}' for name, made in kinds)} |")
    print(f"|---|{'---|---|' * len(kinds)}")
    for name, method in methods.items():
        cells = [cell for _, made in kinds for cell in found(method, made)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def planted_with(options: dict[str, object]) -> list[planted_circuit.Planted]:
    return [planted_circuit.induction(seed=seed, **options) for seed in SEEDS]


def decoyed() -> list[planted_circuit.Planted]:
    return [planted_circuit.decoyed(seed=seed) for seed in SEEDS]


def found(method: Callable[..., EdgeScores], circuits: list[planted_circuit.Planted]) -> tuple[str, str]:
    scores = [method(made.model, made.prompts) for made in circuits]
    pairs = list(zip(scores, circuits, strict=True))
    values = [f"{planted_circuit.auroc(one, made.edges):.4f}" for one, made in pairs]
    hits = [str(len(made.edges & one.top(k=len(made.edges)).edges)) for one, made in pairs]
    return ", ".join(values), ", ".join(hits)


def random(model: object, prompts: object) -> EdgeScores:
    scored = localize.edge_attribution_patching(model, prompts)
    order = torch.rand(len(scored), generator=torch.Generator().manual_seed(0)).tolist()
    return EdgeScores.of(dict(zip(scored, order, strict=True)), scored.shape)


def share_table() -> None:
    """Score over exact effect, of one component each."""
    soft, saturated = planted_circuit.induction(anchor=5.0, kinds=(1, 3)), planted_circuit.induction(**SATURATED)
    by_keys, by_norm = (
        planted_circuit.induction(anchor=5.0, kinds=(1,)),
        planted_circuit.induction(kinds=(2,), sharpness=30.0),
    )
    cases = {
        "query, soft": (soft, "L2H3.W_Q"),
        "query, saturated": (saturated, "L2H3.W_Q"),
        "key, soft": (soft, "L2H3.W_K"),
        "key, saturated": (saturated, "L2H3.W_K"),
        "head that acts through keys": (by_keys, "L0H1"),
        "head before a saturated norm": (by_norm, "L2H3"),
    }
    methods: dict[str, Callable[..., ComponentScores]] = {
        "`attribution_patching`": localize.attribution_patching,
        "`atp_star`, `grad_drop=False`": partial(localize.atp_star, grad_drop=False),
        "`atp_star`": localize.atp_star,
        "`relp`": localize.relp,
        "`integrated_gradients`, 5 steps": localize.integrated_gradients,
        "`integrated_gradients_of_activations`, 5 steps": localize.integrated_gradients_of_activations,
    }
    print(f"| score / exact effect | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
    for name, method in methods.items():
        print(f"| {name} | {' | '.join(share(method, *case) for case in cases.values())} |", flush=True)


def share(method: Callable[..., ComponentScores], made: planted_circuit.Planted, label: str) -> str:
    components = matrices if "." in label else [label]
    if method is localize.relp and "." in label:
        return "refused"
    score = method(made.model, made.prompts, components=components)[label]
    return f"{abs(score / localize.activation_patching(made.model, made.prompts, components=[label])[label]):.2f}"


def decoy_table() -> None:
    """AUROC of what matters against decoys, per seed, and score over exact effect of decoys, with the seeds' range."""
    methods: dict[str, Callable[..., ComponentScores]] = {
        "`activation_patching`": localize.activation_patching,
        "`attribution_patching`, noising": localize.attribution_patching,
        "`attribution_patching`, denoising": partial(localize.attribution_patching, direction="denoising"),
        "`atp_star`, `grad_drop=False`": partial(localize.atp_star, grad_drop=False),
        "`atp_star`": localize.atp_star,
        "`relp`": localize.relp,
        "`integrated_gradients`, 5 steps": localize.integrated_gradients,
        "`integrated_gradients`, 10 steps": partial(localize.integrated_gradients, steps=10),
    }
    circuits = decoyed()
    layers, heads, parts = range(1, 4), range(4), ("W_Q", "W_K", "W_V")
    reading = [f"L{layer}H{head}.{part}" for layer in layers for head in heads for part in parts]
    places = {
        "queries, keys, values": (reading, planted_circuit.readers),
        "heads, MLPs": (None, planted_circuit.writers),
    }
    print(f"| method | {' | '.join(f'{place}: AUROC | decoys / exact' for place in places)} |\n|---|---|---|---|---|")
    for name, method in methods.items():
        cells = [cell for place in places.values() for cell in against_decoys(method, circuits, *place)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def against_decoys(
    method: Callable[..., ComponentScores],
    circuits: list[planted_circuit.Planted],
    components: list[str] | None,
    ends: Callable[..., list[str]],
) -> tuple[str, str]:
    options = {} if components is None else {"components": components}
    if method is localize.relp and components is not None:
        return "refused", "refused"
    values, shares = [], []
    for made in circuits:
        true, decoys = ends(made.edges), ends(made.decoys)
        scores = method(made.model, made.prompts, **options)
        direction = {"direction": scores.settings["direction"]}
        exact = localize.activation_patching(made.model, made.prompts, components=decoys, **direction)
        values.append(f"{planted_circuit.decoy_auroc(scores, true, decoys):.2f}")
        shares += [abs(scores[decoy] / exact[decoy]) for decoy in decoys]
    return ", ".join(values), f"{min(shares):.2f} to {max(shares):.2f}"


if __name__ == "__main__":
    main()
