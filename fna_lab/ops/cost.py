"""FLOPs by formula; a multiply-add counts as two, softmax and copies are left out.

Formulas, because the framework's counters see no fused attention on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

from fna_lab.ops.spread import KEPT, KEPT_ONE_OF, SAMPLED


def attention_flops(tokens: int, heads: int, head_dim: int) -> int:
    """Exact attention: the products q k' and (weights) v of one picture."""
    _positive(tokens=tokens, heads=heads, head_dim=head_dim)
    return 4 * heads * tokens * tokens * head_dim


def subset_flops(tokens: int, heads: int, head_dim: int, landmarks: int) -> int:
    """Landmark keys and values alone, for one picture."""
    _positive(tokens=tokens, heads=heads, head_dim=head_dim, landmarks=landmarks)
    return 4 * heads * tokens * landmarks * head_dim


def nystrom_flops(
    tokens: int,
    heads: int,
    head_dim: int,
    landmarks: int,
    *,
    solver: str = "newton_schulz",
    iters: int = 6,
) -> int:
    """Nystroem attention of one picture: two thin attentions, the kernel and its solve."""
    thin = 2 * subset_flops(tokens, heads, head_dim, landmarks)
    kernel = 2 * heads * landmarks**2 * head_dim
    cube = 2 * landmarks**3
    solve = {
        "newton_schulz": 4 * iters * cube + 2 * landmarks**2 * head_dim,
        # A'A, Cholesky (m^3 / 3), A'B and two triangular solves.
        "ridge": cube + landmarks**3 // 3 + 4 * landmarks**2 * head_dim,
        # Singular values: about 20 m^3, then the two products that apply them.
        "pinv": 20 * landmarks**3 + cube + 2 * landmarks**2 * head_dim,
    }
    if solver not in solve:
        raise ValueError(f"Expected solver to be one of {', '.join(solve)}, got {solver!r}.")
    return thin + kernel + heads * solve[solver]


def clustered_flops(
    tokens: int,
    heads: int,
    head_dim: int,
    landmarks: int,
    *,
    rows: int | None = None,
    sketch: int | None = None,
) -> int:
    """Attention to clusters of one picture: two thin attentions, means, a ridge solve.

    `rows` is the number of tokens whose exact outputs are fitted, None = one a landmark; `sketch`
    that of the dimensions in which tokens seek their landmark, None = all.
    """
    rows = landmarks if rows is None else rows
    _positive(tokens=tokens, heads=heads, head_dim=head_dim, landmarks=landmarks, rows=rows)
    channels = heads * head_dim
    thin = [subset_flops(tokens, heads, head_dim, marks) for marks in (landmarks, rows)]
    dims = min(sketch or channels, channels)
    seek = 2 * tokens * landmarks * dims + (2 * tokens * channels * dims if dims < channels else 0)
    means = tokens * channels  # sums; a product, where that is faster, counts as no more
    kernel = 2 * heads * rows * landmarks * 2 * head_dim  # A and A Vp
    # The smaller Gram matrix of A, Cholesky (a third of a cube), two triangular solves and A'.
    small = min(rows, landmarks)
    cube = 2 * rows * landmarks * small + small**3 // 3
    solve = heads * (cube + 2 * (rows * landmarks + small**2) * head_dim)
    return sum(thin) + seek + means + kernel + solve


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
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected {name} to be an integer >= 1, got {value!r}.")
