"""The landscape of tokens: places, colours by a normalised cut, and norms above them."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops

# Tokens that a non-linear map of the eigenvectors is made of; others follow their neighbours.
SAMPLES = 500


class Topology:
    """Patch tokens of a run's first pictures, cut together, so that colours mean the same in all.

    Unlike every other measure this one is of all its pictures at once, whatever the batch size;
    the published one is of 50, each with CLS.

    Args:
        places: block whose input is cut, and gives places; None = the backbone's restart block.
        heights: block whose input gives heights; None = that before the backbone's detection
            block.
        eigenvectors: how many, fewer where there are fewer tokens.
        samples: most tokens that stand for all in the cut (published: 20,000 of 12,850, which is
            exact); None = exact.
        tokens: leave the tokens themselves, too, for `mask.detector.reference` of `ncut`.

    Attributes:
        blocks: the two blocks, once `choose` was called.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        places: int | None = None,
        heights: int | None = None,
        eigenvectors: int = 100,
        samples: int | None = 1024,
        tokens: bool = False,
    ) -> None:
        for name, value, least in (
            ("places", places, 0),
            ("heights", heights, 0),
            ("eigenvectors", eigenvectors, 4),
            ("samples", samples, 4),
        ):
            optional = value is None and name != "eigenvectors"
            if not optional and (type(value) is not int or value < least):
                raise ValueError(
                    f"task.topology.{name}={value!r}: expected an integer >= {least}"
                    + ("." if name == "eigenvectors" else ", or null.")
                )
        if not isinstance(tokens, bool):
            raise ValueError(f"task.topology.tokens={tokens!r}: expected true or false.")
        self.blocks = places, heights
        self.eigenvectors = eigenvectors
        self.samples = samples
        self.leave = tokens
        self.tokens: list[Tensor] = []
        self.kept: list[Tensor] = []

    def choose(self, restart: int, detect: int, depth: int) -> None:
        """Take blocks that were not given from the backbone's anatomy.

        Raises:
            ValueError: the backbone has no such block.
        """
        places, heights = self.blocks
        places = restart if places is None else places
        heights = max(0, detect - 1) if heights is None else heights
        for name, block in (("places", places), ("heights", heights)):
            if block >= depth:
                raise ValueError(
                    f"task.topology.{name}={block}: expected a block from 0 to {depth - 1}."
                )
        self.blocks = places, heights

    def add(self, x: Tensor, kept: Tensor | None) -> None:
        """Pictures more: patch tokens `[b p c]`, and which are no padding, bool `[b p]`."""
        self.tokens.append(x.float())
        everything = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        self.kept.append(everything if kept is None else kept)

    def results(self) -> dict[str, Tensor]:
        """What the figure is drawn from.

        Returns:
            `map_place`, `[pictures p 2]`: first principal components, over all pictures;
            `map_ncut`, `[pictures p k]`: eigenvectors of the cut but the constant one, in root
            mean squares; padding is NaN in both. `ncut_values` `[k]`; `topology_blocks` `[2]`;
            `topology_samples` `[s]`: farthest tokens among the eigenvectors, as indices into all
            tokens that are no padding; `tokens` `[s c]` where they were asked for. Nothing where
            there are fewer than five tokens.
        """
        if not self.tokens:
            return {}
        there = torch.cat(self.kept)
        pool = torch.cat(self.tokens)[there][None]
        size = pool.shape[1]
        if size < 5:
            return {}
        most = size if self.samples is None else min(size, self.samples)
        cut = ops.normalized_cut(pool, min(self.eigenvectors, most), samples=self.samples)
        ncut = cut.vectors[0, :, 1:] * size**0.5
        place = ops.principal_components(pool, min(2, pool.shape[2]))[0][0]

        def spread(values: Tensor) -> Tensor:
            found = values.new_full((*there.shape, values.shape[1]), torch.nan)
            found[there] = values
            return found.float()

        more = {"tokens": pool[0]} if self.leave else {}
        return more | {
            "map_place": spread(place),
            "map_ncut": spread(ncut),
            "ncut_values": cut.values[0, 1:],
            "topology_blocks": torch.tensor(self.blocks),
            "topology_samples": ops.farthest_points(ncut[None], min(size, SAMPLES))[0],
        }
