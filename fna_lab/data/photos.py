"""Four photographs that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fna_lab.data.base import PictureData, PictureFiles

PICTURES = Path(__file__).resolve().parent / "pictures"


class PhotosData(PictureData):
    """Astronaut (NASA, public domain), chelsea, coffee and rocket (CC0), from scikit-image.

    Args:
        **common: see `PictureData`.
    """

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """List the four photographs."""
        paths = sorted(PICTURES.glob("*.jpg"))[: self.limit]
        self.test_set = PictureFiles([(path, path.stem, None) for path in paths], self.transform)

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        return super().describe() | {"root": "fna_lab/data/pictures", "split": "all"}
