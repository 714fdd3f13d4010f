"""What every backbone is: a host model, its facts, and its features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from fna_lab.backbone.blocks import Layout, find_blocks
from fna_lab.backbone.replay import Replay
from fna_lab.backbone.without_bias import WithoutBias
from fna_lab.hosts import out_projection, out_weight


@dataclass(frozen=True)
class Anatomy:
    """Where in a backbone things happen; 0-based block indices.

    Attributes:
        restart: block from which iterative detection runs again.
        detect: block whose input, or attention, the detectors read.
        mask: first block whose attention is masked, up to the last.
        fna: first block whose attention is approximated, up to the last.
    """

    restart: int
    detect: int
    mask: int
    fna: int

    @classmethod
    def read(cls, value: Anatomy | Mapping[str, int] | None, depth: int) -> Anatomy:
        """From a mapping; None = CLIP ViT-L/14's 9, 13, 13, 13 of 24 in proportion.

        Raises:
            ValueError: a name is unknown or missing, or a block lies beyond the depth.
        """
        if value is None:
            value = {"restart": 9 * depth // 24, "detect": 13 * depth // 24}
            value |= {"mask": value["detect"], "fna": value["detect"]}
        if not isinstance(value, Anatomy):
            if not isinstance(value, Mapping) or set(value) != set(cls.__dataclass_fields__):
                names = ", ".join(cls.__dataclass_fields__)
                raise ValueError(f"backbone.anatomy={value!r}: expected {names}.")
            value = cls(**value)
        for name, block in vars(value).items():
            if not isinstance(block, int) or not 0 <= block < depth:
                raise ValueError(
                    f"backbone.anatomy.{name}={block}: the backbone has {depth} blocks, "
                    f"0 to {depth - 1}."
                )
        return value


@dataclass(frozen=True)
class Features:
    """What a backbone says of a batch of pictures.

    Attributes:
        pooled: what the model's own head or the image-text space uses `[b e]`.
        cls: CLS after the final norm `[b c]`, None where the host has none.
        patches: patch tokens after the final norm `[b p c]`.
        grid: (rows, columns) of the patch tokens.
    """

    pooled: Tensor
    cls: Tensor | None
    patches: Tensor
    grid: tuple[int, int]


def compared(features: Features) -> list[Tensor]:
    """The features that `task=fidelity` compares, `[b t c]` each: pooled, patches, CLS."""
    found = [features.pooled[:, None], features.patches]
    return found if features.cls is None else [*found, features.cls[:, None]]


class Backbone(nn.Module):
    """A pretrained ViT with the facts that tasks and variants need.

    Args:
        host: the model that `fna_lab.patch` works on.
        name: the name that messages and results carry.
        img_size: side of the input pictures in pixels.
        patch_size: side of a patch in pixels.
        mean: channel means of the normalisation.
        std: channel deviations of the normalisation.
        interpolation: `bicubic` or `bilinear`.
        crop_pct: share of the resized picture that the centre crop keeps.
        anatomy: see `Anatomy`.

    Raises:
        ValueError: `img_size` is no multiple of `patch_size`, or the anatomy does not fit.
    """

    has_text = False
    host: Any  # a class of another library

    def __init__(
        self,
        host: nn.Module,
        *,
        name: str,
        img_size: int,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
        anatomy: Anatomy | Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.host = host.eval().requires_grad_(False)
        self.name = name
        self.img_size = img_size
        self.patch_size = patch_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.blocks_path, blocks = find_blocks(host)
        self.depth = len(blocks)
        self.anatomy = Anatomy.read(anatomy, self.depth)

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Normalised pictures `[b 3 img_size img_size]` -> features."""

    def logits(self, images: Tensor) -> Tensor:  # noqa: ARG002
        """The model's own classification head, `[b 3 h w]` -> `[b classes]`.

        Raises:
            NotImplementedError: the backbone has no such head.
        """
        raise NotImplementedError(f"backbone={self.name} has no classification head.")

    def encode_text(self, texts: list[str]) -> Tensor:  # noqa: ARG002
        """Unit text embeddings `[t e]`.

        Raises:
            NotImplementedError: the backbone has no text tower.
        """
        raise NotImplementedError(f"backbone={self.name} has no text tower.")

    @property
    def blocks(self) -> list[Any]:
        """The host's transformer blocks, in order."""
        return find_blocks(self.host, self.blocks_path)[1]

    def out_weight(self, layer: int) -> Tensor:
        """The weight `[c h*d]` by which attention of a block reaches the residual stream."""
        return out_weight(self.blocks[layer])

    def without_output_bias(self, layers: Iterable[int]) -> WithoutBias:
        """A context in which the output projections of these blocks add no bias."""
        return WithoutBias(out_projection(self.blocks[layer]) for layer in layers)

    def replay(self, images: Tensor, first: int, last: int) -> Replay:
        """Run the host once, so that some of its blocks can run again; see `Replay`."""
        return Replay(self.blocks, lambda: self(images), first, last)

    def kept(self, images: Tensor) -> Tensor | None:  # noqa: ARG002 (pictures have no padding)
        """Tokens of the blocks that are no padding, bool `[b n]`; None = all."""
        return None

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised pictures `[b 3 h w]` as bytes to look at, uint8 `[b h w 3]`."""
        mean, std = (images.new_tensor(part)[:, None, None] for part in (self.mean, self.std))
        colours = (images * std + mean).clamp(0, 1) * 255
        return colours.round().to(torch.uint8).permute(0, 2, 3, 1)

    @property
    def num_classes(self) -> int:
        """Classes of the model's own head, 0 without one."""
        return 0

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patch tokens at this input size."""
        return self.img_size // self.patch_size, self.img_size // self.patch_size

    @property
    def has_cls(self) -> bool:
        """Whether token 0 is CLS."""
        return Layout(self.host, self.blocks_path).has_cls(self.num_prefix_tokens)

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """CLS and registers before the patch tokens."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """Attention heads of a block."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Channels of a token inside the blocks."""

    @property
    def num_tokens(self) -> int:
        """Tokens in a block at this input size."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Resize the shorter side, crop the centre, normalise."""
        return v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(
                    round(self.img_size / self.crop_pct),
                    interpolation=InterpolationMode(self.interpolation),
                    antialias=True,
                ),
                v2.CenterCrop(self.img_size),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.mean, self.std),
            ]
        )

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        facts = ("name", "img_size", "patch_size", "depth", "num_heads", "embed_dim")
        more = {"num_tokens": self.num_tokens, "num_prefix_tokens": self.num_prefix_tokens}
        return {fact: getattr(self, fact) for fact in facts} | more


def check_img_size(img_size: int, patch_size: int) -> None:
    """Raise unless the patches tile the picture.

    Raises:
        ValueError: naming the setting, the value and the nearest sizes that fit.
    """
    if isinstance(img_size, int) and img_size >= patch_size and img_size % patch_size == 0:
        return
    if not isinstance(img_size, int):
        raise ValueError(f"backbone.img_size={img_size!r}: expected a whole number of pixels.")
    below = max(1, img_size // patch_size) * patch_size
    raise ValueError(
        f"backbone.img_size={img_size}: expected a multiple of the patch size {patch_size}, "
        f"such as {below} or {below + patch_size}."
    )
