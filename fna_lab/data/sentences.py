"""English sentences, one sample each: of the shapes world, or of a text file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from fna_lab.data.base import PictureData
from fna_lab.data.shapes_world import sample_scene
from fna_lab.settings import check_integer


class Sentences(Dataset[dict[str, Any]]):
    """Sentences as a backbone reads them.

    A sample holds `image` (what stands there for a picture: token ids), `index`, `name` and
    `text`.

    Args:
        texts: the sentences.
        transform: sentence -> token ids.
    """

    def __init__(self, texts: Sequence[str], transform: Callable[[Any], Tensor]) -> None:
        self.texts = texts
        self.transform = transform

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = self.texts[index]
        ids = self.transform(text)
        if not isinstance(ids, Tensor):  # a transform of pictures hands on what is none
            raise ValueError(
                "data=sentences holds no pictures: it goes with a backbone that reads text, "
                "backbone=minilm."
            )
        return {
            "image": ids,
            "index": index,
            "name": f"sentence-{index}",
            "text": text,
        }


class SentencesData(PictureData):
    """Sentences for a text encoder: synthetic ones about shapes, or those of a file.

    Args:
        path: a UTF-8 text file, one sentence a line, empty lines left out; None = sentences that
            the project makes from scenes of its shapes world.
        count: how many of those.
        **common: see `PictureData`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a setting is out of range, or the file holds no text.
    """

    samples = "sentences"

    def __init__(self, *, path: str | None = None, count: int = 200, **common: Any) -> None:
        super().__init__(**common)
        check_integer("data.count", count)
        self.path = None if path is None else Path(path).expanduser()
        self.count = count

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read or make the sentences."""
        if self.path is None:
            texts = [sentence(self.seed * 1_000_003 + i) for i in range(self.count)]
        else:
            texts = read_lines(self.path)
        self.test_set = Sentences(texts[: self.limit], self.transform)

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        facts = super().describe() | {"split": "all"}
        if self.path is None:
            return facts | {"synthetic": True}
        return facts | {"path": str(self.path)}


def sentence(seed: int) -> str:
    """A true sentence about a synthetic scene of one to five objects; longer for more."""
    scene = sample_scene(seed, split="train")
    *first, last = scene.captions[0].split(" and ")
    listed = f"{', '.join(first)} and {last}" if first else last
    number = "There is" if len(scene.things) == 1 else "There are"
    return f"{number} {listed} on a {scene.background} background."


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8 text, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.path={path}: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path={path} is no UTF-8 text (byte {error.start}); expected a sentence a line."
        ) from error
    if "\0" in text:
        raise ValueError(f"data.path={path} is no text; expected one sentence a line.")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"data.path={path} is empty; expected one sentence a line.")
    return lines
