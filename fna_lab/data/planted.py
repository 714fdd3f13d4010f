"""Pictures for `backbone=planted`: coloured noise with white and black patches at known places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fna_lab.data.base import PictureData, Transform
from fna_lab.settings import check_integer

PATCH_SIZE = 8
NUM_CLASSES = 12
# Two colours at right angles to grey and to each other span the hues.
PLANE = np.array([[2, -1, -1], [0, 1, -1]]) / np.sqrt([[6], [2]])


class PlantedPictures(Dataset[dict[str, Any]]):
    """Synthetic pictures with exact ground truth, each drawn from its index and the seed.

    A sample holds `image`, `index`, `name`, `label` (the hue), and `massive` and `artifact`, bool
    `[patches]`.

    Args:
        count: number of pictures.
        img_size: side in pixels.
        transform: PIL picture -> tensor.
        massive: fewest and most white patches.
        artifact: fewest and most black patches.
        jitter: deviation of the hue from that of its class, in degrees.
        seed: two numbers, of the data set and of the split.
    """

    def __init__(
        self,
        count: int,
        *,
        img_size: int,
        transform: Transform,
        massive: tuple[int, int],
        artifact: tuple[int, int],
        jitter: float,
        seed: tuple[int, int],
    ) -> None:
        self.count = count
        self.side = img_size // PATCH_SIZE
        self.transform = transform
        self.massive = massive
        self.artifact = artifact
        self.jitter = jitter
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([*self.seed, index])
        label = int(rng.integers(NUM_CLASSES))
        angle = np.deg2rad(label * 360 / NUM_CLASSES + rng.normal(0, self.jitter))
        colour = 0.2 * np.array([np.cos(angle), np.sin(angle)]) @ PLANE
        pixels = self.side * PATCH_SIZE
        picture = 0.5 + colour + rng.normal(0, 0.08, (pixels, pixels, 3))
        patches = self.side**2
        kinds = rng.permutation(patches)
        white = int(rng.integers(self.massive[0], self.massive[1] + 1))
        black = int(rng.integers(self.artifact[0], self.artifact[1] + 1))
        truth = {"massive": kinds[:white], "artifact": kinds[white : white + black]}
        for name, level in (("massive", 0.98), ("artifact", 0.02)):
            for patch in truth[name]:
                row, column = (int(i) * PATCH_SIZE for i in divmod(int(patch), self.side))
                noise = rng.normal(0, 0.01, (PATCH_SIZE, PATCH_SIZE, 3))
                picture[row : row + PATCH_SIZE, column : column + PATCH_SIZE] = level + noise
        drawn = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
        flags = {name: torch.zeros(patches, dtype=torch.bool) for name in truth}
        for name, places in truth.items():
            flags[name][torch.from_numpy(places)] = True
        name = f"planted-{self.seed[0]}-{self.seed[1]}-{index}"
        return {
            "image": self.transform(drawn),
            "index": index,
            "name": name,
            "label": label,
        } | flags


class PlantedData(PictureData):
    """Synthetic pictures of twelve hues with white patches (massive) and black ones (artifacts).

    Args:
        count: pictures to measure on.
        bank_count: pictures of the k-NN bank.
        img_size: side in pixels, that of the backbone, so that nothing is resampled.
        massive: fewest and most white patches of a picture.
        artifact: fewest and most black patches.
        jitter: deviation of a picture's hue from its class, in degrees; classes lie 30 apart.
        **common: see `PictureData`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        count: int = 200,
        bank_count: int = 400,
        img_size: int = 112,
        massive: Sequence[int] = (1, 3),
        artifact: Sequence[int] = (2, 4),
        jitter: float = 9.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for name, value in (("count", count), ("bank_count", bank_count), ("img_size", img_size)):
            check_integer(f"data.{name}", value)
        if img_size % PATCH_SIZE:
            raise ValueError(f"data.img_size={img_size}: expected a multiple of {PATCH_SIZE}.")
        for name, few_and_most in (("massive", massive), ("artifact", artifact)):
            if len(few_and_most) != 2 or not 0 <= few_and_most[0] <= few_and_most[1]:
                raise ValueError(
                    f"data.{name}={list(few_and_most)}: expected two numbers >= 0, in order."
                )
        if massive[1] + artifact[1] > (img_size // PATCH_SIZE) ** 2 // 2:
            raise ValueError(
                f"data.massive={list(massive)}, data.artifact={list(artifact)}: expected at most "
                f"half of the {(img_size // PATCH_SIZE) ** 2} patches."
            )
        if not jitter >= 0:
            raise ValueError(f"data.jitter={jitter}: expected a number >= 0.")
        self.count = count
        self.bank_count = bank_count
        self.img_size = img_size
        self.massive = (massive[0], massive[1])
        self.artifact = (artifact[0], artifact[1])
        self.jitter = jitter
        self.classnames = [f"hue {360 * i // NUM_CLASSES}" for i in range(NUM_CLASSES)]

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Nothing is drawn before it is asked for."""
        count = self.count if self.limit is None else min(self.count, self.limit)
        self.test_set = self._draw(count, 0)

    def bank(self) -> PlantedPictures:
        """Other pictures of the same kind."""
        return self._draw(self.bank_count, 1)

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        return super().describe() | {
            "split": "all",
            "massive": list(self.massive),
            "artifact": list(self.artifact),
            "bank": self.bank_count,
            "synthetic": True,
        }

    def _draw(self, count: int, split: int) -> PlantedPictures:
        return PlantedPictures(
            count,
            img_size=self.img_size,
            transform=self.transform,
            massive=self.massive,
            artifact=self.artifact,
            jitter=self.jitter,
            seed=(self.seed, split),
        )
