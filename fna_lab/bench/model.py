"""Whole forward passes, beside one in which attention is free of charge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fna_lab.attn.base import AttentionVariant, Context
from fna_lab.attn.layers import parse_layers
from fna_lab.backbone.patch import Patch, patch
from fna_lab.backbone.timm import TimmBackbone
from fna_lab.bench import packages
from fna_lab.bench.attention import chosen_variants, made_variants, measure
from fna_lab.bench.progress import Say, follow
from fna_lab.bench.settings import Settings


class Free(AttentionVariant):
    """No attention at all: values pass. What is left of a model's time is its Amdahl limit."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """The values themselves."""
        return v


def bench_model(settings: Settings, say: Say) -> Iterator[dict[str, Any]]:
    """Rows of a whole forward pass, beside one with free attention, case by case."""
    assert settings.model is not None
    names = chosen_variants(settings, say)
    for name in (n for n in names if n in packages.ATTENTION):
        say(f"{name} is left out: it has no part that a model could be patched with")
    if "block_svd" in names and "block_svd" not in (settings.variants or ()):
        names.remove("block_svd")
        say("block_svd is left out unless it is named: it takes minutes a block")
    names = ["exact", *(name for name in names if name != "exact")]
    variants = made_variants(names, settings, say) | {"free": Free()}
    cases = [
        (side, b, t) for t in settings.dtype for b in settings.batch for side in settings.img_size
    ]
    for side, batch, kind in follow(cases, settings.model, settings):
        backbone = TimmBackbone(name=settings.model, pretrained=False, img_size=side)
        backbone = backbone.to(settings.device, getattr(torch, kind))
        pictures = torch.randn(
            batch, 3, side, side, device=settings.device, dtype=getattr(torch, kind)
        )
        layers = parse_layers(settings.layers, backbone.depth, setting="--layers")
        patches: dict[str, Patch] = {}

        def run(chosen: Patch, all_of: dict[str, Patch], model: Any, x: Tensor) -> None:
            for one in all_of.values():
                one.enabled = one is chosen
            model(x)

        for name, variant in variants.items():
            if variant.min_tokens > backbone.num_tokens:
                say(f"{name} is left out at {side} px: it needs {variant.min_tokens} tokens")
                continue
            try:
                patches[name] = patch(backbone.host, variant, layers=layers)
                with torch.no_grad():
                    run(patches[name], patches, backbone, pictures)
            except Exception as error:  # a variant that this host or size does not suit
                say(f"{name} is left out at {side} px: {error}")
                if name in patches:
                    patches.pop(name).remove()
        runs: dict[str, tuple[Callable[[], object], Any]] = {
            name: (lambda p=p, a=patches, m=backbone, x=pictures: run(p, a, m, x), p)
            for name, p in patches.items()
        }
        case = {"tokens": backbone.num_tokens, "img_size": side, "batch": batch, "dtype": kind}
        yield from measure(runs, case, settings)
