"""Detection inside a pass where it is easily wrong: other patches, odd hosts, errors."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from hosts import build, set_batch_first
from torch import nn

import fna_lab
from fna_lab.attn.exact import ExactAttention
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.subset import SubsetAttention
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.detector.register_neurons import RegisterNeuronsDetector
from fna_lab.mask.iterative_masking import IterativeMaskingMask
from fna_lab.mask.pattern import PatternMask
from fna_lab.mask.projection import ProjectionMask
from fna_lab.mask.redistribute import RedistributeMask
from fna_lab.mask.replace import ReplaceMask
from fna_lab.mask.type1 import Type1Mask
from fna_lab.mask.type2 import Type2Mask
from fna_lab.run import _check_found

LATE = dict(layers=[3], mask_layers=[3], detect=3, restart=1)


def iterative(**settings):
    return IterativeMaskingMask(detector=ClsProxyDetector(ratio=1.5), **settings)


def redistribute():
    return RedistributeMask(detector=NormRatioDetector(ratio=1.1))


@pytest.mark.parametrize("neurons", [[[0, 3]], [[0, 3], [2, 5]]])
def test_neurons_of_blocks_that_do_not_run_again(neurons):
    host, model, x = build("timm vit")
    detector = RegisterNeuronsDetector(neurons=neurons, ratio=2.0)
    mask = Type1Mask(detector=detector, schedule="iterative")
    with fna_lab.patch(model, "exact", mask, **LATE) as patched:
        host.run(model, x)
        ranks, alone = patched.ranks, []
        for picture in x.split(1):
            host.run(model, picture)
            alone.append(patched.ranks)
    assert len(set(ranks.amax(1).tolist())) > 1  # the pictures need different numbers of rounds
    assert torch.equal(ranks, torch.cat(alone))


@pytest.mark.parametrize("attn", [FastNystromAttention, SubsetAttention])
@pytest.mark.parametrize("settings", [{"guarantee": ["cls", "massive"]}, {"exclude": ["massive"]}])
def test_classes_of_the_variant_in_rounds_that_some_pictures_need(attn, settings):
    host, model, x = build("timm vit")
    detector = RegisterNeuronsDetector(neurons=[[0, 3], [2, 5]], ratio=2.0)
    mask = Type1Mask(detector=detector, schedule="iterative")
    variant = attn(landmarks=FarthestPointLandmarks(), num_landmarks=6, **settings)
    where = LATE | dict(layers="1-3", mask_layers=[2, 3])
    with fna_lab.patch(model, variant, mask, **where) as patched:
        together = host.run(model, x)
        ranks, alone = patched.ranks, [host.run(model, picture) for picture in x.split(1)]
    assert len(set(ranks.amax(1).tolist())) > 1 and patched.classes["massive"].any()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_single_round_takes_no_more_than_it_may():
    host, model, x = build("timm vit")
    for rounds in (1, 2):
        with fna_lab.patch(model, "exact", iterative(max_rounds=rounds), **LATE) as patched:
            host.run(model, x)
        assert patched.found == [rounds] * 3


@pytest.mark.parametrize(
    ("mask", "taken"),
    [(iterative(), 1), (iterative(), 2), (ReplaceMask(), 2), (RedistributeMask(), 2)],
)
def test_a_block_that_another_patch_takes_is_named(mask, taken):
    host, model, x = build("timm vit")
    where = LATE if taken == 1 or mask.pattern else LATE | dict(detect=2)
    with (
        fna_lab.patch(model, "exact", mask, **where),
        fna_lab.patch(model, "exact", layers=[taken]),
    ):
        with pytest.raises(RuntimeError, match="another patch may have taken"):
            host.run(model, x)


@pytest.mark.parametrize(
    "mask",
    [
        iterative(),
        Type2Mask(detector=NormRatioDetector(ratio=1.1)),
        ReplaceMask(how="median", detector=NormRatioDetector(ratio=1.1)),
        redistribute(),
        ProjectionMask(),
        Type1Mask(detector=RegisterNeuronsDetector(neurons=[[0, 3]], ratio=2.0)),
    ],
)
def test_hosts_that_keep_tokens_first(mask):
    outputs, found = [], []
    for batch_first in (True, False):
        host, model, x = build("open_clip")
        set_batch_first(model, batch_first)
        with fna_lab.patch(model, "exact", mask, **LATE) as patched:
            outputs.append(host.run(model, x))
            found.append(patched.tokens)
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    assert found[0] is found[1] is None or torch.equal(*found)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("attn", "mask"), [("exact", ProjectionMask()), ("fna", "none")])
def test_as_many_pictures_as_tokens(batch_first, attn, mask):
    host, model, _ = build("open_clip")
    set_batch_first(model, batch_first)
    x = torch.randn(26, 3, 80, 80)  # 26 tokens, too
    settings = {"num_landmarks": 6} if attn == "fna" else {}
    with fna_lab.patch(model, attn, mask, layers="2-3", **settings):
        together = host.run(model, x)
        halves = torch.cat([host.run(model, half) for half in x.split(13)])
    torch.testing.assert_close(together, halves, rtol=1e-3, atol=1e-3)


class Fails(ExactAttention):
    fails = False

    def __call__(self, q, k, v, context):
        if self.fails:
            raise KeyError("on purpose")
        return super().__call__(q, k, v, context)


def test_an_error_leaves_no_correction_behind():
    host, model, x = build("timm vit")
    before, attn = host.run(model, x), Fails()
    with fna_lab.patch(model, attn, ProjectionMask(), layers="2-3") as patched:
        wanted = host.run(model, x)
        attn.fails = True
        with pytest.raises(KeyError):
            host.run(model, x)
        attn.fails = False
        with patched.disabled():
            assert torch.equal(host.run(model, x), before)
        assert torch.equal(host.run(model, x), wanted)
    assert torch.equal(host.run(model, x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "mask",
    [ProjectionMask(), Type1Mask(detector=RegisterNeuronsDetector(neurons=[[0, 3]], ratio=2.0))],
)
def test_a_copy_of_a_patched_model_works_on_its_own(mask):
    host, model, x = build("timm vit")
    x.requires_grad_(True)  # a step of training: what the pass left has graphs
    with fna_lab.patch(model, "exact", mask, layers="2-3") as patched:
        wanted = host.run(model, x)
        twin = copy.deepcopy(model)
        patched.remove()
        for block in model.blocks:
            block.mlp = nn.Identity()
    assert torch.equal(host.run(twin, x), wanted)


@pytest.mark.parametrize("mask", ["none", iterative()])
def test_nothing_of_a_pass_is_held_longer_than_the_patch(mask):
    host, model, x = build("timm vit")
    inputs = []
    handle = model.blocks[2].register_forward_pre_hook(
        lambda _, args: inputs.append(weakref.ref(args[0]))
    )
    patched = fna_lab.patch(model, "exact", mask, **LATE)
    host.run(model, x.requires_grad_(True))
    if mask == "none":
        assert not any(held() is not None for held in inputs)
    patched.remove()
    handle.remove()
    assert inputs and not any(held() is not None for held in inputs)


@pytest.mark.parametrize("mask", [iterative(), redistribute(), ProjectionMask()])
@pytest.mark.parametrize("name", ["timm vit", "open_clip"])
def test_gradients_are_finite(name, mask):
    host, model, x = build(name)
    x.requires_grad_(True)
    with fna_lab.patch(model, "exact", mask, layers="2-3", restart=1):
        host.run(model, x).square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()


@pytest.mark.parametrize("pattern", ["x_to_x", "x_self", "type1"])
def test_only_what_depends_on_tokens_must_find_some(pattern):
    host, model, x = build("timm vit")
    before = host.run(model, x)
    mask = PatternMask(pattern=pattern, stage="sink", detector=NormRatioDetector(ratio=1e6))
    with fna_lab.patch(model, "exact", mask, **LATE) as patched:
        changed = not torch.equal(host.run(model, x), before)
        assert changed == (pattern != "type1") and not any(patched.found)
        if changed:
            _check_found(patched)
        else:
            with pytest.raises(ValueError, match="finds no token"):
                _check_found(patched)


@pytest.mark.parametrize("stage", ["mask", "sink"])
@pytest.mark.parametrize("ratio", [1.5, 1e6])
def test_type2_compiles_without_graph_breaks(stage, ratio):
    host, model, x = build("timm vit")
    mask = Type2Mask(stage=stage, detector=ClsProxyDetector(ratio=ratio))
    with torch.no_grad(), fna_lab.patch(model, "exact", mask, layers="2-3") as patched:
        wanted = host.run(model, x)
        assert any(patched.found) == (ratio < 2)
        torch._dynamo.reset()
        compiled = torch.compile(model.forward_features, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask_layers", [[3], [2, 3], [1, 3]])
def test_only_attention_that_the_host_goes_on_with_is_counted_and_shown(mask_layers):
    host, model, x = build("timm vit")
    heads, seen, measured = model.blocks[0].attn.num_heads, [], []
    settings = LATE | dict(layers="1-3", mask_layers=mask_layers)
    masked = [layer in mask_layers for layer in range(1, 4)]

    def observe(q, k, v, context):
        seen.append((context.layer, context.removal is not None))

    def meter(variant, q, k, v, context):
        measured.append((context.layer, context.removal is not None))
        return variant(q, k, v, context)

    variant = FastNystromAttention(num_landmarks=6, guard=0.5)
    with fna_lab.patch(model, variant, iterative(), **settings) as patched:
        plain = host.run(model, x)
        assert patched.ranks.max() > 1  # blocks ran again
        patched.meter = meter
        with patched.observed(observe):
            torch.testing.assert_close(host.run(model, x), plain)
    counts = {layer: int(count[0]) for layer, count in variant.guard.counts.items()}
    assert counts == dict.fromkeys((1, 2, 3), 2 * len(x) * heads)
    assert measured == list(zip((1, 2, 3), masked, strict=True))
    assert seen == [(0, False), *measured]
