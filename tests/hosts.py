"""Small random models of every host family that the seam promises to serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Host:
    """A host family.

    Attributes:
        build: makes the model.
        run: model and pictures to output.
        img_size: side of the pictures.
        prefix: number of prefix tokens.
        cls: whether token 0 is CLS.
        depth: number of blocks.
    """

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    img_size: int
    prefix: int
    cls: bool
    depth: int = 4


def _timm(name: str, prefix: int, cls: bool, patch: int = 16, **settings: object) -> Host:
    size = patch * 5

    def build() -> nn.Module:
        shape = dict(depth=4, embed_dim=48, num_heads=4, img_size=size, num_classes=7)
        return timm.create_model(name, **{**shape, **settings})

    return Host(build, lambda model, x: model.forward_features(x), size, prefix, cls)


def _open_clip() -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(
        32,
        vision_cfg=dict(image_size=80, layers=4, width=48, head_width=12, patch_size=16),
        text_cfg=dict(context_length=8, vocab_size=50, width=32, heads=2, layers=6),
        quick_gelu=True,
    )


def _open_clip_timm() -> nn.Module:
    from open_clip.model import CustomTextCLIP

    model = CustomTextCLIP(
        32,
        vision_cfg=dict(
            timm_model_name="vit_tiny_patch16_224", timm_pool="token", timm_proj="linear"
        ),
        text_cfg=dict(context_length=8, vocab_size=50, width=32, heads=2, layers=2),
    )
    model.visual.set_input_size(80)
    return model


def _hf_clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=80,
        patch_size=16,
    )
    return CLIPVisionModel._from_config(config, attn_implementation="sdpa")


def _hf_dinov2(registers: bool = False) -> nn.Module:
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    config, model = (
        (Dinov2WithRegistersConfig, Dinov2WithRegistersModel)
        if registers
        else (Dinov2Config, Dinov2Model)
    )
    shape = dict(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=80,
        patch_size=16,
    )
    host = model._from_config(config(**shape), attn_implementation="sdpa")
    if registers:  # zero as they are made: equal tokens, between which rounding would choose
        nn.init.normal_(host.embeddings.register_tokens)
    return host


def _hf(build: Callable[[], nn.Module], prefix: int) -> Host:
    return Host(build, lambda model, x: model(x).last_hidden_state, 80, prefix, True)


HOSTS = {
    "timm vit": _timm("vit_tiny_patch16_224", 1, True),
    "timm vit without cls": _timm(
        "vit_tiny_patch16_224", 0, False, class_token=False, global_pool="avg"
    ),
    "timm dinov2": _timm("vit_small_patch14_dinov2", 1, True, patch=14),
    "timm dinov2 registers": _timm("vit_small_patch14_reg4_dinov2", 5, True, patch=14),
    "timm dinov3": _timm("vit_small_patch16_dinov3", 5, True),
    "timm clip": _timm("vit_base_patch16_clip_quickgelu_224", 1, True),
    "timm siglip": _timm("vit_base_patch16_siglip_224", 0, False),
    "timm deit3": _timm("deit3_small_patch16_224", 1, True),
    "timm beit": _timm("beit_base_patch16_224", 1, True),
    "timm beitv2": _timm("beitv2_base_patch16_224", 1, True),
    "timm eva02": _timm("eva02_tiny_patch14_224", 1, True, patch=14),
    "timm mae": _timm("vit_base_patch16_224.mae", 1, True),
    "open_clip": Host(_open_clip, lambda model, x: model.encode_image(x), 80, 1, True),
    "open_clip timm tower": Host(
        _open_clip_timm, lambda model, x: model.encode_image(x), 80, 1, True, depth=12
    ),
    "transformers clip": _hf(_hf_clip, 1),
    "transformers dinov2": _hf(_hf_dinov2, 1),
    "transformers dinov2 registers": _hf(lambda: _hf_dinov2(True), 5),
}


def build(name: str, seed: int = 0) -> tuple[Host, nn.Module, torch.Tensor]:
    """A host family, a random model of it in eval mode, and three random pictures."""
    torch.manual_seed(seed)
    host = HOSTS[name]
    model = host.build().eval().requires_grad_(False)
    for key, value in model.named_parameters():
        # Random weights attend almost uniformly; make queries and keys tell tokens apart.
        if any(word in key for word in ("qkv.weight", "q_proj.weight", "k_proj.weight")):
            value.mul_(6)
        if any(word in key for word in ("in_proj_weight", "query.weight", "key.weight")):
            value.mul_(6)
    return host, model, torch.randn(3, 3, host.img_size, host.img_size)


def set_batch_first(model: nn.Module, batch_first: bool) -> None:
    """Let open_clip's vision tower keep hidden states `[b n c]`, or else `[n b c]`."""
    tower = model.visual.transformer
    tower.batch_first = batch_first
    for block in tower.resblocks:
        block.attn.batch_first = batch_first
