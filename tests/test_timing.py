"""task=timing is the benchmark as a run: its rows, its clock, and one line where it cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from clocks import interrupt_second_case
from hydra import compose, initialize_config_dir
from rich.console import Console

from fna_lab.bench import attention, packages
from fna_lab.bench.settings import Settings
from fna_lab.cli import conf_dir, main
from fna_lab.metric import cost
from fna_lab.report import record as records
from fna_lab.report import table
from fna_lab.report.sweep import show_sweep
from fna_lab.run import run

QUICK = ["trainer=cpu", "trainer.enable_progress_bar=false", "task=timing", "task.seconds=0.01",
         "task.least=1", "task.heads=2", "task.head_dim=8", "task.landmarks=8"]  # fmt: skip


def timed(folder: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=[*QUICK, *overrides])
    return run(cfg, folder)


def test_every_variant_at_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []
    clock = cost.latency

    def latency(*args: Any, **more: Any) -> Any:
        measured.append(clock(*args, **more))
        return measured[-1]

    monkeypatch.setattr(cost, "latency", latency)
    names = ["exact", "fna", "performer"]
    given = [f"task.variants=[{','.join(names)}]", "task.tokens=[101,50]", "task.batch=[1,2]"]
    found = timed(tmp_path, *given)
    rows = found["timing"]["rows"]
    asked = [(n, b, v) for b in (1, 2) for n in (50, 101) for v in names]
    assert [(row["tokens"], row["batch"], row["variant"]) for row in rows] == asked
    assert len(measured) == 4 and all(set(times) == set(names) for times in measured)  # one clock
    for i, row in enumerate(rows):
        times = measured[i // len(names)]
        assert row["speedup"] == pytest.approx(cost.ratio(times, "exact", row["variant"]))
        assert row["variant"] != "exact" or row["speedup"] == 1
        assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"] and row["peak_mib"] > 0
        assert (row["selection_ms"] > 0) == (row["variant"] == "fna")
        name = f"{row['variant']}, batch {row['batch']}/{row['tokens']}"
        for key in ("ms", "speedup", "peak_mib"):
            assert found["metrics"][f"{key}/{name}"] == pytest.approx(row[key])
    assert json.loads((tmp_path / records.METRICS).read_text())["timing"] == found["timing"]
    samples = pq.read_table(tmp_path / records.SAMPLES).to_pylist()
    assert [row["ms"] for row in samples] == [row["ms"] for row in rows]
    assert (tmp_path / "figures" / "timing.png").stat().st_size > 20_000
    table.show(found, Console(width=140))
    said = capsys.readouterr().out
    assert "constructed" in said and "fna_tiny is not run" in said and "quartiles" in said


def test_what_was_measured_before_an_interruption_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_second_case(monkeypatch)
    given = ["task.variants=[exact,fna]", "task.tokens=[50,101]"]
    with pytest.raises(KeyboardInterrupt):
        timed(tmp_path, *given)
    kept = pq.read_table(tmp_path / records.UNFINISHED).to_pylist()
    assert [(row["tokens"], row["variant"]) for row in kept] == [(50, "exact"), (50, "fna")]
    assert not (tmp_path / records.METRICS).exists()
    monkeypatch.undo()
    timed(tmp_path, *given)  # into the same folder
    assert not (tmp_path / records.UNFINISHED).exists()


def test_a_sweep_has_a_table_for_each_run(tmp_path: Path) -> None:
    given = ["task.variants=[exact,fna]", "task.tokens=[50]"]
    runs = [timed(tmp_path, *given, f"task.batch=[{batch}]") for batch in (1, 3)]
    console = Console(width=table.WIDTH, record=True)
    show_sweep(runs, console)
    said = console.export_text()
    assert "run 0 task.batch=[1]" in said and "run 1 task.batch=[3]" in said
    for row in (row for found in runs for row in found["timing"]["rows"]):
        assert f" {row['low_ms']:.2f}-{row['high_ms']:.2f} " in said


def test_selection_knows_farthest_points_and_says_what_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: False)
    found = timed(tmp_path, "task.part=selection", "task.tokens=[50]")
    rows = {row["variant"]: row for row in found["timing"]["rows"]}
    assert rows["fps"]["farthest"] == 1 and rows["fps"]["coverage"] == pytest.approx(1)
    assert rows["random"]["farthest"] < 1 < rows["random"]["coverage"]
    assert len(found["timing"]["notes"]) == len(packages.SAMPLERS)
    table.show(found, Console(width=140))
    said = capsys.readouterr().out
    for name in packages.SAMPLERS:
        assert f"{name} is not installed" in said


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    given = ["task.variants=[exact,fna]", "task.tokens=[50,65]", "task.exact_limit=60"]
    found = timed(tmp_path, *given, "task.memory=false")
    left = [(row["tokens"], row["variant"]) for row in found["timing"]["rows"]]
    assert left == [(50, "exact"), (50, "fna"), (65, "fna")]
    assert found["timing"]["notes"] == [
        "exact is left out at 65 tokens: task.exact_limit=60"
    ]  # fmt: skip
    assert not any(name.startswith("peak_mib") for name in found["metrics"])


def test_the_attention_of_the_run_stands_beside_the_named_ones(tmp_path: Path) -> None:
    given = ["task.tokens=[50]", "attn=fna", "attn.num_landmarks=16", "attn/landmarks=random"]
    found = timed(tmp_path / "a", *given, "task.variants=[exact,fna]")
    assert [r["variant"] for r in found["timing"]["rows"]] == ["exact", "fna", "attn=fna"]
    found = timed(tmp_path / "b", *given, "task.part=selection", "task.samplers=[fps,random]")
    ours = {row["variant"]: row for row in found["timing"]["rows"]}
    assert ours["attn=fna"]["coverage"] == ours["random"]["coverage"]


def test_landmarks_may_be_more_than_tokens_of_the_backbone_that_is_not_run(tmp_path: Path) -> None:
    given = ["task.tokens=[300]", "task.variants=[exact]", "attn=subset", "attn.num_landmarks=256"]
    found = timed(tmp_path, *given, "attn/landmarks=random")
    assert [row["variant"] for row in found["timing"]["rows"]] == ["exact", "attn=subset"]


def test_heads_are_the_backbones_where_none_are_set(tmp_path: Path) -> None:
    given = ["task.heads=null", "task.head_dim=null", "task.variants=[exact]", "task.tokens=[50]"]
    found = timed(tmp_path, *given)
    facts = found["timing"]
    assert facts["heads"] > 2
    assert facts["heads"] * facts["head_dim"] == found["backbone"]["embed_dim"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["task.part=whole"], "task.part='whole': expected one of attention, selection"),
        (["task.tokens=[50,1]"], "task.tokens=[50, 1]: expected a list of integers >= 2"),
        (["task.tokens=50"], "task.tokens=50: expected a list of integers >= 2"),
        (["task.batch=[0]"], "task.batch=[0]: expected a list of integers >= 1"),
        (["task.dtype=[int8]"], "task.dtype=['int8']: expected a list of float32, bfloat16"),
        (["task.masks=[type3]"], "task.masks=['type3']: expected a list of type1-mask"),
        (["task.heads=0"], "task.heads=0: expected an integer >= 1"),
        (["task.seconds=0"], "task.seconds=0: expected a number > 0"),
        (["task.seconds=nan"], "task.seconds=nan: expected a number > 0"),
        (["task.variants=[]"], "task.variants=[]: expected a list of names"),
        (["task.variants=[nonsense]"], "task.variants=nonsense: there is no such variant; known"),
        (["task.variants=[reduced]"], "task.variants=reduced: there is no such variant; known"),
        (["task.part=selection", "task.samplers=[nonsense]"], "task.samplers=nonsense: there is"),
        (["task.part=selection", "task.samplers=[attention]"], "task.samplers=attention: it samp"),
        (
            ["task.part=selection", "task.tokens=[5]"],
            "task.landmarks=8: more landmarks than the",
        ),
        (["task.part=selection", "attn=performer"], "attn=performer: it has no landmark sampler"),
        (
            ["task.part=selection", 'task.samplers=["fps:foo=1"]'],
            "task.samplers=fps:foo=1: fps has no setting foo; known: sketch, block.",
        ),
        (
            ["task.part=selection", 'task.samplers=["fps:block"]'],
            "task.samplers=fps:block: expected block=VALUE",
        ),
        (
            ["task.part=selection", "task.variants=[fna]"],
            "task.variants=['fna']: it does nothing with task.part=selection; expected null.",
        ),
        (
            ["task.part=selection", "task.masks=[type1-sink]"],
            "task.masks=['type1-sink']: it does nothing with task.part=selection; expected [].",
        ),
        (
            ["task.samplers=[fps]"],
            "task.samplers=['fps']: it does nothing without task.part=selection; expected null.",
        ),
        (
            ["task.tokens=[50,9]", "task.masks=[type1-sink]", "task.masked_tokens=9"],
            "task.masked_tokens=9: expected at most 8, for CLS stays of the 9 tokens in "
            "task.tokens=[50, 9].",
        ),
        (["task.masked_tokens=9"], "task.masked_tokens=9: it does nothing without task.masks;"),
        (["task.variants=[fna]", "task.tokens=[5]"], "task.tokens=[5]: nothing fits; fna is left"),
        (["mask=type2"], "mask=type2: task=timing runs no model; expected mask=none"),
        (["data=noise"], "data=noise: task=timing reads no picture; expected"),
    ],
)
def test_bad_settings_are_one_line(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fna_lab", *QUICK, *given])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        main()
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 1 and len(errors) == 1 and said in errors[0]
    assert not list(tmp_path.rglob(records.METRICS))


def test_slow_calls_are_left_out_by_what_the_last_size_took() -> None:
    notes: list[str] = []
    settings = Settings(variants=["exact"], tokens=[50, 5000], heads=1, head_dim=4, slowest=1e-3,
                        seconds=0.01, least=1, memory=False, progress=False)  # fmt: skip
    rows = [*attention.bench_attention(settings, notes.append)]
    assert [row["tokens"] for row in rows] == [50]
    assert len(notes) == 1 and "exact is left out at 5000 tokens: a call would take" in notes[0]
    assert "--slowest 0.001" in notes[0]
