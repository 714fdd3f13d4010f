"""Agreement of detectors: numbers against scipy and sets by hand, and the task end to end."""

from __future__ import annotations

import io
import math
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from rich.console import Console, Group
from scipy.stats import rankdata, spearmanr

from fna_lab import ops
from fna_lab.backbone.patch import patch
from fna_lab.backbone.timm import TimmBackbone
from fna_lab.data.photos import PhotosData
from fna_lab.data.shapes import ShapesData
from fna_lab.mask.detector.base import Detector, Evidence
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.incoming import IncomingDetector
from fna_lab.mask.detector.norm_fixed import NormFixedDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.detector.register_neurons import RegisterNeuronsDetector
from fna_lab.mask.detector.singular_defect import SingularDefectDetector
from fna_lab.mask.type1 import Type1Mask
from fna_lab.metric import agreement
from fna_lab.report.matrix import matrices
from fna_lab.report.table import _metrics
from fna_lab.task.agreement import CHANGES, Agreement


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys(ties: bool) -> None:
    first, second = draw(3, 4, 25), draw(3, 4, 25, seed=1)
    second = first + second
    if ties:
        first, second = (first * 2).round(), (second * 2).round()
    found, ranks = ops.rank_correlation(first, second), ops.average_ranks(first)
    for i in range(3):
        for j in range(4):
            wanted = spearmanr(first[i, j], second[i, j]).statistic
            assert found[i, j].item() == pytest.approx(wanted)
            np.testing.assert_allclose(ranks[i, j], rankdata(first[i, j]))
    assert ops.rank_correlation(first, torch.ones(25)).isnan().all()
    assert ops.rank_correlation(first, -first.exp()).allclose(-torch.ones(3, 4).double())
    low = first.bfloat16()
    assert ops.rank_correlation(low, low.float()).allclose(torch.ones(3, 4).double())


def test_sets_are_compared_as_sets() -> None:
    first, second = draw(5, 30) > 0.5, draw(5, 30, seed=3) > 0.7
    second |= first & (draw(5, 30, seed=4) > 0)
    first[4] = second[4] = False
    first[3] = False
    found = ops.set_agreement(*ops.set_counts(first, second))
    for b in range(5):
        one, two = (set(s[b].nonzero()[:, 0].tolist()) for s in (first, second))
        both = len(one & two)
        wanted = {
            "iou": both / len(one | two) if one | two else math.nan,
            "precision": both / len(one) if one else math.nan,
            "recall": both / len(two) if two else math.nan,
        }
        for name, value in wanted.items():
            assert found[name][b].item() == pytest.approx(value, nan_ok=True)
    with pytest.raises(TypeError, match="bool sets"):
        ops.set_counts(first.long(), second)
    with pytest.raises(ValueError, match="one shape"):
        ops.set_counts(first, second[:, :7])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("grid", "other", "box"),
    [
        ((4, 6), (4, 6), (0, 0, 1, 1)),
        ((4, 6), (8, 3), (0, 0, 1, 1)),
        ((8, 8), (8, 8), (0.25, 0.25, 0.75, 0.75)),
        ((5, 7), (9, 4), (0.1, 0.2, 0.7, 0.95)),
    ],
)
def test_places_are_those_of_a_picture_that_names_its_patches(grid, other, box, flip) -> None:
    # A picture whose pixels say to which patch they belong, cut and mirrored pixel by pixel.
    pixel = 120  # to a patch
    rows = np.arange(grid[0] * pixel) // pixel
    columns = np.arange(grid[1] * pixel) // pixel
    picture = rows[:, None] * grid[1] + columns
    top, left, bottom, right = (
        round(share * side) for share, side in zip(box, 2 * picture.shape, strict=True)
    )
    cut = picture[top:bottom, left:right]
    cut = cut[:, ::-1] if flip else cut
    wanted = []
    for i in range(other[0]):
        for j in range(other[1]):
            y = (i + 0.5) / other[0] * cut.shape[0]
            x = (j + 0.5) / other[1] * cut.shape[1]
            # Both pixels beside a centre that lies between two: an edge may fall to either.
            near = {cut[int(y - d), int(x - e)] for d in (1e-6, -1e-6) for e in (1e-6, -1e-6)}
            wanted.append(near)
    found = ops.matching_places(grid, other, box=box, flip=flip).tolist()
    assert all(place in near for place, near in zip(found, wanted, strict=True))


def test_places_refuse_what_does_not_fit() -> None:
    assert ops.matching_places((2, 3), (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert ops.matching_places((2, 3), (2, 3), flip=True).tolist() == [2, 1, 0, 5, 4, 3]
    with pytest.raises(ValueError, match="grid to be"):
        ops.matching_places((0, 3), (2, 3))
    with pytest.raises(ValueError, match="box to be"):
        ops.matching_places((2, 3), (2, 3), box=(0.5, 0, 0.5, 1))


def test_counts_of_batches_add_up() -> None:
    sets, scores = draw(3, 8, 20) > 0.6, draw(3, 8, 20, seed=2)
    whole, parts = agreement.SetAgreement((3, 3)), agreement.SetAgreement((3, 3))
    for metric, size in ((whole, 8), (parts, 3)):
        for some, heights in zip(sets.split(size, 1), scores.split(size, 1), strict=True):
            metric.update(some[:, None], some[None], heights[:, None], heights[None])
    for name, table in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], table)
    one, two = sets[0].flatten(), sets[1].flatten()
    iou = (one & two).sum() / (one | two).sum()
    assert whole.compute()["iou"][0, 1].item() == pytest.approx(iou.item())
    precision = whole.compute()["precision"]
    assert torch.equal(precision, whole.compute()["recall"].T)


def test_changes_keep_to_their_pictures() -> None:
    images = draw(3, 3, 40, 48)
    for change in (
        agreement.flipped,
        lambda x: agreement.cropped(x, 0.5),
        lambda x: agreement.coarsened(x, 0.5),
    ):
        changed = change(images)
        assert changed.images.shape == images.shape
        alone = torch.cat([change(one).images for one in images.split(1)])
        torch.testing.assert_close(changed.images, alone)
    noise = agreement.noisy(images, 0.1, [5, 6, 7]).images - images
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    again = agreement.noisy(images[1:], 0.1, [6, 7]).images - images[1:]
    torch.testing.assert_close(again, noise[1:])
    assert agreement.cropped(images, 0.5).box == (0.25, 0.25, 0.75, 0.75)
    # What the crop shows is the middle.
    middle = torch.nn.functional.avg_pool2d(agreement.cropped(images, 0.5).images, 2)
    inner = slice(3, -3)
    kept = images[:, :, 10:30, 12:36]
    near = torch.corrcoef(torch.stack([t[..., inner, inner].flatten() for t in (middle, kept)]))
    assert near[0, 1] > 0.9


@pytest.fixture(scope="module")
def backbone() -> TimmBackbone:
    torch.manual_seed(0)
    made = TimmBackbone(
        name="vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False, img_size=64
    )
    for block in made.blocks:
        block.attn.qkv.weight.mul_(6)
    return made


def measure(backbone: TimmBackbone, data: Any, detectors: dict[str, Detector], **settings: Any):
    patched, exact = (patch(backbone.host, "exact", layers="6-11") for _ in range(2))
    try:
        task = Agreement(
            backbone=backbone, patched=patched, exact=exact, detectors=detectors, **settings
        )
        data.setup("test")
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        trainer.test(task, data, verbose=False)
    finally:
        exact.remove()
        patched.remove()
    assert not any(m._forward_pre_hooks for m in backbone.host.modules())
    return task


def test_the_task_is_the_comparison_by_hand(backbone: TimmBackbone) -> None:
    data = ShapesData(transform=backbone.transform, count=5, img_size=64, batch_size=3)
    detectors: dict[str, Detector] = {
        "cls_proxy": ClsProxyDetector(ratio=0.9),
        "incoming": IncomingDetector(factor=1.4),
        "norm_fixed": NormFixedDetector(norm=1e6),  # finds nothing
    }
    task = measure(backbone, data, detectors, block=7)
    found = task.found

    def look(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = {}

        def keep(module: Any, args: Any) -> None:
            attn, x = module.attn, args[0]
            q, k, _ = attn.qkv(module.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            seen["it"] = Evidence(x, 1, True, q=q, k=k, scale=attn.scale)

        hook = backbone.blocks[7].register_forward_pre_hook(keep)
        with torch.no_grad():
            backbone.host.forward_features(images)  # type: ignore[operator]
        hook.remove()
        sets = [detector(seen["it"])[:, 1:] for detector in detectors.values()]
        heights = [detector.scores(seen["it"])[:, 1:] for detector in detectors.values()]
        return torch.stack(sets), torch.stack(heights)

    images = torch.stack([data.test_set[i]["image"] for i in range(5)])  # type: ignore[index]
    sets, heights = look(images)
    assert sets[0].any() and sets[1].any()
    one, two = sets[0], sets[1]
    wanted = (one & two).sum().item()
    assert found["iou/cls_proxy/incoming"] == pytest.approx(wanted / (one | two).sum().item())
    assert found["precision/cls_proxy/incoming"] == pytest.approx(wanted / one.sum().item())
    assert found["recall/cls_proxy/incoming"] == pytest.approx(wanted / two.sum().item())
    assert found["found/cls_proxy"] == pytest.approx(one.sum().item() / 5)
    assert found["found/norm_fixed"] == 0 and "iou/norm_fixed/norm_fixed" not in found
    assert found["iou/cls_proxy/norm_fixed"] == 0
    ranks = [spearmanr(a, b).statistic for a, b in zip(heights[0], heights[1], strict=True)]
    assert found["spearman/cls_proxy/incoming"] == pytest.approx(np.mean(ranks))
    # A mirrored picture on a 4 x 4 grid: columns change places.
    mirrored, heights_after = look(images.flip(-1))
    before, after = one.unflatten(1, (4, 4)).flip(-1).flatten(1), mirrored[0]
    iou = (before & after).sum() / (before | after).sum()
    assert found["stable_iou/flip/cls_proxy"] == pytest.approx(iou.item())
    ordered = heights[0].unflatten(1, (4, 4)).flip(-1).flatten(1)
    ranks = [spearmanr(a, b).statistic for a, b in zip(ordered, heights_after[0], strict=True)]
    assert found["stable_spearman/flip/cls_proxy"] == pytest.approx(np.mean(ranks))
    # One row a picture.
    assert [row["index"] for row in task.rows] == list(range(5))
    for b, row in enumerate(task.rows):
        assert row["found/cls_proxy"] == one[b].sum()
        either = (one[b] | two[b]).sum().item()
        value = (one[b] & two[b]).sum().item() / either if either else None
        assert row["iou/cls_proxy/incoming"] == (pytest.approx(value) if either else None)
        assert row["stable_iou/seed/norm_fixed"] is None


def test_results_do_not_depend_on_the_batch(backbone: TimmBackbone) -> None:
    detectors: dict[str, Detector] = {
        "cls_proxy": ClsProxyDetector(ratio=0.9),
        "singular_defect": SingularDefectDetector(stds=1.0, samples=400),
    }
    found = []
    for size in (1, 4):
        data = PhotosData(transform=backbone.transform, batch_size=size)
        found.append(measure(backbone, data, detectors).found)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert any(0 < value < 1 for name, value in found[0].items() if "stable_iou" in name)


def test_what_the_host_cannot_serve_is_left_out_and_named(backbone: TimmBackbone) -> None:
    detectors: dict[str, Detector] = {
        "norm_ratio": NormRatioDetector(),
        "register_neurons": RegisterNeuronsDetector(),
        "cls_proxy": ClsProxyDetector(),
    }
    data = PhotosData(transform=backbone.transform)
    task = measure(backbone, data, detectors)
    assert list(task.skipped) == ["register_neurons"]
    assert "has an outlier token" in task.skipped["register_neurons"]
    assert "iou/norm_ratio/cls_proxy" in task.found
    with pytest.raises(ValueError, match="has an outlier token"):
        measure(backbone, data, detectors, names=["norm_ratio", "register_neurons"])
    detectors["register_neurons"] = RegisterNeuronsDetector(neurons=[[2, 5], [3, 1]], ratio=1.2)
    found = measure(backbone, data, detectors, names=["cls_proxy", "register_neurons"]).found
    assert found["found/register_neurons"] > 0 and "found/norm_ratio" not in found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"names": ["cls_proxy"]}, "task.names=.*two or more different names of cls_proxy, norm"),
        ({"names": ["cls_proxy", "odd"]}, "task.names=.*'odd'"),
        ({"block": 12}, "task.block=12: expected a block from 0 to 11"),
        ({"crop": 1.0}, "task.crop=1.0"),
        ({"resolution": 0}, "task.resolution=0"),
        ({"noise": 0}, "task.noise=0"),
        ({"calibration": 0}, "task.calibration=0"),
    ],
)
def test_wrong_settings_are_named(backbone, settings, words) -> None:
    detectors = {"cls_proxy": ClsProxyDetector(), "norm_ratio": NormRatioDetector()}
    with pytest.raises(ValueError, match=words):
        measure(backbone, PhotosData(transform=backbone.transform), detectors, **settings)


def test_a_masked_model_is_refused(backbone: TimmBackbone) -> None:
    exact = patch(backbone.host, "exact", layers="6-11")
    masked = patch(backbone.host, "exact", Type1Mask(), layers="6-11")
    detectors = {"cls_proxy": ClsProxyDetector(), "norm_ratio": NormRatioDetector()}
    with pytest.raises(ValueError, match="mask=type1: task=agreement .* expected mask=none"):
        Agreement(backbone=backbone, patched=masked, exact=exact, detectors=detectors)
    masked.remove()
    exact.remove()


def test_tables_name_rows_and_columns() -> None:
    metrics = {"n": 4.0, "found/a": 2.0, "found/b": 0.0, "largest_norm/03": 1.0}
    metrics |= {"iou/a/a": 1.0, "iou/a/b": 0.25, "recall/a/b": 0.99}
    metrics |= {"spearman/a/b": -0.5, "stable_iou/flip/a": 0.75}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(Group(*matrices(metrics)))
    text = console.export_text()
    rows = [line.split() for line in text.splitlines()]
    assert ["tokens", "a", "picture", "2.00", "0.00"] in rows and ["flip", "0.75", "-"] in rows
    assert ["a", "1.00", "0.25"] in rows and ["b", "-", "-"] in rows
    assert "largest" not in text and "0.99" not in text
    assert not matrices({"n": 1.0, "largest_norm/03": 1.0})
    assert set(CHANGES) == {"flip", "crop", "resolution", "seed"}


def test_the_table_of_a_run_shows_both_kinds() -> None:
    facts = _metrics({"n": 2.0, "iou/a/b": 0.25, "largest_norm/03": 1.0, "found/b": 2.0})
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(facts)
    text = console.export_text()
    assert "largest" in text and "0.25" in text and "IoU of the tokens found, over all" in text
