"""Iterative detection against a slow loop of whole forward passes, and its laws."""

from __future__ import annotations

import pytest
import torch
from hosts import HOSTS, build

import fna_lab
from fna_lab.attn.base import AttentionVariant
from fna_lab.mask.detector.base import Detector
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.iterative_masking import IterativeMaskingMask
from fna_lab.mask.iterative_sinking import IterativeSinkingMask
from fna_lab.mask.type1 import Type1Mask

STAGES = {"mask": IterativeMaskingMask, "sink": IterativeSinkingMask}
WITH_CLS = [name for name, host in HOSTS.items() if host.cls]
every_stage = pytest.mark.parametrize("stage", STAGES)


class Written(AttentionVariant):
    """Attention written out without fixed tokens, and what CLS attends to."""

    def __init__(self, tokens, stage, pattern):
        self.tokens, self.stage, self.pattern = tokens, stage, pattern
        self.rows = {}

    def __call__(self, q, k, v, context):
        scores = context.scale * (q @ k.mT)
        if context.attn_mask is not None:
            scores = scores + context.attn_mask
        gone = self.tokens[:, None, None].expand_as(scores)
        if self.pattern == "type2":
            gone = gone & ~torch.eye(q.shape[2], dtype=torch.bool)
        if self.stage == "mask":
            weights = scores.masked_fill(gone, -torch.inf).softmax(-1)
        else:
            weights = scores.softmax(-1).masked_fill(gone, 0)
        self.rows[context.layer] = weights[:, :, 0].mean(1)
        return weights @ v


def slow(host, model, x, *, stage, pattern, ratio, restart=1, detect=3, per_round=1):
    """Ranks `[b n]` of one picture by whole forward passes."""
    tokens = torch.zeros(1, 25 + host.prefix, dtype=torch.bool)
    ranks = tokens.long()
    for number in range(1, 30):
        written = Written(tokens, stage, pattern)
        with fna_lab.patch(model, written, layers=range(restart, detect + 1)):
            host.run(model, x)
        row = written.rows[detect]
        new = (row > ratio * row[:, :1]) & ~tokens
        new[:, : host.prefix] = False
        if not new.any():
            return ranks
        best = row.masked_fill(~new, -1).argsort(dim=1, descending=True, stable=True)
        chosen = torch.zeros_like(new).scatter(1, best[:, : per_round or 99], True) & new
        tokens = tokens | chosen
        ranks = ranks + number * chosen
    return ranks


@pytest.mark.parametrize("name", WITH_CLS)
@every_stage
@pytest.mark.parametrize("pattern", ["type1", "type2"])
def test_ranks_are_those_of_a_loop_of_whole_passes(name, stage, pattern):
    host, model, x = build(name)
    mask = STAGES[stage](pattern=pattern, detector=ClsProxyDetector(ratio=1.5))
    where = dict(mask_layers=[3], detect=3, restart=1)
    with fna_lab.patch(model, "exact", mask, layers=[3], **where) as patched:
        host.run(model, x)
        ranks = patched.ranks
    wanted = [slow(host, model, p, stage=stage, pattern=pattern, ratio=1.5) for p in x.split(1)]
    assert torch.equal(ranks, torch.cat(wanted))
    assert patched.rounds == ranks.amax(1).tolist()
    assert patched.found == (ranks > 0).sum(1).tolist()


@every_stage
def test_a_batch_equals_its_pictures_one_by_one(stage):
    host, model, x = build("timm dinov3")
    x = torch.cat([x, 3 * x.roll(1, -1)])
    mask = STAGES[stage](detector=ClsProxyDetector(ratio=1.2))
    where = dict(layers=[3], mask_layers="2-3", detect=2, restart=0)
    with fna_lab.patch(model, "exact", mask, **where) as patched:
        together, ranks = host.run(model, x), patched.ranks
        alone, each = [], []
        for picture in x.split(1):
            alone.append(host.run(model, picture))
            each.append(patched.ranks)
    assert len(set(patched.rounds[:6])) > 1  # pictures need different numbers of rounds
    assert torch.equal(ranks, torch.cat(each))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_all_over_the_threshold_in_a_round():
    host, model, x = build("timm vit")
    mask = IterativeMaskingMask(detector=ClsProxyDetector(ratio=1.2), per_round=None)
    with fna_lab.patch(
        model, "exact", mask, layers=[3], mask_layers=[3], detect=3, restart=1
    ) as patched:
        host.run(model, x)
    more = dict(stage="mask", pattern="type1", ratio=1.2, per_round=None)
    wanted = [slow(host, model, p, **more) for p in x.split(1)]
    assert torch.equal(patched.ranks, torch.cat(wanted))
    assert max(torch.bincount(patched.ranks.flatten())[1:]) > 3


def test_blocks_before_detection_are_masked_too():
    host, model, x = build("timm vit")
    mask = IterativeMaskingMask(detector=ClsProxyDetector(ratio=1.5))
    where = dict(layers=[3], mask_layers="1-3", detect=3, restart=1)
    with fna_lab.patch(model, "exact", mask, **where) as patched:
        found = host.run(model, x)
        tokens = patched.tokens
    written = Written(tokens, "mask", "type1")
    with fna_lab.patch(model, written, layers="1-3"):
        torch.testing.assert_close(found, host.run(model, x), rtol=1e-4, atol=1e-5)


def test_a_bound_on_rounds_and_hooks_of_the_user_see_the_main_pass_alone():
    host, model, x = build("timm vit")
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    mask = IterativeSinkingMask(detector=ClsProxyDetector(ratio=0.5), max_rounds=3)
    with fna_lab.patch(model, "exact", mask, mask_layers=[3], restart=1) as patched:
        host.run(model, x)
    assert patched.rounds == [3, 3, 3] == patched.found
    assert len(calls) == 4


def test_hidden_states_are_read_again_each_round():
    host, model, x = build("timm vit")
    seen = []

    class Norms(NormRatioDetector):
        def __call__(self, evidence):
            seen.append(evidence.x)
            return super().__call__(evidence)

    mask = Type1Mask(detector=Norms(ratio=1.05), schedule="iterative", per_round=1, max_rounds=4)
    with fna_lab.patch(model, "exact", mask, mask_layers=[3], detect=3, restart=1) as patched:
        host.run(model, x)
    assert len(seen) > 1 and not torch.equal(seen[0], seen[1])
    assert patched.ranks.max() > 1


def test_the_variant_works_while_blocks_run_again():
    host, model, x = build("timm vit")
    mask = IterativeMaskingMask(detector=ClsProxyDetector(ratio=1.5))
    where = dict(layers="1-3", mask_layers=[3], detect=3, restart=2)
    with fna_lab.patch(model, "fna", mask, num_landmarks=6, **where) as patched:
        together = host.run(model, x)
        assert torch.equal(host.run(model, x), together)
        assert patched.ranks.max() > 0


class Wants(AttentionVariant):
    token_classes = ("massive", "artifact")

    def __init__(self):
        self.classes = {}

    def __call__(self, q, k, v, context):
        self.classes = context.classes
        return (context.scale * q @ k.mT).softmax(-1) @ v


def test_token_classes_are_found_for_a_variant_that_asks():
    host, model, x = build("timm vit")
    variant = Wants()
    with fna_lab.patch(model, variant, layers="2-3", detect=2, restart=1) as patched:
        host.run(model, x)
        assert patched.tokens is None and patched.found == []
    sinks = [
        slow(host, model, p, stage="mask", pattern="type1", ratio=1.0, detect=2)
        for p in x.split(1)
    ]
    written = Written(torch.zeros(3, 26, dtype=torch.bool), "mask", "type1")
    with fna_lab.patch(model, written, layers=[2]):
        host.run(model, x)
    row = written.rows[2]
    massive = (row > 0.3 * row[:, :1]) & (torch.arange(26) > 0)
    assert torch.equal(variant.classes["massive"], massive)
    assert torch.equal(variant.classes["artifact"], (torch.cat(sinks) > 0) & ~massive)


class Fixed(Detector):
    def __call__(self, evidence):
        return evidence.candidates() & (torch.arange(evidence.x.shape[1]) == 5)

    def scores(self, evidence):
        return torch.zeros(evidence.x.shape[:2])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(schedule="often"), "mask.schedule='often': expected oneshot or iterative"),
        (dict(per_round=0), "mask.per_round=0: expected an integer >= 1"),
        (dict(max_rounds=1.5), "mask.max_rounds=1.5"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Type1Mask(detector=Fixed(), **settings)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (dict(detect=2, restart=3), "mask.restart=3: expected a block up to mask.detect=2"),
        (dict(mask_layers="0-3", detect=2, restart=1), "mask.detect=2.*or mask.restart up to 0"),
        (dict(detect=4), "mask.detect=4: block 4 does not exist"),
    ],
)
def test_blocks_that_do_not_fit_are_named(where, words):
    _, model, _ = build("timm vit")
    mask = IterativeMaskingMask(detector=Fixed())
    with pytest.raises(ValueError, match=words):
        fna_lab.patch(model, "exact", mask, **{"mask_layers": "2-3", **where})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
