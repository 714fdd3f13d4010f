"""The benchmark runs, tells what it measured, and fits what it says it fits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fna_lab.bench import attention
from fna_lab.bench.__main__ import main
from fna_lab.bench.table import slopes


def run(monkeypatch: pytest.MonkeyPatch, out: Path, arguments: str) -> dict:
    common = "--seconds 0.01 --least 1 --landmarks 8 --device cpu".split()
    argv = ["bench", *arguments.split(), *common, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    assert (out / "bench.png").stat().st_size > 5000
    return json.loads((out / "bench.json").read_text())


def test_attention_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(monkeypatch, tmp_path, "--tokens 50 101 --batch 1 2 --heads 2 --head-dim 8")
    rows = found["rows"]
    assert len(rows) == 2 * 2 * len(attention.VARIANTS)
    assert {row["variant"] for row in rows} == set(attention.VARIANTS)
    for row in rows:
        assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"] and row["peak_mib"] > 0
        assert (row["selection_ms"] > 0) == (row["variant"] in ("fna", "fna_paper", "subset"))
        if row["variant"] == "exact":
            assert row["speedup"] == 1
    assert "against exact" in capsys.readouterr().out
    assert found["versions"]["torch"] and found["device"]["type"] == "cpu"


def test_whole_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = "--model vit_tiny_patch16_224 --img-size 64 --variants exact fna --layers 6-"
    rows = run(monkeypatch, tmp_path, arguments)["rows"]
    assert [row["variant"] for row in rows] == ["exact", "fna", "free"]
    assert rows[-1]["amdahl"] == 1 and rows[0]["tokens"] == 17


def test_exact_attention_is_left_out_beyond_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = "--tokens 50 65 --exact-limit 60 --variants exact subset --no-memory"
    rows = run(monkeypatch, tmp_path, arguments)["rows"]
    assert [(r["tokens"], r["variant"]) for r in rows] == [
        (50, "exact"), (50, "subset"), (65, "subset"),
    ]  # fmt: skip
    assert "speedup" not in rows[-1] and "peak_mib" not in rows[0]


def test_slopes_are_exponents_of_growth() -> None:
    same = {"variant": "a", "batch": 1, "dtype": "float32"}
    sizes = (100, 4000, 8000, 64000)
    rows = [same | {"tokens": n, "ms": 3 * n**1.5, "peak_mib": n} for n in sizes]
    (fit,) = slopes(rows).values()
    assert fit["ms"] == pytest.approx(1.5, abs=1e-4)
    assert fit["peak_mib"] == pytest.approx(1, abs=1e-4)
    assert slopes(rows[:2]) == {}


def test_unknown_names_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: .*nonsense"):
        run(monkeypatch, tmp_path, "--tokens 50 --variants nonsense")
