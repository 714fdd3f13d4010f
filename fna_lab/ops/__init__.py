"""Tensor functions: attention, Nystroem attention, farthest points, patterns, detectors, cost."""

from fna_lab.ops.attention import attention
from fna_lab.ops.choices import cluster_medoids, grid_cells, leverage_scores, segment_centres
from fna_lab.ops.cost import (
    attention_flops,
    break_even_tokens,
    farthest_points_flops,
    nystrom_flops,
    spread_points_flops,
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
    masked_attention,
    removed_pairs,
    restore_own_rows,
    token_rows,
)
from fna_lab.ops.points import farthest_points, sketch_points, spread_points
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
    "cls_proxy",
    "cls_row",
    "cluster_medoids",
    "farthest_points",
    "farthest_points_flops",
    "gather_tokens",
    "grid_cells",
    "incoming",
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
    "patch_norms",
    "performer_attention",
    "recall_at_k",
    "removed_pairs",
    "restore_own_rows",
    "ridge_solve",
    "segment_centres",
    "segment_weights",
    "sketch_points",
    "spread_points",
    "spread_points_flops",
    "subset_attention",
    "subset_flops",
    "suppression",
    "token_rows",
    "unmerge_tokens",
]
