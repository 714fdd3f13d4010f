"""What every data set of this project gives, as a Lightning data module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fna_lab.settings import check_integer

Transform = Callable[[Image.Image], Tensor]
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {}")


class PictureData(L.LightningDataModule):
    """Pictures to measure on, and where there are labels, a labelled bank for k-NN.

    A sample is a dict: `image` `[3 h w]`, `index`, `name`, and `label` where there are classes.

    Args:
        transform: PIL picture -> tensor, the backbone's.
        batch_size: pictures of a batch.
        num_workers: processes that read pictures.
        limit: measure on the first so many pictures; None = all.
        seed: seed of every random choice.

    Attributes:
        classnames: names of the classes, None without labels.
        templates: prompt templates with `{}`.
        skipped: names of files that are no pictures.
        samples: what the samples are called in reports, in the plural.

    Raises:
        ValueError: a setting is out of range.
    """

    samples = "pictures"

    def __init__(
        self,
        *,
        transform: Transform,
        batch_size: int = 32,
        num_workers: int = 0,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("data.batch_size", batch_size)
        check_integer("data.limit", limit, optional=True)
        check_integer("data.num_workers", num_workers, least=0)
        self.transform = transform
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.limit = limit
        self.seed = seed
        self.classnames: list[str] | None = None
        self.templates: Sequence[str] = TEMPLATES
        self.skipped: list[str] = []
        self.test_set: Dataset[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """The data set's name in `conf/data`: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Find the pictures; a second call does nothing."""

    def bank(self) -> Dataset[dict[str, Any]]:
        """Labelled pictures that k-NN votes with.

        Raises:
            NotImplementedError: the data set has none.
        """
        raise NotImplementedError(
            f"data={self.name} has no labelled training pictures, "
            "which task.protocols=[knn] needs."
        )

    def calibration(self, count: int) -> Tensor:
        """A few pictures `[k 3 h w]` to settle a variant on: of the bank, or the first measured.

        Fewer than `count` where there are no more.
        """
        assert self.test_set is not None, "call setup first"
        try:
            source = self.bank()
        except NotImplementedError:
            source = self.test_set
        size = len(source)  # type: ignore[arg-type]
        picks = torch.linspace(0, size - 1, min(count, size)).round().long().tolist()
        return torch.stack([source[i]["image"] for i in picks])

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of the pictures to measure on."""
        assert self.test_set is not None, "call setup first"
        return self._loader(self.test_set)

    def bank_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of the bank."""
        return self._loader(self.bank())

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        assert self.test_set is not None, "call setup first"
        count = len(self.test_set)  # type: ignore[arg-type]
        facts = {"name": self.name, "count": count, "limit": self.limit, "seed": self.seed}
        facts |= {"samples": self.samples}
        return facts | {"skipped": len(self.skipped), "skipped_names": self.skipped[:20]}

    def _loader(self, data: Dataset[dict[str, Any]]) -> DataLoader[dict[str, Any]]:
        return DataLoader(data, batch_size=self.batch_size, num_workers=self.num_workers)


class PictureFiles(Dataset[dict[str, Any]]):
    """Pictures on disk.

    Args:
        files: path, name and label (None = unlabelled) of each.
        transform: PIL picture -> tensor.
    """

    def __init__(
        self, files: Sequence[tuple[Path, str, int | None]], transform: Transform
    ) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, name, label = self.files[index]
        sample = {"image": self.transform(open_picture(path)), "index": index, "name": name}
        return sample if label is None else sample | {"label": label}


def open_picture(path: Path) -> Image.Image:
    """Any picture as upright RGB; transparency becomes white, 16 bits become 8.

    Raises:
        ValueError: the file is no whole picture.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits: convert() would clip them
                high = 65535 if picture.getextrema()[1] > 255 else 255  # pyright: ignore
                return (
                    picture.convert("F")
                    .point(lambda v: v * 255 / high)
                    .convert("L")
                    .convert("RGB")
                )
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                return Image.alpha_composite(white, picture).convert("RGB")
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no readable picture: {error}") from error


def usable(path: Path) -> bool:
    """Whether a file is a whole picture."""
    try:
        open_picture(path)
    except ValueError:
        return False
    return True
