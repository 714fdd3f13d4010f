"""What a patch has to look for: the tokens of its mask, and the classes of its variant."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fna_lab.attn.base import AttentionVariant
from fna_lab.attn.layers import parse_layers
from fna_lab.backbone.search import Search
from fna_lab.hosts import is_joint
from fna_lab.mask.base import Mask, check_block
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector

# CLIP ViT-L/14, 24 blocks: iterative detection runs again from block 9 on.
RESTART = 9 / 24


def check_fit(attn: AttentionVariant, mask: Mask, block: nn.Module) -> None:
    """Refuse what a variant or a mask cannot honour, before any data is read.

    Args:
        attn: the variant.
        mask: the strategy.
        block: one of the host's.

    Raises:
        NotImplementedError: naming what does not fit.
    """
    if mask.pattern is not None:
        attn.check(mask.pattern)
    if mask.reweighs and not attn.reweighs:
        raise NotImplementedError(
            f"attn={attn.name} cannot honour mask={mask.name}, which changes attention weights; "
            "use attn=exact."
        )
    if mask.appends and not attn.extends:
        raise NotImplementedError(
            f"attn={attn.name} cannot honour mask={mask.name} with a concatenation, which appends "
            "tokens behind the others; use attn=exact."
        )
    if not is_joint(block):
        return
    where = "joint blocks, which attend over a text behind the picture"
    if mask.acts or attn.token_classes:
        what = f"mask={mask.name}" if mask.acts else f"attn={attn.name} with detected classes"
        raise NotImplementedError(
            f"{what} cannot be used on {where}: detectors look for tokens of pictures alone."
        )
    if not attn.joins:
        raise NotImplementedError(
            f"attn={attn.name} cannot honour {where}; use attn=fna, subset, explicit or performer."
        )


def plan_searches(
    attn: AttentionVariant,
    mask: Mask,
    attn_layers: Sequence[int],
    mask_layers: Sequence[int],
    *,
    depth: int,
    detect: int | None,
    restart: int | None,
) -> list[Search]:
    """How the mask's tokens and the variant's token classes are looked for.

    Classes are the published ones: massive tokens draw CLS with 0.3 of its own weight, at once;
    artifacts are what an iterative search at 1.0 finds beside them.

    Raises:
        ValueError: a block does not exist, or comes too late.
    """
    usual = round(RESTART * depth)
    searches = []
    if mask.looks:
        seen = next((d for d in (mask.detect, detect) if d is not None), mask_layers[0])
        again = next((r for r in (mask.restart, restart) if r is not None), min(usual, seen))
        for name, layer in (("detect", seen), ("restart", again)):
            check_block(f"mask.{name}", layer)
            parse_layers(layer, depth, setting=f"mask.{name}")
        if again > seen:
            raise ValueError(
                f"mask.restart={again}: expected a block up to mask.detect={seen}, so that what "
                "was found changes what is seen there."
            )
        if mask_layers[0] < seen and not (mask.masks_before and mask_layers[0] >= again):
            raise ValueError(
                f"mask.detect={seen}: tokens are detected after block {mask_layers[0]}, the first "
                "one that masks them; expected that block or an earlier one"
                + (f", or mask.restart up to {mask_layers[0]}." if mask.masks_before else ".")
            )
        searches.append(
            Search(
                "mask",
                mask.detector,
                seen,
                again,
                rounds=mask.rounds,
                per_round=mask.per_round if mask.schedule == "iterative" else None,
                pattern=mask.pattern or "type1",
                stage=mask.stage,
                early=mask.rewrites,
                redone=range(again, seen) if mask_layers[0] < seen else range(0),
            )
        )
    if attn.token_classes:
        seen = attn_layers[0] if detect is None else min(detect, attn_layers[0])
        again = min(usual if restart is None else restart, seen)
        # Artifacts are told from massive tokens, so those are looked for in any case.
        searches.append(Search("massive", ClsProxyDetector(ratio=0.3), seen, again))
        if "artifact" in attn.token_classes:
            sinks = ClsProxyDetector(ratio=1.0)
            searches.append(Search("artifact", sinks, seen, again, rounds=50, per_round=1))
    return searches
