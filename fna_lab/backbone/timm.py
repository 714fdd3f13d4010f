"""Any ViT of timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import Tensor, nn

from fna_lab.backbone.base import Anatomy, Backbone, Features, check_img_size
from fna_lab.backbone.weights import explain_missing_weights, load_fitting, read_checkpoint


class TimmBackbone(Backbone):
    """A ViT of timm, by its name.

    Args:
        name: timm's name, with its tag: `vit_small_patch14_dinov2.lvd142m`.
        pretrained: load pretrained weights; False = random ones.
        checkpoint: a local file instead; position embeddings are resampled.
        img_size: side of the pictures; None = the model's own.
        patch_size: side of a patch, None = as the model says; another value is an error.
        mean: channel means, None = the model's own.
        std: channel deviations, None = the model's own.
        interpolation: of the resizing, None = the model's own.
        crop_pct: share that the centre crop keeps, None = the model's own.
        anatomy: see `Anatomy`.

    Raises:
        ValueError: a setting does not fit the model.
        FileNotFoundError: the weights cannot be had.
    """

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool = True,
        checkpoint: str | None = None,
        img_size: int | None = None,
        patch_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        anatomy: Anatomy | Mapping[str, int] | None = None,
    ) -> None:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if config is None:
            near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*", pretrained=True)[:3])
            raise ValueError(
                f"backbone.name={name}: timm has no such model; near ones: {near or 'none'}."
            )
        if patch_size is not None and img_size is not None:
            check_img_size(img_size, patch_size)
        try:
            host: Any = _create(name, pretrained, checkpoint, img_size)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            raise ValueError(
                f"backbone.img_size={img_size}: {name} takes no such setting, so it is no plain "
                "ViT; expected a model of timm that is."
            ) from error
        parts = ("patch_embed", "blocks", "num_prefix_tokens")
        if not all(hasattr(host, part) for part in parts):
            raise ValueError(
                f"backbone.name={name}: {type(host).__name__} is no plain ViT; expected a model "
                f"of timm with {', '.join(parts)}."
            )
        patch = _side(host.patch_embed.patch_size)
        if img_size is not None:
            check_img_size(img_size, patch)
        if patch_size not in (None, patch):
            raise ValueError(
                f"backbone.patch_size={patch_size}: {name} has {patch}-pixel patches."
            )
        super().__init__(
            host,
            name=name,
            img_size=img_size or config.input_size[-1],
            patch_size=patch,
            mean=mean or config.mean,
            std=std or config.std,
            interpolation=interpolation or config.interpolation,
            crop_pct=crop_pct or config.crop_pct or 1.0,
            anatomy=anatomy,
        )

    def forward(self, images: Tensor) -> Features:
        """Normalised pictures `[b 3 h w]` -> features."""
        tokens = self.host.forward_features(images)
        pooled = self.host.forward_head(tokens, pre_logits=True)
        # Average-pooling models keep their final norm after the pooling.
        if isinstance(self.host.norm, nn.Identity):
            tokens = self.host.fc_norm(tokens)
        prefix = self.num_prefix_tokens
        return Features(
            pooled, tokens[:, 0] if self.has_cls else None, tokens[:, prefix:], self.grid
        )

    def logits(self, images: Tensor) -> Tensor:
        """The model's own classification head, `[b 3 h w]` -> `[b classes]`."""
        if not self.num_classes:
            return super().logits(images)
        return self.host(images)

    @property
    def num_classes(self) -> int:
        """Classes of the model's own head, 0 without one."""
        return int(self.host.num_classes)

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers before the patch tokens."""
        return int(self.host.num_prefix_tokens)

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        return int(self.host.blocks[0].attn.num_heads)

    @property
    def embed_dim(self) -> int:
        """Channels of a token inside the blocks."""
        return int(self.host.embed_dim)


def _create(
    name: str, pretrained: bool, checkpoint: str | None, img_size: int | None
) -> nn.Module:
    settings: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if checkpoint is not None:
        # timm's own loader renames the keys of the original releases and resamples positions.
        state = read_checkpoint(checkpoint)
        overlay = {"state_dict": state}
        host: Any = load_fitting(
            lambda: timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **settings
            ),
            checkpoint,
            name,
        )
        host.pretrained_cfg.pop("state_dict", None)  # keep no second copy of the weights
        return host
    if not pretrained:
        return timm.create_model(name, pretrained=False, **settings)
    try:
        return timm.create_model(name, pretrained=True, **settings)
    except TypeError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds
        raise explain_missing_weights(name, error) from error


def _side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]
