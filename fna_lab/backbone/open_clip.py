"""Any image-text pair of open_clip with a ViT as image tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import load_checkpoint
from torch import Tensor, nn

from fna_lab.backbone.base import Anatomy, Backbone, Features, check_img_size
from fna_lab.backbone.weights import explain_missing_weights, load_fitting, read_checkpoint


class OpenClipBackbone(Backbone):
    """An image-text pair of open_clip, by its name.

    Args:
        name: open_clip's name, `ViT-L-14-quickgelu` where the weights want QuickGELU.
        pretrained_tag: the tag of the weights, `openai`.
        pretrained: load pretrained weights; False = random ones.
        checkpoint: a local file instead; position embeddings are resampled.
        img_size: side of the pictures; None = the model's own.
        patch_size: side of a patch, None = as the model says; another value is an error.
        mean: channel means, None = the weights' own.
        std: channel deviations, None = the weights' own.
        interpolation: of the resizing.
        crop_pct: share that the centre crop keeps.
        anatomy: see `Anatomy`.

    Raises:
        ValueError: a setting does not fit the model.
        FileNotFoundError: the weights cannot be had.
    """

    has_text = True

    def __init__(
        self,
        *,
        name: str,
        pretrained_tag: str | None = None,
        pretrained: bool = True,
        checkpoint: str | None = None,
        img_size: int | None = None,
        patch_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
        anatomy: Anatomy | Mapping[str, int] | None = None,
    ) -> None:
        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError(f"backbone.name={name}: open_clip has no such model.")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained_tag is not None and pretrained_tag not in tags:
            raise ValueError(
                f"backbone.pretrained_tag={pretrained_tag}: open_clip has {name} with "
                f"{', '.join(tags) or 'no weights'}."
            )
        if patch_size is not None and img_size is not None:
            check_img_size(img_size, patch_size)
        facts = open_clip.get_pretrained_cfg(name, pretrained_tag) if pretrained_tag else {}
        host: Any = _create(name, pretrained_tag, pretrained, checkpoint, img_size)
        super().__init__(
            host,
            name=name if pretrained_tag is None else f"{name}/{pretrained_tag}",
            img_size=img_size or _side(host.visual.image_size),
            patch_size=_patch_size(host.visual, name),
            mean=mean or facts.get("mean") or open_clip.OPENAI_DATASET_MEAN,
            std=std or facts.get("std") or open_clip.OPENAI_DATASET_STD,
            interpolation=interpolation,
            crop_pct=crop_pct,
            anatomy=anatomy,
        )
        # Tokenizers may fetch files, so this waits until texts come.
        self._tokenizer: Callable[[], Any] = lambda: open_clip.get_tokenizer(name)
        if patch_size not in (None, self.patch_size):
            raise ValueError(
                f"backbone.patch_size={patch_size}: {name} has {self.patch_size}-pixel patches."
            )

    def forward(self, images: Tensor) -> Features:
        """Normalised pictures `[b 3 h w]` -> features; `pooled` is the projected embedding."""
        visual = self.host.visual
        if hasattr(visual, "trunk"):
            tokens = visual.trunk.forward_features(images)
            pooled = visual.head(visual.trunk.forward_head(tokens))
        else:
            kept: list[Tensor] = []
            hook = visual.transformer.register_forward_hook(lambda *call: kept.append(call[2]))
            try:
                pooled = self.host.encode_image(images)
            finally:
                hook.remove()
            tokens = visual.ln_post(kept[0])
        prefix = self.num_prefix_tokens
        return Features(
            pooled, tokens[:, 0] if self.has_cls else None, tokens[:, prefix:], self.grid
        )

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """Unit text embeddings `[t e]`."""
        tokens = self._tokenizer()(texts)
        tokens = tokens.to(next(self.host.parameters()).device)
        return F.normalize(self.host.encode_text(tokens), dim=-1)

    @property
    def logit_scale(self) -> float:
        """Factor of the image-text similarity."""
        return float(self.host.logit_scale.exp())

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers before the patch tokens."""
        visual = self.host.visual
        return int(getattr(getattr(visual, "trunk", visual), "num_prefix_tokens", 1))

    @property
    def num_heads(self) -> int:
        """Attention heads of an image block."""
        return int(self.blocks[0].attn.num_heads)

    @property
    def embed_dim(self) -> int:
        """Channels of a token inside the image blocks."""
        visual = self.host.visual
        if hasattr(visual, "trunk"):
            return int(visual.trunk.embed_dim)
        return int(visual.conv1.out_channels)


def _patch_size(visual: Any, name: str) -> int:
    tower = getattr(visual, "trunk", visual)
    found = getattr(getattr(tower, "patch_embed", tower), "patch_size", None)
    if found is None:
        raise ValueError(
            f"backbone.name={name}: its image tower, {type(tower).__name__}, is no ViT; expected "
            "a model of open_clip with one, such as ViT-B-16."
        )
    return _side(found)


def _create(
    name: str, tag: str | None, pretrained: bool, checkpoint: str | None, img_size: int | None
) -> nn.Module:
    settings: dict[str, Any] = {
        "force_image_size": img_size,
        "pretrained_text": False,
        "device": torch.get_default_device(),
    }
    if checkpoint is not None:
        read_checkpoint(checkpoint)  # checked here: one line on a file that is none
        host = open_clip.create_model(name, load_weights=False, **settings)
        load_fitting(lambda: _load(host, checkpoint), checkpoint, name)
        return host
    if not pretrained:
        return open_clip.create_model(name, load_weights=False, **settings)
    if tag is None:
        raise ValueError(f"backbone.pretrained_tag is not set; {name} needs one, such as openai.")
    try:
        return open_clip.create_model(name, tag, require_pretrained=True, **settings)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise explain_missing_weights(name, error) from error


def _load(host: Any, checkpoint: str) -> nn.Module:
    load_checkpoint(host, checkpoint, strict=True, weights_only=True)
    return host


def _side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]
