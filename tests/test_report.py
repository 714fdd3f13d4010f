"""Records on disk, and how they are shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from rich.console import Console

from fna_lab.report import __main__ as shell
from fna_lab.report import figure, record, sweep, table


def made(attn: str, landmarks: int | None, cosine: float, seed: int = 0) -> dict[str, Any]:
    """A record as a run writes it (constructed)."""
    config = {
        "name": "x", "outputs": "outputs", "seed": seed, "logger": {"_target_": None},
        "backbone": {"_target_": "fna_lab.backbone.timm.TimmBackbone", "name": "vit"},
        "attn": {"_target_": f"fna_lab.attn.{attn}.A", "num_landmarks": landmarks},
    }  # fmt: skip
    costs = {f"{who}_{part}": 2.0 for who in ("exact", "patched") for part in
             ("total_ms", "attention_ms", "selection_ms", "rest_ms", "peak_mib")}  # fmt: skip
    costs |= {"batch": 4, "tokens": 10, "rounds": 3, "speedup": 1.5, "attention_gflops": 0.5,
              "exact_attention_gflops": 1.0, "break_even_tokens": None}  # fmt: skip
    return {
        "config": config, "config_hash": record.config_hash(config), "task": "fidelity",
        "code_hash": record.code_hash(), "data": {"name": "photos", "count": 4},
        "backbone": {"name": "vit", "img_size": 32, "num_tokens": 10, "depth": 2},
        "attn": {"name": attn, "layers": [0, 1]}, "mask": {"name": "none", "layers": []},
        "metrics": {"n": 4.0, "cls_cosine": cosine, "error/00": 0.1, "error/01": 0.2},
        "cost": costs,
    }  # fmt: skip


def shown(draw: Any, what: Any, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    draw(what, console)
    return console.export_text()


def test_hash_knows_what_changes_results_and_what_does_not() -> None:
    one, two = made("fna", 8, 0.5)["config"], made("fna", 8, 0.5)["config"]
    two |= {"name": "y", "outputs": "/tmp", "logger": {"_target_": "W"}}
    assert record.config_hash(one) == record.config_hash(two)
    assert record.config_hash(one) != record.config_hash(one | {"seed": 1})
    assert record.config_hash(dict(reversed(one.items()))) == record.config_hash(one)


def test_a_record_is_found_again_by_config_and_code(tmp_path: Path) -> None:
    one = made("fna", 8, 0.5)
    record.write(one, [{"index": 0, "cosine": 0.5}], tmp_path / "a" / "0")
    record.write(made("fna", 16, 0.5), [{"index": 0}], tmp_path / "a" / "1")
    assert record.find(tmp_path, one["config"]) == tmp_path / "a" / "0"
    assert record.find(tmp_path, one["config"] | {"seed": 5}) is None
    record.write(one | {"code_hash": "older code"}, [{"index": 0}], tmp_path / "a" / "0")
    assert record.find(tmp_path, one["config"]) is None
    (tmp_path / "a" / "0" / record.METRICS).write_text("{ cut")  # by hand: we never leave this
    assert record.find(tmp_path, one["config"]) is None


def test_nothing_is_written_half(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        record.write({"metric": float("nan")}, [{"index": 0}], tmp_path)
    assert not (tmp_path / record.METRICS).exists()
    assert record.finished(tmp_path) == []


def test_runs_are_listed_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "0"):
        record.write(made("fna", 8, 0.5), [{"index": 0}], tmp_path / name)
    assert [path.name for path in record.finished(tmp_path)] == ["0", "9", "10"]


def test_surroundings_are_plain_json() -> None:
    facts = record.surroundings(torch.device("cpu"))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] and facts["device"]["threads"] >= 1
    assert torch.backends.cpu.get_cpu_capability() in facts["device"]["processor"]
    assert facts["git"] is None or len(facts["git"]["commit"]) == 40


def test_one_run_as_a_table() -> None:
    text = shown(table.show, made("fna", 8, 0.98765))
    for part in ("fidelity of 4 pictures of photos", "fna in blocks 0-1 (num_landmarks=8)",
                 "0.9877", "2.00x", "block", "never"):  # fmt: skip
        assert part in text
    masked = made("fna", 8, 0.5)
    masked["mask"] = {
        "name": "type2", "layers": [1], "stage": "mask", "detector": "norm_gap",
        "threshold": "min_gap=0.5", "detect": 1, "found": {"mean": 1.25, "share": 0.5},
    }  # fmt: skip
    text = shown(table.show, masked)
    assert "norm_gap (min_gap=0.5) at block 1 finds 1.25 tokens a picture, in 50% of them" in text


def test_intervals_stand_beside_their_means() -> None:
    run = made("fna", 8, 0.5)
    run["metrics"] |= {"cls_cosine_low": 0.25, "cls_cosine_high": 0.75}
    run["metrics"] |= {"velocity/free_error/07": 0.125}
    text = shown(table.show, run)
    assert "95 % interval" in text and "0.2500 to 0.7500" in text and "cosine low" not in text
    assert "velocity: of a step" in text and "step" in text
    swept = shown(sweep.show_sweep, [run, made("fna", 16, 0.95)])
    assert "0.5000" in swept and "0.2500" not in swept
    assert "95 % interval" not in shown(table.show, made("fna", 8, 0.5))


def test_a_sweep_shows_what_differs_and_nothing_else() -> None:
    runs = [made("fna", 8, 0.9), made("fna", 16, 0.95), made("exact", 8, 1.0)]
    text = shown(sweep.show_sweep, runs)
    assert "attn.num_landmarks" in text and "backbone" not in text and "logger" not in text
    assert text.count("1.50x") == 3 and "0.9500" in text
    assert "seed" not in text and "seed" in shown(
        sweep.show_sweep, [*runs, made("fna", 8, 0.9, seed=1)]
    )
    same = [made("fna", 8, 0.9), made("fna", 8, 0.9)]
    assert "2 runs" in shown(sweep.show_sweep, same)


def test_many_settings_and_metrics_stay_legible_and_tasks_apart() -> None:
    runs = [made("fna", n, 0.9) for n in (8, 8, 16)] + [made("exact", 8, 1.0)]
    for i, run in enumerate(runs[:3]):
        run["config"]["attn"] |= {f"setting_number_{j}": i * j % 3 for j in range(9)}
        run["metrics"] |= {f"metric_{j}_of_many": j + i / 7 for j in range(20)}
    runs[3]["task"] = "classification"
    lines = shown(sweep.show_sweep, runs, width=100).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    text = " ".join(" ".join(lines).split())
    assert "4 runs" in text and "classification, 1 run " in text
    assert "attn.num_landmarks=16, attn.setting_number_1=2, attn.setting_number_2=1," in text
    for j in range(20):
        for i in range(3):
            assert f" {j + i / 7:.4f} " in f"{text} "


def test_narrow_terminals_and_brackets_lose_nothing() -> None:
    runs = [made(attn, 8, 0.9) for attn in ("fna", "nystromformer", "exact")]
    for i, run in enumerate(runs):
        run["config"]["backbone"]["name"] = f"vit_small_patch14_reg{i}_dinov2.lvd142m"
        run["config"]["data"] = {"_target_": "fna_lab.data.folder.F", "root": f"/a/[b{i}]/x[/c]"}
        run["metrics"] |= {f"metric_{j}": j + i / 7 for j in range(9)}
    text = shown(sweep.show_sweep, runs, width=80)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    text = " ".join(text.split())
    assert text.count(" 1.50x ") == 3 and "data.root=/a/[b0]/x[/c]" in text
    assert all(f"{j + i / 7:.4f}" in text for j in range(9) for i in range(3))


def test_figure_and_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, landmarks in enumerate((8, 16, 32)):
        record.write(made("fna", landmarks, i / 3), [{"index": 0}], tmp_path / f"{i}")
    picture = tmp_path / "out.png"
    command = [
        "report",
        str(tmp_path),
        "--figure",
        str(picture),
        "--y",
        "cls_cosine",
        "cost.speedup",
    ]
    monkeypatch.setattr(sys, "argv", command)
    shell.main()
    assert "3 runs" in capsys.readouterr().out
    pixels = matplotlib.image.imread(picture)
    blue = (abs(pixels[..., :3] - [0, 0x72 / 255, 0xB2 / 255]).max(-1) < 0.02).sum()
    assert blue > 100  # the line is there
    with pytest.raises(ValueError, match="the metrics are cls_cosine"):
        figure.plot(
            [record.read(tmp_path / "0")],
            picture,
            x="attn.num_landmarks",
            y=["top1"],
            lines="attn",
        )
    without = made("fna", None, 0.5)
    with pytest.raises(ValueError, match="attn.num_landmarks=None in one of the runs: expected"):
        figure.plot([without], picture, x="attn.num_landmarks", y=["cls_cosine"], lines="attn")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="holds no finished run"):
        shell.main()
