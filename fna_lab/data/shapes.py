"""The synthetic world of shapes as a data set: drawn on demand, no files."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from fna_lab.data.base import PictureData, Transform
from fna_lab.data.shapes_world import COLOURS, SHAPES, SIZES, TEXTURES, Scene, render, sample_scene
from fna_lab.settings import check_integer

LABELS = {
    "shape": list(SHAPES),
    "colour": [f"{colour} object" for colour in COLOURS],
    "size": [f"{size} object" for size in SIZES],
    "texture": [f"{texture} object" for texture in TEXTURES],
    "shape_colour": [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS],
    "all": [
        f"{size} {texture} {colour} {shape}"
        for shape in SHAPES
        for colour in COLOURS
        for size in SIZES
        for texture in TEXTURES
    ],
}


class Shapes(Dataset[dict[str, Any]]):
    """Synthetic pictures with exact ground truth.

    A sample holds `image`, `index`, `name` and `label`; the scene behind it, with captions,
    questions and segmentation, is `scene(index)`.

    Args:
        count: number of pictures.
        split: `train`, `val` or `test`; no composition occurs in two of them.
        img_size: side of the drawn pictures in pixels.
        transform: PIL picture -> tensor.
        objects: fewest and most objects of a picture.
        label: what the label says of the largest object, a key of `LABELS`.
        seed: seed of the pictures.
    """

    def __init__(
        self,
        count: int,
        *,
        split: str,
        img_size: int,
        transform: Transform,
        objects: tuple[int, int] = (1, 1),
        label: str = "shape_colour",
        seed: int = 0,
    ) -> None:
        self.count = count
        self.split = split
        self.img_size = img_size
        self.transform = transform
        self.objects = objects
        self.label = label
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """What picture `index` shows."""
        return sample_scene(self.seed * 1_000_003 + index, objects=self.objects, split=self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        picture, segmentation = render(scene, self.img_size)
        return {
            "image": self.transform(Image.fromarray(picture)),
            "segmentation": torch.from_numpy(segmentation),
            "index": index,
            "name": f"{self.split}-{self.seed}-{index}",
            "label": label_of(scene, self.label),
        }


def label_of(scene: Scene, label: str) -> int:
    """The class of a scene's largest object."""
    shape, colour, size, texture = scene.main.attributes
    place = {
        "shape": SHAPES.index(shape),
        "colour": list(COLOURS).index(colour),
        "size": list(SIZES).index(size),
        "texture": TEXTURES.index(texture),
    }
    pair = place["shape"] * len(COLOURS) + place["colour"]
    if label == "shape_colour":
        return pair
    if label == "all":
        return (pair * len(SIZES) + place["size"]) * len(TEXTURES) + place["texture"]
    return place[label]


class ShapesData(PictureData):
    """Synthetic pictures of compositions that training never saw, and a bank that it may have.

    Args:
        count: pictures to measure on.
        bank_count: pictures of the k-NN bank, from the training split.
        split: the split to measure on.
        img_size: side of the drawn pictures in pixels.
        objects: fewest and most objects of a picture.
        label: what is classified, a key of `LABELS`.
        **common: see `PictureData`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        count: int = 400,
        bank_count: int = 2000,
        split: str = "test",
        img_size: int = 112,
        objects: tuple[int, int] = (1, 1),
        label: str = "all",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for name, value in (("count", count), ("bank_count", bank_count), ("img_size", img_size)):
            check_integer(f"data.{name}", value)
        if label not in LABELS:
            raise ValueError(f"data.label={label!r}: expected one of {', '.join(LABELS)}.")
        sample_scene(0, objects=(objects[0], objects[1]), split=split)  # checks both
        self.count = count
        self.bank_count = bank_count
        self.split = split
        self.img_size = img_size
        self.objects = (objects[0], objects[1])
        self.label = label
        self.classnames = LABELS[label]

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Nothing is drawn before it is asked for."""
        count = self.count if self.limit is None else min(self.count, self.limit)
        self.test_set = self._draw(count, self.split)

    def bank(self) -> Shapes:
        """Pictures of the training split."""
        if self.label == "all":
            raise NotImplementedError(
                "data.label=all names whole compositions, and none of the measured ones occurs in "
                "the training split; use data.label=shape_colour, or another."
            )
        return self._draw(self.bank_count, "train")

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        return super().describe() | {
            "split": self.split,
            "objects": list(self.objects),
            "label": self.label,
            "bank": self.bank_count,
            "synthetic": True,
        }

    def _draw(self, count: int, split: str) -> Shapes:
        return Shapes(
            count,
            split=split,
            img_size=self.img_size,
            transform=self.transform,
            objects=self.objects,
            label=self.label,
            seed=self.seed,
        )
