"""Normalised cuts against dense solvers of scipy and scikit-learn, and the laws they keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fna_lab import ops

scipy_linalg = pytest.importorskip("scipy.linalg")


def groups(sizes, apart=8.0, channels=12, seed=0, batch=1):
    """Sets of tokens in groups whose centres lie so far apart; label `[n]`."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centre = apart * torch.eye(channels, dtype=torch.float64)[label]
    noise = torch.randn(batch, sum(sizes), channels, generator=generator, dtype=torch.float64)
    return centre + noise, label


def dense(x, bandwidth):
    """W one entry at a time, and the solution of (D - W) y = (1 - value) D y with y' D y = 1."""
    size = len(x)
    affinity = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            affinity[i, j] = math.exp(-np.sum((x[i] - x[j]) ** 2) / (2 * bandwidth**2))
    degree = np.diag(affinity.sum(1))
    values, vectors = scipy_linalg.eigh(degree - affinity, degree)
    return affinity, 1 - values, vectors


def test_the_cut_solves_the_generalised_problem():
    x, _ = groups([30, 14, 6], apart=4.0)
    cut = ops.normalized_cut(x, 8, bandwidth=3.0)
    affinity, values, vectors = dense(x[0].numpy(), 3.0)
    np.testing.assert_allclose(cut.degree[0], affinity.sum(1), rtol=1e-10)
    np.testing.assert_allclose(cut.values[0], values[:8], atol=1e-10)
    ours = (cut.vectors[0] / cut.degree[0].sqrt()[:, None]).numpy()
    sign = np.sign((ours * vectors[:, :8]).sum(0))
    np.testing.assert_allclose(ours, vectors[:, :8] * sign, atol=1e-8)


def test_the_cut_is_the_spectral_embedding_of_scikit_learn():
    """Which leaves the affinity of a token to itself out: of 300 tokens that is little."""
    manifold = pytest.importorskip("sklearn.manifold")
    x, _ = groups([170, 90, 40], apart=8.0, seed=1)
    affinity, _, _ = dense(x[0].numpy(), 5.0)
    theirs = manifold.spectral_embedding(
        affinity, n_components=3, drop_first=False, eigen_solver="arpack", random_state=0
    )
    cut = ops.normalized_cut(x, 3, bandwidth=5.0)
    ours = (cut.vectors[0] / cut.degree[0].sqrt()[:, None]).numpy()
    for k in range(3):
        a, b = ours[:, k], theirs[:, k]
        assert abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


@pytest.mark.parametrize("samples", [None, 25])
def test_the_first_is_constant_and_the_rest_orthogonal_to_it_in_the_metric_of_degrees(samples):
    x, _ = groups([30, 14, 6], apart=3.0, batch=2)
    cut = ops.normalized_cut(x, 9, samples=samples)
    y = cut.vectors / cut.degree.sqrt()[..., None]
    gram = y.mT @ torch.diag_embed(cut.degree) @ y
    torch.testing.assert_close(gram, torch.eye(9).double().expand(2, 9, 9), atol=1e-8, rtol=0)
    torch.testing.assert_close(y[..., 0], y[:, :1, 0].expand(2, 50))
    assert torch.equal(cut.values[:, 0], torch.ones(2).double())
    assert (cut.values.diff(dim=1) <= 1e-12).all() and (cut.values >= 0).all()


@pytest.mark.parametrize("samples", [None, 30])
def test_groups_without_affinity_are_told_apart(samples):
    x, label = groups([40, 15, 5], apart=200.0)
    cut = ops.normalized_cut(x, 4, samples=samples, bandwidth=4.0)
    torch.testing.assert_close(cut.values[0, :3], torch.ones(3).double())
    assert cut.values[0, 3] < 0.5
    # In the units of D^1/2 every vector of value 1 is constant on each group.
    y = cut.vectors[0, :, :3] / cut.degree[0].sqrt()[:, None]
    means = torch.stack([y[label == g].mean(0) for g in range(3)])
    torch.testing.assert_close(y, means[label], atol=1e-4, rtol=1e-4)
    assert torch.cdist(means, means).add(torch.eye(3)).min() > 0.01


@pytest.mark.parametrize("rare", [1, 5, 20])
def test_the_smaller_group_is_positive_and_its_entries_are_known(rare):
    """Two groups apart: u is (d_other / d_own / d)^1/2 of each token, in sums of degrees."""
    x, label = groups([60 - rare, rare], apart=300.0)
    cut = ops.normalized_cut(x, 2, bandwidth=4.0)
    degree, u = cut.degree[0], cut.vectors[0, :, 1]
    total = torch.stack([degree[label == g].sum() for g in (0, 1)])
    wanted = (degree * total.flip(0)[label] / total[label] / total.sum()).sqrt()
    torch.testing.assert_close(u, torch.where(label == 1, wanted, -wanted), atol=1e-8, rtol=1e-6)
    assert (u[label == 1] > 0).all()


def test_as_many_samples_as_tokens_are_exact():
    """And one sample fewer, by the other formula, all but is."""
    x, _ = groups([30, 14, 6], apart=3.0, channels=4)
    exact = ops.normalized_cut(x, 6)
    for same in (ops.normalized_cut(x, 6, samples=50), ops.normalized_cut(x, 6, samples=99)):
        assert torch.equal(same.vectors, exact.vectors)
    twice = torch.cat([x, x], dim=1)  # 50 samples of 100 tokens in pairs: again nothing is lost
    whole = ops.normalized_cut(twice, 6, bandwidth=4.0)
    sampled = ops.normalized_cut(twice, 6, samples=50, bandwidth=4.0)
    torch.testing.assert_close(sampled.values, whole.values, atol=1e-7, rtol=0)
    torch.testing.assert_close(sampled.degree, whole.degree, rtol=1e-6, atol=0)
    torch.testing.assert_close(sampled.vectors, whole.vectors, atol=1e-5, rtol=0)


def test_samples_by_the_slow_formula():
    x, _ = groups([20, 10], apart=3.0, channels=3, seed=4)
    cut = ops.normalized_cut(x, 4, samples=12, bandwidth=3.0)
    chosen = ops.farthest_points(x.float(), 12, sketch=32)[0]
    affinity, _, _ = dense(x[0].numpy(), 3.0)
    columns = affinity[:, chosen]
    approximate = columns @ np.linalg.pinv(affinity[np.ix_(chosen, chosen)]) @ columns.T
    degree = approximate.sum(1)
    values, vectors = np.linalg.eigh(approximate / np.sqrt(np.outer(degree, degree)))
    np.testing.assert_allclose(cut.values[0], values[::-1][:4], atol=1e-6)
    overlap = np.abs((cut.vectors[0].numpy() * vectors[:, ::-1][:, :4]).sum(0))
    np.testing.assert_allclose(overlap, 1, atol=1e-5)


def test_more_samples_come_closer():
    x, _ = groups([300, 150, 50], apart=3.0, channels=5)
    exact = ops.normalized_cut(x, 4)
    errors = []
    for samples in (20, 60, 200):
        near = ops.normalized_cut(x, 4, samples=samples)
        errors.append(1 - (near.vectors * exact.vectors).sum(1).abs().min().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_the_scale_of_an_entry_goes_with_the_root_of_the_number_of_tokens():
    x, label = groups([90, 10], apart=6.0)
    small = ops.normalized_cut(x, 2, bandwidth=5.0).vectors[0, :, 1]
    large = ops.normalized_cut(x.repeat(1, 9, 1), 2, bandwidth=5.0).vectors[0, :100, 1]
    torch.testing.assert_close(small * 100**0.5, large * 900**0.5, atol=1e-8, rtol=0)


@pytest.mark.parametrize("samples", [None, 20])
def test_tokens_left_out_change_nothing_and_sets_are_cut_alone(samples):
    x, _ = groups([25, 10, 5], apart=3.0, batch=3)
    allowed = torch.rand(3, 40, generator=torch.Generator().manual_seed(2)) < 0.8
    cut = ops.normalized_cut(x, 5, samples=samples, allowed=allowed)
    assert (cut.vectors[~allowed] == 0).all() and (cut.degree[~allowed] == 0).all()
    changed = torch.where(allowed[..., None], x, 1e3)
    again = ops.normalized_cut(changed, 5, samples=samples, allowed=allowed)
    torch.testing.assert_close(again.vectors, cut.vectors, atol=1e-6, rtol=0)
    for b in range(3):
        mine = x[b : b + 1, allowed[b]]
        alone = ops.normalized_cut(mine, 5, samples=samples)
        torch.testing.assert_close(alone.values[0], cut.values[b], atol=1e-9, rtol=0)
        torch.testing.assert_close(alone.vectors[0], cut.vectors[b, allowed[b]], atol=1e-6, rtol=0)


def test_the_same_tokens_give_the_same_cut_bit_by_bit():
    x, _ = groups([200, 100], apart=2.0)
    for samples in (None, 64):
        one, two = (ops.normalized_cut(x, 9, samples=samples) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_bandwidth_is_a_deviation_that_outliers_leave_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20000, 6, generator=generator) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 50
    wanted = math.sqrt(1 + 4 + 9 + 16 + 25 + 36)
    assert ops.rbf_bandwidth(x).item() == pytest.approx(wanted, rel=0.02)
    low, high = np.quantile(x[0].numpy(), [0.022750131948179, 0.977249868051821], axis=0)
    exact = np.linalg.norm(high - low) / 4
    assert ops.rbf_bandwidth(x).item() == pytest.approx(exact, rel=1e-6)
    x[:, :100] *= 100
    assert ops.rbf_bandwidth(x).item() == pytest.approx(wanted, rel=0.03)
    # Nearly all equal: the plain deviation; all equal: 1, and one value.
    x = torch.zeros(1, 100, 6)
    x[0, 0, 0] = 10.0
    assert ops.rbf_bandwidth(x).item() == pytest.approx(10 * math.sqrt(0.01 * 0.99))
    same = torch.ones(1, 10, 6)
    assert ops.rbf_bandwidth(same).item() == 1
    cut = ops.normalized_cut(same, 3)
    torch.testing.assert_close(cut.values, torch.tensor([[1.0, 0, 0]]).double())


def test_an_extension_gives_tokens_of_the_reference_their_own_entries():
    x, label = groups([60, 20, 10], apart=5.0)
    for samples in (None, 70):
        cut = ops.normalized_cut(x, 3, samples=samples, bandwidth=5.0)
        back = ops.extend_cut(x.expand(2, -1, -1), cut, x, 5.0)
        tolerance = 1e-9 if samples is None else 1e-2
        for one in back:
            torch.testing.assert_close(one, cut.vectors[0], atol=tolerance, rtol=0)
    cut = ops.normalized_cut(x, 3, bandwidth=5.0)
    new, _ = groups([60, 20, 10], apart=5.0, seed=9)
    placed = ops.extend_cut(new, cut, x, 5.0)[0]
    for g in range(3):
        near = cut.vectors[0, label == g].mean(0)
        torch.testing.assert_close(placed[label == g].mean(0), near, atol=0.02, rtol=0)
    far = ops.extend_cut(new + 1e6, cut, x, 5.0)
    assert torch.equal(far, torch.zeros_like(far))


def test_aligned_axes_are_the_groups():
    sizes = [30, 12, 8, 5]
    x, label = groups(sizes, apart=40.0, batch=3)
    order = torch.randperm(55, generator=torch.Generator().manual_seed(0))
    x, label = x[:, order], label[order]
    cut = ops.normalized_cut(x, 4, bandwidth=6.0)
    soft = ops.align_axes(cut.vectors)
    for b in range(3):
        member = soft[b].argmax(1)
        assert len(set(zip(member.tolist(), label.tolist(), strict=True))) == 4
        assert soft[b].amax(1).min() > 0.95
    # A rotation: lengths and angles of the rows stay.
    rows = cut.vectors / cut.vectors.norm(dim=2, keepdim=True)
    torch.testing.assert_close(soft @ soft.mT, rows @ rows.mT)
    left = torch.ones(3, 55, dtype=torch.bool)
    left[:, :5] = False
    assert (ops.align_axes(cut.vectors, allowed=left)[:, :5] == 0).all()


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"num": 0}, ValueError, "num to be an integer from 1 to 9, got 0"),
        ({"num": 10}, ValueError, "from 1 to 9, got 10"),
        ({"num": 5, "samples": 4}, ValueError, "from 1 to 4, got 5"),
        ({"samples": 0}, ValueError, "samples to be an integer >= 1 or None"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth to be > 0, got 0.0"),
        ({"bandwidth": torch.ones(3)}, ValueError, r"a number or \[2\]"),
        ({"allowed": torch.ones(2, 9)}, TypeError, "bool"),
    ],
)
def test_wrong_arguments_are_named(more, error, said):
    settings = {"num": 3} | more
    with pytest.raises(error, match=said):
        ops.normalized_cut(torch.rand(2, 9, 3), **settings)


def test_an_extension_checks_its_reference():
    x = torch.rand(1, 9, 3)
    cut = ops.normalized_cut(x, 2)
    with pytest.raises(ValueError, match=r"reference to be \[1 m 4\]"):
        ops.extend_cut(torch.rand(1, 5, 4), cut, x, 1.0)
    with pytest.raises(ValueError, match="cut to be of the 8 reference tokens"):
        ops.extend_cut(x, cut, x[:, :8], 1.0)
