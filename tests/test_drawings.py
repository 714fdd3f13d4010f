"""What the drawings show is what attention did: the pairs it lost, the landmarks it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from test_anatomy import call

from fna_lab import ops
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.random import RandomLandmarks
from fna_lab.attn.reduced import LandmarkAttention
from fna_lab.cli import conf_dir
from fna_lab.metric.landmarks import class_counts
from fna_lab.metric.pairs import EACH, drawn_patterns, drawn_tokens, pair_facts
from fna_lab.ops.patterns import EMPTY_ROWS
from fna_lab.report import drawings
from fna_lab.report import record as records
from fna_lab.run import run

QUICK = ["trainer=cpu", "trainer.enable_progress_bar=false", "task=anatomy", "backbone=planted",
         "data=planted", "data.limit=5", "data.batch_size=3"]  # fmt: skip


def measured(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        found = run(compose("config", overrides=[*QUICK, *overrides]), folder)
    return found, records.read_arrays(folder)


@pytest.mark.parametrize("number", [0, 1, 2, 7])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_patterns_that_are_drawn_are_those_of_the_whole_picture(number: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(number)
    kept = torch.arange(40) < 33
    tokens = torch.zeros(40, dtype=torch.bool)
    tokens[prefix + torch.randperm(33 - prefix, generator=generator)[:number]] = True
    chosen = drawn_tokens(tokens, kept, prefix, prefix > 0)
    assert len(set(chosen.tolist())) == len(chosen) == int(prefix > 0) + min(EACH, number) + EACH
    assert kept[chosen].all() and (chosen[int(prefix > 0) :] >= prefix).all()
    assert int(tokens[chosen].sum()) == min(EACH, number)
    drawn = drawn_patterns(tokens, chosen)
    for name, matrix in zip(ops.PATTERNS, drawn, strict=True):
        whole = ops.removed_pairs(tokens[None], name)[0]
        for i, query in enumerate(chosen):
            for j, key in enumerate(chosen):
                assert matrix[i, j] == whole[query, key]


def test_tokens_and_shares_of_pairs_do_not_count_padding() -> None:
    tokens = torch.zeros(2, 9, dtype=torch.bool)
    tokens[:, [2, 5]] = True
    tokens[1, 7:] = True  # padding
    kept = (torch.arange(9) < 7).expand(2, -1)
    padded, plain = pair_facts(tokens, kept), pair_facts(tokens[:, :7], kept[:, :7])
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value)
    whole = ops.removed_pairs(tokens[:, :7], "type2").flatten(1).double().mean(1)
    torch.testing.assert_close(plain["pairs_type2"], whole)
    assert plain["tokens_in_T"].tolist() == [2, 2] and plain["pairs_x_to_x"].tolist() == [1, 1]


def test_the_drawing_names_every_pattern() -> None:
    assert tuple(drawings.PATTERNS) == ops.PATTERNS
    sink_only = {name for name, said in drawings.PATTERNS.items() if "sink only" in said}
    assert sink_only == set(EMPTY_ROWS)


@pytest.mark.parametrize("mask", ["none", "type2"])
def test_t_is_what_the_run_found(mask: str, tmp_path: Path) -> None:
    found, arrays = measured(tmp_path, "task.measure=[patterns]", f"mask={mask}")
    tokens, drawn = arrays["map_tokens"], int(arrays["map_patterns_picture"])
    assert tokens.shape[0] == 4 and tokens[drawn].any()
    if mask == "none":  # then the massive tokens of the figure of tokens
        massive = ops.TOKEN_CLASSES.index("massive")
        assert np.array_equal(tokens, arrays["map_classes"] == massive)
    else:
        rows = pq.read_table(tmp_path / records.SAMPLES).to_pylist()
        for mine, row in zip(tokens, rows, strict=False):
            assert sorted(row["mask_tokens"]) == np.flatnonzero(mine).tolist()
            assert row["tokens_in_T"] == mine.sum()
            assert row["pairs_type1"] == pytest.approx(mine.mean())
        assert rows[4]["pairs_type1"] is None  # not looked at closely
    chosen = torch.from_numpy(arrays["map_patterns_tokens"])
    wanted = drawn_patterns(torch.from_numpy(tokens[drawn]), chosen)
    assert np.array_equal(arrays["map_patterns"], wanted.numpy())
    pixels = matplotlib.image.imread(tmp_path / "figures" / "patterns.png")[..., :3]
    gone = np.array([0xD5, 0x5E, 0x00]) / 255
    assert (abs(pixels - gone).max(-1) < 0.02).sum() > 10_000
    assert found["metrics"]["pairs_x_to_x"] == 1


@pytest.mark.parametrize("attn", ["fna", "fna_paper", "subset"])
@pytest.mark.parametrize("mask", ["none", "type2"])
def test_landmarks_that_are_shown_are_those_that_were_used(
    attn: str, mask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.Tensor] = []
    members: list[Any] = []
    for name in ("clustered_attention", "nystrom_attention", "subset_attention"):
        inner = getattr(ops, name)

        def spy(q: Any, k: Any, v: Any, landmarks: Any, *, inner: Any = inner, **more: Any) -> Any:
            used.append(landmarks)
            members.append(more.get("members"))
            return inner(q, k, v, landmarks, **more)

        monkeypatch.setattr(ops, name, spy)
    more = ["task.measure=[landmarks]", f"attn={attn}", "attn.num_landmarks=20", f"mask={mask}"]
    found, arrays = measured(tmp_path, *more, "attn.layers=4-6")
    blocks = found["attn"]["layers"]
    firsts = torch.cat(used[:: len(blocks)])[:4]
    assert int(arrays["map_landmarks_block"][0]) == blocks[0] == 4
    assert np.array_equal(arrays["map_picks_own"], firsts.numpy())
    assert ("map_clusters" in arrays) == (attn == "fna")
    if attn == "fna":
        shown = torch.cat(members[:: len(blocks)])[:4]
        assert np.array_equal(arrays["map_clusters"], shown.numpy())
    for block in blocks:
        counts = [
            found["metrics"].get(f"landmarks/{kind}/{block:02d}", 0.0)
            for kind in ops.TOKEN_CLASSES
        ]
        assert counts[0] == 1 and sum(counts) >= 19
    assert (tmp_path / "figures" / "landmarks.png").stat().st_size > 50_000


def test_a_meter_and_the_look_at_landmarks_go_together(tmp_path: Path) -> None:
    more = ["task.measure=[landmarks]", "attn=fna", "attn.num_landmarks=20"]
    plain, _ = measured(tmp_path / "a", *more)
    meter, _ = measured(tmp_path / "b", *more, "task.meter=true")
    assert meter["errors"] and not plain["errors"]
    assert meter["metrics"] == pytest.approx(plain["metrics"])


@pytest.mark.parametrize("per_head", [False, True])
def test_another_sampler_takes_what_it_would_as_the_variants_own(per_head: bool) -> None:
    q, k, v, context = call(n=26, prefix=1, grid=(5, 5))
    sampler = RandomLandmarks()
    one = FastNystromAttention(num_landmarks=6, per_head=per_head)
    other = FastNystromAttention(num_landmarks=6, per_head=per_head, landmarks=sampler)
    one(q, k, v, context)
    before, _ = one.taken(q, context)
    taken = one.taken_by(sampler, q, k, context)
    again, _ = one.taken(q, context)
    assert torch.equal(before, again) and isinstance(one, LandmarkAttention)
    context.shared.clear()
    other(q, k, v, context)
    assert torch.equal(taken, other.taken(q, context)[0])
    assert taken.shape == ((3, 4, 6) if per_head else (3, 6))


def test_coverage_radius_is_the_obvious_one() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 20, 5, generator=generator)
    picks = torch.randint(20, (3, 4), generator=generator)
    allowed = torch.rand(3, 20, generator=generator) < 0.7
    found = ops.coverage_radius(points, picks, allowed)
    for i in range(3):
        near = [
            min(float((points[i, n] - points[i, p]).norm()) for p in picks[i])
            for n in range(20)
            if allowed[i, n]
        ]
        assert float(found[i]) == pytest.approx(max(near), rel=1e-4)
    whole = torch.arange(20).expand(3, -1)
    assert ops.coverage_radius(points, whole).max() < 1e-3
    with pytest.raises(ValueError, match="Expected picks of 3 pictures, got 2"):
        ops.coverage_radius(points, picks[:2])
    with pytest.raises(TypeError, match="Expected picks to be a long tensor"):
        ops.coverage_radius(points, picks.float())


def test_class_counts_count_repeats_once_and_know_what_is_not_there() -> None:
    members = torch.zeros(2, 6, 3, dtype=torch.bool)
    members[0, :2, 0] = members[0, 2:, 1] = members[1, :, 1] = True
    found = class_counts(torch.tensor([[0, 1, 1, 4], [5, 5, 5, 5]]), members)
    wanted = torch.tensor([[2, 1, torch.nan], [torch.nan, 1, torch.nan]])
    torch.testing.assert_close(found, wanted, equal_nan=True)
    heads = torch.tensor([[[0, 1], [4, 5]], [[0, 1], [2, 2]]])
    torch.testing.assert_close(class_counts(heads, members)[:, 1], torch.tensor([1.0, 1.5]))


def test_class_counts_do_not_mind_the_default_float() -> None:
    picks, members = torch.tensor([[0, 1, 1, 4]]), torch.ones(1, 6, 1, dtype=torch.bool)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does with precision=bf16-true
    try:
        assert class_counts(picks, members).item() == 3
    finally:
        torch.set_default_dtype(torch.float32)
