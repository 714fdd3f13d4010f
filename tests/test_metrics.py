"""Metrics against independent references; time and memory against what is known of them."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from fna_lab import ops
from fna_lab.attn.exact import ExactAttention
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.metric import cost
from fna_lab.metric.accuracy import ClassAccuracy
from fna_lab.metric.fidelity import LayerError, NeighbourAgreement, cosine, relative_errors

CPU = torch.device("cpu")


@pytest.mark.parametrize("balanced", [False, True])
def test_accuracy_equals_sklearn_whatever_the_batches(balanced: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 6, (211,), generator=generator) ** 2 % 7  # uneven, one class absent
    guess = torch.where(torch.rand(211, generator=generator) < 0.6, label, (label + 1) % 7)
    wanted = (balanced_accuracy_score if balanced else accuracy_score)(label, guess)
    for sizes in ([211], [100, 100, 11]):
        metric = ClassAccuracy(7, balanced=balanced)
        for g, y in zip(guess.split(sizes), label.split(sizes), strict=True):
            metric.update(g, y)
        assert metric.compute().item() == pytest.approx(wanted, abs=1e-12)


def test_knn_votes_equal_sklearn() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(200) % 5
    points = centres[labels] + 2 * torch.randn(200, 16, generator=generator)
    points = torch.nn.functional.normalize(points.double(), dim=-1)
    bank, queries = points[:150], points[150:]
    votes = ops.knn_probabilities(
        queries, bank, labels[:150], num_classes=5, ks=(1, 10, 20), temperature=0.07
    )
    for k, vote in votes.items():

        def weights(distance: np.ndarray) -> np.ndarray:
            return np.exp((1 - distance) / 0.07)

        reference = KNeighborsClassifier(k, metric="cosine", weights=weights)
        reference.fit(bank.numpy(), labels[:150].numpy())
        assert (vote.argmax(1).numpy() == reference.predict(queries.numpy())).all()


def test_neighbour_agreement_equals_sklearn() -> None:
    generator = torch.Generator().manual_seed(2)
    exact = torch.randn(40, 8, generator=generator)
    patched = exact + 0.4 * torch.randn(40, 8, generator=generator)

    def nearest(x: torch.Tensor) -> np.ndarray:
        found = NearestNeighbors(n_neighbors=2, metric="cosine").fit(x.numpy())
        return found.kneighbors(x.numpy(), return_distance=False)[:, 1]

    metric = NeighbourAgreement()
    for e, p in zip(exact.split(16), patched.split(16), strict=True):
        metric.update(e, p)
    wanted = (nearest(exact) == nearest(patched)).mean()
    assert 0 < wanted < 1 and metric.compute().item() == pytest.approx(wanted)


def test_layer_error_is_the_mean_over_pictures() -> None:
    exact = [torch.randn(5, 7, 4) for _ in range(3)]
    patched = [x + 0.1 * torch.randn_like(x) for x in exact]
    errors = relative_errors(exact, patched)
    wanted = [
        [np.linalg.norm(p[i] - e[i]) / np.linalg.norm(e[i]) for i in range(5)]
        for e, p in zip(
            [x.double().numpy() for x in exact], [x.double().numpy() for x in patched], strict=True
        )
    ]
    metric = LayerError(3)
    metric.update(errors[:2])
    metric.update(errors[2:])
    assert np.allclose(errors.numpy(), np.array(wanted).T)
    assert np.allclose(metric.compute().numpy(), np.array(wanted).mean(1))
    assert relative_errors(exact, exact).max() == 0


def test_cosine_of_equal_vectors_is_one() -> None:
    x = torch.randn(50, 384)
    x[0] = 0
    assert (cosine(x, x) == 1).all()
    assert cosine(x[1:], -x[1:]).max() <= -1 + 1e-12


def test_latency_is_a_median_of_interleaved_rounds() -> None:
    order = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    def fast() -> None:
        order.append("fast")
        time.sleep(0.002)

    found = cost.latency({"slow": (slow, None), "fast": (fast, None)}, CPU, rounds=5)
    assert order == ["slow", "fast"] * 6  # the first pair is warm-up
    assert found["slow"]["total"] > 2 * found["fast"]["total"]
    assert found["slow"]["rounds"] == 5


def test_a_ratio_is_the_median_of_those_within_a_round() -> None:
    # The machine is slow in the second round, in which both are.
    times = {"a": {"totals": [1.0, 8.0, 2.0]}, "b": {"totals": [2.0, 16.0, 6.0]}}
    assert cost.ratio(times, "b", "a") == 2.0
    assert cost.ratio(times, "a", "b") == 0.5


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    mib = torch.ones(2**18)  # there before: not counted, nor its views

    def run() -> None:
        a = mib + 1  # 1 MiB
        b = a * 2  # 2 MiB alive
        del a
        c = torch.cat([b, b])  # 3 MiB alive
        del b
        c.view(2, -1).sum()

    assert cost.peak_memory(run, CPU) == pytest.approx(3 * 2**20, abs=64)
    assert cost.peak_memory(lambda: mib.view(2, -1), CPU) == 0


def test_flops_follow_the_formulas() -> None:
    shape = dict(heads=6, embed_dim=384, layers=6)
    exact = cost.flops(ExactAttention(), tokens=1370, **shape)
    assert exact["attention_gflops"] == exact["exact_attention_gflops"]
    assert exact["break_even_tokens"] is None
    variant = FastNystromAttention(num_landmarks=64)
    fna = cost.flops(variant, tokens=1370, **shape)
    assert fna["attention_gflops"] < exact["attention_gflops"] / 4  # type: ignore[operator]
    even = int(fna["break_even_tokens"])  # type: ignore[arg-type]
    for tokens, cheaper in ((even - 1, False), (even, True)):
        found = cost.flops(variant, tokens=tokens, **shape)
        assert (found["attention_gflops"] < found["exact_attention_gflops"]) == cheaper  # type: ignore[operator]
