"""Vision transformers of Hugging Face transformers, by name or local folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fna_lab.backbone.base import Anatomy, Backbone, Features, check_img_size
from fna_lab.backbone.weights import explain_missing_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TransformersBackbone(Backbone):
    """The vision model of a transformers checkpoint (CLIP, DINOv2, DINOv3, ViT, SigLIP).

    Args:
        name: a name on the hub or a local folder with `config.json`.
        pretrained: load pretrained weights; False = random ones of that configuration.
        img_size: side of the pictures; None = the model's own.
        mean: channel means, None = ImageNet's.
        std: channel deviations, None = ImageNet's.
        interpolation: of the resizing.
        crop_pct: share that the centre crop keeps.
        anatomy: see `Anatomy`.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the configuration or weights cannot be had.
        ValueError: a setting does not fit the model.
    """

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool = True,
        img_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
        anatomy: Anatomy | Mapping[str, int] | None = None,
    ) -> None:
        host: Any = _create(name, pretrained)
        config = host.config
        if img_size is not None:
            check_img_size(img_size, config.patch_size)
        super().__init__(
            host,
            name=name,
            img_size=img_size or config.image_size,
            patch_size=config.patch_size,
            mean=mean or IMAGENET_MEAN,
            std=std or IMAGENET_STD,
            interpolation=interpolation,
            crop_pct=crop_pct,
            anatomy=anatomy,
        )
        with torch.no_grad():  # what the host does not state, one picture tells
            side = self.img_size
            device = next(host.parameters()).device
            tokens = self._run(torch.zeros(1, 3, side, side, device=device)).last_hidden_state
        self._prefix = tokens.shape[1] - self.grid[0] * self.grid[1]

    def _run(self, images: Tensor) -> Any:
        native = images.shape[-1] == self.host.config.image_size
        # Models with learned positions resample them on request; the others need no request.
        learned = "interpolate_pos_encoding" in inspect.signature(self.host.forward).parameters
        more = {"interpolate_pos_encoding": True} if learned and not native else {}
        return self.host(pixel_values=images, **more)

    def forward(self, images: Tensor) -> Features:
        """Normalised pictures `[b 3 h w]` -> features."""
        out = self._run(images)
        tokens = out.last_hidden_state
        if type(self.host).__name__.startswith("CLIPVision"):
            # transformers' CLIP keeps its final norm for the pooled token alone.
            tokens = self._post_layernorm(tokens)
        pooled = out.pooler_output if getattr(out, "pooler_output", None) is not None else None
        cls = tokens[:, 0] if self.has_cls else None
        patches = tokens[:, self._prefix :]
        if pooled is None:
            pooled = patches.mean(1) if cls is None else cls
        return Features(pooled, cls, patches, self.grid)

    def _post_layernorm(self, tokens: Tensor) -> Tensor:
        for name, module in self.host.named_modules():
            if name.endswith("post_layernorm"):
                return module(tokens)
        return tokens

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers before the patch tokens."""
        return self._prefix

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        return int(self.host.config.num_attention_heads)

    @property
    def embed_dim(self) -> int:
        """Channels of a token inside the blocks."""
        return int(self.host.config.hidden_size)


def _create(name: str, pretrained: bool) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.models.auto.modeling_auto import MODEL_MAPPING
    except ImportError as error:
        raise ImportError(
            "backbone=transformers needs the package transformers: pip install 'fna-lab[hf]'."
        ) from error
    try:
        config = AutoConfig.from_pretrained(name)
        config = getattr(config, "vision_config", config)  # of a pair, the vision model alone
        if type(config) not in MODEL_MAPPING:
            raise ValueError(f"backbone.name={name}: {type(config).__name__} is no vision model.")
        if not pretrained:
            return AutoModel.from_config(config, attn_implementation="sdpa")
        kind: Any = MODEL_MAPPING[type(config)]
        return kind.from_pretrained(name, attn_implementation="sdpa")
    except (OSError, ConnectionError) as error:
        raise explain_missing_weights(name, error) from error
