"""Looks at what a solver says, and takes a surer way where it is worthless."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.solver.ridge import RidgeSolver
from fna_lab.settings import check_number

Solve = Callable[[Tensor, Tensor], Tensor]

# The second try.
AGAIN = RidgeSolver()


class Guard:
    """Falls back from the chosen solver to ridge and then to exact attention, head by head.

    The residual of a head of a picture is the larger of two: that of the solve,
    ||A X - B|| / ||B||, which is the error at the landmark queries; and the error
    ||out - exact|| / ||exact|| at a few other queries, spread evenly over what is no padding. The
    second is there because an inverse without a penalty meets every landmark and misses the rest.
    Costs O(probes n d) a head; where something is replaced, it waits for the device.

    Args:
        threshold: largest residual that is believed, above 0; 1 is what an answer of zeros has.
        probes: how many other queries at most.

    Attributes:
        counts: by layer, heads of pictures seen, tried again with ridge, done exactly; long `[3]`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, threshold: float, *, probes: int = 32) -> None:
        check_number("attn.guard", threshold, "a number > 0, or null for none", above=0)
        self.threshold = threshold
        self.probes = probes
        self.counts: dict[int, Tensor] = {}

    def attention(
        self,
        attend: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        landmarks: Tensor,
        *,
        layer: int | None,
        scale: float,
        solver: Solve,
        keys: Tensor | None = None,
        bias: Tensor | None = None,
        distinct: bool | None = None,
        exact_rows: int = 0,
        members: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`attend`, with what is worthless replaced: `[b h n d]` x3 -> `[b h n d]`.

        Args:
            attend: `ops.nystrom_attention`, or `ops.clustered_attention`. The latter solves for
                a correction alone, so that the error at other queries is all that counts.
            q: queries `[b h n d]`.
            k: keys `[b h n d]`.
            v: values `[b h n d]`.
            landmarks: token indices, long `[b m]`, or `[b h m]` where heads differ.
            layer: under which the counts go; None = nothing is counted.
            scale: factor of the logits.
            solver: the chosen one.
            keys: bool `[b n]`, True = may be attended to; None = all.
            bias: added to the logits, broadcastable to `[b h n n]`; None = nothing.
            distinct: whether no landmark repeats; None = as without `keys`, see `ops`.
            exact_rows: give so many of the first landmarks their exact outputs.
            members: the landmark of each token, for clusters.
            rows: tokens whose exact outputs are fitted, for clusters; None = the landmarks.
        """
        batch, heads = q.shape[:2]

        def attempt(parts: _Heads, solve: Solve) -> tuple[Tensor, Tensor]:
            noted: list[Tensor] = []

            def watched(kernel: Tensor, values: Tensor) -> Tensor:
                solution = solve(kernel, values)
                if members is None:
                    noted.append(ops.solve_residual(kernel, solution, values))
                return solution

            out = attend(
                parts.q,
                parts.k,
                parts.v,
                parts.landmarks,
                scale=scale,
                solver=watched,
                keys=parts.keys,
                bias=parts.bias,
                distinct=distinct,
                exact_rows=exact_rows,
                **parts.clusters,
            )
            probes = parts.spread(self.probes)
            wrong = ops.relative_error(ops.gather_tokens(out, probes), parts.exact(scale, probes))
            found = wrong.nan_to_num(torch.inf, torch.inf)
            return out, torch.maximum(noted[0], found) if noted else found

        clusters = {"members": members, "rows": rows} if members is not None else {}
        everything = _Heads(q, k, v, landmarks, keys, bias, clusters)
        out, residual = attempt(everything, solver)
        bad = residual > self.threshold  # [b h]
        counts = torch.tensor([batch * heads, 0, 0])
        if bad.any():
            doubted = everything.only(bad)
            if type(solver) is RidgeSolver and solver.ridge == AGAIN.ridge:
                exactly = bad  # it would say the same again
            else:
                counts[1] = int(bad.sum())
                again, residual = attempt(doubted, AGAIN)
                out = out.masked_scatter(bad[:, :, None, None], again)
                exactly = bad.masked_scatter(bad, residual[:, 0] > self.threshold)
            if exactly.any():
                counts[2] = int(exactly.sum())
                surely = everything.only(exactly).exact(scale)
                out = out.masked_scatter(exactly[:, :, None, None], surely)
        if layer is not None:
            self.counts[layer] = self.counts.get(layer, torch.zeros(3, dtype=torch.long)) + counts
        return out


class _Heads:
    """Some heads of some pictures, and what they attend under."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        landmarks: Tensor,
        keys: Tensor | None,
        bias: Tensor | None,
        clusters: dict[str, Tensor | None],
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.landmarks = landmarks
        self.keys = keys
        self.clusters = clusters
        self.bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])

    def only(self, which: Tensor) -> _Heads:
        """The heads of bool `[b h]`, each as a picture of one head."""
        picture = which.nonzero()[:, 0]
        q, k, v = (x[which][:, None] for x in (self.q, self.k, self.v))
        keys = None if self.keys is None else self.keys[picture]
        bias = None if self.bias is None else self.bias[which][:, None]

        def part(found: Tensor | None) -> Tensor | None:
            if found is None:
                return None
            return found[picture] if found.ndim == 2 else found[which][:, None]

        marks = part(self.landmarks)
        assert marks is not None
        clusters = {name: part(found) for name, found in self.clusters.items()}
        return _Heads(q, k, v, marks, keys, bias, clusters)

    def spread(self, num: int) -> Tensor:
        """At most so many tokens at equal distances, none of them padding: long `[b num]`."""
        batch, _, size, _ = self.q.shape
        keys = self.keys
        if keys is None:
            keys = torch.ones((batch, size), dtype=torch.bool, device=self.q.device)
        return ops.segment_centres(keys, min(num, size))

    def exact(self, scale: float, rows: Tensor | None = None) -> Tensor:
        """Exact attention of some queries, long `[b r]`, or of all: `[b h r d]`."""
        q, mask = self.q, self.bias
        if rows is not None:
            q = ops.gather_tokens(q, rows)
            mask = None if mask is None else ops.gather_tokens(mask, rows)
        if self.keys is not None:
            mask = ops.only_keys(self.keys, mask)
        return F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask, scale=scale)
