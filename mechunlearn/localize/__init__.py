"""Where is it? Each method: (model, prompts) -> `ComponentScores`; `.top(...)` makes a mask of them."""

from mechunlearn.curve import Curve
from mechunlearn.localize.atp import atp_star
from mechunlearn.localize.attribution import (
    attribution_patching,
    integrated_gradients,
    integrated_gradients_of_activations,
    relp,
)
from mechunlearn.localize.circuits.curves import Faithfulness
from mechunlearn.localize.circuits.faithfulness import edge_faithfulness, faithfulness, n_components, n_weights
from mechunlearn.localize.circuits.files import load_mib, save_mib
from mechunlearn.localize.circuits.incompleteness import Incompleteness, incompleteness
from mechunlearn.localize.combining import (
    absolute,
    average,
    contrast,
    mean_absolute,
    per_weight,
    rank_difference,
    ratio,
    standardised_difference,
)
from mechunlearn.localize.controls import all_mlps, everything, random, random_like
from mechunlearn.localize.edge_attribution import (
    edge_attribution_patching,
    edge_clean_corrupted,
    edge_integrated_gradients,
    edge_integrated_gradients_of_activations,
)
from mechunlearn.localize.edges import edge_patching
from mechunlearn.localize.patching import SetEffects, activation_patching, activation_patching_by_position, set_patching
from mechunlearn.localize.paths import path_effect, path_patching
from mechunlearn.localize.readings.fact_lookup import (
    PAPER_LAYERS,
    PAPER_SHAPES,
    FactLookup,
    all_inputs,
    fact_lookup_by_paths,
    fact_lookup_by_probes,
    lowest_layer,
    paper_fact_lookup,
)
from mechunlearn.localize.readings.lenses import LogitLens, direct_logit_attribution, logit_lens
from mechunlearn.localize.readings.probes import ProbeResult, probes
from mechunlearn.localize.replacement import gaussian, mean_over, resample, zero
from mechunlearn.localize.saliency import fisher, gradient_times_weight, snip, wagle
from mechunlearn.localize.screening import Verified, screen_then_verify
from mechunlearn.localize.tracing import CausalTrace, causal_tracing
from mechunlearn.tasks.positions import answer, answers, everywhere, from_subject, roles, subject, subject_last

__all__ = [
    "PAPER_LAYERS", "PAPER_SHAPES", "CausalTrace", "Curve", "FactLookup", "Faithfulness", "Incompleteness",
    "LogitLens", "ProbeResult", "SetEffects", "Verified", "absolute", "activation_patching",
    "activation_patching_by_position", "all_inputs", "all_mlps", "answer", "answers", "atp_star",
    "attribution_patching", "average", "causal_tracing", "contrast", "direct_logit_attribution",
    "edge_attribution_patching", "edge_clean_corrupted", "edge_faithfulness", "edge_integrated_gradients",
    "edge_integrated_gradients_of_activations", "edge_patching", "everything", "everywhere", "fact_lookup_by_paths",
    "fact_lookup_by_probes", "faithfulness", "fisher", "from_subject", "gaussian", "gradient_times_weight",
    "incompleteness", "integrated_gradients", "integrated_gradients_of_activations", "load_mib", "logit_lens",
    "lowest_layer", "mean_absolute", "mean_over", "n_components", "n_weights", "paper_fact_lookup", "path_effect",
    "path_patching", "per_weight", "probes", "random", "random_like", "rank_difference", "ratio", "relp",
    "resample", "roles", "save_mib", "screen_then_verify", "set_patching", "snip", "standardised_difference",
    "subject", "subject_last", "wagle", "zero",
]  # fmt: skip
