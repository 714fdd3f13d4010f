"""Tensor functions: attention, Nystroem attention, farthest points, patterns, detectors, cost."""

from fna_lab.ops.attention import attention, attention_pattern
from fna_lab.ops.choices import cluster_medoids, grid_cells, leverage_scores, segment_centres
from fna_lab.ops.clustered import cluster_means, clustered_attention, nearest_landmarks
from fna_lab.ops.cost import (
    attention_flops,
    break_even_tokens,
    clustered_flops,
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
from fna_lab.ops.points import farthest_points, sketch_points
from fna_lab.ops.random_features import orthogonal_features, performer_attention
from fna_lab.ops.retrieval import knn_probabilities, recall_at_k
from fna_lab.ops.segments import segment_weights
from fna_lab.ops.solvers import newton_schulz, ridge_solve
from fna_lab.ops.strategies import (
    CORRECTIONS,
    REPLACEMENTS,
    projection_correction,
    redistribute,
    replace_tokens,
)

__all__ = [
    "CORRECTIONS",
    "PATTERNS",
    "REPLACEMENTS",
    "STAGES",
    "attention",
    "attention_flops",
    "attention_pattern",
    "bipartite_matching",
    "break_even_tokens",
    "check_pattern",
    "cls_proxy",
    "cls_row",
    "cluster_means",
    "cluster_medoids",
    "clustered_attention",
    "clustered_flops",
    "farthest_points",
    "farthest_points_flops",
    "gather_tokens",
    "grid_cells",
    "incoming",
    "knn_probabilities",
    "leverage_scores",
    "masked_attention",
    "merge_tokens",
    "nearest_landmarks",
    "newton_schulz",
    "norm_gap",
    "norm_ratio",
    "nystrom_attention",
    "nystrom_chain",
    "nystrom_flops",
    "orthogonal_features",
    "patch_norms",
    "performer_attention",
    "projection_correction",
    "recall_at_k",
    "redistribute",
    "removed_pairs",
    "replace_tokens",
    "restore_own_rows",
    "ridge_solve",
    "segment_centres",
    "segment_weights",
    "sketch_points",
    "subset_attention",
    "subset_flops",
    "suppression",
    "token_rows",
    "unmerge_tokens",
]
