"""Every experiment runs in its smoke form, and leaves what a reader needs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from fna_lab.cli import conf_dir, main, smoke
from fna_lab.report import record as records
from fna_lab.run import run

CONF = conf_dir()
NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
QUICK = ["trainer=cpu", "trainer.enable_progress_bar=false"]
SWEPT = ["projection_clamp", "sink_mask_grid", "svd_rank_sweep"]


def node(name: str) -> Any:
    return OmegaConf.load(CONF / "experiment" / f"{name}.yaml")


def first_of_each_sweep(overrides: list[str]) -> list[str]:
    """What the first job of a multirun is given."""
    parser, given = OverridesParser.create(), []
    for text in overrides:
        one = parser.parse_override(text)
        if one.is_sweep_override():
            text = f"{one.key_or_group}={next(one.sweep_string_iterator())}"
        given.append(text)
    return given


def composed(name: str) -> DictConfig:
    overrides = [f"experiment={name}", *node(name).smoke_overrides, *QUICK]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=first_of_each_sweep(overrides))


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_runs_in_seconds_without_network_or_weights(
    name: str, tmp_path: Path
) -> None:
    cfg = composed(name)
    kind = cfg.backbone["_target_"].rpartition(".")[2]
    if kind == "RandomSD3Backbone":
        pytest.importorskip(
            "diffusers", reason="needs diffusers: pip install 'fna-lab[diffusion]'"
        )
    else:
        assert kind in ("FnaTiny", "PlantedBackbone") or cfg.backbone.pretrained is False
    assert cfg.data.get("root") is None
    found = run(cfg, tmp_path)
    assert json.loads((tmp_path / records.METRICS).read_text())["metrics"] == found["metrics"]
    assert len(found["metrics"]) > 1 and found["metrics"]["n"] == found["data"]["count"] <= 16
    assert all(math.isfinite(value) for value in found["metrics"].values())
    rows = pq.read_table(tmp_path / records.SAMPLES)
    timed = found["timing"]["rows"] if found["task"] == "timing" else None
    assert rows.num_rows == (found["data"]["count"] if timed is None else len(timed))
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    if found["task"] == "anatomy":
        wanted = set(found["config"]["task"]["measure"]) | {"tokens"}
        assert drawn == wanted
    elif found["task"] == "findings":
        asked = found["config"]["task"]["findings"]
        told = {one["name"]: one for one in found["findings"]}
        assert set(told) == set(asked) if asked else len(told) == 8
        assert all(one["says"] for one in told.values())
        for one in told:  # no figure only where no picture has such tokens
            numbers = [key for key in found["metrics"] if key.startswith(f"{one}/")]
            assert (one in drawn) == bool(numbers)
        assert drawn
    elif found["task"] == "generation":
        assert drawn == {"pictures", "velocity"} and records.nature(found) == " (random weights)"
    else:
        assert drawn == ({"timing"} if timed else set())


def test_the_planted_backbone_is_given_its_findings(tmp_path: Path) -> None:
    found = run(composed("sinking_variations"), tmp_path)
    told = {one["name"]: one["holds"] for one in found["findings"]}
    assert told["sinking_shrinks"] is True and told["type2_controls_growth"] is True
    assert found["backbone"]["constructed"] and found["data"]["synthetic"]


def test_random_weights_are_called_so(tmp_path: Path) -> None:
    found = run(composed("no_massive_in_mae"), tmp_path)
    assert records.nature(found) == " (random weights)"
    found["config"]["backbone"]["checkpoint"] = "some.safetensors"
    assert records.nature(found) == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_is_one_in_the_file_and_in_smoke(name: str) -> None:
    text = OmegaConf.to_container(node(name))
    assert isinstance(text, dict)
    parser = OverridesParser.create()
    swept = {
        one.key_or_group
        for one in map(parser.parse_override, text["smoke_overrides"])
        if one.is_sweep_override()
    }
    params = set(text.get("hydra", {}).get("sweeper", {}).get("params", {}))
    assert (name in SWEPT) == bool(params)
    assert swept <= params
    # What smoke does not sweep has to be set, or the whole sweep would run.
    assert params <= {one.split("=")[0] for one in text["smoke_overrides"]}


def command_line(*overrides: str, code: int = 0) -> list[dict[str, Any]]:
    """Run in this process and folder; the records of finished runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["fna_lab", *overrides])
        patched.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == code
    return [json.loads(path.read_text()) for path in Path("outputs").rglob("metrics.json")]


def test_a_multirun_in_smoke_and_a_setting_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = ["mask.layers=7", "data.limit=2"]
    found = command_line("experiment=sink_mask_grid", "smoke=true", *mine, *QUICK)
    assert {one["config"]["mask"]["pattern"] for one in found} == {"t_to_t", "type1"}
    assert [one["mask"]["layers"] for one in found] == [[7], [7]]
    assert [one["data"]["count"] for one in found] == [2, 2]
    assert {one["backbone"]["name"] for one in found} == {"planted"}
    said = capsys.readouterr().out
    assert "2 runs" in said and "mask.pattern" in said


def test_what_the_user_says_wins_over_smoke() -> None:
    said = ["experiment=paper_clip_l14_448", "smoke=true", "backbone=planted", "data.limit=1"]
    given = smoke(said, CONF)
    assert given[-len(said) :] == said
    keys = [text.split("=")[0] for text in given]
    assert len(set(keys)) == len(keys)
    assert "data.batch_size" in keys and "attn.num_landmarks" in keys
    assert not any(key.startswith("backbone.") for key in keys)  # of a backbone that is not used
    assert smoke(["experiment=findings"], CONF) == ["experiment=findings"]


def test_smoke_of_another_option_keeps_the_settings_that_it_has() -> None:
    said = ["experiment=fps_illustration", "smoke=true", "attn=exact"]
    given = smoke(said, CONF)
    assert 'attn.layers="4-"' in given  # for the backbone of smoke has fewer blocks
    assert not any(text.startswith("attn.num_landmarks") for text in given)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            ["experiment=fps_illustration", "attn=exact", "smoke=true"],
            "attn.num_landmarks=64: attn=exact has no such setting; expected layers. "
            "experiment=fps_illustration sets it. Leave it out (~attn.num_landmarks)",
        ),
        (
            ["experiment=fps_illustration", "task=fidelity", "smoke=true"],
            "task.measure=['landmarks']: task=fidelity has no such setting; expected cost, meter. "
            "experiment=fps_illustration sets it.",
        ),
        (
            ["attn=fna", "+attn.landmarks.foo=2"],
            "attn.landmarks.foo=2: attn/landmarks=grid_fps has no such setting; expected share, "
            "sketch. Leave it out",
        ),
        (["smoke=maybe", "experiment=findings"], "smoke=maybe: expected true or false."),
        (["smoke=true"], "smoke=true: expected an experiment beside it, experiment=NAME"),
        (["smoke=true", "experiment=nine"], "experiment=nine: there is no such option"),
        (["experiment=nine"], "experiment=nine: there is no such option; expected one of att"),
    ],
)
def test_errors_say_what_is_wrong(
    given: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command_line(*given, code=1) == []
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and wanted in errors[0]
