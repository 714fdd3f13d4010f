"""Detectors, suppression, retrieval and cost: published values, laws, wrong arguments."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fna_lab import ops

REFERENCE = np.load(Path(__file__).parent / "fixtures" / "reference.npz")


def reference(name):
    return torch.from_numpy(REFERENCE[name])


def test_norm_gap_gives_the_published_tokens():
    assert torch.equal(ops.norm_gap(reference("gap_x")), reference("gap_massive"))


@pytest.mark.parametrize(
    ("settings", "key"),
    [({}, "sinks"), ({"ratio": 0.3}, "massive"), ({"top": 1}, "top1")],
)
def test_cls_proxy_gives_the_published_tokens(settings, key):
    pattern = reference("proxy_pattern")
    assert torch.equal(ops.cls_proxy(pattern, **settings), reference(f"proxy_{key}"))
    assert torch.equal(ops.cls_proxy(pattern[:, :, :1], **settings), reference(f"proxy_{key}"))


def test_suppression_gives_the_published_values():
    out = ops.suppression(*(reference(f"supp_{x}") for x in ("x", "v", "out_weight")))
    torch.testing.assert_close(out, reference("supp_out"), rtol=1e-6, atol=1e-9)


def test_recall_gives_the_published_values():
    found = ops.recall_at_k(reference("recall_sim"), reference("recall_owner").long(), (1, 2, 5))
    for way in ("t2i", "i2t"):
        expected = dict(zip((1, 2, 5), reference(f"recall_{way}").tolist(), strict=True))
        assert found[way] == pytest.approx(expected, rel=1e-6)


def hidden(batch=3, tokens=20, channels=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, channels, generator=generator)
    x[1, 7] *= 100
    return x


def test_per_picture_detection_does_not_see_batch_mates():
    x = hidden()
    for detect in (
        lambda x: ops.norm_gap(x, per_picture=True, min_gap=1.0),
        lambda x: ops.norm_ratio(x, ratio=5.0),
    ):
        found = detect(x)
        assert found.nonzero().tolist() == [[1, 7]]
        assert torch.equal(found, torch.cat([detect(picture) for picture in x.split(1)]))


def test_prefix_tokens_are_never_massive():
    x = hidden()
    x[:, 0] *= 1000
    assert not ops.norm_ratio(x, prefix=1)[:, 0].any()
    assert not ops.norm_gap(x, prefix=1, per_picture=True)[:, 0].any()
    assert ops.norm_ratio(x, prefix=0)[:, 0].all()


def test_tokens_without_a_norm_hide_no_gap():
    x = hidden()
    x[:, [3, 4]], x[:, 5] = 0, 1000 * x[:, 5]
    assert ops.norm_gap(x, per_picture=True, min_gap=2.0)[:, 5].all()


def test_the_row_of_cls_is_the_first_row_of_the_attention():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    pattern = (q @ k.mT * 0.5).softmax(-1)
    torch.testing.assert_close(ops.cls_row(q, k, scale=0.5), pattern[:, :, :1])
    torch.testing.assert_close(ops.incoming(pattern).sum(1), torch.ones(2, dtype=torch.float64))


def test_found_tokens_are_not_found_again():
    pattern = reference("proxy_pattern")
    first = ops.cls_proxy(pattern, top=1)
    second = ops.cls_proxy(pattern, top=1, found=first)
    assert not (first & second).any()
    everything = ops.cls_proxy(pattern)
    assert ((first | second) & ~everything).sum() == 0


def test_knn_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    centres = torch.eye(3, 8).double()
    draw = torch.randn(80, 8, generator=generator, dtype=torch.float64)
    classes = torch.cat([labels, torch.arange(20) % 3])
    x = torch.nn.functional.normalize(centres[classes] + 0.4 * draw, dim=1)
    bank, queries = x[:60], x[60:]
    votes = ops.knn_probabilities(queries, bank, labels, num_classes=3, ks=(5,))
    judge = KNeighborsClassifier(
        5, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.numpy(), labels.numpy())
    np.testing.assert_allclose(votes[5].numpy(), judge.predict_proba(queries.numpy()), rtol=1e-6)


def test_flops_grow_as_the_formulas_say():
    assert ops.attention_flops(2000, 6, 64) == 4 * ops.attention_flops(1000, 6, 64)
    assert ops.subset_flops(1000, 6, 64, 1000) == ops.attention_flops(1000, 6, 64)


def test_break_even_is_where_the_curves_cross():
    def nystrom(n):
        return ops.nystrom_flops(n, 6, 64, 64, solve=ops.ridge_flops(64, 64, 64))

    def exact(n):
        return ops.attention_flops(n, 6, 64)

    n = ops.break_even_tokens(nystrom, exact, least=64)
    assert nystrom(n) < exact(n) and nystrom(n - 1) >= exact(n - 1)
    assert ops.break_even_tokens(exact, exact) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.norm_gap(torch.zeros(2, 5)), "x to have shape"),
        (lambda: ops.norm_gap(torch.zeros(2, 2, 5), prefix=1), "at least two patch tokens"),
        (lambda: ops.norm_ratio(hidden(), ratio=0), "ratio to be > 0, got 0"),
        (lambda: ops.cls_proxy(torch.zeros(1, 1, 3, 5)), "pattern to be"),
        (lambda: ops.cls_proxy(torch.zeros(1, 1, 5, 5), top=0), "top to be an integer"),
        (lambda: ops.recall_at_k(torch.zeros(2, 3), torch.zeros(2), [1]), "owner to have shape"),
        (lambda: ops.recall_at_k(torch.zeros(2, 3), torch.zeros(3), [0]), "ks to be"),
        (
            lambda: ops.knn_probabilities(
                torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(3), num_classes=2, ks=[4]
            ),
            "from 1 to 3",
        ),
        (lambda: ops.suppression(hidden(), torch.zeros(3, 2, 20, 4), torch.zeros(8, 4)), "to fit"),
        (lambda: ops.attention_flops(0, 1, 1), "tokens to be an integer >= 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
