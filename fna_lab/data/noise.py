"""Pictures of noise, the control of every claim about pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from fna_lab.data.base import PictureData, Transform
from fna_lab.settings import check_integer


class NoiseData(PictureData):
    """Every pixel is drawn uniformly on its own; synthetic.

    Args:
        count: pictures.
        img_size: side in pixels, before the backbone's resizing.
        **common: see `PictureData`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, *, count: int = 16, img_size: int = 224, **common: Any) -> None:
        super().__init__(**common)
        for name, value in (("count", count), ("img_size", img_size)):
            check_integer(f"data.{name}", value)
        self.count = count if self.limit is None else min(count, self.limit)
        self.img_size = img_size

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Nothing is read: pictures are drawn on demand."""
        self.test_set = _Noise(self.count, self.img_size, self.seed, self.transform)

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        return super().describe() | {"synthetic": True, "split": "all"}


class _Noise(Dataset[dict[str, Any]]):
    def __init__(self, count: int, img_size: int, seed: int, transform: Transform) -> None:
        self.count, self.img_size, self.seed, self.transform = count, img_size, seed, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        draw = np.random.default_rng([self.seed, index])
        pixels = draw.integers(0, 256, (self.img_size, self.img_size, 3), dtype=np.uint8)
        picture = self.transform(Image.fromarray(pixels))
        return {"image": picture, "index": index, "name": f"noise {index}"}
