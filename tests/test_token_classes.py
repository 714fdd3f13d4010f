"""Token classes that landmarks must, or must not, be taken from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from hosts import build

import fna_lab
from fna_lab import ops
from fna_lab.attn.base import Context, Removal
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.fna_paper import PublishedFastNystromAttention
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.landmarks.random import RandomLandmarks
from fna_lab.attn.layers import Renewal
from fna_lab.attn.solver.pinv import PinvSolver
from fna_lab.attn.subset import SubsetAttention

every_variant = pytest.mark.parametrize(
    "variant", [FastNystromAttention, PublishedFastNystromAttention, SubsetAttention]
)
MASSIVE = [[7, 30], [], [11, 12, 13, 44]]


def classes(rows, size=45):
    found = torch.zeros(len(rows), size, dtype=torch.bool)
    for row, tokens in zip(found, rows, strict=True):
        row[tokens] = True
    return found


def call(massive=None, artifact=None, **more):
    """q, k, v of five prefix tokens and 5 x 8 patches, and what the seam would tell."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 45, 8, dtype=torch.float64)
    found = {"massive": massive, "artifact": artifact}
    found = {name: classes(rows) for name, rows in found.items() if rows is not None}
    context = Context(
        layer=1,
        nth=0,
        scale=8**-0.5,
        x=torch.randn(3, 45, 16, dtype=torch.float64),
        num_prefix_tokens=5,
        has_cls=True,
        grid=(5, 8),
        classes=found,
        **more,
    )
    return q, k, v, context


def choose(variant, q, k, v, context):
    keys = None if context.attn_mask is None else context.attn_mask[:, 0, 0]
    return variant.choose(q, k, keys, context).tolist()


@every_variant
def test_guaranteed_tokens_come_first_in_ascending_order(variant):
    given = variant(num_landmarks=9, guarantee=["massive", "cls"])
    assert given.token_classes == ("massive",)
    picks = choose(given, *call(massive=MASSIVE))
    for row, massive in zip(picks, MASSIVE, strict=True):
        assert row[: 1 + len(massive)] == [0, *massive] and len(set(row)) == 9
    picks = choose(variant(num_landmarks=9, guarantee=["register"]), *call())
    assert all(row[:4] == [1, 2, 3, 4] and 0 not in row[:4] for row in picks)


@every_variant
def test_guaranteed_tokens_are_cut_off_at_the_number_of_landmarks(variant):
    given = variant(num_landmarks=3, guarantee=["cls", "register", "massive"])
    assert choose(given, *call(massive=MASSIVE)) == [[0, 1, 2]] * 3
    given = variant(num_landmarks=3, guarantee=["massive"])
    assert choose(given, *call(massive=[[9, 8, 7, 6]] * 3)) == [[6, 7, 8]] * 3


@every_variant
@pytest.mark.parametrize("sampler", [None, RandomLandmarks()])
def test_excluded_tokens_are_never_landmarks(variant, sampler):
    others = [[], [7], list(range(5, 40))]
    given = variant(
        num_landmarks=9,
        landmarks=sampler,
        guarantee=["massive"],
        exclude=["cls", "register", "artifact"],
    )
    q, k, v, context = call(massive=MASSIVE, artifact=others)
    picks = choose(given, q, k, v, context)
    for row, massive, artifact in zip(picks, MASSIVE, others, strict=True):
        first = sorted(set(massive) - set(artifact))
        assert row[: len(first)] == first
        assert not set(row) & {0, 1, 2, 3, 4, *artifact}
    assert [len(set(row)) for row in picks] == [9, 9, 5]
    context.shared.clear()
    assert torch.isfinite(given(q, k, v, context)).all()


def test_too_few_tokens_mean_fewer_landmarks():
    q, k, v, context = call(massive=[[], [], list(range(4, 45))])
    few = SubsetAttention(num_landmarks=9, landmarks=RandomLandmarks(), exclude=["massive"])
    out = few(q, k, v, context)
    wanted = ops.attention(q[2:], k[2:, :, :4], v[2:, :, :4])
    torch.testing.assert_close(out[2:], wanted)
    more = dict(exclude=["massive"], solver=PinvSolver(), clusters=False)
    fna = FastNystromAttention(num_landmarks=9, **more)
    context.shared.clear()
    marks = torch.arange(4)[None]
    wanted = ops.nystrom_attention(q[2:], k[2:], v[2:], marks, solver="pinv", exact_rows=1)
    torch.testing.assert_close(fna(q, k, v, context)[2:], wanted, rtol=1e-6, atol=1e-8)


def test_static_classes_that_leave_too_few_tokens_are_named():
    given = FastNystromAttention(num_landmarks=42, exclude=["register"])
    with pytest.raises(ValueError, match=r"42: more landmarks .* attn.exclude=\['register'\]"):
        given(*call())
    full = FastNystromAttention(num_landmarks=40, guarantee=[], exclude=["cls", "register"])
    assert torch.isfinite(full(*call())).all()


def test_without_cls_among_the_landmarks_its_row_is_not_exact():
    q, k, v, context = call()
    exact = ops.attention(q, k, v)[:, :, 0]
    torch.testing.assert_close(FastNystromAttention(num_landmarks=6)(*call())[:, :, 0], exact)
    other = FastNystromAttention(num_landmarks=6, guarantee=[], exclude=["cls"])
    assert not torch.allclose(other(q, k, v, context)[:, :, 0], exact, rtol=1e-3)


@every_variant
def test_a_removed_token_is_no_landmark_though_guaranteed(variant):
    keep = torch.arange(45).expand(3, 1, 1, -1) < 30
    given = variant(
        num_landmarks=9, guarantee=["cls", "massive"], landmarks=FarthestPointLandmarks()
    )
    picks = choose(given, *call(massive=MASSIVE, attn_mask=keep))
    assert picks[0][:2] == [0, 7] and picks[2][:4] == [0, 11, 12, 13]
    assert all(max(row) < 30 and len(set(row)) == 9 for row in picks)


def test_a_picture_does_not_see_its_batch_mates():
    given = FastNystromAttention(num_landmarks=9, guarantee=["massive"], exclude=["artifact"])
    q, k, v, context = call(massive=MASSIVE, artifact=[[5], [], [6, 8]])
    together = given(q, k, v, context)
    for i in range(3):
        alone = Context(**{**vars(context), "x": context.x[i : i + 1], "shared": {}})
        alone.classes = {name: found[i : i + 1] for name, found in context.classes.items()}
        row = given(*(t[i : i + 1] for t in (q, k, v)), alone)
        torch.testing.assert_close(row[0], together[i])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(guarantee=["sink"]), r"attn.guarantee=\['sink'\]: expected classes among cls, reg"),
        (dict(exclude=["cls"]), r"attn.exclude=\['cls'\]: cls cannot be guaranteed and excl"),
        (dict(exclude="patch"), r"attn.exclude=\['patch'\]"),
        (
            dict(renew="sometimes"),
            "attn.renew='sometimes': expected every, settled, never, or an i",
        ),
        (dict(renew=True), "attn.renew=True"),
        (dict(renew=-1), "attn.renew=-1"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        FastNystromAttention(**settings)


def test_a_class_that_nobody_detected_is_named():
    with pytest.raises(ValueError, match="'massive' is not known at block 1"):
        FastNystromAttention(num_landmarks=6, guarantee=["massive"])(*call())


@pytest.mark.parametrize(
    ("renew", "depth", "wanted"),
    [
        ("never", 4, [0]),
        (0, 4, [0]),
        ("every", 4, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1, None, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (2, 4, [0, 2, 4, 6, 8]),
        ("settled", 4, [0, 1, 2, 5, 8]),
        ("settled", 12, [0, 1, 2, 3, 4, 5, 6]),
        ("settled", None, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_landmarks_are_renewed_as_often_as_said(renew, depth, wanted):
    seen = []

    class Sampler(FarthestPointLandmarks):
        def __call__(self, points, num, **more):
            seen.append(layer)
            return super().__call__(points, num, **more)

    variant = FastNystromAttention(num_landmarks=6, renew=renew, landmarks=Sampler())
    q, k, v, context = call(depth=depth)
    for layer in range(9):
        # The layer decides on what has settled, not how many before it were replaced.
        context = replace(context, layer=layer, nth=layer)
        variant(q, k, v, context)
    assert seen == wanted


def test_layers_that_leave_gaps_are_renewed_as_often():
    settled = Renewal("settled")

    def renewed(layers, depth):
        found = []
        for nth, layer in enumerate(layers):
            if not found or settled.due(nth, layer, depth, found[-1]):
                found.append(layer)
        return found

    assert renewed(range(6, 12), 12) == [6, 9]
    assert renewed([7, 8, 10, 11], 12) == [7, 10]
    assert renewed([13, 14, 16, 17, 19, 20, 22, 23], 24) == [13, 16, 19, 22]


def test_gradients_are_the_same_under_activation_checkpointing():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=6)
    x = torch.randn(2, 3, 64, 64)
    with fna_lab.patch(model, "fna", layers="all", num_landmarks=8):
        found = []
        for again in (False, True):
            model.set_grad_checkpointing(again)
            model.zero_grad()
            model.forward_features(x).square().sum().backward()
            found.append(model.blocks[5].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*found)


def test_a_layer_that_renews_nothing_attends_to_the_same_clusters():
    variant = FastNystromAttention(num_landmarks=6, renew="never")
    q, k, v, context = call()
    variant(q, k, v, context)
    marks, members = variant.taken(q, context)
    context.nth = 1
    q, k, v = (t.flip(2) for t in (q, k, v))
    out = variant(q, k, v, context)
    more = dict(scale=8**-0.5, rows=marks, exact_rows=1, distinct=True)
    wanted = ops.clustered_attention(q, k, v, marks, members, variant.solver, **more)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(variant.taken(q, context)[1], members)


@pytest.mark.parametrize("padded", [False, True])
@every_variant
def test_landmarks_from_before_a_mask_serve_no_layer_behind_it(variant, padded):
    mask = torch.ones(3, 1, 1, 45, dtype=torch.bool)
    mask[..., 40:] = not padded
    given = variant(num_landmarks=6, renew="never")
    q, k, v, context = call(attn_mask=mask if padded else None)
    given(q, k, v, context)
    before = given.taken(q, context)[0] if variant is FastNystromAttention else None
    gone = torch.zeros(3, 45, dtype=torch.bool)
    gone.scatter_(1, given.choose(q, k, given.keys(q, context)[0], context)[:, 1:], True)
    context.nth = 1
    removal = Removal(gone, "type1", "mask", *ops.token_rows(gone))
    behind = replace(context, removal=removal)
    out = given(q, k, v, behind)
    taken = given.choose(q, k, given.keys(q, behind)[0], behind)
    assert not gone.gather(1, taken).any() and out.isfinite().all()
    after = given(q, k, v, context)  # a layer without the mask: as if none had been there
    alone = given(q, k, v, replace(context, shared={}, nth=0))
    torch.testing.assert_close(after, alone)
    if before is not None:
        assert torch.equal(given.taken(q, context)[0], before)


def test_put_first_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        picks = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(4)])
        wanted = torch.rand(4, 12, generator=generator) < 0.3
        for row, old, mine in zip(ops.put_first(picks, wanted), picks, wanted, strict=True):
            first = mine.nonzero()[:, 0].tolist()
            rest = [i for i in old.tolist() if i not in first]
            assert row.tolist() == (first + rest)[:5]


def test_the_patch_tells_the_classes_that_a_variant_asks_for():
    _, model, x = build("timm dinov2 registers")
    given = dict(num_landmarks=8, guarantee=["cls", "massive"], exclude=["register", "artifact"])
    with fna_lab.patch(model, "fna", layers="1-3", **given) as patched:
        together = model.forward_features(x)
        assert set(patched.classes) == {"massive", "artifact"}
        alone = torch.cat([model.forward_features(one) for one in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
