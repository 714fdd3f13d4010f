"""A tiny Stable Diffusion 3 with random weights, to try the code: its pictures mean nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fna_lab.backbone.base import Anatomy
from fna_lab.backbone.sd3 import SD3Backbone, import_diffusers

TEXT_TOKENS, TEXT_CHANNELS, POOLED = 20, 32, 32
DUAL = 4  # of 6 blocks, as 13 of 24: the deeper half begins with one that has two attentions


class RandomSD3Backbone(SD3Backbone):
    """The architecture of Stable Diffusion 3.5 with 6 blocks of 64 channels, made in the code.

    Transformer and decoder have random weights, and prompts random embeddings, by their letters:
    constructed, not trained. Pictures have 64 tokens at 64 pixels, prompts 20.

    Args:
        img_size: side of the pictures in pixels, a multiple of 8, up to 192.
        seed: of the weights.
        anatomy: see `Anatomy`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: a setting does not fit.
    """

    def __init__(
        self,
        *,
        img_size: int = 64,
        seed: int = 0,
        anatomy: Anatomy | Mapping[str, int] | None = None,
    ) -> None:
        diffusers = import_diffusers()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            host = diffusers.SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=6,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT_CHANNELS,
                caption_projection_dim=64,
                pooled_projection_dim=POOLED,
                pos_embed_max_size=24,
                dual_attention_layers=tuple(range(DUAL)),
                qk_norm="rms_norm",
            )
            vae = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 16, 16),
                latent_channels=4,
                norm_num_groups=4,
                scaling_factor=1.0,
                shift_factor=0.0,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        self._setup(
            host,
            vae,
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            _random_text,
            name="sd3_random",
            img_size=img_size,
            anatomy=anatomy,
        )

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        return super().describe() | {"random_weights": True}


def _random_text(prompt: str) -> tuple[Tensor, Tensor]:
    """Random tokens `[1 t c]` and pooled embedding `[1 p]`, the same for equal prompts."""
    digest = hashlib.sha256(prompt.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    tokens = torch.randn(1, TEXT_TOKENS, TEXT_CHANNELS, generator=generator)
    return tokens, torch.randn(1, POOLED, generator=generator)
