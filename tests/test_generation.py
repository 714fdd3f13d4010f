"""`task=generation` and `data=prompts`: which steps are replaced, and numbers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from fna_lab.attn.landmarks.joint import JointLandmarks
from fna_lab.attn.subset import SubsetAttention
from fna_lab.backbone.fna_tiny import FnaTiny
from fna_lab.backbone.patch import patch
from fna_lab.backbone.sd3_random import RandomSD3Backbone
from fna_lab.cli import conf_dir
from fna_lab.data.prompts import PROMPTS, PromptsData
from fna_lab.metric.generation import closeness, psnr, timed, with_interval
from fna_lab.report import record as records
from fna_lab.run import run
from fna_lab.task.generation import Generation, read_steps

needs_diffusers = pytest.importorskip(
    "diffusers", reason="needs diffusers: pip install 'fna-lab[diffusion]'"
)
STEPS = 7


@pytest.fixture(scope="module")
def backbone() -> RandomSD3Backbone:
    return RandomSD3Backbone()


def measured(backbone: Any, attn: Any, limit: int = 3, **more: Any) -> Generation:
    """A finished task over the first prompts."""
    patched = patch(backbone.host, attn, layers="3-5")
    exact = patch(backbone.host, "exact", layers="3-5")
    settings = {"cost": False, "num_steps": STEPS, "steps": [2, 4], "pictures": 2} | more
    data = PromptsData(transform=backbone.transform, seeds=2, limit=limit, batch_size=2)
    data.setup()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    try:
        task = Generation(backbone=backbone, patched=patched, exact=exact, **settings)
        trainer.test(task, data, verbose=False)
    finally:
        patched.remove()
        exact.remove()
    return task


def few() -> SubsetAttention:
    return SubsetAttention(num_landmarks=24, landmarks=JointLandmarks(text=8), source="k")


def by_hand(
    backbone: Any, prompt: str, seed: int, replaced: set[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Latents and velocities of one picture, written out with diffusers' transformer alone."""
    (empty, asked), (empty_pooled, asked_pooled) = backbone.encode([prompt])
    scheduler = backbone.schedule(STEPS)
    latents, velocities = (
        [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed))],
        [],
    )
    for i, time in enumerate(scheduler.timesteps):
        handle = patch(backbone.host, few(), layers="3-5") if i in replaced else None
        with torch.no_grad():
            both = backbone.host(
                hidden_states=torch.stack([latents[-1]] * 2),
                timestep=torch.stack([time] * 2),
                encoder_hidden_states=torch.stack([empty, asked]),
                pooled_projections=torch.stack([empty_pooled, asked_pooled]),
            ).sample
        if handle is not None:
            handle.remove()
        velocities.append(both[0] + 3.5 * (both[1] - both[0]))
        change = scheduler.sigmas[i + 1] - scheduler.sigmas[i]
        latents.append(latents[-1] + change * velocities[-1])
    return latents, velocities


def test_numbers_by_hand(backbone: Any) -> None:
    task = measured(backbone, few())
    assert [(row["prompt"], row["seed"]) for row in task.rows] == [
        (PROMPTS[0], 0), (PROMPTS[0], 1), (PROMPTS[1], 0),
    ]  # fmt: skip
    for row in task.rows:
        exact, speed = by_hand(backbone, row["prompt"], row["seed"], set())
        found, other = by_hand(backbone, row["prompt"], row["seed"], {2, 3, 4})
        error = [((o - s).norm() / s.norm()).item() for o, s in zip(other, speed, strict=True)]
        assert row["free_error_by_step"] == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert row["free_error_by_step"][:2] == [0, 0] and min(error[2:]) > 1e-4
        end = (found[-1] - exact[-1]).norm() / exact[-1].norm()
        assert row["latent_error"] == pytest.approx(end.item(), rel=1e-3)
        # The first replaced step begins from the same latents on both paths.
        assert row["teacher_error_by_step"][0] == pytest.approx(error[2], rel=1e-3)
        assert row["teacher_error"] == pytest.approx(np.mean(row["teacher_error_by_step"]))
        one, two = ((backbone.decode(x[-1][None]) / 2 + 0.5).clamp(0, 1) for x in (exact, found))
        wanted = -10 * (one - two).square().mean().log10()
        assert row["image_psnr"] == pytest.approx(wanted.item(), abs=0.05)
    found = task.found
    errors = np.array([row["free_error_by_step"] for row in task.rows])
    for i in range(STEPS):
        assert found[f"velocity/free_error/{i:02d}"] == pytest.approx(errors[:, i].mean())
        assert (f"velocity/teacher_error/{i:02d}" in found) == (i in (2, 3, 4))
    assert found["latent_error_low"] < found["latent_error"] < found["latent_error_high"]
    assert task.arrays["pixels/exact"].shape == (2, 64, 64, 3)
    assert task.arrays["pixels/exact"].dtype == np.uint8


def test_teacher_forced_steps_by_hand(backbone: Any) -> None:
    task = measured(backbone, few(), limit=1)
    exact, speed = by_hand(backbone, PROMPTS[0], 0, set())
    text = backbone.encode([PROMPTS[0]])
    for nth, i in enumerate((2, 3, 4)):
        time = backbone.schedule(STEPS).timesteps[i]
        with patch(backbone.host, few(), layers="3-5"):
            found = backbone.velocity(exact[i][None], time, text, 3.5)[0]
        error = ((found - speed[i]).norm() / speed[i].norm()).item()
        assert task.rows[0]["teacher_error_by_step"][nth] == pytest.approx(error, rel=1e-3)


def test_steps_outside_are_bit_equal(backbone: Any) -> None:
    patched = patch(backbone.host, few(), layers="3-5")
    exact = patch(backbone.host, "exact", layers="3-5")
    task = Generation(
        backbone=backbone, patched=patched, exact=exact, steps=[3, 4], num_steps=STEPS
    )
    task._text = backbone.encode(["a", "b"])
    noise = torch.stack([backbone.noise(seed) for seed in (0, 1)])
    one, two = task.make(noise, exact=True), task.make(noise, exact=False)
    patched.remove()
    exact.remove()
    for i in range(STEPS):
        same = torch.equal(one.velocities[i], two.velocities[i])
        assert same == (i < 3)
    assert torch.equal(one.latents[3], two.latents[3])
    # The exact path is that of the model before it was patched.
    plain = task.make(noise, exact=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.latents, one.latents, strict=True))


def test_exact_attention_and_full_landmarks_change_nothing(backbone: Any) -> None:
    full = SubsetAttention(num_landmarks=84, landmarks=JointLandmarks(text=20), source="k")
    for attn in ("exact", full):
        found = measured(backbone, attn, limit=2, steps=None).found
        assert found["latent_error"] < 1e-5 and found["image_psnr"] > 90
        assert found["latent_cosine"] == pytest.approx(1, abs=1e-8)


def test_the_meter_sees_each_replaced_step_once(backbone: Any) -> None:
    task = measured(backbone, few(), limit=3, meter=True)
    assert set(task.errors) == {"03", "04", "05"}
    # Two rows of guidance, three steps, three pictures, and none of the free path.
    assert task.meter is not None
    counted = {int(n) for n in task.meter.count[3].flatten().unique()}
    assert max(counted) == 2 * 3 * 3
    assert len(task.errors["03"]["relative_error"]["text"]) == 4


def test_the_clock_measures_one_step(backbone: Any) -> None:
    task = measured(backbone, few(), limit=1, cost=True, guidance=1.0)
    assert task.costs["tokens"] == 84 and task.costs["batch"] == 1
    assert task.costs["patched_selection_ms"] and task.costs["exact_total_ms"]
    assert task.costs["exact_total_ms"] < 1e3 * task.found["exact_seconds"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": [2, 7]}, r"task.steps=\[2, 7\]: expected two steps in their order among the 7"),
        ({"steps": [3, 2]}, r"task.steps=\[3, 2\]: expected two steps"),
        ({"steps": [3]}, r"task.steps=\[3\]: expected \[first, last\]"),
        ({"steps": "2-4"}, "task.steps=2-4: expected"),
        ({"steps": [0.5, 3]}, "task.steps="),
        ({"num_steps": 0}, "task.num_steps=0: expected"),
        ({"guidance": 0.5}, "task.guidance=0.5: expected"),
        ({"guidance": None}, "task.guidance=None: expected"),
        ({"guidance": "much"}, "task.guidance='much': expected"),
        ({"pictures": 0}, "task.pictures=0: expected"),
    ],
)
def test_bad_settings_are_named(backbone: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        measured(backbone, "exact", **settings)
    assert not any(m._forward_pre_hooks for m in backbone.host.modules())


def test_steps_are_read() -> None:
    assert read_steps(None, 5) == range(5)
    assert read_steps([6, 17], 28) == range(6, 18) and read_steps([4, 4], 5) == range(4, 5)


def test_a_backbone_that_reads_pictures_is_refused() -> None:
    tiny = FnaTiny()
    with pytest.raises(
        ValueError, match="task=generation with backbone=fna_tiny: expected one th"
    ):
        measured(tiny, "exact")
    data = PromptsData(transform=tiny.transform)
    data.setup()
    with pytest.raises(ValueError, match="data=prompts holds no pictures: it goes with task=gen"):
        next(iter(data.test_dataloader()))


def test_latents_that_are_not_finite_are_an_error(backbone: Any) -> None:
    class Broken(SubsetAttention):
        def attend(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().attend(*args, **kwargs) * torch.nan

    with pytest.raises(ValueError, match="latents that are NaN or infinite under attn="):
        measured(backbone, Broken(num_landmarks=24))


def test_prompts_and_seeds(tmp_path: Path) -> None:
    assert len(set(PROMPTS)) == 8
    data = PromptsData(transform=lambda seed: torch.full((3,), seed), seeds=3, seed=5, limit=4)
    data.setup()
    assert data.test_set is not None
    pairs = [(s["text"], s["seed"], s["name"]) for s in (data.test_set[i] for i in range(4))]
    assert pairs == [
        (PROMPTS[0], 5, "prompt-0-seed-5"), (PROMPTS[0], 6, "prompt-0-seed-6"),
        (PROMPTS[0], 7, "prompt-0-seed-7"), (PROMPTS[1], 5, "prompt-1-seed-5"),
    ]  # fmt: skip
    assert data.describe()["count"] == 4 and data.describe()["seeds"] == 3
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    data = PromptsData(transform=lambda seed: torch.zeros(1), path=str(tmp_path / "p.txt"))
    data.setup()
    assert [s["text"] for s in data.test_dataloader()] == [["one"], ["two"]]
    with pytest.raises(ValueError, match="data.seeds=0"):
        PromptsData(transform=lambda seed: torch.zeros(1), seeds=0)


def test_closeness_and_psnr_by_hand() -> None:
    exact, found = torch.randn(2, 3, 4, 5, 5)
    same, error = closeness(found, exact)
    for i in range(3):
        a, b = found[i].flatten().double(), exact[i].flatten().double()
        assert same[i] == pytest.approx((a @ b / (a.norm() * b.norm())).item())
        assert error[i] == pytest.approx(((a - b).norm() / b.norm()).item())
    assert psnr(exact, exact).tolist() == [100, 100, 100]
    black, grey = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)
    assert psnr(black, grey).item() == pytest.approx(20, abs=1e-5)


def test_intervals_and_the_clock() -> None:
    assert with_interval("x", [2.0]) == {"x": 2.0}
    found = with_interval("x", [1.0, 2.0, 3.0])
    assert found["x"] == 2 and 1 <= found["x_low"] < 2 < found["x_high"] <= 3
    made, seconds = timed(lambda: "made", torch.device("cpu"))
    assert made == "made" and 0 <= seconds < 1


def composed(*overrides: str) -> Any:
    given = ["experiment=sd3_linear", "backbone=sd3_random", 'attn.layers="3-5"',
             "attn.num_landmarks=24", "attn.landmarks.text=8", "task.num_steps=4",
             "task.steps=[1,2]", "task.cost=false", "trainer=cpu",
             "trainer.enable_progress_bar=false", *overrides]  # fmt: skip
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=given)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    found = run(composed("data.limit=3", "data.seeds=2"), tmp_path)
    rows = pq.read_table(tmp_path / records.SAMPLES).to_pylist()
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (PROMPTS[0], 0), (PROMPTS[0], 1), (PROMPTS[1], 0),
    ]  # fmt: skip
    assert found["metrics"]["latent_error"] == pytest.approx(
        np.mean([row["latent_error"] for row in rows])
    )
    assert found["generation"] == {"steps": [1, 2], "num_steps": 4}
    assert [one["prompt"] for one in found["pictures"]] == [row["prompt"] for row in rows]
    assert found["backbone"]["random_weights"] and records.nature(found) == " (random weights)"
    assert found["versions"]["diffusers"] is not None
    assert {p.stem for p in (tmp_path / "figures").glob("*.png")} == {"pictures", "velocity"}
    again = run(composed("data.limit=3", "data.seeds=2", "data.batch_size=3"), tmp_path / "two")
    for name in ("latent_error", "image_psnr", "teacher_error"):  # whatever the batch
        assert again["metrics"][name] == pytest.approx(found["metrics"][name], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        (["data=photos"], ValueError, "begins from noise, got Image; use data=prompts"),
        (["attn.num_landmarks=85"], ValueError, "more landmarks than the 84 tokens"),
        (["mask=type1"], NotImplementedError, "mask=type1 cannot be used on joint blocks"),
        (["attn.layers=auto", "+attn.budget=0.1"], NotImplementedError, "attn.layers other than"),
    ],
)
def test_impossible_runs_are_one_line(
    more: list[str], error: Any, said: str, tmp_path: Path
) -> None:
    more = [text.lstrip("+") for text in more]
    with pytest.raises(error, match=said) as caught:
        run(composed(*more), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_variant_that_calibrates_is_refused_before_it_does(tmp_path: Path) -> None:
    given = ["task=generation", "backbone=sd3_random", "attn=registers", "trainer=cpu"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=given)
    with pytest.raises(NotImplementedError, match="attn=registers cannot honour joint blocks"):
        run(cfg, tmp_path)
