"""Attention to clusters: the slow obvious formula, and the laws that it obeys."""

import pytest
import torch

from fna_lab import ops
from fna_lab.attn.solver.pinv import PinvSolver
from fna_lab.attn.solver.ridge import RidgeSolver
from fna_lab.ops import clustered, nystrom

PINV, RIDGE = PinvSolver(), RidgeSolver(ridge=1e-2)


def random_qkv(batch=2, heads=3, tokens=30, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dim)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def slow(q, k, v, landmarks, members, *, ridge, scale, fitted=None, keep=None, bias=None):
    """One head of one picture, `[n d]`, written out."""
    keep = torch.ones(len(k), dtype=torch.bool) if keep is None else keep
    bias = torch.zeros(len(q), len(k), dtype=q.dtype) if bias is None else bias
    groups = [[t for t in range(len(k)) if members[t] == i] for i in range(len(landmarks))]
    centres = torch.stack([k[g].mean(0) for g in groups])
    sizes = torch.tensor([float(len(g)) for g in groups], dtype=q.dtype)

    def weights(rows):
        logits = scale * q[rows] @ centres.T + bias[rows][:, landmarks]
        numerator = sizes * logits.exp()
        return numerator / numerator.sum(1, keepdim=True)

    rows = landmarks if fitted is None else fitted
    exact = (scale * q[rows] @ k.T + bias[rows]).masked_fill(~keep, -torch.inf).softmax(1) @ v
    kernel, prior = weights(rows), v[landmarks]
    eye = torch.eye(len(landmarks), dtype=q.dtype)
    inverse = torch.linalg.inv(kernel.T @ kernel + ridge * eye) @ kernel.T
    return weights(list(range(len(q)))) @ (prior + inverse @ (exact - kernel @ prior))


@pytest.mark.parametrize("fitted", [None, [5, 11, 22, 0, 9, 21, 14], [0, 21], [7]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_slow_formula(fitted, masked, biased):
    q, k, v = random_qkv()
    landmarks = torch.tensor([[0, 9, 21, 14], [3, 4, 28, 20]])
    points = torch.randn(2, 30, 5, dtype=torch.float64)
    keys = torch.rand(2, 30) > 0.3 if masked else None
    bias = torch.randn(1, 3, 30, 30, dtype=torch.float64) if biased else None
    if masked:
        keys = keys.scatter(1, landmarks, True)
    members = ops.nearest_landmarks(points, landmarks, allowed=keys)
    out = ops.clustered_attention(
        q, k, v, landmarks, members, RIDGE, scale=0.3, keys=keys, bias=bias,
        rows=torch.tensor([fitted, fitted]) if fitted else None,
    )  # fmt: skip
    for b in range(2):
        for h in range(3):
            expected = slow(
                q[b, h], k[b, h], v[b, h], landmarks[b].tolist(), members[b].tolist(),
                ridge=1e-2, scale=0.3, fitted=fitted, keep=None if keys is None else keys[b],
                bias=None if bias is None else bias[0, h],
            )  # fmt: skip
            torch.testing.assert_close(out[b, h], expected)


def test_tokens_join_their_nearest_landmark():
    points = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    landmarks = torch.tensor([[0, 4, 17], [30, 31, 32], [49, 2, 3]])
    allowed = torch.arange(50).expand(3, -1) != 7
    members = ops.nearest_landmarks(points, landmarks, allowed=allowed)
    for b in range(3):
        distance = torch.cdist(points[b], points[b, landmarks[b]])
        assert torch.equal(members[b, allowed[b]], distance.argmin(1)[allowed[b]])
    assert (members[:, 7] == -1).all()


def test_a_landmark_is_its_own_among_equal_points_and_a_repeat_is_nobodys():
    members = ops.nearest_landmarks(torch.zeros(1, 6, 4), torch.tensor([[5, 2, 5, 0]]))
    assert members[0, [5, 2, 0]].tolist() == [0, 1, 3] and 2 not in members[0].tolist()


@pytest.mark.parametrize("way", ["cpu", "cpu, in runs", "other devices"])
def test_means_and_sizes_are_those_of_the_clusters(way, monkeypatch):
    (x, _, _) = random_qkv(tokens=7)
    members = torch.tensor([[0, 0, 1, -1, 1, 1, 3], [2, 2, 2, 2, 2, 2, 2]])
    if way == "other devices":
        product = clustered._product_means
        monkeypatch.setattr(clustered, "_bagged_means", lambda x, *_: product(x, members, 4))
    runs = ops.cluster_runs(members, 4) if way == "cpu, in runs" else None
    means, sizes = ops.cluster_means(x, members, 4, runs=runs)
    assert sizes.tolist() == [[2, 3, 0, 1], [0, 0, 7, 0]]
    torch.testing.assert_close(means[0, :, 1], x[0][:, [2, 4, 5]].mean(1))
    torch.testing.assert_close(means[1, :, 2], x[1].mean(1))
    assert (means[1, :, [0, 1, 3]] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_every_kept_token_a_landmark_is_exact_attention(masked, biased):
    q, k, v = random_qkv(tokens=12)
    marks = torch.arange(3 if masked else 0, 12).expand(2, -1)
    keys = torch.arange(12).expand(2, -1) >= 3 if masked else None
    bias = torch.randn(1, 3, 12, 12, dtype=torch.float64) if biased else None
    members = ops.nearest_landmarks(k.transpose(1, 2).flatten(2), marks, allowed=keys)
    out = ops.clustered_attention(q, k, v, marks, members, PINV, keys=keys, bias=bias)
    logits = (q @ k.mT) * 8**-0.5 + (0 if bias is None else bias)
    if masked:
        logits[..., :3] = -torch.inf
    torch.testing.assert_close(out, logits.softmax(-1) @ v)


def test_equal_values_come_out_as_they_are():
    q, k, v = random_qkv()
    v = v[:, :, :1].expand_as(v)
    marks = torch.tensor([[0, 5, 7], [1, 2, 3]])
    members = ops.nearest_landmarks(k.mean(1), marks)
    torch.testing.assert_close(ops.clustered_attention(q, k, v, marks, members, RIDGE), v)


def test_a_heavy_penalty_leaves_plain_attention_to_clusters():
    q, k, v = random_qkv()
    marks = torch.tensor([[0, 5, 7], [1, 2, 3]])
    members = ops.nearest_landmarks(k.mean(1), marks)
    out = ops.clustered_attention(q, k, v, marks, members, RidgeSolver(ridge=1e12))
    means, sizes = ops.cluster_means(k, members, 3)
    logits = (q @ means.mT) * 8**-0.5 + sizes.log()[:, None, None]
    torch.testing.assert_close(out, logits.softmax(-1) @ ops.gather_tokens(v, marks))


@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tokens_that_see_themselves_count_once(sunk, dtype):
    """Where nothing is fitted: clusters with the values of their landmarks, and oneself."""
    q, k, v = (x.to(dtype) for x in random_qkv())
    gone = torch.zeros(2, 30, dtype=torch.bool)
    gone[0, [7, 9, 29]] = gone[1, 4] = True  # 4 is a landmark where values sink
    marks = torch.tensor([[0, 5, 8], [1, 2, 4 if sunk else 3]])
    taken = ops.token_rows(gone)
    members = ops.nearest_landmarks(k.mean(1), marks, allowed=None if sunk else ~gone)
    out = ops.clustered_attention(
        q, k, v, marks, members, RidgeSolver(ridge=1e12), keys=None if sunk else ~gone,
        removed=taken, own=True, sunk=sunk,
    )  # fmt: skip
    assert out.dtype == dtype
    means, sizes = ops.cluster_means(k.double(), members, 3)
    plain = ops.clustered_attention(
        q, k, v.masked_fill(gone[:, None, :, None], 0), marks, members, RidgeSolver(ridge=1e12)
    )
    torch.testing.assert_close(*(x.transpose(1, 2)[~gone] for x in (out, plain)))
    for b, t in gone.nonzero().tolist():
        weights = sizes[b].clone()
        if sunk:
            weights[members[b, t]] -= 1
        values = v[b][:, marks[b]].double() * ~gone[b, marks[b]][:, None]
        for h in range(3):
            query = 8**-0.5 * q[b, h, t].double()
            shares = torch.cat(
                [weights * (means[b, h] @ query).exp(), (k[b, h, t].double() @ query).exp()[None]]
            )
            expected = shares / shares.sum() @ torch.cat([values[h], v[b, h, t][None]])
            size = expected.abs().max().item()  # in half precision to some units in the last place
            near = 4 * torch.finfo(dtype).eps * size if dtype != torch.float64 else 1e-9
            torch.testing.assert_close(out[b, h, t].double(), expected, rtol=0, atol=near)


def test_removed_tokens_change_nothing():
    q, k, v = random_qkv()
    keys = (torch.arange(30) % 4 > 0).expand(2, -1)
    marks = torch.tensor([[1, 5, 7], [1, 2, 3]])
    points = torch.randn(2, 30, 5)

    def run(k, v, points):
        members = ops.nearest_landmarks(points, marks, allowed=keys)
        return ops.clustered_attention(q, k, v, marks, members, RIDGE, keys=keys)

    gone = ~keys[:, None, :, None]
    other = run(k.masked_fill(gone, 9.0), v.masked_fill(gone, 9.0), points)
    assert torch.equal(other, run(k, v, points))


def test_a_picture_does_not_see_its_batch_mates():
    q, k, v = random_qkv()
    marks = torch.tensor([[0, 5, 7], [1, 2, 3]])
    members = ops.nearest_landmarks(k.mean(1), marks)
    both = ops.clustered_attention(q, k, v, marks, members, RIDGE)
    alone = ops.clustered_attention(q[1:], k[1:], v[1:], marks[1:], members[1:], RIDGE)
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_results_are_finite(dtype, size, masked, few):
    q, k, v = ((size * x).to(dtype) for x in random_qkv(tokens=300))
    marks = torch.tensor([[0, 5, 7], [1, 1, 3]])
    keys = torch.arange(300).expand(2, -1) < 10 if masked else None
    members = ops.nearest_landmarks(k.mean(1), marks, allowed=keys)
    rows = torch.tensor([[5, 9, 4, 7], [0, 0, 0, 2]])[:, : 2 if few else 4]
    out = ops.clustered_attention(
        q, k, v, marks, members, RIDGE, keys=keys, rows=rows, exact_rows=1
    )
    assert out.dtype == dtype and torch.isfinite(out).all()


def test_exact_rows_are_those_of_exact_attention_and_no_others_change():
    q, k, v = random_qkv()
    marks = torch.tensor([[0, 9, 21], [0, 4, 5]])
    members = ops.nearest_landmarks(k.mean(1), marks)
    plain = ops.clustered_attention(q, k, v, marks, members, RIDGE)
    out = ops.clustered_attention(q, k, v, marks, members, RIDGE, exact_rows=1)
    torch.testing.assert_close(out[:, :, :1], ops.attention(q, k, v)[:, :, :1])
    assert torch.equal(out[:, :, 1:], plain[:, :, 1:]) and not torch.allclose(plain, out)


def test_rows_and_landmarks_that_repeat_weigh_once():
    q, k, v = random_qkv()
    points = k.mean(1)
    once = torch.tensor([[0, 9, 21], [3, 4, 28]])
    twice, rows = once[:, [0, 1, 0, 2, 2]], torch.tensor([[9, 0], [4, 3]])
    for fitted in (None, rows):
        want = ops.clustered_attention(
            q, k, v, once, ops.nearest_landmarks(points, once), RIDGE, rows=fitted
        )
        again = None if fitted is None else fitted[:, [0, 0, 1]]
        found = ops.clustered_attention(
            q, k, v, twice, ops.nearest_landmarks(points, twice), RIDGE, rows=again, distinct=False
        )
        torch.testing.assert_close(found, want)


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x.requires_grad_() for x in random_qkv(batch=1, heads=2, tokens=9, dim=4))
    marks = torch.tensor([[0, 3, 5, 8]])
    members = ops.nearest_landmarks(k.detach().mean(1), marks)

    def run(*args):
        return ops.clustered_attention(*args, marks, members, RIDGE, exact_rows=1)

    assert torch.autograd.gradcheck(run, (q, k, v), eps=1e-6, atol=1e-5)


def test_wrong_shapes_are_named():
    q, k, v = random_qkv()
    marks = torch.tensor([[0, 5, 7], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"members long \[2, 30\], got torch.int64 \(2, 29\)"):
        ops.clustered_attention(q, k, v, marks, torch.zeros(2, 29, dtype=torch.long), RIDGE)
    with pytest.raises(ValueError, match=r"landmarks \[2 m\], got \(1, 3\)"):
        ops.nearest_landmarks(k.mean(1), marks[:1])
    with pytest.raises(ValueError, match="dims to be an integer >= 1, got 0"):
        ops.sketch_points(k.mean(1), 0)


@pytest.mark.parametrize("packed", [1, 3, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_tokens_are_rows_without_a_copy(packed, batch):
    host = torch.randn(batch, 7, packed, 3, 4)
    for i in range(packed):
        x = host[:, :, i].transpose(1, 2)
        table = nystrom.packed_rows(x)
        assert table is not None and table.stride() == (12 * packed, 1)
        assert table.untyped_storage().data_ptr() == host.untyped_storage().data_ptr()
        assert torch.equal(table.view(batch, 7, 12), x.transpose(1, 2).flatten(2))


def test_tokens_in_any_other_order_are_no_such_rows():
    heads_first = torch.randn(2, 3, 7, 4)
    cut = torch.randn(2, 9, 3, 4)[:, 1:8].transpose(1, 2)
    learnt = torch.randn(2, 7, 3, 4, requires_grad=True).transpose(1, 2)
    for x in (heads_first, cut, learnt):
        assert nystrom.packed_rows(x) is None


def test_a_packed_batch_without_pictures_has_means():
    k = torch.randn(0, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)[1]  # [0 h n d]
    means, sizes = ops.cluster_means(k, torch.zeros(0, 9, dtype=torch.long), 3)
    assert means.shape == (0, 2, 3, 4)
    assert sizes.shape == (0, 3)


@pytest.mark.parametrize("packed", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_are_gathered_alike_from_packed_rows_and_others(packed, batch):
    x = torch.randn(batch, 7, packed, 3, 4)[:, :, -1].transpose(1, 2)
    marks = torch.tensor([[6, 0, 0, 3], [2, 1, 5, 4]])[:batch]
    want = torch.stack([x[i][:, marks[i]] for i in range(batch)])
    assert torch.equal(ops.gather_tokens(x, marks), want)
    assert torch.equal(ops.gather_tokens(x.contiguous(), marks), want)


@pytest.mark.parametrize("flag", ["own", "sunk"])
def test_flags_about_removed_tokens_need_some(flag):
    q, k, v = random_qkv()
    marks = torch.tensor([[0, 5, 7], [1, 2, 3]])
    members = ops.nearest_landmarks(k.mean(1), marks)
    with pytest.raises(ValueError, match=f"Expected removed tokens with .*{flag}=True"):
        ops.clustered_attention(q, k, v, marks, members, RIDGE, **{flag: True})
