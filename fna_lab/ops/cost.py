"""FLOPs by formula; a multiply-add counts as two, softmax and copies are left out.

Formulas, because the framework's counters see no fused attention on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

from fna_lab.ops.checks import check_integer
from fna_lab.ops.spread import KEPT, KEPT_ONE_OF, SAMPLED


def attention_flops(tokens: int, heads: int, head_dim: int) -> int:
    """Exact attention: the products q k' and (weights) v of one picture."""
    _positive(tokens=tokens, heads=heads, head_dim=head_dim)
    return 4 * heads * tokens * tokens * head_dim


def subset_flops(tokens: int, heads: int, head_dim: int, landmarks: int) -> int:
    """Landmark keys and values alone, for one picture."""
    _positive(tokens=tokens, heads=heads, head_dim=head_dim, landmarks=landmarks)
    return 4 * heads * tokens * landmarks * head_dim


def nystrom_flops(tokens: int, heads: int, head_dim: int, landmarks: int, *, solve: int) -> int:
    """Nystroem attention of one picture: two thin attentions, the kernel and its solve.

    `solve` is what the solver needs for a head: `newton_schulz_flops`, `ridge_flops`, `svd_flops`.
    """
    thin = 2 * subset_flops(tokens, heads, head_dim, landmarks)
    kernel = 2 * heads * landmarks**2 * head_dim
    return thin + kernel + heads * solve


def clustered_flops(
    tokens: int, heads: int, head_dim: int, landmarks: int, *, rows: int, solve: int
) -> int:
    """Attention to clusters of one picture: two thin attentions, means and a solve.

    `rows` is the number of tokens whose exact outputs are fitted, `solve` what the solver needs
    for a head.
    """
    _positive(rows=rows)
    thin = [subset_flops(tokens, heads, head_dim, marks) for marks in (landmarks, rows)]
    means = mean_flops(tokens, heads * head_dim)
    kernel = 2 * heads * rows * landmarks * 2 * head_dim  # A and A Vp
    return sum(thin) + means + kernel + heads * solve


def mean_flops(tokens: int, channels: int) -> int:
    """Means over clusters of all tokens: sums; a product, where it is faster, counts no more."""
    _positive(tokens=tokens, channels=channels)
    return tokens * channels


def newton_schulz_flops(landmarks: int, head_dim: int, iters: int) -> int:
    """The cubic iteration of one head, and its product with the values."""
    _positive(landmarks=landmarks, head_dim=head_dim)
    return 8 * iters * landmarks**3 + 2 * landmarks**2 * head_dim


def ridge_flops(rows: int, landmarks: int, head_dim: int) -> int:
    """A ridge solve of one head: the smaller Gram matrix of A, Cholesky, two solves and A'."""
    _positive(rows=rows, landmarks=landmarks, head_dim=head_dim)
    small = min(rows, landmarks)
    cubes = 2 * rows * landmarks * small + small**3 // 3
    return cubes + 2 * (rows * landmarks + small**2) * head_dim


def svd_flops(rows: int, landmarks: int, head_dim: int) -> int:
    """Singular values of one head, about 20 cubes, the inverse, and its product with values."""
    _positive(rows=rows, landmarks=landmarks, head_dim=head_dim)
    cubes = (20 * max(rows, landmarks) * min(rows, landmarks) + 2 * rows * landmarks) * min(
        rows, landmarks
    )
    return cubes + 2 * rows * landmarks * head_dim


def sketch_flops(tokens: int, channels: int, dims: int, groups: int = 1) -> int:
    """A random projection of one picture, in so many groups of channels."""
    _positive(tokens=tokens, channels=channels, dims=dims, groups=groups)
    return 2 * tokens * channels * dims // groups


def farthest_points_flops(tokens: int, channels: int, landmarks: int) -> int:
    """Farthest point sampling of one picture: a difference, a square and a sum a channel."""
    _positive(tokens=tokens, channels=channels, landmarks=landmarks)
    return 3 * tokens * channels * landmarks


def spread_points_flops(
    tokens: int,
    channels: int,
    landmarks: int,
    sketch: int | None,
    thin: tuple[int, int] | None = None,
) -> int:
    """`spread_points` of one picture: the projection, and one product a landmark.

    With `thin` (how many candidates a round, and how many rounds) half the landmarks meet all
    tokens, the sample and the candidates of each round meet themselves, and what all rounds but
    the last take meets the tokens that are kept.
    """
    _positive(tokens=tokens, channels=channels, landmarks=landmarks)
    dims = min(sketch or channels, channels)
    project = 2 * tokens * channels * dims if dims < channels else 0
    if thin is None:
        return project + 2 * tokens * dims * landmarks
    half = -(-landmarks // 2)
    sample = min(SAMPLED * half, tokens)
    candidates, rounds = thin
    kept = max(KEPT * half, tokens // KEPT_ONE_OF)
    kept = kept if 2 * kept <= tokens else tokens
    met = tokens * half + half * (rounds - 1) // rounds * kept
    met += sample**2 + rounds * min(candidates, tokens) ** 2
    return project + 2 * dims * met


def break_even_tokens(
    variant: Callable[[int], int], exact: Callable[[int], int], *, least: int = 1
) -> int | None:
    """Fewest tokens from which on a linear variant needs fewer FLOPs than exact attention.

    Args:
        variant: number of tokens -> FLOPs of the variant, selection included.
        exact: the same of exact attention, growing faster.
        least: fewest tokens that the variant works on.

    Returns:
        Number of tokens; None where the variant is not cheaper at a million either.
    """
    low, high = least - 1, least
    while variant(high) >= exact(high):
        low, high = high, 2 * high
        if low > 1_000_000:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if variant(middle) < exact(middle) else (middle, high)
    return high


def _positive(**values: int) -> None:
    for name, value in values.items():
        check_integer(name, value)
