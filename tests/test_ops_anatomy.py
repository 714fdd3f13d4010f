"""The maths of token anatomy against slow, obvious formulas."""

from __future__ import annotations

import pytest
import torch

from fna_lab import ops


def tokens(prefix: int = 1, cls: bool = True, seed: int = 0, batch: int = 3, n: int = 12):
    """Random classes of tokens, every class present but registers where there are none."""
    generator = torch.Generator().manual_seed(seed)
    massive = torch.rand(batch, n, generator=generator) < 0.3
    artifact = torch.rand(batch, n, generator=generator) < 0.3
    massive[:, -1], artifact[:, -2] = True, True
    massive[:, -2] = False
    massive[:, -3], artifact[:, -3] = False, False
    return ops.class_members(ops.token_classes(massive, artifact, prefix=prefix, has_cls=cls))


@pytest.mark.parametrize(("prefix", "cls"), [(0, False), (1, True), (5, True), (4, False)])
def test_every_token_has_exactly_one_class(prefix: int, cls: bool) -> None:
    members = tokens(prefix, cls)
    assert members.shape == (3, 12, 5) and (members.sum(-1) == 1).all()
    assert members[:, :, 0].sum(1).tolist() == [int(cls)] * 3
    assert members[:, :, 1].sum(1).tolist() == [prefix - int(cls)] * 3
    assert not members[:, :prefix, 2:].any()


def test_sums_means_and_maxima_by_class_are_those_of_loops() -> None:
    members = tokens(5)
    members[1, :, 3] = False  # a picture without artifacts
    values, matrix = torch.randn(3, 12, 4), torch.rand(3, 2, 12, 12)
    mean, most = ops.class_mean(values, members), ops.class_max(values[..., 0], members)
    sums = ops.class_sums(matrix, members, members)
    for b in range(3):
        for k in range(5):
            mine = members[b, :, k]
            if not mine.any():
                assert mean[b, k].isnan().all() and most[b, k].isnan()
                continue
            torch.testing.assert_close(mean[b, k], values[b, mine].mean(0))
            torch.testing.assert_close(most[b, k], values[b, mine, 0].max())
            for other in range(5):
                wanted = matrix[b][:, mine][:, :, members[b, :, other]].sum((1, 2))
                torch.testing.assert_close(sums[b, :, k, other], wanted)
    assert mean[1, 3].isnan().all()


def test_class_suppression_is_the_mean_of_the_matrix() -> None:
    members, x = tokens(5), torch.randn(3, 12, 16)
    v, weight = torch.randn(3, 4, 12, 4), torch.randn(16, 16)
    found = ops.class_suppression(x, v, weight, members)
    matrix = ops.suppression(x, v, weight)
    for b, k, other in [(0, 0, 2), (1, 4, 4), (2, 2, 3), (0, 1, 4)]:
        wanted = matrix[b][:, members[b, :, k]][:, :, members[b, :, other]].mean((1, 2))
        torch.testing.assert_close(found[b, :, k, other], wanted)


def test_a_token_without_a_direction_leaves_the_classes_of_others_alone() -> None:
    members, x = tokens(5), torch.randn(3, 12, 16)
    members[0, 7] = False  # padding
    x[0, 7] = 0
    found = ops.class_suppression(x, torch.randn(3, 4, 12, 4), torch.randn(16, 16), members)
    there = members[0].any(0)
    assert found[0][:, there][:, :, there].isfinite().all()


def test_alignments_are_the_cosines_of_loops() -> None:
    members, x = tokens(1), torch.randn(3, 12, 16)
    q, k, v = torch.randn(3, 3, 4, 12, 4)
    weight = torch.randn(16, 16)
    qk, ov = ops.qk_alignment(q, k), ops.ov_alignment(x, v, weight, members)
    for b in range(3):
        for h in range(4):
            wanted = torch.cosine_similarity(q[b, h].mean(0)[None], k[b, h])
            torch.testing.assert_close(qk[b, h], wanted)
        sent = torch.cat([v[b, h] for h in range(4)], dim=-1) @ weight.T
        pairs = torch.cosine_similarity(x[b][:, None], sent[None], dim=-1)
        left, right = members[b, :, 4], members[b, :, 2]
        torch.testing.assert_close(ov[b, 4, 2], pairs[left][:, right].mean())
        torch.testing.assert_close(ov[b, 2, 5], pairs.diagonal()[right].mean())


def test_components_are_those_of_the_singular_values() -> None:
    x = torch.randn(2, 30, 8) * torch.linspace(3, 0.2, 8)
    scores, shares = ops.principal_components(x, 3)
    for b in range(2):
        centred = (x[b] - x[b].mean(0)).double()
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        wanted = u[:, :3] * s[:3]
        wanted = wanted * wanted.gather(0, wanted.abs().argmax(0)[None]).sign()
        torch.testing.assert_close(scores[b], wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(shares[b], (s.square() / s.square().sum())[:3])


def test_top_activations_say_where() -> None:
    x = torch.randn(2, 5, 7)
    x[0, 3, 2], x[1, 0, 6] = -40.0, 30.0
    values, places = ops.top_activations(x, 3)
    assert values[:, 0].tolist() == [40.0, 30.0]
    assert places[:, 0].tolist() == [3 * 7 + 2, 6]
    assert (values.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ops.class_members(torch.ones(2, 3)), "classes to be a long tensor"),
        (lambda: ops.class_mean(torch.ones(2, 3).long(), torch.ones(2, 3, 5).bool()), "values"),
        (lambda: ops.class_sums(torch.ones(1, 1, 2, 3), torch.ones(1, 3, 5).bool(),
                                torch.ones(1, 3, 5).bool()), "to fit"),
        (lambda: ops.top_activations(torch.ones(1, 2, 3), 7), "num to be an integer from 1 to 6"),
        (lambda: ops.principal_components(torch.ones(1, 2, 3), 3),
         "num to be an integer from 1 to 2"),
        (lambda: ops.per_head(torch.ones(4, 7), 2), "of 2 heads"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        call()
