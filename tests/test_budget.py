"""The budget solver: the promise, what it costs, and how it is asked for."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, build

import fna_lab
from fna_lab import cli, ops
from fna_lab.attn.base import Context
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.layers import BlockCounts
from fna_lab.backbone.named import named_attention
from fna_lab.hosts import out_projection
from fna_lab.mask.detector.norm_gap import NormGapDetector
from fna_lab.mask.type1 import Type1Mask

FEW = (2, 4, 6, 8, 12)
NOWHERE = ("data=folder", "data.root=/no/such/folder")


# --- the knapsack ---


def test_the_choice_is_the_cheapest_of_all() -> None:
    generator = random.Random(0)
    for _ in range(20):
        costs = [[generator.random() for _ in range(4)] for _ in range(4)]
        errors = [[0.0, *(generator.random() for _ in range(3))] for _ in range(4)]
        limit = generator.uniform(0.1, 2)

        def total(table: list[list[float]], picks: Any) -> float:
            return sum(row[pick] for row, pick in zip(table, picks, strict=True))

        every = itertools.product(range(4), repeat=4)
        best = min(total(costs, p) for p in every if total(errors, p) <= limit * (1 - 4 / 4096))
        picks = ops.cheapest_choice(costs, errors, limit)
        assert total(errors, picks) <= limit
        assert total(costs, picks) <= best + 1e-12


def test_limits_that_cannot_be_kept_are_named() -> None:
    assert ops.cheapest_choice([[2.0, 1.0]], [[0.0, 5.0]], 5.0) == [1]
    assert ops.cheapest_choice([[2.0, 1.0]], [[0.0, 5.0]], 4.99) == [0]
    with pytest.raises(ValueError, match="No choice keeps the sum of errors within 1"):
        ops.cheapest_choice([[1.0]], [[2.0]], 1.0)
    with pytest.raises(ValueError, match="limit to be > 0"):
        ops.cheapest_choice([[1.0]], [[0.0]], 0.0)
    with pytest.raises(ValueError, match="same options"):
        ops.cheapest_choice([[1.0]], [[0.0, 1.0]], 1.0)


# --- landmarks block by block ---


@pytest.mark.parametrize("name", ["fna", "subset", "nystromformer", "linformer_pool"])
@pytest.mark.parametrize("counts", [{1: 4, 3: 9}, [4, 9]])
def test_every_block_has_its_own_number(name: str, counts: Any) -> None:
    host, model, x = build("timm vit")
    with fna_lab.patch(model, name, layers=[1, 3], num_landmarks=counts):
        both = host.run(model, x)
    with fna_lab.patch(model, name, layers=[1], num_landmarks=4):
        with fna_lab.patch(model, name, layers=[3], num_landmarks=9):
            torch.testing.assert_close(host.run(model, x), both)
    shape = dict(heads=4, head_dim=12, channels=48)
    alone = [named_attention(name, num_landmarks=num).flops(26, **shape, layers=1)  # type: ignore[arg-type]
             for num in (4, 9)]  # fmt: skip
    several = named_attention(name, num_landmarks=counts)
    assert several.flops(26, **shape, layers=2) == sum(alone)  # type: ignore[arg-type]


def test_reused_landmarks_are_taken_anew_where_the_number_changes() -> None:
    host, model, x = build("timm vit")
    counts = {0: 5, 1: 5, 2: 8}
    with fna_lab.patch(model, "fna", layers="0-2", num_landmarks=counts, renew=0):
        out = host.run(model, x)
    with fna_lab.patch(model, "fna", layers="0-1", num_landmarks=5, renew=0):
        with fna_lab.patch(model, "fna", layers=[2], num_landmarks=8):
            torch.testing.assert_close(host.run(model, x), out)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (0, "num_landmarks=0: expected an integer >= 1"),
        ([], "expected an integer >= 1, or one for each block"),
        ({6: 0}, "expected an integer >= 1, or one for each block"),
        ({"six": 4}, "expected an integer >= 1, or one for each block"),
        ([4, True], "expected an integer >= 1, or one for each block"),
        ("few", "num_landmarks='few': expected"),
        (None, "num_landmarks=None: expected"),
    ],
)
def test_bad_numbers_are_named(counts: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BlockCounts(counts)


@pytest.mark.parametrize("counts", [{1: 4}, {1: 4, 2: 4, 3: 4}, [4], {0: 4, 3: 4}])
def test_numbers_for_other_blocks_are_refused_before_anything_runs(counts: Any) -> None:
    _, model, _ = build("timm vit")
    with pytest.raises(ValueError, match="one number for each of the replaced blocks 1, 3"):
        fna_lab.patch(model, "fna", layers=[1, 3], num_landmarks=counts)


# --- the solver ---


def features(host: Any, model: Any, x: Any) -> list[torch.Tensor]:
    """CLS and patches of the last block, by a hook."""
    seen = []
    hook = model.blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    host.run(model, x)
    hook.remove()
    return [seen[0][:, :1], seen[0][:, host.prefix :]]


def worst(host: Any, model: Any, x: Any, found: Any, attn: str, exact: Any, **more: Any) -> float:
    with fna_lab.patch(model, attn, **found.settings, **more):
        pairs = zip(exact, features(host, model, x), strict=True)
        return max(
            float((1 - F.cosine_similarity(a.double(), b.double(), dim=-1).mean(1)).max())
            for a, b in pairs
        )


@pytest.mark.parametrize("attn", ["fna", "fna_paper", "nystromformer"])
def test_the_budget_holds_and_more_of_it_is_cheaper(attn: str) -> None:
    host, model, x = build("timm vit")
    exact = features(host, model, x)
    plans = []
    for budget in (0.01, 0.05, 0.3):
        found = fna_lab.solve_budget(model, x, attn, budget=budget, candidates=FEW)
        error = worst(host, model, x, found, attn, exact)
        assert error <= budget
        assert found.error == pytest.approx(error, rel=1e-6)
        assert found.gflops < found.exact_gflops and found.pictures == 3
        plans.append(found)
    assert plans[0].gflops >= plans[1].gflops >= plans[2].gflops
    assert plans[0].gflops > plans[2].gflops
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_it_uses_most_of_the_budget() -> None:
    """Fewer landmarks anywhere, by one candidate, would break it: at most one block has slack."""
    host, model, x = build("timm vit")
    exact = features(host, model, x)
    found = fna_lab.solve_budget(model, x, "fna", budget=0.02, candidates=FEW)
    slack = 0
    for layer, num in found.landmarks.items():
        place = FEW.index(num)
        if place:
            fewer = {**found.landmarks, layer: FEW[place - 1]}
            with fna_lab.patch(model, "fna", layers=sorted(fewer), num_landmarks=fewer):
                pairs = zip(exact, features(host, model, x), strict=True)
                error = max(float((1 - F.cosine_similarity(a, b, dim=-1).mean(1)).max())
                            for a, b in pairs)  # fmt: skip
            slack += error <= 0.02
    assert slack <= 1


def test_errors_of_blocks_are_those_behind_the_out_projection() -> None:
    host, model, x = build("timm vit")
    found = fna_lab.solve_budget(model, x, "fna", budget=0.02, candidates=FEW, layers=[2])
    assert set(found.landmarks) == {2}
    block, noted = model.blocks[2], {}
    hook = block.register_forward_pre_hook(lambda _, args: noted.update(x=args[0]))
    host.run(model, x)
    hook.remove()
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(noted["x"])).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
    weight = out_projection(block).weight
    context = Context(layer=2, nth=0, scale=12**-0.5, x=noted["x"], num_prefix_tokens=1,
                      has_cls=True, grid=(5, 5))  # fmt: skip
    approximate = FastNystromAttention(num_landmarks=found.landmarks[2])(q, k, v, context)
    exact = (q @ k.mT * 12**-0.5).softmax(-1) @ v
    a, b = (t.transpose(1, 2).flatten(2) @ weight.T for t in (approximate, exact))
    each = [((a[i] - b[i]).norm() / b[i].norm()) ** 2 for i in range(3)]
    wanted = float(torch.stack(each).mean() ** 0.5)
    assert found.errors[2] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", [n for n in HOSTS if "open_clip timm" not in n])
def test_every_host_family(name: str) -> None:
    host, model, x = build(name)
    if name == "open_clip":
        model = model.visual
    plain = FastNystromAttention(clusters=False, source="normed")  # 25 tokens are few for clusters
    found = fna_lab.solve_budget(model, x, plain, budget=0.5, candidates=(4, 8), layers="3-")
    assert found.landmarks and found.error <= 0.5


def test_under_a_mask_the_reference_is_masked_too() -> None:
    host, model, x = build("timm vit")
    mask = Type1Mask(detector=NormGapDetector(min_gap=0))
    more = {"mask": mask, "mask_layers": "2-3", "detect": 1}
    with fna_lab.patch(model, "exact", **more):
        exact = features(host, model, x)
    found = fna_lab.solve_budget(model, x, "fna", budget=0.02, candidates=FEW, patching=more)
    error = worst(host, model, x, found, "fna", exact, **more)
    assert found.error == pytest.approx(error, rel=1e-6) and error <= 0.02


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"budget": 0}, "attn.budget=0: expected a number between 0 and 1"),
        ({"budget": "low"}, "attn.budget='low'"),
        ({"budget": 0.1, "attn": "tome"}, "attn.layers=auto: attn=tome has no landmarks"),
        ({"budget": 0.1, "attn": "explicit"}, "attn=explicit has no landmarks to choose freely"),
        ({"budget": 1e-9}, "attn.budget=1e-09: no choice of landmarks keeps it on the 3"),
        ({"budget": 0.1, "candidates": (25, 26)}, "at no number of landmarks cheaper than exact"),
        ({"budget": 0.1, "layers": "3-4"}, "block 4 does not exist"),
    ],
)
def test_bad_budgets_are_named(more: dict[str, Any], words: str) -> None:
    _, model, x = build("timm vit")
    with pytest.raises(ValueError, match=words):
        fna_lab.solve_budget(model, x, **({"candidates": FEW} | more))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_padding_is_not_compared() -> None:
    """Rows of zeros, as features have them behind short sentences, dilute no error."""
    host, model, x = build("timm vit")

    def padded(pictures: torch.Tensor) -> list[torch.Tensor]:
        return [F.pad(f, (0, 0, 0, 40)) for f in features(host, model, pictures)]

    plain = partial(features, host, model)
    more: dict[str, Any] = {"budget": 0.02, "candidates": FEW}
    one, other = (fna_lab.solve_budget(model, x, features=f, **more) for f in (plain, padded))
    assert one.landmarks == other.landmarks and one.error == pytest.approx(other.error, rel=1e-6)


@pytest.mark.parametrize("budget", [1e-40, 1e-15, 1e-9])
def test_a_budget_out_of_reach_names_the_smallest_error(budget: float) -> None:
    host, model, x = build("timm vit")
    with pytest.raises(ValueError, match=f"attn.budget={budget}: no choice") as told:
        fna_lab.solve_budget(model, x, "fna", budget=budget, candidates=FEW)
    said = str(told.value)
    assert "more than 6 cost more than exact" in said  # of 26 tokens
    least = float(said.split("measured is ")[1].split(" ")[0])
    landmarks = {int(i): int(num) for i, num in re.findall(r"(\d+): (\d+)", said)}
    exact = features(host, model, x)
    with fna_lab.patch(model, "fna", layers=sorted(landmarks), num_landmarks=landmarks):
        found = features(host, model, x)
    error = max(
        float((1 - F.cosine_similarity(a.double(), b.double(), dim=-1).mean(1)).max())
        for a, b in zip(exact, found, strict=True)
    )
    assert least == pytest.approx(error, rel=1e-2)
    # A budget of as much is kept.
    kept = fna_lab.solve_budget(model, x, "fna", budget=1.01 * least, candidates=FEW)
    assert kept.error <= 1.01 * least


# --- command line ---


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, code: int = 0) -> Any:
    monkeypatch.chdir(folder)
    quick = ["trainer=cpu", "task.cost=false", "task=fidelity"]
    monkeypatch.setattr(sys, "argv", ["fna_lab", *quick, *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    found = sorted(Path("outputs").rglob("metrics.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(found[-1].read_text()) if found else None


def test_a_budget_on_the_command_line_and_the_same_again_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = ["attn=fna", "attn.layers=auto", "attn.budget=0.01"]
    record = run(tmp_path, monkeypatch, *auto)
    solved, metrics = record["budget"], record["metrics"]
    # data=photos has no bank, so that these four pictures are those that it was chosen on.
    for name in ("cls_cosine", "pooled_cosine", "patch_cosine"):
        assert 1 - metrics[name] <= solved["error"] <= 0.01
    assert record["attn"]["layers"] == [int(layer) for layer in solved["landmarks"]]
    said = capsys.readouterr().out
    assert "budget 0.01: 1 - cosine of the features is at most" in said
    line = next(row for row in said.splitlines() if row.startswith("the same again: "))
    again = line.removeprefix("the same again: ").replace("'", "").split()
    by_hand = run(tmp_path, monkeypatch, "attn=fna", *again)
    assert by_hand["metrics"] == metrics and by_hand["budget"] == {}


def test_pictures_come_from_the_bank_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = ["attn=subset", "attn.layers=auto", "attn.budget=0.3", "calibration=2"]
    record = run(tmp_path, monkeypatch, *auto, "data=shapes", "data.count=4")
    assert record["budget"]["pictures"] == 2 and record["metrics"]["n"] == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attn=fna", "attn.layers=auto"], "attn.layers=auto needs a budget of error"),
        (["attn=fna", "attn.budget=0.1"], "attn.budget=0.1 chooses the blocks"),
        (["attn=fna", "attn.layers=auto", "attn.budget=2"], "attn.budget=2: expected a number"),
        (
            ["attn=fna", "attn.layers=auto", "attn.budget=0.1", "calibration=0"],
            "calibration=0: expected a number of pictures >= 1",
        ),
        # Before data that is not there is asked for.
        (["attn=fna", "attn.layers=auto", "attn.budget=0", *NOWHERE], "attn.budget=0: expected"),
        (["attn=fna", "attn.layers=auto", *NOWHERE], "attn.layers=auto needs a budget of error"),
        (["attn=tome", "attn.layers=auto", "+attn.budget=0.1", *NOWHERE], "attn=tome has no land"),
        (["attn=fna", "attn.layers=[6,7]", "attn.num_landmarks={6:4}"],
         "attn.num_landmarks={6: 4}: expected one number for each of the replaced blocks 6, 7"),
        (["attn=fna", "attn.guard=-1"], "attn.guard=-1: expected a number > 0"),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_clear_line(
    overrides: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(tmp_path, monkeypatch, *overrides, code=1) is None
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0]
