"""The landscape of tokens: what is measured, whatever the batches, and how it is coloured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fna_lab import ops
from fna_lab.mask.detector.base import Evidence
from fna_lab.mask.detector.ncut import NcutDetector
from fna_lab.metric.topology import Topology
from fna_lab.report.topology import ncut_colours


def pictures(seed: int = 0) -> torch.Tensor:
    """Three groups of tokens that lie apart, in every one of four pictures `[4 40 6]`."""
    generator = torch.Generator().manual_seed(seed)
    centres = 30 * torch.eye(6)[:3]
    label = torch.randint(3, (4, 40), generator=generator)
    return centres[label] + torch.randn(4, 40, 6, generator=generator)


def measured(x: torch.Tensor, size: int, kept: torch.Tensor | None = None, **settings: Any):
    found = Topology(**settings)
    found.choose(1, 3, 8)
    for i in range(0, len(x), size):
        found.add(x[i : i + size], None if kept is None else kept[i : i + size])
    return found.results()


def test_all_pictures_are_cut_together_whatever_the_batches() -> None:
    x = pictures()
    one, four = measured(x, 1, eigenvectors=6), measured(x, 4, eigenvectors=6)
    for name in one:
        assert torch.equal(one[name], four[name]), name
    assert one["topology_blocks"].tolist() == [1, 2]
    pool = x.reshape(1, -1, 6)
    cut = ops.normalized_cut(pool, 6)
    wanted = cut.vectors[0, :, 1:].view(4, 40, 5).float() * 160**0.5
    torch.testing.assert_close(one["map_ncut"], wanted)
    torch.testing.assert_close(one["ncut_values"], cut.values[0, 1:])
    centred = (pool[0] - pool[0].mean(0)).double().numpy()
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    place = np.abs(centred @ axes.T).reshape(4, 40, 2)
    np.testing.assert_allclose(one["map_place"].abs(), place, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", [None, 60])
def test_padding_takes_no_part(samples: int | None) -> None:
    x = pictures()
    kept = torch.ones(4, 40, dtype=torch.bool)
    kept[1, 30:], kept[3, 12:] = False, False
    settings = {"eigenvectors": 5, "samples": samples}
    found = measured(x, 2, kept, **settings)
    junk = measured(torch.where(kept[..., None], x, 1e4), 4, kept, **settings)
    for name in ("map_ncut", "map_place"):
        assert found[name][~kept].isnan().all() and not found[name][kept].isnan().any()
        assert torch.equal(found[name][kept], junk[name][kept])
    assert int(found["topology_samples"].max()) < int(kept.sum())
    few = torch.zeros(4, 40, dtype=torch.bool)
    few[0, :4] = True
    assert measured(x, 4, few) == {}


def test_groups_get_colours_of_their_own() -> None:
    pytest.importorskip("sklearn")
    x = pictures()
    found = measured(x, 4, eigenvectors=4)
    vectors, samples = found["map_ncut"].numpy(), found["topology_samples"].numpy()
    vectors[3, 20:] = np.nan
    samples = samples[samples < np.isfinite(vectors[..., 0]).sum()]
    colours, said = ncut_colours(vectors, samples)
    assert said == "t-SNE of 3 eigenvectors of the normalised cut"
    assert np.isnan(colours[3, 20:]).all() and np.isfinite(colours[:3]).all()
    assert np.nanmin(colours) == 0 and np.nanmax(colours) == 1
    again, _ = ncut_colours(vectors, samples)
    np.testing.assert_array_equal(again, colours)
    label = (x[:3] @ torch.eye(6)[:, :3]).argmax(-1).numpy()
    means = np.stack([colours[:3][label == g].mean(0) for g in range(3)])
    within = max(np.linalg.norm(colours[:3][label == g] - means[g], axis=1).mean() for g in (0, 1))
    apart = min(np.linalg.norm(means[a] - means[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert apart > 1.5 * within


def test_without_scikit_learn_eigenvectors_are_the_colours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("sklearn", "sklearn.manifold", "sklearn.neighbors"):
        monkeypatch.setitem(sys.modules, name, None)
    found = measured(pictures(), 4, eigenvectors=5)
    vectors = found["map_ncut"].numpy()
    colours, said = ncut_colours(vectors, found["topology_samples"].numpy())
    assert said == "first three eigenvectors of the normalised cut"
    low, high = np.percentile(vectors.reshape(-1, 4)[:, :3], (5, 95), axis=0)
    wanted = np.clip((vectors[..., :3] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(colours, wanted, atol=1e-5)


def test_tokens_that_were_left_are_a_reference_of_the_detector(tmp_path: Path) -> None:
    x = pictures()
    found = measured(x, 2, tokens=True)
    assert torch.equal(found["tokens"], x.reshape(-1, 6))
    assert "tokens" not in measured(x, 2)
    np.savez(tmp_path / "arrays.npz", **{name: value.numpy() for name, value in found.items()})
    detector = NcutDetector(reference=str(tmp_path / "arrays.npz"), component=2, samples=None)
    scores = detector.scores(Evidence(x=x, num_prefix_tokens=0, has_cls=False))
    torch.testing.assert_close(scores, found["map_ncut"][..., 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"places": -1}, "task.topology.places=-1: expected an integer >= 0, or null"),
        ({"heights": True}, "task.topology.heights=True"),
        ({"eigenvectors": None}, "task.topology.eigenvectors=None: expected an integer >= 4."),
        ({"samples": 3}, "task.topology.samples=3: expected an integer >= 4, or null"),
        ({"tokens": 1}, "task.topology.tokens=1: expected true or false"),
        ({"heights": 8}, "task.topology.heights=8: expected a block from 0 to 7"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Topology(**settings).choose(1, 3, 8)
