"""Where is it? Each method: (model, prompts) -> `ComponentScores`; `.top(...)` makes a mask of them."""

from mechunlearn.curve import Curve
from mechunlearn.localize.activation_patching import activation_patching, activation_patching_by_position
from mechunlearn.localize.atp_star import atp_star
from mechunlearn.localize.attribution_patching import attribution_patching
from mechunlearn.localize.causal_trace import CausalTrace
from mechunlearn.localize.causal_tracing import causal_tracing
from mechunlearn.localize.circuit_curves import Faithfulness
from mechunlearn.localize.circuit_files import load_mib, save_mib
from mechunlearn.localize.contrast import (
    absolute,
    average,
    contrast,
    mean_absolute,
    per_weight,
    rank_difference,
    ratio,
    standardised_difference,
)
from mechunlearn.localize.direct_logit_attribution import direct_logit_attribution
from mechunlearn.localize.edge_attribution_patching import edge_attribution_patching
from mechunlearn.localize.edge_faithfulness import edge_faithfulness
from mechunlearn.localize.edge_integrated_gradients import (
    edge_clean_corrupted,
    edge_integrated_gradients,
    edge_integrated_gradients_of_activations,
)
from mechunlearn.localize.edge_patching import edge_patching
from mechunlearn.localize.fact_lookup import all_inputs, fact_lookup_by_paths, fact_lookup_by_probes, lowest_layer
from mechunlearn.localize.faithfulness import faithfulness
from mechunlearn.localize.incompleteness import incompleteness
from mechunlearn.localize.integrated_gradients import integrated_gradients, integrated_gradients_of_activations
from mechunlearn.localize.knockouts import Incompleteness
from mechunlearn.localize.logit_lens import LogitLens, logit_lens
from mechunlearn.localize.lookup import FactLookup
from mechunlearn.localize.paper_layers import PAPER_LAYERS, paper_fact_lookup
from mechunlearn.localize.path_patching import path_effect, path_patching
from mechunlearn.localize.probes import ProbeResult, probes
from mechunlearn.localize.random import all_mlps, everything, random, random_like
from mechunlearn.localize.relp import relp
from mechunlearn.localize.saliency import fisher, gradient_times_weight, snip, wagle
from mechunlearn.localize.screen_then_verify import screen_then_verify
from mechunlearn.localize.set_effects import SetEffects
from mechunlearn.localize.set_patching import set_patching
from mechunlearn.localize.verified import Verified

__all__ = [
    "PAPER_LAYERS",
    "CausalTrace",
    "Curve",
    "FactLookup",
    "Faithfulness",
    "Incompleteness",
    "LogitLens",
    "ProbeResult",
    "SetEffects",
    "Verified",
    "absolute",
    "activation_patching",
    "activation_patching_by_position",
    "all_inputs",
    "all_mlps",
    "atp_star",
    "attribution_patching",
    "average",
    "causal_tracing",
    "contrast",
    "direct_logit_attribution",
    "edge_attribution_patching",
    "edge_clean_corrupted",
    "edge_faithfulness",
    "edge_integrated_gradients",
    "edge_integrated_gradients_of_activations",
    "edge_patching",
    "everything",
    "fact_lookup_by_paths",
    "fact_lookup_by_probes",
    "faithfulness",
    "fisher",
    "gradient_times_weight",
    "incompleteness",
    "integrated_gradients",
    "integrated_gradients_of_activations",
    "load_mib",
    "logit_lens",
    "lowest_layer",
    "mean_absolute",
    "paper_fact_lookup",
    "path_effect",
    "path_patching",
    "per_weight",
    "probes",
    "random",
    "random_like",
    "rank_difference",
    "ratio",
    "relp",
    "save_mib",
    "screen_then_verify",
    "set_patching",
    "snip",
    "standardised_difference",
    "wagle",
]
