"""The embedded backbone: a small CLIP, trained by this project on synthetic pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from open_clip.model import resize_pos_embed
from torch import nn

from fna_lab.backbone.base import Anatomy, Backbone, check_img_size
from fna_lab.backbone.open_clip import OpenClipBackbone
from fna_lab.backbone.tiny_clip import PATCH_SIZE, WordTokenizer, build_clip
from fna_lab.backbone.weights import load_fitting, read_checkpoint

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


class FnaTiny(OpenClipBackbone):
    """A ViT with CLS and 8-pixel patches and a text tower of 60 words; see docs/fna_tiny.md.

    Args:
        pretrained: load the weights that ship with the package; False = random ones.
        checkpoint: a local file instead.
        img_size: side of the pictures, a multiple of 8; None = that of the training.
        mean: channel means.
        std: channel deviations.
        anatomy: see `Anatomy`.

    Raises:
        ValueError: a setting does not fit the model.
    """

    def __init__(
        self,
        *,
        pretrained: bool = True,
        checkpoint: str | None = None,
        img_size: int | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        anatomy: Anatomy | Mapping[str, int] | None = None,
    ) -> None:
        facts = json.loads((WEIGHTS / "fna_tiny.json").read_text())
        side = facts["img_size"] if img_size is None else img_size
        check_img_size(side, PATCH_SIZE)
        host = build_clip(img_size=side, **facts["model"])
        source = checkpoint or (WEIGHTS / "fna_tiny.safetensors" if pretrained else None)
        if source is not None:
            state = read_checkpoint(source)

            def load() -> nn.Module:
                resize_pos_embed(state, host)
                host.load_state_dict(state)
                return host

            load_fitting(load, source, "fna_tiny")
        Backbone.__init__(
            self,
            host,
            name="fna_tiny",
            img_size=side,
            patch_size=PATCH_SIZE,
            mean=mean,
            std=std,
            anatomy=anatomy,
        )
        self._tokenizer = WordTokenizer
