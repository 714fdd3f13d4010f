"""Replacement, redistribution and projection correction: maths, and through the seam."""

from __future__ import annotations

import inspect

import pytest
import torch
from hosts import HOSTS, build

import fna_lab
from fna_lab import ops
from fna_lab.attn.base import AttentionVariant
from fna_lab.backbone.blocks import find_blocks
from fna_lab.hosts import out_projection
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.incoming import IncomingDetector
from fna_lab.mask.detector.norm_gap import NormGapDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.detector.register_neurons import RegisterNeuronsDetector
from fna_lab.mask.detector.sink_rate import SinkRateDetector
from fna_lab.mask.projection import ProjectionMask
from fna_lab.mask.redistribute import RedistributeMask
from fna_lab.mask.replace import ReplaceMask
from fna_lab.mask.type1 import Type1Mask

every_host = pytest.mark.parametrize("name", HOSTS)


def drawn(seed=0, prefix=1, grid=(5, 6)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, prefix + grid[0] * grid[1], 8, generator=generator, dtype=torch.float64)
    tokens = torch.rand(3, x.shape[1], generator=generator) < 0.3
    tokens[:, :prefix] = False
    return x, tokens


@pytest.mark.parametrize("how", ops.REPLACEMENTS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_replacement_leaves_the_others_and_takes_none_of_t(how, prefix):
    x, tokens = drawn(prefix=prefix)
    out = ops.replace_tokens(x, tokens, how, prefix=prefix, grid=(5, 6))
    assert torch.equal(out[~tokens], x[~tokens])
    x[tokens] = 100 + x[tokens]
    assert torch.equal(ops.replace_tokens(x, tokens, how, prefix=prefix, grid=(5, 6)), out)
    alone = [
        ops.replace_tokens(a, t, how, prefix=prefix, grid=(5, 6))
        for a, t in zip(x.split(1), tokens.split(1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), out)


def test_replacements_are_what_they_say():
    x, tokens = drawn()
    mean = ops.replace_tokens(x, tokens, "mean")
    swapped = ops.replace_tokens(x, tokens, "permutation")
    median = ops.replace_tokens(x, tokens, "median", grid=(5, 6), window=3)
    for b, i in tokens.nonzero().tolist():
        others = x[b, 1:][~tokens[b, 1:]]
        torch.testing.assert_close(mean[b, i], others.mean(0))
        assert (others == swapped[b, i]).all(1).any()
        row, column = divmod(i - 1, 6)
        near = [
            r * 6 + c + 1
            for r in range(max(0, row - 1), min(5, row + 2))
            for c in range(max(0, column - 1), min(6, column + 2))
        ]
        near = [j for j in near if not tokens[b, j]]
        if not near:
            continue  # see the next test
        ranked = sorted(near, key=lambda j: (float(x[b, j].float().norm()), j))
        assert torch.equal(median[b, i], x[b, ranked[(len(ranked) - 1) // 2]])
    assert (mean[tokens] != swapped[tokens]).any()


def test_median_of_a_surrounded_token_is_that_of_the_picture():
    x, tokens = drawn()
    tokens[:, 1:] = True
    tokens[:, 30] = False
    out = ops.replace_tokens(x, tokens, "median", grid=(5, 6), window=3)
    assert torch.equal(out[:, 1], x[:, 30])


def test_redistribution_row_by_row():
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64)
    weights = scores.softmax(-1)
    tokens = torch.zeros(2, 9, dtype=torch.bool)
    tokens[0, [3, 5]] = tokens[1, 8] = True
    out = ops.redistribute(weights, tokens, keep=0.25, max_share=0.4, min_patches=0.6, prefix=2)
    changed = 0
    for b in range(2):
        sink, other = tokens[b].nonzero()[:, 0], (~tokens[b]).nonzero()[2:, 0]
        for row, new in zip(weights[b].flatten(0, 1), out[b].flatten(0, 1), strict=True):
            wanted = row.clone()
            if row[2:].sum() >= 0.6 and row[sink].sum() <= 0.4 * row[2:].sum():
                wanted[sink] *= 0.25
                moved = row.sum() - wanted.sum()
                wanted[other] += moved * row[other] / row[other].sum()
                changed += 1
            torch.testing.assert_close(new, wanted)
    assert 5 < changed < 50
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))


@pytest.mark.parametrize("order", ops.CORRECTIONS)
def test_correction_token_by_token(order):
    x, tokens = drawn()
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(3, 2, 31, 4, generator=generator, dtype=torch.float64)
    w = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, 2, 31, 31, generator=generator, dtype=torch.float64).softmax(-1)
    pairs = ops.removed_pairs(tokens, "type2")
    out = ops.projection_correction(weights, x, v, w, pairs, clamp=0.1, order=order)
    for b, i in ((0, 3), (1, 0), (2, 30)):
        unit = x[b, i] / x[b, i].norm()
        scale = 0.0
        for j in range(31):
            if not pairs[b, i, j]:
                continue
            parts = []
            for h in range(2):
                along = float(unit @ (w[:, 4 * h : 4 * h + 4] @ v[b, h, j]))
                a = float(weights[b, h, i, j])
                parts.append(a * max(0.1 - along, 0) if order == "relu_sum" else a * along)
            scale += sum(parts) if order == "relu_sum" else max(0.1 - sum(parts), 0)
        torch.testing.assert_close(out[b, i], scale * unit)


@every_host
@pytest.mark.parametrize("how", ops.REPLACEMENTS)
def test_replacement_through_the_seam(name, how):
    host, model, x = build(name)
    before = host.run(model, x)
    _, blocks = find_blocks(model)
    seen = []
    mask = ReplaceMask(how=how, detector=NormGapDetector(min_gap=0))
    with fna_lab.patch(model, "exact", mask, mask_layers=[2], layers=[2]) as patched:
        hook = blocks[2].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        together = host.run(model, x)
        tokens = patched.tokens
        hook.remove()
        alone = torch.cat([host.run(model, p) for p in x.split(1)])
    given = []
    hook = blocks[2].register_forward_pre_hook(
        lambda _, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    assert torch.equal(host.run(model, x), before)
    hook.remove()
    wanted = ops.replace_tokens(given[0], tokens, how, prefix=host.prefix, grid=(5, 5))
    torch.testing.assert_close(seen[0], wanted)
    assert not torch.equal(together, before)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


class Corrected(AttentionVariant):
    """Keeps what a correction is made of."""

    def __call__(self, q, k, v, context):
        scores = context.scale * (q @ k.mT)
        scores = scores if context.attn_mask is None else scores + context.attn_mask
        self.weights, self.v, self.x = scores.softmax(-1), v, context.x
        return self.weights @ v


@every_host
def test_correction_is_added_to_the_projected_output(name):
    host, model, x = build(name)
    _, blocks = find_blocks(model)
    variant, outs = Corrected(), []
    with fna_lab.patch(model, variant, layers=[2]):
        host.run(model, x)
    more = ops.projection_correction(
        variant.weights,
        variant.x,
        variant.v,
        out_projection(blocks[2]).weight,
        torch.ones(3, *variant.weights.shape[2:], dtype=torch.bool),
        clamp=0.5,
    )
    hook = blocks[2].register_forward_hook(
        lambda _, args, out: outs.append(out[0] if isinstance(out, tuple) else out)
    )
    host.run(model, x)
    with fna_lab.patch(model, "exact", ProjectionMask(clamp=0.5), mask_layers=[2], layers=[2]):
        host.run(model, x)
    with torch.no_grad():  # by hand: the same through the bias of the projection, token by token
        projection = out_projection(blocks[2])
        if type(projection) is torch.nn.Linear:
            projection.register_forward_hook(lambda *a: a[2] + more)
            host.run(model, x)
            torch.testing.assert_close(outs[1], outs[2], rtol=1e-4, atol=1e-5)
    hook.remove()
    assert not torch.equal(outs[0], outs[1])


def test_redistribution_through_the_seam_and_its_refusal():
    host, model, x = build("timm vit")
    mask = RedistributeMask(detector=NormGapDetector(min_gap=0), keep=0.0, max_share=1.0)
    mask.shares["min_patches"] = 0.0
    with fna_lab.patch(model, "exact", mask, mask_layers="2-3", layers="2-3"):
        found = host.run(model, x)
        alone = torch.cat([host.run(model, p) for p in x.split(1)])
    assert not torch.equal(found, host.run(model, x))
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-4)
    keep_all = RedistributeMask(detector=NormGapDetector(min_gap=0), keep=1.0)
    with fna_lab.patch(model, "exact", keep_all, mask_layers="2-3", layers="2-3"):
        torch.testing.assert_close(host.run(model, x), host.run(model, x))
    with pytest.raises(NotImplementedError, match="attn=fna cannot honour mask=redistribute"):
        fna_lab.patch(model, "fna", mask)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ReplaceMask(how="best"), "mask.how='best': expected one of mean"),
        (lambda: ReplaceMask(window=4), "mask.window=4: expected an odd"),
        (lambda: RedistributeMask(keep=2), "mask.keep=2: expected a number from 0 to 1"),
        (lambda: ProjectionMask(order="sum"), "mask.order='sum'"),
        (lambda: ProjectionMask(pairs="t"), "mask.pairs"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_half_precision_does_not_overflow_and_zero_tokens_stay_finite():
    x, tokens = drawn(grid=(20, 30))
    x[..., 0] = 300  # 600 of them are beyond what half precision holds
    wanted = ops.replace_tokens(x, tokens, "mean")
    found = ops.replace_tokens(x.half(), tokens, "mean")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)
    x, tokens = drawn()
    x[:, 0] = 0  # a host's register before it was trained
    weights = torch.full((3, 2, 31, 31), 1 / 31, dtype=torch.float64)
    v, w = torch.ones(3, 2, 31, 4, dtype=torch.float64), -torch.eye(8, dtype=torch.float64)
    out = ops.projection_correction(weights, x, v, w, ops.removed_pairs(tokens, "x_to_x"))
    assert torch.isfinite(out).all() and out[:, 1:].any() and not out[:, 0].any()


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda value: Type1Mask(detect=value), "mask.detect"),
        (lambda value: Type1Mask(restart=value), "mask.restart"),
        (lambda value: Type1Mask(max_rounds=value), "mask.max_rounds"),
        (lambda value: ReplaceMask(seed=value), "mask.seed"),
        (lambda value: ReplaceMask(window=value), "mask.window"),
        (lambda value: RedistributeMask(keep=value), "mask.keep"),
        (lambda value: ProjectionMask(clamp=value), "mask.clamp"),
        (lambda value: ClsProxyDetector(top=value), "mask.detector.top"),
        (lambda value: ClsProxyDetector(least=value), "mask.detector.least"),
        (lambda value: NormGapDetector(min_gap=value), "mask.detector.min_gap"),
        (lambda value: NormRatioDetector(ratio=value), "mask.detector.ratio"),
        (lambda value: SinkRateDetector(epsilon=value), "mask.detector.epsilon"),
        (lambda value: SinkRateDetector(share=value), "mask.detector.share"),
        (lambda value: IncomingDetector(rule=value), "mask.detector.rule"),
        (lambda value: RegisterNeuronsDetector(neurons=value), "mask.detector.neurons"),
    ],
)
@pytest.mark.parametrize("value", ["many", [1], True])
def test_values_of_the_wrong_kind_are_named(make, setting, value):
    with pytest.raises(ValueError, match=f"{setting}="):
        make(value)


NO_PLACE = {  # of position encodings that have no place for appended tokens
    "timm beit": "attention mask or position bias",
    "timm beitv2": "attention mask or position bias",
    "timm eva02": "rotary embedding",
    "timm dinov3": "rotary embedding",
}


@pytest.mark.parametrize("how", ops.MOVES)
def test_moved_tokens_are_what_they_say(how):
    x, tokens = drawn()
    tokens[1] = False
    moved, valid = ops.moved_tokens(x, tokens, how, seed=3)
    assert moved.shape == (3, int(tokens.sum(1).max()), 8)
    assert valid.sum(1).tolist() == tokens.sum(1).tolist() and not moved[~valid].any()
    for b in (0, 2):
        mine, found = x[b][tokens[b]], moved[b][valid[b]]
        if how == "concatenation":
            assert torch.equal(found, mine)
        elif how == "mean_concatenation":
            torch.testing.assert_close(found, mine.mean(0).expand_as(mine))
        else:
            assert torch.equal(found.sort(1).values, mine.sort(1).values)
            order = [(mine[0] == value).nonzero().item() for value in found[0]]
            assert order != list(range(8)) and torch.equal(found, mine[:, order])


class Few(NormGapDetector):
    """One patch of the first picture, three of the second, none of the third, whatever they are.

    Where pictures are alone, their first pixel says which one it is.
    """

    def __init__(self, which):
        super().__init__(min_gap=0)
        self.which = which

    def __call__(self, evidence):
        found = torch.zeros_like(evidence.candidates())
        for row, which in zip(found, self.which(), strict=True):
            row[evidence.num_prefix_tokens + torch.tensor([[4], [3, 9, 20], []][which]).long()] = 1
        return found


def by_hand(blocks, first, x, t, how, prefix):
    """One picture `[1 n c]` through the blocks from `first` on with its moved tokens behind it."""
    moved = ops.moved_tokens(x, t, how)[0]
    x = ops.replace_tokens(x, t, "median", prefix=prefix, grid=(5, 5))
    n, x = x.shape[1], torch.cat([x, moved], 1)
    for block in blocks[first:]:
        asks = "attention_mask" in inspect.signature(block.forward).parameters
        x = block(x, attention_mask=None) if asks else block(x)
        x = x[0] if isinstance(x, tuple) else x
    return x[:, :n]


@every_host
@pytest.mark.parametrize("how", ops.MOVES)
def test_concatenation_on_every_host(name, how):
    host, model, x = build(name)
    path, blocks = find_blocks(model)
    now = [0, 1, 2]
    mask = ReplaceMask(how=how, detector=Few(lambda: now))
    if name in NO_PLACE:
        with fna_lab.patch(model, "exact", mask, layers="1-2", mask_layers=[2]):
            with pytest.raises(NotImplementedError, match="mask=replace with a conc") as told:
                host.run(model, x)
        assert NO_PLACE[name] in str(told.value) and "no place in it" in str(told.value)
        return
    before = host.run(model, x)
    ends, given = [], []
    hooks = [
        blocks[-1].register_forward_hook(
            lambda _, args, out: ends.append(out[0] if isinstance(out, tuple) else out)
        ),
        blocks[2].register_forward_pre_hook(
            lambda _, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
    ]
    host.run(model, x)
    start, plain = given[0], ends.pop()
    with fna_lab.patch(model, "exact", mask, layers="1-2", mask_layers=[2]) as patched:
        hooks += [
            blocks[-1].register_forward_hook(
                lambda _, args, out: ends.append(out[0] if isinstance(out, tuple) else out)
            )
        ]
        together = host.run(model, x)
        tokens, last = patched.tokens, ends[-1]
        with patched.disabled():
            assert torch.equal(host.run(model, x), before)
        alone = []
        for number in range(3):
            now[:] = [number]
            alone.append(host.run(model, x[number : number + 1]))
    for hook in hooks:
        hook.remove()
    assert tokens.sum(1).tolist() == [1, 3, 0] and last.shape == plain.shape
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together[2], before[2], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[:2], before[:2], rtol=1e-3, atol=1e-4)
    assert torch.equal(host.run(model, x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        for b in range(3):
            one = by_hand(blocks, 2, start[b : b + 1], tokens[b : b + 1], how, host.prefix)
            torch.testing.assert_close(last[b : b + 1], one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attn", ["fna", "performer", "tome", "registers", "block_svd"])
def test_variants_that_cannot_honour_appended_tokens_refuse_by_name(attn):
    _, model, _ = build("timm vit")
    more = {"neurons": [[2, 3]]} if attn == "registers" else {}
    mask = ReplaceMask(how="concatenation")
    with pytest.raises(NotImplementedError, match=f"attn={attn} cannot honour mask=replace with"):
        fna_lab.patch(model, attn, mask, layers="1-", **more)


def test_another_patch_behind_appended_tokens_is_an_error():
    host, model, x = build("timm vit")
    mask = ReplaceMask(how="concatenation", detector=Few(lambda: [0, 1, 2]))
    with (
        fna_lab.patch(model, "exact", mask, layers="1-", mask_layers=[1]),
        fna_lab.patch(model, "exact", layers=[2]),
        pytest.raises(RuntimeError, match="that 1 of the blocks behind know nothing of"),
    ):
        host.run(model, x)


def test_without_tokens_concatenation_changes_nothing():
    host, model, x = build("timm dinov2 registers")
    before = host.run(model, x)
    mask = ReplaceMask(how="concatenation", detector=NormRatioDetector(ratio=1e6))
    with fna_lab.patch(model, "exact", mask, layers="1-", mask_layers="2-") as patched:
        torch.testing.assert_close(host.run(model, x), before, rtol=1e-4, atol=1e-5)
        assert patched.found == [0, 0, 0]
