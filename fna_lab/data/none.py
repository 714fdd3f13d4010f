"""No picture, for tasks that measure without any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fna_lab.data.base import PictureData


class NoData(PictureData):
    """One blank item (constructed), so that a test loop goes round once."""

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Nothing is read."""
        self.test_set = _Blank()

    def calibration(self, count: int) -> Tensor:
        """Refuse: there is no picture to settle a variant on.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"data=none: expected data with {count} pictures to settle a variant on.")

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        return super().describe() | {"synthetic": True, "split": "all"}


class _Blank(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != 0:
            raise IndexError(index)
        return {"image": torch.zeros(3, 1, 1), "index": 0, "name": "blank"}
