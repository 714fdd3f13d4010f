"""The command line as a user meets it: help, results, and one clear line for every error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch

from fna_lab.cli import check_arguments, conf_dir, main
from fna_lab.help import first_comment
from fna_lab.report.__main__ import main as report
from fna_lab.task.fidelity import Fidelity

QUICK = ["data.count=6", "task.protocols=[zero_shot]", "task.cost=false", "trainer=cpu"]
TINY_TIMM = ["backbone=timm", "backbone.name=vit_tiny_patch16_224.augreg_in21k_ft_in1k"]


def run(*overrides: str, code: int = 0) -> list[Path]:
    """Run in this process and folder; the folders of finished runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["fna_lab", *overrides])
        patched.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == code
    return sorted(path.parent for path in Path("outputs").rglob("metrics.json"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_lists_every_group_and_option_in_one_line_each() -> None:
    command = [sys.executable, "-m", "fna_lab", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for path in conf_dir().rglob("*/*.yaml"):
        wanted = f"  {path.stem:24} {first_comment(path)}"
        assert wanted.rstrip() in [line.rstrip() for line in lines]
    for group in ("backbone", "attn", "attn/solver", "mask/detector", "trainer", "logger"):
        assert any(line.startswith(f"{group}=") for line in lines)


def test_a_run_leaves_its_record_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data.count=6", "data.bank_count=20", "data.label=shape", "task.knn_k=[3]"]
    (done,) = run("attn=fna", "attn.num_landmarks=32", "name=first", "trainer=cpu", *data)
    assert done.parent.name == "first"
    record = json.loads((done / "metrics.json").read_text())
    for key in ("config", "config_hash", "code_hash", "git", "versions", "device", "seed", "data"):
        assert key in record
    assert record["config"]["attn"]["num_landmarks"] == 32
    assert record["data"]["count"] == record["metrics"]["n"] == 6
    assert record["attn"] == {"name": "fna", "layers": [4, 5, 6, 7]}
    cost = record["cost"]
    assert cost["patched_selection_ms"] > 0 and cost["exact_selection_ms"] == 0
    parts = [cost[f"patched_{part}_ms"] for part in ("selection", "attention", "rest")]
    assert min(parts) > 0 and cost["patched_peak_mib"] > 1
    rows = pq.read_table(done / "samples.parquet").to_pylist()
    assert [row["index"] for row in rows] == list(range(6))
    right = sum(row["knn3_correct"] for row in rows) / 6
    assert right == pytest.approx(record["metrics"]["knn3_accuracy"])
    assert {p.name for p in done.iterdir()} == {
        ".hydra",
        "run.log",
        "metrics.json",
        "samples.parquet",
    }
    said = capsys.readouterr().out
    assert "fna in blocks 4-7" in said and "num_landmarks=32" in said
    assert "knn3 accuracy" in said and "peak memory (MiB)" in said


def test_anatomy_leaves_arrays_and_figures_that_can_be_drawn_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["task=anatomy", "task.measure=[facts,mass,growth,decay]", "task.rounds=1"]
    (done,) = run(*settings, "data.count=5", "data.batch_size=2", "trainer=cpu")
    rows = pq.read_table(done / "samples.parquet").to_pylist()
    assert len(rows) == 5 and rows[0]["decay/removed/00"] == 0
    assert rows[3]["growth/off/07"] > 0 and rows[4]["growth/off/07"] is None
    names = {"mass", "growth", "decay", "tokens"}
    assert {path.stem for path in (done / "figures").iterdir()} == names
    said = capsys.readouterr().out
    assert "mass: share of all attention" in said and "artifact" not in said.split("growth")[0]
    (done / "figures" / "mass.png").unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["report", str(done), "--figures"])
        report()
    assert (done / "figures" / "mass.png").stat().st_size > 10_000
    assert "figures/mass.png" in capsys.readouterr().out


def test_same_seed_same_numbers() -> None:
    for name in ("one", "two"):
        done = run("attn=fna", "attn/landmarks=random", f"name={name}", *QUICK)
    records = [json.loads((path / "metrics.json").read_text()) for path in done]
    assert len(records) == 2
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["config_hash"] == records[1]["config_hash"]


def test_multirun_goes_on_after_a_failure_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = run("-m", "attn=exact,fna", "attn.layers=7,9", *QUICK, code=1)
    assert len(done) == 2
    said = capsys.readouterr()
    assert "error: job 1: attn.layers=9: block 9 does not exist" in said.err
    assert "2 runs" in said.out and "zero shot" in said.out
    # Again: what is there is skipped, what failed is tried again.
    before = [(path / "metrics.json").stat().st_mtime_ns for path in done]
    again = run("-m", "attn=exact,fna", "attn.layers=7,6", *QUICK)
    assert len(again) == 4
    assert [(path / "metrics.json").stat().st_mtime_ns for path in done] == before
    assert "2 runs" not in capsys.readouterr().out
    assert len(run("-m", "attn=exact,fna", "attn.layers=7,6", *QUICK)) == 4
    assert len(run("-m", "attn=exact,fna", "attn.layers=7,6", "force=true", *QUICK)) == 8


def test_an_interrupted_sweep_keeps_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    steps, step = list[int](), Fidelity.step

    def interrupted(task: Fidelity, batch: dict[str, Any]) -> None:
        steps.append(len(batch["image"]))
        if len(steps) == 6:  # the second batch of the third run
            raise KeyboardInterrupt
        step(task, batch)

    sweep = ["-m", "attn=exact,fna,subset", "task=fidelity", "data.batch_size=3"]
    sweep += ["data.count=6", "task.cost=false", "trainer=cpu", "data=noise"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Fidelity, "step", interrupted)
        done = run(*sweep, code=130)
    assert [folder.name for folder in done] == ["0", "1"]
    (kept,) = Path("outputs").rglob("unfinished.parquet")
    assert kept.parent.name == "2" and len(pq.read_table(kept)) == 3
    out, err = capsys.readouterr()
    assert "2 runs" in out and "interrupted" in err
    (new,) = {*run(*sweep)} - {*done}
    assert new.name == "2" and "3 runs" in capsys.readouterr().out


def test_the_flag_of_a_multirun_may_stand_anywhere() -> None:
    assert len(run("attn=fna", "-m", "attn.layers=6,7", *QUICK)) == 2


def test_parts_that_have_a_default_in_python_may_be_left_out() -> None:
    given = ["-m", "attn=fna", "~attn/landmarks", "~experiment", "~attn.budget", "outputs=x"]
    check_arguments(given, conf_dir())


def test_settings_of_swept_options_need_no_sweep_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = run("-m", "attn=fna,subset", "attn.num_landmarks=16", "attn.layers=[6,7]", "seed=0,1",
               "attn/landmarks=random", "attn.landmarks.seed=${seed}", *QUICK)  # fmt: skip
    records = [json.loads((path / "metrics.json").read_text())["config"] for path in done]
    assert len(records) == 4
    assert {one["attn"]["num_landmarks"] for one in records} == {16}
    assert [one["attn"]["layers"] for one in records] == [[6, 7]] * 4
    assert {one["attn"]["landmarks"]["seed"] for one in records} == {0, 1}
    run("-m", "attn=fna,subset", "attn.landmark=16", *QUICK, code=1)
    assert "attn.landmark: there is no such setting" in capsys.readouterr().err


@pytest.mark.parametrize(("logger", "left"), [("csv", "csv/metrics.csv"), ("wandb", "wandb")])
def test_loggers_leave_their_files_in_the_run_folder(logger: str, left: str) -> None:
    (done,) = run(f"logger={logger}", *QUICK)
    assert (done / left).exists()


def nan_weights(folder: Path) -> list[str]:
    model = timm.create_model("vit_tiny_patch16_224")
    state = model.state_dict()
    state["blocks.3.mlp.fc1.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(state, folder / "nan.safetensors")
    return [*TINY_TIMM, f"backbone.checkpoint={folder / 'nan.safetensors'}"]


def other_model(folder: Path) -> list[str]:
    safetensors.torch.save_file({"w": torch.ones(3)}, folder / "other.safetensors")
    return [*TINY_TIMM, f"backbone.checkpoint={folder / 'other.safetensors'}"]


def no_folder(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [f"outputs={folder / 'file' / 'x'}"]


BAD = {
    "unknown option": (["attn=foo"], "attn=foo: there is no such option; expected one of block"),
    "unknown nested option": (["attn=fna", "attn/solver=x"], "attn/solver=x: there is no such"),
    "unknown group": (["atn=fna"], "atn: there is no such"),
    "unknown setting": (["attn.landmark=3"], "attn.landmark: there is no such setting"),
    "unset setting": (["data=folder"], "data.root is not set"),
    "layers beyond the depth": (["attn.layers=4-9"], "attn.layers='4-9': block 8 does not exist"),
    "mask layers beyond the depth": (["mask=type1", "mask.layers=[8]"], "mask.layers="),
    "detection after the mask": (
        ["mask=type1", "mask.detect=6", "mask.layers=5-7"], "mask.detect=6"
    ),
    "too many landmarks": (
        ["attn=fna", "attn.num_landmarks=198"],
        "attn.num_landmarks=198: more landmarks than the 197 tokens",
    ),
    "landmarks no number": (["attn=fna", "attn.num_landmarks=few"], "attn.num_landmarks='few'"),
    "input size": (["backbone.img_size=100"], "backbone.img_size=100: expected a multiple of"),
    "checkpoint of another model": (other_model, "other.safetensors does not fit backbone="),
    "NaN in the weights": (nan_weights, "blocks.3.mlp.fc1.weight holds 1 values that are NaN"),
    "no checkpoint": (["backbone.checkpoint=/no/x.pth"], "backbone.checkpoint=/no/x.pth"),
    "detector finds nothing": (
        ["mask=type2", "mask/detector=norm_ratio", "mask.detector.ratio=1000"],
        "mask/detector=norm_ratio (ratio=1000) finds no token at block 5",
    ),
    "detector finds everything": (
        ["mask=type2", "mask/detector=norm_ratio", "mask.detector.ratio=0.001"],
        "finds all 196 patch tokens",
    ),
    "output folder": (no_folder, "outputs: cannot write"),
    "empty folder of pictures": (
        lambda folder: ["task=fidelity", "data=folder", f"data.root={folder}"],
        "no picture in it",
    ),
    "protocol without labels": (["data=photos"], "task=classification needs labels"),
    "unknown protocol": (["task.protocols=[guess]"], "task.protocols=['guess']"),
    "part as a setting": (["mask=type2", "mask.detector=norm_gap"],
                          "mask.detector='norm_gap': expected mask/detector=NAME on the command"),
    "sampler as a setting": (["attn=fna", "attn.landmarks=fps"],
                             "attn.landmarks='fps': expected attn/landmarks=NAME on the command"),
    "part that is not there": (["attn/landmarks=fps"],
                               "attn/landmarks: the attn that is chosen has no landmarks; choose"),
    "no option": (["attn="], "attn=: there is no such option; expected one of block_svd"),
    "no folder": (["outputs="], "outputs=: expected the name of a folder."),
    "no name": (["name=''"], "name='': expected the name of a folder."),
    "part left out": (["~attn"], "~attn: a run needs its attn; expected attn=NAME."),
    "dashes": (["--attn", "fna"], "--attn: settings have no dashes; expected attn=NAME."),
    "no equal sign": (["attn", "fna"], "attn: cannot be read; expected group=option"),
    "open bracket": (["attn.layers=[6,7"], "[6,7: cannot be read; expected group=option"),
    "several values": (["attn=fna,exact"], "attn=fna,exact: expected one value; -m runs every"),
    "no true or false": (["attn=fna", "attn.clusters=maybe"],
                         "attn.clusters='maybe': expected true or false."),
    "force no true or false": (["force=maybe"], "force='maybe': expected true or false."),
    "name without a list": (["task.protocols=knn"],
                            "task.protocols='knn': expected a list of names or null."),
    "number without a list": (["task.knn_k=5"], "task.knn_k=5: expected a list of integers."),
    "no neighbours": (["task.knn_k=[0]"], "task.knn_k=[0]: expected a list of integers >= 1."),
    "temperature": (["task.temperature=0"], "task.temperature=0: expected a number > 0."),
    "one of two numbers": (["data.objects=9"], "data.objects=9: expected two integers."),
    "seed of the run": (["seed=-1"], "seed=-1: expected an integer from 0 to 4294967295."),
    "seed of the data": (["data.seed=x"], "data.seed='x': expected an integer."),
    "batches of none": (["data.batch_size=0"], "data.batch_size=0: expected an integer >= 1."),
    "workers": (["data.num_workers=-1"], "data.num_workers=-1: expected an integer >= 0."),
    "workers no number": (["data.num_workers=x"], "data.num_workers='x': expected an integer"),
    "precision": (["trainer.precision=foo"], "trainer=cpu: Precision 'foo' is invalid."),
    "several devices": (["task=fidelity", "data=photos", "trainer=cpu", "trainer.devices=2"],
                        "trainer.devices=2: expected 1"),
    "no picture": (["task=fidelity", "data=photos", "data=none"],
                   "data=none: task=fidelity measures on pictures; expected data"),
    "sentences for a ViT": (["task=fidelity", "data=photos", "data=sentences"],
                            "data=sentences holds no pictures: it goes with a backbone that r"),
    "no ViT": (["backbone=timm", "backbone.name=resnet18", "backbone.pretrained=false"],
               "backbone.name=resnet18: ResNet is no plain ViT; expected a model of timm"),
    "no ViT of open_clip": (
        ["backbone=open_clip", "backbone.name=RN50", "backbone.pretrained=false"],
        "backbone.name=RN50: its image tower, ModifiedResNet, is no ViT; expected a model",
    ),
    "anatomy": (["backbone.anatomy=3"], "backbone.anatomy=3: expected restart, detect, mask"),
    "too many neighbours": (
        ["task.protocols=[knn]", "data.bank_count=3", "data.label=shape"],
        "wants more neighbours than the 3 pictures",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_clear_line(
    case: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, wanted = BAD[case]
    given = overrides(folder) if callable(overrides) else overrides
    quick = ["trainer=cpu", "task.cost=false"] if "fidelity" not in str(given) else []
    if "data=photos" not in given and "data=folder" not in given:
        quick.append("data.count=6")
    if not any(text.startswith("task") for text in given):
        quick.append("task.protocols=[zero_shot]")
    if "backbone=timm" in given:
        quick = ["task=fidelity", "trainer=cpu"]
    assert run(*quick, *given, code=1) == []
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and wanted in errors[0]
    left = [path for path in Path(".").rglob("*") if path.suffix in (".part", ".parquet", ".json")]
    assert not left


def test_errors_reach_the_shell() -> None:
    command = [sys.executable, "-m", "fna_lab", "attn=foo"]
    environment = {**os.environ, "HYDRA_FULL_ERROR": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: attn=foo") and "\n" not in done.stderr.strip()


def test_an_iterative_mask_of_blocks_before_detection_still_looks_where_the_backbone_says() -> (
    None
):
    data = ["backbone=planted", "data=planted", "data.count=4", "task=fidelity"]
    more = ["mask.layers=3-7", "task.cost=false", "trainer=cpu"]
    (done,) = run(*data, *more, "mask=iterative_masking")
    mask = json.loads((done / "metrics.json").read_text())["mask"]
    assert mask["detect"] == 5 and mask["layers"] == [3, 4, 5, 6, 7]
    assert mask["found"]["rounds"] == mask["found"]["mean"] > 2  # one token a round
    rows = pq.read_table(done / "samples.parquet").to_pylist()
    assert [len(row["mask_tokens"]) for row in rows] == [row["mask_rounds"] for row in rows]
    # White patches draw CLS first; the black ones are sinks only once those are gone.
    assert 0 < mask["found"]["new_per_removed"] < 1
