"""Key masks of any form, on every variant: bool, far below zero, a bias of each key; autocast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context, Removal
from fna_lab.attn.exact import ExactAttention
from fna_lab.attn.host_mask import HostMasks
from fna_lab.attn.landmarks.attention import AttentionLandmarks
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.landmarks.leverage import LeverageLandmarks
from fna_lab.attn.solver.pinv import PinvSolver
from fna_lab.backbone.named import named_attention
from fna_lab.metric.attention_error import attention_facts

N = 25
KEEP = torch.ones(2, N, dtype=torch.bool)
KEEP[0, 19:] = KEEP[1, 22:] = False
LANDMARKS = {"num_landmarks": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fna": LANDMARKS,
    "fna_paper": LANDMARKS,
    "subset": LANDMARKS,
    "explicit": {"num_landmarks": 8, "num_explicit": 3},
    "nystromformer": LANDMARKS,
    "linformer_pool": LANDMARKS,
    "performer": {"num_features": 32},
    "tome": {},
    "prune": {},
    "block_svd": {},
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def given(mask: Tensor | None, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Context]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 2, 3, N, 8, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(2, N, 24, generator=generator, dtype=torch.float64).to(dtype)
    return list(qkv), Context(
        layer=0, nth=0, scale=0.5, x=x, num_prefix_tokens=1, has_cls=True, grid=(4, 6),
        attn_mask=mask,
    )  # fmt: skip


def run(name: str, mask: Tensor | None) -> Tensor:
    (q, k, v), context = given(mask)
    return named_attention(name, **VARIANTS[name])(q, k, v, context)


@every_variant
@pytest.mark.parametrize("low", [-1e4, -1e9, -torch.inf, torch.finfo(torch.float64).min])
def test_a_mask_far_below_zero_is_a_padding_mask(name: str, low: float) -> None:
    keep = KEEP[:, None, None]
    mask = torch.zeros(2, 1, 1, N, dtype=torch.float64).masked_fill(~keep, low)
    found, wanted = (run(name, m).transpose(1, 2)[KEEP] for m in (mask, keep))
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(wanted, run(name, None).transpose(1, 2)[KEEP])


@pytest.mark.parametrize("name", [*VARIANTS, "fna rows"])
def test_a_mask_that_keeps_all_changes_nothing(name: str) -> None:
    """Rows that are fitted may repeat landmarks; none weighs twice, masked or not."""
    settings = {"fna rows": {"num_landmarks": 8, "rows": 3}}.get(name) or VARIANTS[name]
    variant = named_attention(name.partition(" ")[0], **settings)
    outs = []
    for mask in (None, torch.ones(2, 1, 1, N, dtype=torch.bool)):
        (q, k, v), context = given(mask)
        outs.append(variant(q, k, v, context))
    torch.testing.assert_close(*outs)


honouring = pytest.mark.parametrize("name", [name for name in VARIANTS if name != "performer"])


def test_performer_refuses_a_bias_of_each_key() -> None:
    with pytest.raises(NotImplementedError, match="attn=performer cannot honour the position"):
        run("performer", torch.randn(2, 1, 1, N, dtype=torch.float64))


@honouring
def test_a_bias_of_each_key_is_honoured(name: str) -> None:
    bias = 3 * torch.randn(2, 1, 1, N, dtype=torch.float64)
    torch.testing.assert_close(run(name, bias), run(name, bias.expand(-1, 3, N, -1)))
    assert not torch.allclose(run(name, bias), run(name, None))


EXACT: dict[str, dict[str, Any]] = {  # settings with which a variant is exact attention
    "fna": {"num_landmarks": N, "solver": PinvSolver()},
    "fna_paper": {"num_landmarks": N, "solver": PinvSolver()},
    "subset": {"num_landmarks": N},
    "explicit": {"num_landmarks": N, "num_explicit": N},
    "nystromformer": {"num_landmarks": N, "solver": PinvSolver()},
    "linformer_pool": {"num_landmarks": N},
    "tome": {"ratio": 0.0},
    "prune": {"keep": 1.0},
    "block_svd": {"rank": N},
}


@pytest.mark.parametrize("name", EXACT)
def test_a_bias_beside_padding_is_honoured(name: str) -> None:
    bias = torch.randn(2, 1, 1, N, dtype=torch.float64).masked_fill(~KEEP[:, None, None], -1e9)
    (q, k, v), context = given(bias)
    out = named_attention(name, **EXACT[name])(q, k, v, context)
    exact = (0.5 * q @ k.mT + bias).softmax(-1) @ v
    torch.testing.assert_close(out.transpose(1, 2)[KEEP], exact.transpose(1, 2)[KEEP])


def test_a_mask_of_all_pairs_is_read_once_a_pass_and_again_when_it_changes(monkeypatch) -> None:
    read, masks = [], HostMasks()
    kept_tokens = ops.kept_tokens
    monkeypatch.setattr(ops, "kept_tokens", lambda mask: read.append(1) or kept_tokens(mask))
    mask = KEEP[:, None, None].expand(-1, -1, N, -1).clone()
    for _ in range(3):
        keys, bias = masks.split(mask, N, "fna")
        assert torch.equal(keys, KEEP) and bias is None
        assert torch.equal(masks.kept(mask.expand(2, 1, N, N)), KEEP)
    assert len(read) == 1
    mask[:, :, :, 3] = False
    assert not masks.split(mask, N, "fna")[0][:, 3].any() and len(read) == 2


def test_a_later_block_with_another_mask_is_refused_too() -> None:
    """Hosts of windows and of causal layers hand out several masks."""
    (q, k, v), context = given(torch.zeros(1, 1, N, N, dtype=torch.float64))
    variant = named_attention("fna", **VARIANTS["fna"])
    variant(q, k, v, context)
    causal = torch.full((1, 1, N, N), -torch.inf, dtype=torch.float64).triu(1)
    with pytest.raises(NotImplementedError, match="keeps some queries from some keys"):
        variant(q, k, v, replace(context, nth=1, layer=1, attn_mask=causal))


SAMPLERS = {"attention": AttentionLandmarks(), "leverage": LeverageLandmarks()}


@pytest.mark.parametrize("name", [*VARIANTS, "fna attention", "fna leverage"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["type1", "type2"])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_under_autocast(name: str, dtype: torch.dtype, pattern: str, padded: bool) -> None:
    name, _, sampler = name.partition(" ")
    more = {"landmarks": SAMPLERS[sampler]} if sampler else {}
    variant = named_attention(name, **VARIANTS[name], **more)
    (q, k, v), context = given(KEEP[:, None, None] if padded else None, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    gone = torch.zeros(2, N, dtype=torch.bool)
    gone[0, [3, 9]] = gone[1, 7] = True
    context = replace(context, removal=Removal(gone, pattern, "mask", *ops.token_rows(gone)))
    with torch.autocast("cpu", dtype=dtype):
        out = variant(q, k, v, context)
    kept = KEEP if padded else torch.ones_like(KEEP)
    assert out.transpose(1, 2)[kept].isfinite().all()


@pytest.mark.parametrize("name", ["fna", "subset"])
def test_the_error_meter_leaves_padding_aside(name: str) -> None:
    """Facts of a padded batch are those of each picture alone."""
    variant: AttentionVariant = named_attention(
        name, num_landmarks=8, landmarks=FarthestPointLandmarks()
    )

    def facts(q: Tensor, k: Tensor, v: Tensor, context: Context) -> dict[str, Tensor]:
        out = variant(q, k, v, replace(context, shared={}))
        return attention_facts(variant, ExactAttention(), q, k, v, context, out)

    (q, k, v), context = given(KEEP[:, None, None])
    context = replace(context, grid=None)
    padded = facts(q, k, v, context)
    for i in range(2):
        n = int(KEEP[i].sum())
        a, b, c = (x[i : i + 1, :, :n] for x in (q, k, v))
        alone = facts(a, b, c, replace(context, x=context.x[i : i + 1, :n], attn_mask=None))
        assert alone.keys() == padded.keys() and "negative_share/all" in alone
        for fact, values in alone.items():
            torch.testing.assert_close(padded[fact][i : i + 1], values, rtol=1e-5, atol=1e-7)
