"""ImageNet-1k: the usual folders, or a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision.models._meta import _IMAGENET_CATEGORIES

from fna_lab.data.base import PictureData, PictureFiles, Transform

SUFFIXES = {".jpeg", ".jpg", ".png"}
VAL_NAMES = ("val", "validation", "valid")
# The seven templates that OpenAI's notebook on prompts found to do best together.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


class ImageNetData(PictureData):
    """The 50,000 validation pictures, and the training folder as k-NN bank where it is there.

    Args:
        root: directory that holds `val/<wnid>/*.JPEG` (and `train/`); for `source=folder`.
        source: `folder` or `hf`.
        dataset: name or local path of a Hugging Face dataset with `image` and `label`; for `hf`.
        split: split of that dataset, or name of the folder.
        bank_per_class: training pictures of each class in the bank.
        **common: see `PictureData`.

    Raises:
        FileNotFoundError: the pictures are not there.
        ValueError: a setting is out of range, or the layout is another.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        source: str = "folder",
        dataset: str = "ILSVRC/imagenet-1k",
        split: str | None = None,
        bank_per_class: int = 50,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if source not in ("folder", "hf"):
            raise ValueError(f"data.source={source!r}: expected folder or hf.")
        if source == "folder" and root is None:
            raise ValueError(
                "data.root is not set: expected the directory that holds val/<wnid>/*.JPEG "
                "(or data.source=hf)."
            )
        self.root = None if root is None else Path(root).expanduser()
        self.source = source
        self.dataset = dataset
        self.split = split
        self.bank_per_class = bank_per_class
        self.templates = TEMPLATES

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Find the pictures; a second call does nothing."""
        if self.test_set is not None:
            return
        self.test_set = self._hf(self.split or "validation", None) if self.source == "hf" else None
        if self.source == "folder":
            self.test_set = self._folder(self._split_folder(), None)
        if self.limit is not None and self.limit < len(self.test_set):  # type: ignore[arg-type]
            # Every so many pictures, so that a small limit still sees many classes.
            size = len(self.test_set)  # type: ignore[arg-type]
            picks = [i * size // self.limit for i in range(self.limit)]
            self.test_set = Subset(self.test_set, picks)  # type: ignore[arg-type]

    def bank(self) -> Dataset[dict[str, Any]]:
        """Training pictures, the first of each class."""
        if self.source == "hf":
            return self._hf("train", self.bank_per_class)
        assert self.root is not None
        folder = self.root / "train"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"data.root={self.root} has no train/ folder, which task.protocols=[knn] needs."
            )
        return self._folder(folder, self.bank_per_class)

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        place = self.dataset if self.source == "hf" else str(self.root)
        return super().describe() | {
            "root": place,
            "split": self.split or "validation",
            "source": self.source,
        }

    def _split_folder(self) -> Path:
        assert self.root is not None
        names = VAL_NAMES if self.split is None else (self.split,)
        for name in names:
            if (self.root / name).is_dir():
                return self.root / name
        raise FileNotFoundError(
            f"data.root={self.root}: expected a folder {' or '.join(names)} in it."
        )

    def _folder(self, folder: Path, per_class: int | None) -> PictureFiles:
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
        if not classes:
            loose = next(folder.glob("*.JPEG"), None)
            hint = (
                " The raw archive puts all pictures in one folder; sort them into class folders."
                if loose
                else ""
            )
            raise ValueError(f"data.root: {folder} has no class folders <wnid>/.{hint}")
        self.classnames = _classnames(classes)
        files: list[tuple[Path, str, int | None]] = []
        for label, name in enumerate(classes):
            pictures = sorted(
                p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES
            )[:per_class]
            files += [(p, f"{name}/{p.name}", label) for p in pictures]
        if not files:
            raise FileNotFoundError(f"data.root: {folder} holds no picture.")
        return PictureFiles(files, self.transform)

    def _hf(self, split: str, per_class: int | None) -> Dataset[dict[str, Any]]:
        try:
            from datasets import load_dataset, load_from_disk
        except ImportError as error:
            raise ImportError(
                "data.source=hf needs the package datasets: pip install 'fna-lab[hf]'."
            ) from error
        table: Any
        try:
            local = Path(self.dataset)
            if (local / "dataset_dict.json").exists():
                table = load_from_disk(str(local))[split]
            else:
                table = load_dataset(self.dataset, split=split)
        except Exception as error:  # hub, cache and file errors of a dozen kinds
            reason = str(error).split("\n")[0][:160]
            raise FileNotFoundError(
                f"data.dataset={self.dataset}, split {split}: cannot be loaded ({reason}). Give a "
                "local path, or connect to the hub once."
            ) from error
        missing = {"image", "label"} - set(table.column_names)
        if missing:
            raise ValueError(
                f"data.dataset={self.dataset} has the columns {table.column_names}; expected "
                "image and label."
            )
        names = getattr(table.features["label"], "names", None) or []
        self.classnames = _classnames(names) if names else list(_IMAGENET_CATEGORIES)
        picks: Sequence[int] = range(len(table))
        if per_class is not None:
            seen: dict[int, int] = {}
            picks = []
            for i, label in enumerate(table["label"]):
                if seen.setdefault(label, 0) < per_class:
                    seen[label] += 1
                    picks.append(i)
        return HfPictures(table, picks, self.transform)


class HfPictures(Dataset[dict[str, Any]]):
    """Rows of a Hugging Face dataset with `image` and `label`."""

    def __init__(self, table: Any, picks: Sequence[int], transform: Transform) -> None:
        self.table = table
        self.picks = picks
        self.transform = transform

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[int(self.picks[index])]
        picture: Image.Image = row["image"]
        return {
            "image": self.transform(picture.convert("RGB")),
            "index": index,
            "name": str(self.picks[index]),
            "label": int(row["label"]),
        }


def _classnames(names: Sequence[str]) -> list[str]:
    """English names: torchvision's for the 1,000 sorted wnids, else what the folders say."""
    wnids = all(name.startswith("n") and name[1:].isdigit() for name in names)
    if wnids and len(names) == len(_IMAGENET_CATEGORIES):
        return list(_IMAGENET_CATEGORIES)
    return [name.split(",")[0].replace("_", " ") for name in names]
