"""The attention variants beside fna, against slow and obvious formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from calls import BIAS, KEEP, call, every_mask, weights

from fna_lab import ops
from fna_lab.attn.base import Context, Removal
from fna_lab.attn.block_svd import BlockSvdAttention
from fna_lab.attn.explicit import ExplicitAttention
from fna_lab.attn.landmarks.random import RandomLandmarks
from fna_lab.attn.prune import PruneAttention
from fna_lab.attn.solver.pinv import PinvSolver
from fna_lab.attn.tome import TomeAttention


@every_mask
def test_explicit_attention_is_exact_with_every_token_explicit(mask):
    q, k, v, context = call(attn_mask=mask)
    variant = ExplicitAttention(num_landmarks=25, num_explicit=25)
    exact = weights(q, k, context).softmax(-1) @ v
    torch.testing.assert_close(variant(q, k, v, context), exact)


@every_mask
def test_explicit_attention_is_exact_with_every_token_picked(mask):
    q, k, v, context = call(attn_mask=mask)
    variant = ExplicitAttention(num_landmarks=25, num_explicit=9, solver=PinvSolver())
    exact = weights(q, k, context).softmax(-1) @ v
    torch.testing.assert_close(variant(q, k, v, context), exact, rtol=1e-5, atol=1e-6)


@every_mask
@pytest.mark.parametrize("per_head", [False, True])
def test_explicit_attention_equals_its_definition(mask, per_head):
    q, k, v, context = call(attn_mask=mask)
    variant = ExplicitAttention(
        num_landmarks=12, num_explicit=5, solver=PinvSolver(), source="k", per_head=per_head
    )
    out = variant(q, k, v, context)
    picks, members = variant.taken(q, context)
    logits, inner = weights(q, k, context), context.scale * q @ k.mT
    kept = torch.ones(2, 25, dtype=torch.bool) if mask is not KEEP else mask[:, 0, 0]
    bias = torch.zeros(1, 3, 25, 25, dtype=q.dtype) if mask is not BIAS else BIAS
    for b, h in itertools.product(range(2), range(3)):
        mine = (picks[b, h] if per_head else picks[b]).tolist()
        homes = members[b, h] if per_head else members[b]
        assert len(set(mine)) == 12 and homes[mine].tolist() == list(range(12))
        assert (homes[kept[b]] >= 0).all() and (homes[~kept[b]] == -1).all()
        groups = [(homes == place).nonzero()[:, 0] for place in range(12)]
        assert all(group.tolist() == [mine[i]] for i, group in enumerate(groups[:5]))
        # A cluster has the mean of its logits, the bias of its landmark and the log of its size.
        columns = [inner[b, h][:, g].mean(1) + math.log(len(g)) for g in groups]
        columns = torch.stack(columns, 1) + bias[0, h][:, mine]
        shares, value = columns.softmax(1), v[b, h]
        exact = logits[b, h][mine].softmax(1) @ value
        fit = torch.linalg.pinv(shares[mine][:, 5:])
        values = torch.cat(
            [value[mine[:5]], value[mine[5:]] + fit @ (exact - shares[mine] @ value[mine])]
        )
        wanted = shares @ values
        wanted[mine[:5]] = exact[:5]
        torch.testing.assert_close(out[b, h], wanted, rtol=1e-5, atol=1e-7)


def test_explicit_attention_with_fewer_tokens_than_picks_is_exact():
    keep = (torch.arange(25) < 8).expand(2, 1, 1, -1)
    q, k, v, context = call(attn_mask=keep)
    variant = ExplicitAttention(
        num_landmarks=12, num_explicit=9, landmarks=RandomLandmarks(), solver=PinvSolver()
    )
    exact = weights(q, k, context).softmax(-1) @ v
    torch.testing.assert_close(variant(q, k, v, context), exact)
    variant = ExplicitAttention(
        num_landmarks=12, num_explicit=3, landmarks=RandomLandmarks(), solver=PinvSolver()
    )
    context.shared.clear()
    torch.testing.assert_close(variant(q, k, v, context), exact, rtol=1e-4, atol=1e-6)


def test_gradients_of_explicit_tokens_that_repeat_count_once():
    keep = (torch.arange(25) < 20).expand(2, 1, 1, -1)
    q, k, v, context = call(attn_mask=keep)
    variant = ExplicitAttention(
        num_landmarks=25, num_explicit=9, landmarks=RandomLandmarks(), solver=PinvSolver()
    )
    weight = torch.randn_like(v)

    def total(v):
        context.shared.clear()
        return (weight * variant(q, k, v, context)).sum()

    found = torch.autograd.functional.jacobian(total, v)
    exact = weights(q, k, context).softmax(-1).mT @ weight
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


def test_all_explicit_tokens_leave_nobody_for_excluded_ones():
    variant = ExplicitAttention(num_landmarks=25, num_explicit=25, exclude=["massive"])
    with pytest.raises(ValueError, match="leaves no landmark for excluded tokens"):
        variant.check_tokens(25)


@pytest.mark.parametrize("num", [0, 7, True, 2.5])
def test_bad_numbers_of_explicit_tokens_are_named(num):
    with pytest.raises(ValueError, match=r"attn.num_explicit=.*: expected an integer from 1 to"):
        ExplicitAttention(num_landmarks=6, num_explicit=num)


def test_explicit_tokens_alone_cannot_stand_for_all():
    with pytest.raises(ValueError, match="attn.num_explicit=6: leaves no landmark of the 6 for"):
        ExplicitAttention(num_landmarks=6, num_explicit=6).check_tokens(25)


@every_mask
@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("restore", ["nearest", "zero"])
def test_pruned_attention_equals_its_definition(mask, has_cls, restore):
    prefix = int(has_cls)
    if mask is not None and not has_cls:
        mask = mask[..., 1:] if mask.dtype == torch.bool else mask[..., 1:, 1:]
    q, k, v, context = call(prefix=prefix, has_cls=has_cls, attn_mask=mask)
    variant = PruneAttention(keep=0.5, restore=restore, queries=4)
    out = variant(q, k, v, context)
    size = prefix + 24
    logits = weights(q, k, context)
    plain = context.scale * q @ k.mT  # the ranking looks at the logits without a bias
    rows = [0] if has_cls else ops.spread_queries(24, 4, grid=(4, 6))
    for b in range(2):
        open_ = torch.ones(size, dtype=torch.bool)
        if mask is not None and mask.dtype == torch.bool:
            open_ = mask[b, 0, 0]
        asked = [r for r in rows if open_[r]] or rows
        rank = plain[b].masked_fill(~open_, -torch.inf).softmax(-1)[:, asked].mean((0, 1))
        rank[~open_] = -1
        rank[:prefix] = 9
        kept = sorted(rank.argsort(descending=True)[: prefix + 12].tolist())
        mean = F.normalize(k[b].mean(0), dim=-1)
        alive = [i for i in kept if i >= prefix and open_[i]]
        for i in range(size):
            if i not in kept and restore == "zero":
                assert (out[b, :, i] == 0).all()
                continue
            j = i if i in kept else alive[int((mean[alive] @ mean[i]).argmax())]
            row = logits[b, :, j, kept].softmax(-1)[:, None] @ v[b][:, kept]
            torch.testing.assert_close(out[b, :, i], row[:, 0])


def test_pruning_nothing_is_exact_attention():
    q, k, v, context = call()
    exact = ops.attention(q, k, v)
    torch.testing.assert_close(PruneAttention(keep=1.0)(q, k, v, context), exact)
    shape = dict(heads=6, head_dim=64, channels=384, layers=2)
    halved, exact = PruneAttention(keep=0.5), 2 * ops.attention_flops(1370, 6, 64)
    assert 0.25 * exact < halved.flops(1370, **shape) < 0.4 * exact


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(keep=0), "attn.keep=0: expected a number above 0"),
        (dict(keep=1.5), "attn.keep=1.5"),
        (dict(restore="copy"), "attn.restore='copy': expected one of nearest, zero"),
        (dict(queries=0), "attn.queries=0"),
    ],
)
def test_bad_settings_of_prune_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        PruneAttention(**settings)


@every_mask
def test_full_rank_blocks_are_exact_attention(mask):
    massive = torch.zeros(2, 25, dtype=torch.bool)
    massive[0, 7] = massive[1, [9, 11, 12]] = True
    q, k, v, context = call(attn_mask=mask, classes={"massive": massive})
    exact = weights(q, k, context).softmax(-1) @ v
    for partition in ([], ["cls"], ["cls", "massive"]):
        variant = BlockSvdAttention(rank=25, partition=partition)
        torch.testing.assert_close(variant(q, k, v, context), exact)
    low = BlockSvdAttention(rank=2, partition=["cls", "massive"])(q, k, v, context)
    assert not torch.allclose(low, exact, rtol=1e-2)


def test_blocks_of_low_rank_equal_their_definition():
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=generator).softmax(-1)
    labels = torch.randint(0, 3, (2, 12), generator=generator)
    found = ops.block_low_rank(pattern, labels, 3, 2)
    for b in range(2):
        for h in range(3):
            for r in range(3):
                for c in range(3):
                    rows, columns = labels[b] == r, labels[b] == c
                    block = pattern[b, h][rows][:, columns]
                    u, s, vh = torch.linalg.svd(block, full_matrices=False)
                    low = u[:, :2] @ torch.diag(s[:2]) @ vh[:2]
                    torch.testing.assert_close(found[b, h][rows][:, columns], low)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(rank=0), "attn.rank=0: expected an integer >= 1"),
        (dict(partition=["sky"]), r"attn.partition=\['sky'\]: expected classes among cls"),
    ],
)
def test_bad_settings_of_block_svd_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        BlockSvdAttention(**settings)


@every_mask
def test_merging_nothing_is_exact_attention(mask):
    q, k, v, context = call(attn_mask=mask)
    exact = weights(q, k, context).softmax(-1) @ v
    torch.testing.assert_close(TomeAttention(ratio=0)(q, k, v, context), exact)


@pytest.mark.parametrize("padded", [False, True])
def test_merging_twins_is_exact_attention(padded):
    """Every odd patch token is the one before it, and weighs as much."""
    keep = torch.ones(2, 1, 1, 25, dtype=torch.bool)
    keep[0, ..., 5:7] = keep[1, ..., 21:25] = False  # whole pairs
    q, k, v, context = call(attn_mask=keep if padded else None)
    for x in (q, k, v):
        x[:, :, 2::2] = x[:, :, 1::2]
    exact = weights(q, k, context).softmax(-1) @ v
    out = TomeAttention()(q, k, v, context)
    real = keep[:, 0, 0] if padded else torch.ones(2, 25, dtype=torch.bool)
    torch.testing.assert_close(out.transpose(1, 2)[real], exact.transpose(1, 2)[real])


@pytest.mark.parametrize("at_a_time", [1, 30, 2**22])
@pytest.mark.parametrize("told", [False, True])
def test_the_most_similar_of_some_tokens(told, at_a_time, monkeypatch):
    monkeypatch.setattr("fna_lab.ops.merging.AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (11, 8))
    kinds = [torch.randint(0, 3, (2, n), generator=generator) for n in (11, 8)]
    kinds[1][1] = kinds[1][1].clamp(max=1)  # no answer of one kind
    cosine, which = ops.most_similar(x, y, *(kinds if told else ()))
    for b, i in itertools.product(range(2), range(11)):
        apart = (kinds[1][b] - kinds[0][b, i]).abs() * told
        every = torch.cosine_similarity(x[b, i], y[b], dim=-1)
        wanted = every.masked_fill(apart > apart.min(), -torch.inf).argmax()
        assert which[b, i] == wanted
        lower = 3 * apart[wanted].item()
        assert cosine[b, i].item() == pytest.approx(every[wanted].item() - lower)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.5])
@pytest.mark.parametrize("pattern", ["type1", "type2"])
def test_padding_reaches_no_merged_token_that_a_mask_took_away(ratio, pattern):
    keep = torch.ones(2, 1, 1, 25, dtype=torch.bool)
    keep[0, ..., 17:] = keep[1, ..., 3:12] = False
    gone = torch.zeros(2, 25, dtype=torch.bool)
    gone[0, [3, 4, 9]] = gone[1, [14, 15, 17, 20]] = True
    removal = Removal(gone, pattern, "mask", *ops.token_rows(gone))
    q, k, v, context = call(attn_mask=keep, removal=removal)
    out = TomeAttention(ratio=ratio)(q, k, v, context)
    real = keep[:, 0, 0]
    q, k, v = (torch.where(real[:, None, :, None], x, 5 * torch.randn_like(x)) for x in (q, k, v))
    again = TomeAttention(ratio=ratio)(q, k, v, context)
    torch.testing.assert_close(again.transpose(1, 2)[real], out.transpose(1, 2)[real])


def test_prune_without_patch_tokens_drops_nothing():
    q = torch.randn(2, 3, 1, 8)
    context = Context(
        layer=0, nth=0, scale=1.0, x=torch.randn(2, 1, 9), num_prefix_tokens=1, has_cls=True
    )
    torch.testing.assert_close(PruneAttention()(q, q, q, context), q)


def test_low_rank_blocks_refuse_gradients():
    q, k, v, context = call()
    with pytest.raises(NotImplementedError, match="attn=block_svd.*no gradient"):
        BlockSvdAttention()(q.requires_grad_(), k, v, context)


@every_mask
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_merged_attention_equals_its_definition(mask, ratio):
    q, k, v, context = call(attn_mask=mask)
    out = TomeAttention(ratio=ratio)(q, k, v, context)
    keys = mask[:, 0, 0] if mask is KEEP else None
    group, groups = ops.bipartite_matching(k.mean(1), int(ratio * 24), prefix=1, keys=keys)
    kept = torch.ones(2, 25, dtype=torch.bool) if keys is None else keys
    for b in range(2):
        sets = [[t for t in range(25) if group[b, t] == g] for g in range(groups)]
        alive = [[t for t in members if kept[b, t]] for members in sets]
        asks = [some or members for some, members in zip(alive, sets, strict=True)]
        answers = [some for some in alive if some]
        size = torch.tensor([float(len(some)) for some in answers], dtype=q.dtype)
        for h in range(3):
            query = torch.stack([q[b, h, some].mean(0) for some in asks])
            key, value = (torch.stack([x[b, h, s].mean(0) for s in answers]) for x in (k, v))
            logits = 8**-0.5 * query @ key.T + size.log()
            if mask is BIAS:
                between = [[mask[0, h][a][:, c].mean() for c in answers] for a in asks]
                logits = logits + torch.tensor(between, dtype=q.dtype)
            expected = (logits.softmax(-1) @ value)[group[b]]
            torch.testing.assert_close(out[b, h], expected)
