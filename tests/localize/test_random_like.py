from collections import Counter
from typing import Any

import pytest

from mechunlearn.components import ComponentMask, ModelShape, heads, heads_and_mlps, layers, matrices, mlps, neurons
from mechunlearn.localize.controls import all_mlps, everything, random, random_like
from mechunlearn.model import shape

LLAMA_MASKS = [
    ["L1MLP"],
    ["L0H1"],
    ["L0H0", "L0H1"],
    ["L0H0", "L0H2"],
    ["L0H0", "L0H1", "L1MLP"],
    ["L0H0", "L1H2", "L2H1", "L0MLP", "L2MLP"],
    ["L1ATTN", "L2MLP"],
    ["L0H0.W_Q", "L1H1.W_O", "L0H0.W_K", "L1MLP.W_gate"],
    ["L0N1", "L0N2", "L2N63"],
]
SEEDS = range(6)


def mask_of(model: Any, labels: list[str]) -> ComponentMask:
    return ComponentMask.of(labels, shape(model))


def smallest(mask: ComponentMask, members: Any) -> int:
    return min(mask.shape.n_parameters([member]) for member in members)


@pytest.mark.parametrize("labels", LLAMA_MASKS, ids="+".join)
def test_grouped_heads_are_matched_within_one_smallest_component_of_the_kinds(llama: Any, labels: list[str]) -> None:
    mask = mask_of(llama, labels)
    for seed in SEEDS:
        control = random_like(mask, llama, seed)
        assert {c.kind for c in control} == {c.kind for c in mask}
        assert 0 <= mask.n_parameters - control.n_parameters < smallest(mask, mask)


@pytest.mark.parametrize("labels", [["L0H0", "L0H1", "L1MLP"], ["L0H3", "L1MLP", "L2MLP"], ["L0N1", "L1H0.W_V"]])
def test_ungrouped_heads_are_matched_kind_by_kind_and_exactly(gpt2: Any, labels: list[str]) -> None:
    mask = mask_of(gpt2, labels)
    for seed in SEEDS:
        control = random_like(mask, gpt2, seed)
        assert Counter(c.kind for c in control) == Counter(c.kind for c in mask)
        assert control.n_parameters == mask.n_parameters


@pytest.mark.parametrize("labels", [["L0H0", "L0H1", "L1MLP"], ["L0H0", "L0H1", "L0MLP", "L1MLP"]])
def test_unlucky_heads_never_crowd_out_an_mlp(llama: Any, labels: list[str]) -> None:
    mask = mask_of(llama, labels)
    n_mlps = sum(c.part == "MLP" for c in mask)
    for seed in range(40):
        assert sum(c.part == "MLP" for c in random_like(mask, llama, seed)) == n_mlps


def test_one_seed_gives_one_control_and_seeds_differ(llama: Any) -> None:
    mask = mask_of(llama, ["L0H0", "L1H3", "L1MLP"])
    assert random_like(mask, llama, 5) == random_like(mask, llama, 5)
    assert len({random_like(mask, llama, seed) for seed in range(20)}) > 10


def test_every_place_is_drawn_those_of_the_mask_among_them(gpt2: Any) -> None:
    mask = mask_of(gpt2, ["L0MLP", "L1MLP"])
    controls = [random_like(mask, gpt2, seed) for seed in range(90)]
    drawn = Counter(c for control in controls for c in control)
    assert set(drawn) == set(mlps(shape(gpt2)))
    assert min(drawn.values()) > 15
    assert all(control.provenance["shared"] == len(control & mask) for control in controls)


def test_a_control_is_never_the_mask_itself(gpt2: Any) -> None:
    mask = mask_of(gpt2, ["L1MLP"])
    assert all(random_like(mask, gpt2, seed) != mask for seed in range(30))
    for whole, pool in ((mask_of(gpt2, ["L0MLP", "L1MLP", "L2MLP"]), None), (mask, list(mask))):
        with pytest.raises(
            ValueError, match=r"expected a pool with other components.*a control equal to the mask is none"
        ):
            random_like(whole, gpt2, 0, pool=pool)


def test_a_pool_is_drawn_from_alone_whatever_its_kinds(llama: Any) -> None:
    mask = mask_of(llama, ["L0MLP", "L0H0"])
    for pool in (matrices(shape(llama)), neurons(shape(llama)), heads(shape(llama))):
        control = random_like(mask, llama, 0, pool=pool)
        assert set(control) <= set(pool)
        assert 0 <= mask.n_parameters - control.n_parameters < smallest(mask, pool)


def test_a_pool_may_be_an_iterator_with_repetitions(llama: Any) -> None:
    mask, pool = mask_of(llama, ["L0H0"]), heads(shape(llama))
    assert random_like(mask, llama, 1, pool=iter(pool * 2)) == random_like(mask, llama, 1, pool=pool)


def test_the_pool_without_the_mask_gives_a_disjoint_control(llama: Any) -> None:
    mask = mask_of(llama, ["L0H0", "L0H1", "L1MLP"])
    pool = set(heads_and_mlps(shape(llama))) - set(mask)
    assert random_like(mask, llama, 0, pool=pool).isdisjoint(mask)


@pytest.mark.parametrize(
    ("labels", "pool", "got"),
    [
        (["L0MLP"], ["L0H0", "L0H1"], "1,536 out of 2"),
        (["L0H0"], ["L0MLP"], "0 out of 1"),
        (["L0H0"], [], "0 out of 0"),
    ],
)
def test_a_pool_that_cannot_match_is_refused(llama: Any, labels: list[str], pool: list[str], got: str) -> None:
    mask = mask_of(llama, labels)
    message = (
        rf"expected a pool that can cover {mask.n_parameters:,} weights .* got {got} components: pass a larger pool or"
    )
    with pytest.raises(ValueError, match=message):
        random_like(mask, llama, 0, pool=list(mask_of(llama, pool)))


def test_an_empty_mask_has_no_control(llama: Any) -> None:
    with pytest.raises(ValueError, match="expected a pool that can cover 0 weights"):
        random_like(mask_of(llama, []), llama, 0)


def test_a_mask_of_another_model_is_refused(llama: Any) -> None:
    other = ModelShape(n_layers=3, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_mlp=65, gated=True)
    with pytest.raises(ValueError, match="same shape"):
        random_like(ComponentMask.of(["L0MLP", "L1MLP"], other), llama, 0)


def test_the_control_says_how_it_was_made(llama: Any) -> None:
    mask = mask_of(llama, ["L0H0", "L0H2"])
    control = random_like(mask, llama, 3)
    made = dict(control.provenance)
    counts = {"weights": control.n_parameters, "matched": mask.n_parameters}
    shared = len(control & mask)
    assert made == {"method": "random_like", "seed": 3, "pool": "the same kinds", "shared": shared, **counts}
    pool = ["L0H0", "L0H2", "L1H0", "L1H2"]
    assert random_like(mask, llama, 3, pool=pool).provenance["pool"] == pool


def test_random_scores_are_uniform_and_repeat_by_seed(llama: Any) -> None:
    scores = random(llama, seed=2, components=neurons)
    assert tuple(scores) == tuple(neurons(shape(llama)))
    assert scores.settings == {"seed": 2}
    assert all(0 <= value < 1 for value in scores.values())
    # 192 uniform values: the mean is 0.5 within 0.021 (one standard error), here three of them
    assert float(scores.tensor.mean()) == pytest.approx(0.5, abs=0.065)
    assert dict(scores) == dict(random(llama, seed=2, components=neurons))
    assert dict(scores) != dict(random(llama, seed=3, components=neurons))


def test_random_scores_cover_heads_and_mlps_by_default(llama: Any) -> None:
    assert list(random(llama, seed=0)) == heads_and_mlps(shape(llama))


def test_fixed_masks_cover_what_they_say(llama: Any) -> None:
    sizes = shape(llama)
    assert set(all_mlps(llama)) == set(mlps(sizes))
    assert set(everything(llama)) == set(layers(sizes))
    assert everything(llama).n_parameters == sizes.n_parameters(matrices(sizes))
