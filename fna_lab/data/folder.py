"""Any directory of pictures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fna_lab.data.base import PictureData, PictureFiles, usable

log = logging.getLogger(__name__)


class FolderData(PictureData):
    """Every picture below a directory, in the order of the names.

    Broken and non-picture files are counted, named and skipped.

    Args:
        root: the directory.
        labels: take the names of the sub-folders for classes.
        **common: see `PictureData`.

    Raises:
        FileNotFoundError: there is no such directory, or no picture in it.
        ValueError: `labels` without sub-folders.
    """

    def __init__(self, *, root: str, labels: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.root = Path(root).expanduser()
        self.labels = labels

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Find the pictures; a second call does nothing."""
        if self.test_set is not None:
            return
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root={self.root}: there is no such directory.")
        paths = sorted(p for p in self.root.rglob("*") if p.is_file())
        paths = [
            path
            for path in paths
            if not any(part.startswith(".") for part in path.relative_to(self.root).parts)
        ]
        found: list[Path] = []
        for path in paths:
            if self.limit is not None and len(found) == self.limit:
                break
            if usable(path):
                found.append(path)
            else:
                self.skipped.append(str(path.relative_to(self.root)))
        if self.skipped:
            names = ", ".join(self.skipped[:5]) + (" ..." if len(self.skipped) > 5 else "")
            log.warning("data.root: skipped %d unreadable files: %s", len(self.skipped), names)
        if not found:
            raise FileNotFoundError(
                f"data.root={self.root}: no picture in it ({len(self.skipped)} other files)."
            )
        classes: dict[str, int] = {}
        if self.labels:
            names = sorted({self._class_of(path) for path in found})
            classes = {name: i for i, name in enumerate(names)}
            self.classnames = [name.replace("_", " ") for name in names]
        self.test_set = PictureFiles(
            [
                (
                    p,
                    str(p.relative_to(self.root)),
                    classes.get(self._class_of(p)) if classes else None,
                )
                for p in found
            ],
            self.transform,
        )

    def _class_of(self, path: Path) -> str:
        if not self.labels:
            return ""
        parts = list(path.relative_to(self.root).parts)
        if len(parts) < 2:
            raise ValueError(
                f"data.labels=true: {parts[0]} lies in no class folder of data.root={self.root}."
            )
        return parts[0]

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        return super().describe() | {"root": str(self.root), "split": "all"}
