"""Tensor functions: attention, Nystroem attention, farthest points, patterns, detectors, cost."""

from fna_lab.ops.agreement import (
    average_ranks,
    matching_places,
    rank_correlation,
    set_agreement,
    set_counts,
)
from fna_lab.ops.anatomy import (
    class_max,
    class_mean,
    class_members,
    class_sums,
    class_suppression,
    ov_alignment,
    per_head,
    principal_components,
    qk_alignment,
    top_activations,
)
from fna_lab.ops.attention import as_bias, attention, attention_pattern
from fna_lab.ops.blocks import block_low_rank
from fna_lab.ops.bootstrap import bootstrap_mean
from fna_lab.ops.choices import (
    cluster_medoids,
    drawn_attention,
    grid_cells,
    leverage_scores,
    put_first,
    segment_centres,
    spread_queries,
)
from fna_lab.ops.clustered import cluster_means, clustered_attention, nearest_landmarks
from fna_lab.ops.cost import (
    attention_flops,
    break_even_tokens,
    clustered_flops,
    farthest_points_flops,
    nystrom_flops,
    spread_points_flops,
    subset_flops,
)
from fna_lab.ops.detectors import (
    cls_proxy,
    cls_row,
    incoming,
    norm_fixed,
    norm_gap,
    norm_ratio,
    patch_norms,
    suppression,
)
from fna_lab.ops.directions import alignment, defect_direction, linear_map, principal_projection
from fna_lab.ops.error import (
    condition_number,
    inverse_residual,
    mean_of_tokens,
    output_cosine,
    relative_error,
    solve_residual,
    weight_facts,
)
from fna_lab.ops.explicit import explicit_attention
from fna_lab.ops.knapsack import cheapest_choice
from fna_lab.ops.merging import bipartite_matching, merge_tokens, unmerge_tokens
from fna_lab.ops.nystrom import (
    gather_tokens,
    nystrom_attention,
    nystrom_chain,
    only_keys,
    subset_attention,
)
from fna_lab.ops.padding import kept_tokens, medians, num_kept, patches_of
from fna_lab.ops.patterns import (
    PATTERNS,
    STAGES,
    WITHOUT_TOKENS,
    check_pattern,
    masked_attention,
    removed_pairs,
    restore_own_rows,
    token_rows,
    zero_rows,
)
from fna_lab.ops.points import coverage_radius, farthest_points
from fna_lab.ops.random_features import orthogonal_features, performer_attention
from fna_lab.ops.register_neurons import (
    register_neuron_scores,
    strongest_activation,
    top_register_neurons,
)
from fna_lab.ops.retrieval import knn_probabilities, recall_at_k
from fna_lab.ops.segments import segment_weights
from fna_lab.ops.sinks import (
    INCOMING_RULES,
    attention_rows,
    incoming_by_head,
    incoming_share,
    incoming_sinks,
    sink_rate,
    standard_scores,
)
from fna_lab.ops.sketch import sketch_points
from fna_lab.ops.solvers import newton_schulz, ridge_solve
from fna_lab.ops.spread import spread_points
from fna_lab.ops.strategies import (
    CORRECTIONS,
    REPLACEMENTS,
    projection_correction,
    redistribute,
    replace_tokens,
)
from fna_lab.ops.token_classes import TOKEN_CLASSES, token_classes

__all__ = [
    "CORRECTIONS",
    "INCOMING_RULES",
    "PATTERNS",
    "REPLACEMENTS",
    "STAGES",
    "WITHOUT_TOKENS",
    "TOKEN_CLASSES",
    "alignment",
    "as_bias",
    "attention",
    "attention_flops",
    "attention_pattern",
    "attention_rows",
    "average_ranks",
    "bipartite_matching",
    "block_low_rank",
    "bootstrap_mean",
    "break_even_tokens",
    "cheapest_choice",
    "check_pattern",
    "class_max",
    "class_mean",
    "class_members",
    "class_sums",
    "class_suppression",
    "cls_proxy",
    "cls_row",
    "cluster_means",
    "cluster_medoids",
    "clustered_attention",
    "clustered_flops",
    "condition_number",
    "coverage_radius",
    "defect_direction",
    "drawn_attention",
    "explicit_attention",
    "farthest_points",
    "farthest_points_flops",
    "gather_tokens",
    "grid_cells",
    "incoming",
    "incoming_by_head",
    "incoming_share",
    "incoming_sinks",
    "inverse_residual",
    "knn_probabilities",
    "leverage_scores",
    "kept_tokens",
    "linear_map",
    "masked_attention",
    "matching_places",
    "mean_of_tokens",
    "medians",
    "merge_tokens",
    "nearest_landmarks",
    "newton_schulz",
    "norm_fixed",
    "norm_gap",
    "norm_ratio",
    "num_kept",
    "nystrom_attention",
    "nystrom_chain",
    "nystrom_flops",
    "only_keys",
    "orthogonal_features",
    "output_cosine",
    "ov_alignment",
    "patch_norms",
    "patches_of",
    "per_head",
    "performer_attention",
    "principal_components",
    "principal_projection",
    "projection_correction",
    "put_first",
    "qk_alignment",
    "rank_correlation",
    "recall_at_k",
    "redistribute",
    "register_neuron_scores",
    "relative_error",
    "removed_pairs",
    "replace_tokens",
    "restore_own_rows",
    "ridge_solve",
    "segment_centres",
    "segment_weights",
    "set_agreement",
    "set_counts",
    "sink_rate",
    "sketch_points",
    "solve_residual",
    "spread_points",
    "spread_points_flops",
    "spread_queries",
    "standard_scores",
    "strongest_activation",
    "subset_attention",
    "subset_flops",
    "suppression",
    "token_classes",
    "token_rows",
    "top_activations",
    "top_register_neurons",
    "unmerge_tokens",
    "weight_facts",
    "zero_rows",
]
