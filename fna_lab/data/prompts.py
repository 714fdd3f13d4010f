"""Prompts and seeds, one sample each pair, for backbones that make pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from fna_lab.data.base import PictureData
from fna_lab.data.sentences import read_lines
from fna_lab.settings import check_integer

# Written for this project: still lives, animals, places, materials, lettering, many things.
PROMPTS = (
    "A bowl of lemons on a wooden table, morning light from a window",
    "A grey cat asleep on a stack of books",
    "A lighthouse on a rocky coast under a cloudy sky, oil painting",
    "An empty street after rain, reflections of shop windows at dusk",
    "A red bicycle leaning against a white brick wall",
    "A steam engine crossing a stone bridge in a green valley, wide view",
    "A paper sign that says OPEN on a glass door",
    "A market stall with many kinds of vegetables, seen from above",
)


class Prompts(Dataset[dict[str, Any]]):
    """Every prompt with every seed, prompt by prompt.

    A sample holds `image` (the noise that a picture is made from), `index`, `name`, `text` and
    `seed`.

    Args:
        prompts: the prompts.
        seeds: of the noise.
        transform: a seed -> noise, the backbone's.
    """

    def __init__(
        self, prompts: Sequence[str], seeds: Sequence[int], transform: Callable[[Any], Tensor]
    ) -> None:
        self.pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        self.transform = transform
        self.seeds = len(seeds)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text, seed = self.pairs[index]
        noise = self.transform(seed)
        if not isinstance(noise, Tensor):  # a transform of pictures hands on what is none
            raise ValueError(
                "data=prompts holds no pictures: it goes with task=generation and a backbone that "
                "makes them, backbone=sd3_medium or sd3_random."
            )
        name = f"prompt-{index // self.seeds}-seed-{seed}"
        return {"image": noise, "index": index, "name": name, "text": text, "seed": seed}


class PromptsData(PictureData):
    """A few neutral prompts, or those of a file; each with so many seeds.

    Args:
        path: a UTF-8 text file, one prompt a line, empty lines left out; None = those above.
        seeds: pictures of each prompt; their noise has the seeds `seed`, `seed` + 1, ...
        batch_size: pictures made at a time.
        **common: see `PictureData`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a setting is out of range, or the file holds no text.
    """

    def __init__(
        self, *, path: str | None = None, seeds: int = 1, batch_size: int = 1, **common: Any
    ) -> None:
        super().__init__(batch_size=batch_size, **common)
        check_integer("data.seeds", seeds)
        self.path = None if path is None else Path(path).expanduser()
        self.seeds = seeds

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read the prompts, and pair them with seeds."""
        prompts = PROMPTS if self.path is None else read_lines(self.path)
        found = Prompts(prompts, range(self.seed, self.seed + self.seeds), self.transform)
        found.pairs = found.pairs[: self.limit]
        self.test_set = found

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        path = None if self.path is None else str(self.path)
        return super().describe() | {"split": "all", "path": path, "seeds": self.seeds}
