"""What is asked of a few pictures alone: blocks run again under interventions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fna_lab.attn.base import NoAttention
from fna_lab.backbone.patch import patch
from fna_lab.metric.anatomy import without_padding
from fna_lab.metric.intervention import BRANCHES, WithoutTokens, next_sink, round_facts

if TYPE_CHECKING:
    from fna_lab.attn.base import Context
    from fna_lab.backbone.base import Backbone


@torch.no_grad()
def growth(backbone: Backbone, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Norms after the restart block with attention, without it, and without its bias.

    Args:
        backbone: the model as it came.
        images: `[b 3 h w]`.

    Returns:
        Facts `[b]`, of the patch token that is largest where detectors look, and of the median;
        and maps: norms `[b layers p]` by name, and that token `[b]`.
    """
    anatomy = backbone.anatomy
    span = range(anatomy.restart, backbone.depth)
    replay = backbone.replay(images, span[0], span[-1])
    runs = {"exact": replay.outputs[span[0] :]}
    with patch(backbone.host, NoAttention(), layers=span, blocks=backbone.blocks_path):
        runs["off"] = replay()
        with backbone.without_output_bias(span):
            runs["off_no_bias"] = replay()
    prefix, kept = backbone.num_prefix_tokens, backbone.kept(images)
    norms = {
        name: torch.stack(
            [without_padding(x[:, prefix:].float().norm(dim=-1), kept) for x in outputs], dim=1
        )
        for name, outputs in runs.items()
    }  # [b layers p]
    # One token is followed through all three: the largest where detectors look.
    place = max(0, anatomy.detect - 1 - span[0])
    largest = norms["exact"][:, place].nan_to_num(-1.0).argmax(1)[:, None, None]
    facts: dict[str, Tensor] = {}
    maps = {"growth_token": largest[:, 0, 0]}
    for name, value in norms.items():
        maps[f"growth_{name}"] = value
        followed = value.gather(2, largest.expand(-1, value.shape[1], 1))[..., 0]
        for i, layer in enumerate(span):
            facts[f"growth/{name}/{layer:02d}"] = followed[:, i]
            facts[f"growth/{name}_median/{layer:02d}"] = value[:, i].nanmedian(1).values
    return facts, maps


@torch.no_grad()
def decay(backbone: Backbone, images: Tensor, rounds: int) -> dict[str, Tensor]:
    """Sinks and norms as one sink after another is taken out, in three ways.

    Args:
        backbone: the model as it came.
        images: `[b 3 h w]`.
        rounds: most sinks that are taken out.

    Returns:
        Facts `[b]`, `decay/<fact>_<branch>/<round>`.
    """
    anatomy = backbone.anatomy
    span = range(anatomy.restart, anatomy.detect + 1)
    replay = backbone.replay(images, span[0], span[-1])
    prefix, has_cls = backbone.num_prefix_tokens, backbone.has_cls
    removed = torch.zeros(
        (len(images), backbone.num_tokens), dtype=torch.bool, device=images.device
    )
    facts: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        shown = {"removed": removed.sum(1).double()}
        new = torch.zeros_like(removed)
        for branch, (stage, pattern) in BRANCHES.items():
            variant = WithoutTokens(removed, stage, pattern)

            def look(
                q: Tensor, k: Tensor, v: Tensor, context: Context,  # noqa: ARG001
                variant: WithoutTokens = variant, branch: str = branch,
                shown: dict[str, Tensor] = shown, new: Tensor = new,
            ) -> None:  # fmt: skip
                if context.layer != anatomy.detect:
                    return
                # A replay passes no embedding that would tell the patch of registers.
                context = replace(context, num_prefix_tokens=prefix, has_cls=has_cls)
                drawn, score = variant.look(q, k, context)
                gone = variant.removal.tokens
                found = round_facts(drawn, score, context.x, gone, prefix, context.kept)
                shown.update({f"{name}_{branch}": value for name, value in found.items()})
                if branch == "mask":
                    new |= next_sink(score)

            path = backbone.blocks_path
            with (
                patch(backbone.host, variant, layers=span, blocks=path) as probe,
                probe.observed(look),
            ):
                replay()
        # A picture that is done stays as it is, whether its batch mates go on or not.
        rest = (number,) if bool(new.any()) else range(number, rounds + 1)
        for later in rest:
            facts |= {f"decay/{name}/{later:02d}": value for name, value in shown.items()}
        if not bool(new.any()):
            break
        removed = removed | new
    return facts
