"""The contract of the seam, on every host family, for every variant and mask."""

from __future__ import annotations

import copy
import importlib
import inspect
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from folders import variants_in
from hosts import HOSTS, build
from torch.overrides import _get_current_function_mode_stack

import fna_lab
from fna_lab.attn.base import AttentionVariant, Context
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.reduced import LandmarkAttention
from fna_lab.attn.solver.pinv import PinvSolver
from fna_lab.backbone.named import named_attention
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.norm_gap import NormGapDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.type1 import Type1Mask
from fna_lab.mask.type2 import Type2Mask

ROOT = Path(fna_lab.__file__).parent
ATTN = sorted(variants_in(ROOT / "attn"))
every_host = pytest.mark.parametrize("name", HOSTS)
every_variant = pytest.mark.parametrize("attn", ATTN)


class Explicit(AttentionVariant):
    """Attention written out, and a record of what the seam told."""

    def __init__(self):
        self.seen = []

    def __call__(self, q, k, v, context):
        self.seen.append(context)
        scores = context.scale * (q @ k.mT)
        if context.attn_mask is not None:
            scores = scores + context.attn_mask
        return scores.softmax(-1) @ v


def settings(attn):
    """Few landmarks, where a variant has such a setting."""
    module = importlib.import_module(f"fna_lab.attn.{attn}")
    classes = (c for c in vars(module).values() if inspect.isclass(c))
    (cls,) = (c for c in classes if c.__module__ == module.__name__)
    few = {"num_landmarks": 6, "num_explicit": 3, "rank": 1, "neurons": [[1, 3], [2, 5]]}
    return {name: few[name] for name in inspect.signature(cls).parameters if name in few}


REFUSALS = {  # of position encodings that have no place for what a variant does
    ("performer", "beit"): "attn=performer cannot honour the position bias",
    ("registers", "beit"): "attn=registers cannot honour the host's attention mask or position b",
    ("registers", "eva02"): "attn=registers cannot honour the rotary embedding",
    ("registers", "dinov3"): "attn=registers cannot honour the rotary embedding",
}


def skip_refusals(attn, name):
    """A variant that cannot honour a position encoding says so, and that is its contract."""
    words = [w for (who, host), w in REFUSALS.items() if who == attn and host in name]
    if not words:
        return False
    host, model, x = build(name)
    with fna_lab.patch(model, attn, layers="1-3", **settings(attn)):
        with pytest.raises(NotImplementedError, match=words[0]):
            host.run(model, x)
    return True


@every_host
def test_the_seam_catches_every_block_and_tells_what_it_is(name):
    host, model, x = build(name)
    before = host.run(model, x)
    explicit = Explicit()
    with fna_lab.patch(model, explicit, layers="all"):
        after = host.run(model, x)
    assert [c.layer for c in explicit.seen] == list(range(host.depth))
    assert {c.grid for c in explicit.seen} == {(5, 5)}
    assert {c.num_prefix_tokens for c in explicit.seen} == {host.prefix}
    assert {c.has_cls for c in explicit.seen} == {host.cls}
    assert {c.x.shape[:2] for c in explicit.seen} == {(3, 25 + host.prefix)}
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


@every_host
@every_variant
def test_unpatching_restores_every_bit(name, attn):
    if skip_refusals(attn, name):
        return
    host, model, x = build(name)
    before = host.run(model, x)
    state = copy.deepcopy(model.state_dict())
    patched = fna_lab.patch(model, attn, layers="1-2", **settings(attn))
    during = host.run(model, x)
    with patched.disabled():
        assert torch.equal(before, host.run(model, x))
    patched.remove()
    assert torch.equal(before, host.run(model, x))
    assert torch.isfinite(during).all()
    if attn != "exact":
        assert not torch.equal(before, during)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not _get_current_function_mode_stack()


@every_host
@every_variant
@pytest.mark.parametrize("mask", [None, Type1Mask, Type2Mask])
@pytest.mark.parametrize("stage", ["mask", "sink"])
def test_a_picture_does_not_see_its_batch_mates(name, attn, mask, stage):
    if mask is None and stage == "sink" or skip_refusals(attn, name):
        return
    host, model, x = build(name)
    strategy = "none" if mask is None else mask(stage=stage, detector=NormGapDetector(min_gap=0))
    if attn == "registers" and mask is not None:
        with pytest.raises(
            NotImplementedError, match="attn=registers cannot honour the mask patt"
        ):
            fna_lab.patch(model, attn, strategy, layers="1-3", mask_layers="2-3", **settings(attn))
        return
    with fna_lab.patch(model, attn, strategy, layers="1-3", mask_layers="2-3", **settings(attn)):
        together = host.run(model, x)
        alone = torch.cat([host.run(model, picture) for picture in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@every_host
@pytest.mark.parametrize("mask", [Type1Mask, Type2Mask])
@pytest.mark.parametrize("stage", ["mask", "sink"])
def test_full_landmarks_are_exact_attention_under_every_mask(name, mask, stage):
    host, model, x = build(name)
    model, x = model.double(), x.double()
    tokens = 25 + host.prefix
    strategy = mask(stage=stage, detector=NormGapDetector(min_gap=0))
    with fna_lab.patch(model, "exact", strategy, layers="1-3", mask_layers="2-3") as patched:
        exact = host.run(model, x)
        assert patched.pictures == 3 and all(0 < n < 25 for n in patched.found)
    nystrom = FastNystromAttention(num_landmarks=tokens, solver=PinvSolver())
    with fna_lab.patch(model, nystrom, strategy, layers="1-3", mask_layers="2-3"):
        torch.testing.assert_close(host.run(model, x), exact, rtol=1e-4, atol=1e-5)
    assert not torch.equal(host.run(model, x), exact)


@pytest.mark.parametrize("pattern", ["type1", "type2"])
def test_detection_happens_inside_the_same_forward_pass(pattern):
    _, model, x = build("timm vit")
    calls = []
    model.blocks[2].register_forward_pre_hook(lambda *_: calls.append(2))
    detector = ClsProxyDetector(ratio=0.9)
    mask = {"type1": Type1Mask, "type2": Type2Mask}[pattern](detector=detector)
    with fna_lab.patch(model, "exact", mask, mask_layers="2-3") as patched:
        model(x)
    assert calls == [2]
    q = []
    explicit = Explicit()
    with fna_lab.patch(model, explicit, layers=[2]):
        model(x)
    norm, attn = model.blocks[2].norm1, model.blocks[2].attn
    q, k, _ = attn.qkv(norm(explicit.seen[0].x)).reshape(3, 26, 3, 4, 12).permute(2, 0, 3, 1, 4)
    row = (q @ k.mT * 12**-0.5).softmax(-1).mean(1)[:, 0]
    assert torch.equal(patched.tokens, (row > 0.9 * row[:, :1]) & (torch.arange(26) > 0))
    assert 0 < sum(patched.found) < 75


def test_patches_nest_and_the_later_one_acts():
    _, model, x = build("timm vit")
    before = model(x)
    outer, inner = Explicit(), Explicit()
    first = fna_lab.patch(model, outer, layers="0-2")
    second = fna_lab.patch(model, inner, layers="2-3")
    model(x)
    assert [c.layer for c in outer.seen] == [0, 1]
    assert [c.layer for c in inner.seen] == [2, 3]
    with second.disabled():
        model(x)
    assert [c.layer for c in outer.seen] == [0, 1, 0, 1, 2]
    first.remove()  # not in the order of their making
    model(x)
    assert [c.layer for c in inner.seen] == [2, 3, 2, 3]
    second.remove()
    assert torch.equal(before, model(x))


def test_a_variant_may_call_fused_attention_under_an_outer_patch():
    _, model, x = build("timm vit")
    before = model(x)
    with fna_lab.patch(model, "exact", layers="all"), fna_lab.patch(model, "exact", layers="all"):
        torch.testing.assert_close(model(x), before)


def test_an_error_inside_a_block_leaves_the_seam():
    _, model, x = build("timm vit")
    before = model(x)

    def fail(*_):
        raise KeyError("from the host")

    hook = model.blocks[2].mlp.register_forward_hook(fail)
    with fna_lab.patch(model, "exact", layers="all"):
        with pytest.raises(KeyError, match="from the host"):
            model(x)
        assert not _get_current_function_mode_stack()
        hook.remove()
        torch.testing.assert_close(model(x), before)


def test_pictures_of_any_size_and_shape():
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=3, dynamic_img_size=True, num_classes=0
    ).eval()
    explicit = Explicit()
    with torch.no_grad(), fna_lab.patch(model, explicit, layers=[1]):
        model(torch.randn(1, 3, 64, 96))
        model(torch.randn(1, 3, 32, 48))
    assert [c.grid for c in explicit.seen] == [(4, 6), (2, 3)]
    with torch.no_grad(), fna_lab.patch(model, "fna", layers=[1], num_landmarks=9):
        assert torch.isfinite(model(torch.randn(2, 3, 64, 96))).all()


@every_variant
def test_compile_without_graph_breaks(attn):
    _, model, x = build("timm vit")
    with torch.no_grad(), fna_lab.patch(model, attn, layers="1-3", **settings(attn)):
        eager = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
    assert not _get_current_function_mode_stack()
    torch._dynamo.reset()


@pytest.mark.parametrize("attn", ["fna", "subset"])
@pytest.mark.parametrize("stage", ["mask", "sink"])
def test_masks_compile_without_graph_breaks(attn, stage):
    _, model, x = build("timm vit")
    strategy = Type2Mask(stage=stage, detector=NormGapDetector(min_gap=0))
    more = {"layers": "1-3", "mask_layers": "2-3", **settings(attn)}
    with torch.no_grad(), fna_lab.patch(model, attn, strategy, **more):
        eager = model.forward_features(x)
        run = torch.compile(model.forward_features, backend="eager", fullgraph=True)
        compiled = run(x)
    torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_float_type_and_autocast(attn, dtype):
    _, model, x = build("timm vit")
    with torch.no_grad(), fna_lab.patch(model, attn, layers="1-3", **settings(attn)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(model(x).float()).all()
            half = model.forward_features(x)
        whole = model.forward_features(x)
        assert (half.float() - whole).norm() < 0.1 * whole.norm()
        out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and torch.isfinite(out.float()).all()


@every_variant
def test_a_padding_mask_is_honoured(attn):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    x = torch.randn(2, 30, 16)
    real = 22
    keep = torch.arange(30).expand(2, 1, 1, -1) < real
    variant = named_attention(attn, **settings(attn))
    if isinstance(variant, LandmarkAttention):
        variant.landmarks = FarthestPointLandmarks()  # grids of patches reach into padding

    def context(**more):
        return Context(layer=0, nth=0, scale=8**-0.5, num_prefix_tokens=1, has_cls=True, **more)

    padded = variant(q, k, v, context(x=x, attn_mask=keep))[:, :, :real]
    short = variant(*(t[:, :, :real] for t in (q, k, v)), context(x=x[:, :real]))
    if not variant.counts_padding:
        torch.testing.assert_close(padded, short, rtol=1e-4, atol=1e-5)
    q[:, :, real:], k[:, :, real:], v[:, :, real:] = 7.0, -3.0, 100.0
    x[:, real:] = 9 * torch.randn(2, 30 - real, 16)
    other = variant(q, k, v, context(x=x, attn_mask=keep))[:, :, :real]
    torch.testing.assert_close(padded, other, rtol=1e-4, atol=1e-5)
    without = variant(q, k, v, context(x=x))[:, :, :real]
    assert not torch.allclose(without, other, rtol=1e-2)


def test_a_model_without_fused_attention_is_refused_by_name():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=224, num_classes=0).eval()
    with pytest.raises((RuntimeError, NotImplementedError), match="Swin|Windowed|windowed"):
        with fna_lab.patch(swin, "exact", layers="all"):
            swin(torch.randn(1, 3, 224, 224))
    _, model, x = build("timm vit")
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(RuntimeError, match=r"blocks\.2 .*0 times.*TIMM_FUSED_ATTN"):
        with fna_lab.patch(model, "exact"):
            model(x)
    assert not _get_current_function_mode_stack()


def test_two_attentions_in_a_block_are_refused():
    _, model, x = build("timm vit")
    plain = model.blocks[3].attn.forward

    class Twice(torch.nn.Module):
        def forward(self, x, **more):
            F.scaled_dot_product_attention(*[x[:, None]] * 3)
            return plain(x, **more)

    model.blocks[3].attn = Twice()
    with pytest.raises(RuntimeError, match="2 times"):
        with fna_lab.patch(model, "exact", layers=[3]):
            model(x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (dict(attn="flash"), ValueError, r"attn='flash': there is no fna_lab.attn.flash"),
        (dict(attn="base"), ValueError, "names no AttentionVariant"),
        (dict(attn=3), TypeError, "attn to be a name"),
        (dict(attn="fna", landmarks=FarthestPointLandmarks()), None, None),
        (dict(attn="fna", landmarks="fps"), TypeError, "attn.landmarks='fps': expected attn/land"),
        (dict(attn="fna", solver="ridge"), TypeError, "attn.solver='ridge': expected attn/solver"),
        (dict(attn="fna", num_marks=3), ValueError, "num_marks.*its settings are: num_landmarks"),
        (dict(attn="fna", num_landmarks=0), ValueError, "num_landmarks=0: expected"),
        (dict(mask="type3"), ValueError, "mask='type3'"),
        (dict(layers="3-4"), ValueError, "attn.layers='3-4': block 4 does not exist"),
        (dict(blocks="trunk"), ValueError, "blocks='trunk' is no list.*blocks"),
        (dict(mask="type1", detect=3, mask_layers=[2]), ValueError, "mask.detect=3"),
    ],
)
def test_bad_settings_are_named(call, error, words):
    _, model, _ = build("timm vit")
    if error is None:
        fna_lab.patch(model, **call).remove()
        return
    with pytest.raises(error, match=words):
        fna_lab.patch(model, **call)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_host_that_is_no_module_is_named():
    with pytest.raises(TypeError, match="model to be a torch.nn.Module, got 'vit'"):
        fna_lab.patch("vit", "exact")


def test_more_landmarks_than_tokens_is_named():
    _, model, x = build("timm vit")
    with pytest.raises(ValueError, match="attn.num_landmarks=27: more landmarks than the 26 tok"):
        with fna_lab.patch(model, "fna", num_landmarks=27):
            model(x)


def test_a_detector_that_finds_everything_is_named():
    _, model, x = build("timm vit")
    mask = Type1Mask(detector=NormRatioDetector(ratio=0.01))
    with pytest.raises(ValueError, match=r"norm_ratio \(ratio=0.01\) finds all 25 patch tokens"):
        with fna_lab.patch(model, "exact", mask):
            model(x)


def test_a_variant_refuses_patterns_that_it_cannot_honour():
    class TToX(Type1Mask):
        pattern = "t_to_t"

    _, model, _ = build("timm vit")
    with pytest.raises(NotImplementedError, match="attn=fna cannot honour .*'t_to_t'"):
        fna_lab.patch(model, "fna", TToX())
    fna_lab.patch(model, "exact", TToX()).remove()


def test_a_patched_model_moves_and_copies():
    _, model, x = build("timm vit")
    with fna_lab.patch(model, "fna", layers="1-3", num_landmarks=6) as patched:
        expected = model(x)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x), expected)
        model.to("meta")
        assert model(x.to("meta")).shape == expected.shape
        assert patched.enabled


def test_without_a_mask_nothing_is_looked_for():
    _, model, x = build("timm vit")
    with fna_lab.patch(model, "exact", "none", layers="2-3", detect=1) as patched:
        model(x)
    assert patched.detect is None and patched.pictures == 0 and patched.tokens is None
