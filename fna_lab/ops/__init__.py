"""Tensor functions: attention, Nystroem attention, farthest points, patterns, detectors, cost."""

from fna_lab.ops.attention import attention
from fna_lab.ops.choices import cluster_medoids, grid_cells, leverage_scores, segment_centres
from fna_lab.ops.cost import (
    attention_flops,
    break_even_tokens,
    farthest_points_flops,
    nystrom_flops,
    subset_flops,
)
from fna_lab.ops.detectors import (
    cls_proxy,
    cls_row,
    incoming,
    norm_gap,
    norm_ratio,
    patch_norms,
    suppression,
)
from fna_lab.ops.error import (
    class_mean,
    condition_number,
    inverse_residual,
    output_cosine,
    relative_error,
    solve_residual,
    weight_facts,
)
from fna_lab.ops.knapsack import cheapest_choice
from fna_lab.ops.merging import bipartite_matching, merge_tokens, unmerge_tokens
from fna_lab.ops.nystrom import gather_tokens, nystrom_attention, nystrom_chain, subset_attention
from fna_lab.ops.patterns import (
    PATTERNS,
    STAGES,
    check_pattern,
    masked_attention,
    removed_pairs,
    restore_own_rows,
    token_rows,
)
from fna_lab.ops.points import farthest_points
from fna_lab.ops.random_features import orthogonal_features, performer_attention
from fna_lab.ops.retrieval import knn_probabilities, recall_at_k
from fna_lab.ops.segments import segment_weights
from fna_lab.ops.solvers import newton_schulz, ridge_solve

__all__ = [
    "PATTERNS",
    "STAGES",
    "attention",
    "attention_flops",
    "bipartite_matching",
    "break_even_tokens",
    "cheapest_choice",
    "check_pattern",
    "class_mean",
    "cls_proxy",
    "cls_row",
    "cluster_medoids",
    "condition_number",
    "farthest_points",
    "farthest_points_flops",
    "gather_tokens",
    "grid_cells",
    "incoming",
    "inverse_residual",
    "knn_probabilities",
    "leverage_scores",
    "masked_attention",
    "merge_tokens",
    "newton_schulz",
    "norm_gap",
    "norm_ratio",
    "nystrom_attention",
    "nystrom_chain",
    "nystrom_flops",
    "orthogonal_features",
    "output_cosine",
    "patch_norms",
    "performer_attention",
    "recall_at_k",
    "relative_error",
    "removed_pairs",
    "restore_own_rows",
    "ridge_solve",
    "segment_centres",
    "segment_weights",
    "solve_residual",
    "subset_attention",
    "subset_flops",
    "suppression",
    "token_rows",
    "unmerge_tokens",
    "weight_facts",
]
