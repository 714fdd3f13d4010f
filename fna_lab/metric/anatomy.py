"""What stands out among the tokens of a block: norms, activations, sinks, and where they lie."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.metric.mass import Sums, by_class


class ArrayMean(Metric):
    """Mean of arrays over pictures, entry by entry; NaN = the picture has no such entry.

    Args:
        shape: of one picture's array.
    """

    full_state_update = False

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        zero = torch.zeros(shape, dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")
        self.total: Tensor
        self.count: Tensor

    def update(self, values: Tensor) -> None:
        """Add pictures `[b ...]`."""
        self.total += values.double().nan_to_num(0.0).sum(0)
        self.count += (~values.isnan()).sum(0)

    def compute(self) -> Tensor:
        """The mean, NaN where no picture had the entry."""
        return self.total / self.count


def token_facts(sums: Sums, context: Context, objects: Tensor | None = None) -> dict[str, Tensor]:
    """Facts of the tokens of one block, picture by picture.

    Args:
        sums: its attention, summed up.
        context: of the block; its input is `context.x` `[b n c]`.
        objects: share of each patch that objects cover `[b p]`, None where unknown.

    Returns:
        Each `[b]`. `largest_norm`: of a patch token, in medians. `massive_norm_ratio` (3) and
        `massive_norm_gap` (0.5): tokens found. `top_incoming`: the largest share of all
        attention that one patch token draws, in uniform shares. `top_norm`: that token's norm, in
        medians. `top_on_background`: whether no object covers it. Where there is a CLS:
        `massive_cls_proxy` (0.3), `sinks_cls_proxy` (1.0), `cls_to_itself`: the weight.
    """
    prefix, x, kept = context.num_prefix_tokens, context.x, context.kept
    norms = x[:, prefix:].float().norm(dim=-1)
    norms = norms / ops.medians(norms, kept)
    if kept is not None:
        norms = norms * kept[:, prefix:]
    gap = ops.norm_gap(x, prefix=prefix, per_picture=True, min_gap=0.5, kept=kept)
    incoming = sums.incoming.mean(1)[:, prefix:]
    share, top = incoming.max(dim=1)
    facts = {
        "largest_norm": norms.amax(1),
        "massive_norm_ratio": ops.norm_ratio(x, prefix=prefix, ratio=3.0, kept=kept).sum(1),
        "massive_norm_gap": gap.sum(1),
        "top_incoming": share * (x.shape[1] if kept is None else kept.sum(1)),
        "top_norm": norms.gather(1, top[:, None])[:, 0],
    }
    if objects is not None:
        facts["top_on_background"] = objects.gather(1, top[:, None])[:, 0] == 0
    if context.has_cls:
        known = torch.arange(x.shape[1], device=x.device) < prefix
        known = known.expand(x.shape[0], -1)
        row = sums.first[:, :, None]
        for name, ratio in (("massive_cls_proxy", 0.3), ("sinks_cls_proxy", 1.0)):
            facts[name] = ops.cls_proxy(row, ratio=ratio, found=known).sum(1)
        facts["cls_to_itself"] = sums.first[:, :, 0].mean(1)
    return {name: value.double() for name, value in facts.items()}


def norm_facts(x: Tensor, members: Tensor, kept: Tensor | None = None) -> dict[str, Tensor]:
    """Norms and largest activations by class.

    Args:
        x: a block's input `[b n c]`.
        members: bool `[b n k]`.
        kept: tokens that are no padding, bool `[b n]`; None = all.

    Returns:
        Each `[b]`, in the host's own units, NaN where a picture has none of the class.
        `norms/<class>`: mean norm. `activations/<class>`: largest absolute activation;
        `activations/second`, `third` and `median`: of all tokens and channels.
        `top_channel`: the channel of the largest.

    Source: Sun et al. 2024 (largest activations against the median).
    """
    x = x.float()
    sizes = x.abs()
    if kept is not None:
        x = x.masked_fill(~kept[..., None], 0.0)
        sizes = sizes.masked_fill(~kept[..., None], torch.nan)
    top, places = ops.top_activations(x, 3)
    facts = by_class("norms", ops.class_mean(x.norm(dim=-1), members))
    facts |= by_class("activations", ops.class_max(x.abs().amax(-1), members))
    facts |= {"activations/second": top[:, 1], "activations/third": top[:, 2]}
    sizes = sizes.flatten(1)
    median = sizes.median(1) if kept is None else sizes.nanmedian(1)
    facts["activations/median"] = median.values
    return facts | {"top_channel": (places[:, 0] % x.shape[2]).double()}


def members_of(
    massive: Tensor,
    artifact: Tensor,
    *,
    prefix: int,
    has_cls: bool,
    kept: Tensor | None = None,
) -> Tensor:
    """Which token is in which class, bool `[b n k]`, from the sets found, bool `[b n]` each.

    Tokens that are not in `kept`, bool `[b n]`, are padding and in no class; None = all are kept.
    """
    classes = ops.token_classes(massive, artifact, prefix=prefix, has_cls=has_cls)
    members = ops.class_members(classes)
    return members if kept is None else members & kept[..., None]


def components(x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Up to three principal components of patch tokens `[b p c]`; see `principal_components`."""
    return ops.principal_components(x, min(3, *x.shape[1:]), kept)


def some_of_each(members: Tensor, num: int) -> Tensor:
    """At most `num` tokens `[m]` of one picture, class by class.

    All that stand out, up to half of them, and normal ones evenly spread.

    Args:
        members: bool `[n k]`, normal tokens last; what is in no class, padding, is left out.
        num: how many.
    """
    there, normal = members.any(-1), members[:, -1]
    classes = members.int().argmax(-1).masked_fill(~there, members.shape[1])
    order = classes.sort(stable=True).indices[: int(there.sum())]  # normal tokens come last
    split = int((there & ~normal).sum())
    special, rest = order[:split][: num // 2], order[split:]
    count = min(len(rest), num - len(special))
    last, kind = max(0, len(rest) - 1), torch.float32  # whatever precision is the default
    picks = torch.linspace(0, last, count, dtype=kind, device=rest.device).round().long()
    return torch.cat([special, rest[picks]])


def without_padding(values: Tensor, kept: Tensor | None) -> Tensor:
    """Values of the last tokens `[b p]`, NaN where `kept`, bool `[b n]`, says padding."""
    if kept is None:
        return values
    kept = kept[: len(values), kept.shape[1] - values.shape[1] :]
    return values.masked_fill(~kept, torch.nan)
