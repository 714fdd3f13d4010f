"""The benchmark runs, tells what it measured, and fits what it says it fits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from clocks import interrupt_second_case
from folders import variants_in

import fna_lab.attn
from fna_lab import ops
from fna_lab.backbone.timm import TimmBackbone
from fna_lab.bench import attention, packages, selection
from fna_lab.bench.__main__ import main
from fna_lab.bench.settings import MASKS
from fna_lab.metric import cost
from fna_lab.report.timings import slopes

CHOOSING = ("fna", "fna_paper", "subset")  # landmarks, of all variants


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
    names = variants_in(Path(fna_lab.attn.__file__).parent) - {"explicit"}
    names |= {*filter(packages.installed, packages.ATTENTION)}
    assert len(rows) == 2 * 2 * len(names) and {row["variant"] for row in rows} == names
    for row in rows:
        assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"] and row["peak_mib"] > 0
        assert (row["selection_ms"] > 0) == (row["variant"] in CHOOSING)
        if row["variant"] == "exact":
            assert row["speedup"] == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "quartiles" in said
    assert "explicit is left out: --landmarks 8: attn.num_explicit=16: expected" in said
    assert found["versions"]["torch"] and found["device"]["type"] == "cpu"


def test_what_was_measured_before_an_interruption_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_second_case(monkeypatch)
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, tmp_path, "--tokens 50 101 --heads 2 --head-dim 8 --variants exact fna")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["tokens"], row["variant"]) for row in rows] == [(50, "exact"), (50, "fna")]
    said = capsys.readouterr().out
    assert "interrupted" in said and "fna" in said and str(tmp_path.name) in said


def test_whole_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = "--model vit_tiny_patch16_224 --img-size 64 --variants exact fna --layers 6-"
    rows = run(monkeypatch, tmp_path, arguments)["rows"]
    assert [row["variant"] for row in rows] == ["exact", "fna", "free"]
    assert rows[-1]["amdahl"] == 1 and rows[0]["tokens"] == 17


def test_a_variant_that_a_model_does_not_suit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--model vit_tiny_patch16_224 --img-size 64 --variants registers fna --layers 0.5"
    rows = run(monkeypatch, tmp_path, arguments)["rows"]
    assert [row["variant"] for row in rows] == ["exact", "fna", "free"]
    assert "registers is left out at 64 px: attn.neurons=null" in " ".join(
        capsys.readouterr().out.split()
    )


def test_masks_stand_beside_what_they_are_put_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--tokens 50 --heads 2 --head-dim 8 --variants exact fna performer --no-memory"
    times = {}
    clock = cost.latency
    monkeypatch.setattr(cost, "latency", lambda *a, **k: times.update(clock(*a, **k)) or times)
    rows = run(monkeypatch, tmp_path, arguments + " --masked-tokens 3 --masks")["rows"]
    for name in ("exact", "fna", "performer"):
        found = [row for row in rows if row["variant"] == name]
        assert [row.get("mask") for row in found] == [None, *MASKS]
        for row in found[1:]:
            ratio = cost.ratio(times, f"{name} {row['mask']}", name)
            assert row["mask_cost"] == pytest.approx(ratio - 1)
    times.clear()
    run(monkeypatch, tmp_path, arguments.replace("exact fna performer", "registers") + " --masks")
    said = " ".join(capsys.readouterr().out.split())
    assert f"registers is measured without {', '.join(MASKS)}, which it does not honour" in said


@pytest.mark.parametrize("points", ["", "--model vit_tiny_patch16_224 --img-size 64 --block 2"])
def test_selection_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, points: str) -> None:
    if points:  # random weights: no hub is at hand
        monkeypatch.setattr(
            selection, "TimmBackbone", lambda **rest: TimmBackbone(**rest | {"pretrained": False})
        )
    names = ["grid_fps", "fps", "fps:block=4,sketch=32", "random"]
    points = points or "--tokens 50 101"
    arguments = f"--selection --batch 2 --samplers {' '.join(names)} {points}"
    rows = run(monkeypatch, tmp_path, arguments)["rows"]
    assert [row["variant"] for row in rows] == names * (2 if "--tokens" in points else 1)
    for row in rows:
        assert row["batch"] == 2 and row["low_ms"] <= row["ms"] <= row["high_ms"]
        exact = row["variant"] == "fps"
        assert row["coverage"] == pytest.approx(1) if exact else row["coverage"] > 0.9
    assert max(row["coverage"] for row in rows if row["variant"] == "random") > 1


@pytest.mark.parametrize("name", packages.SAMPLERS)
def test_public_samplers_take_farthest_points(name: str) -> None:
    if not packages.installed(name):
        pytest.skip(f"{name} is not installed")
    points = torch.randn(2, 300, 48, generator=torch.Generator().manual_seed(0))
    picks = packages.sampler(name)(points, 20)
    assert torch.equal(picks, ops.farthest_points(points, 20))


def test_public_attention_is_nystroem_attention() -> None:
    if not packages.installed("nystrom-attention"):
        pytest.skip("nystrom-attention is not installed")
    qkv, _ = attention.random_inputs(64, (2, 3, 16), torch.float32, torch.device("cpu"))
    out = packages.nystrom_attention(qkv, 8)()
    q, k, v = qkv
    # Segment means and six steps towards the inverse, from its own start.
    q_means, k_means = (x.unflatten(2, (8, 8)).mean(3) for x in (q, k))
    kernel, eye = (q_means @ k_means.mT / 4).softmax(-1), torch.eye(8)
    inverse = kernel.mT / (kernel.sum(-1).max() * kernel.sum(-2).max())
    for _ in range(6):
        step = kernel @ inverse
        inverse = inverse @ (13 * eye - step @ (15 * eye - step @ (7 * eye - step))) / 4
    wanted = (q @ k_means.mT / 4).softmax(-1) @ inverse @ (q_means @ k.mT / 4).softmax(-1) @ v
    torch.testing.assert_close(out, wanted.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


def test_what_is_absent_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: False)
    with pytest.raises(SystemExit, match="error: --variants nystrom-attention: not installed"):
        run(monkeypatch, tmp_path, "--tokens 50 --variants nystrom-attention")
    with pytest.raises(SystemExit, match="error: --samplers torch-fps: not installed"):
        run(monkeypatch, tmp_path, "--tokens 50 --selection --samplers torch-fps")
    with pytest.raises(SystemExit, match="error: --samplers nonsense"):
        run(monkeypatch, tmp_path, "--tokens 50 --selection --samplers nonsense")


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--samplers fps", "--samplers fps: it does nothing without --selection; leave it out"),
        ("--checkpoint x.pth", "--checkpoint x.pth: it does nothing without --model"),
        ("--layers 0-3", "--layers 0-3: it does nothing without --model"),
        ("--selection --variants exact fna", "--variants exact fna: it does nothing with --sel"),
        ("--selection --masks type1-sink", "--masks type1-sink: it does nothing with --selection"),
        ("--selection --no-memory", "--no-memory: it does nothing with --selection"),
        ("--selection --block 2", "--block 2: it does nothing without --model"),
        ("--model vit_tiny_patch16_224 --tokens 50", "--tokens 50: it does nothing with --model"),
        ("--masked-tokens 9", "--masked-tokens 9: it does nothing without --masks"),
        (
            "--tokens 9 50 --masks type1-sink --masked-tokens 9",
            "--masked-tokens 9: expected at most 8, for CLS stays of the 9 tokens in "
            "--tokens 9 50",
        ),
        ("--model resnet18 --img-size 64", "--img-size 64: resnet18 takes no such setting"),
        (
            "--model vit_tiny_patch16_224 --img-size 100",
            "--img-size 100: expected a multiple of the patch size 16, such as 96 or 112",
        ),
        ("--selection --tokens 50 --samplers fps:foo=1", "fps has no setting foo; known: sketch"),
    ],
)
def test_what_would_do_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, arguments)
    assert str(ended.value).startswith("error: ") and said in str(ended.value)
    assert not list(tmp_path.iterdir())


def test_a_block_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        selection, "TimmBackbone", lambda **rest: TimmBackbone(**rest | {"pretrained": False})
    )
    points = "--selection --model vit_tiny_patch16_224 --img-size 64"
    for block in (12, -1):
        with pytest.raises(SystemExit, match=f"--block {block}: expected a block from 0 to 11"):
            run(monkeypatch, tmp_path, f"{points} --block {block}")


def test_what_cannot_be_written_or_run_on_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="error: --out .*file/x: Not a directory"):
        run(monkeypatch, tmp_path / "file" / "x", "--tokens 50")
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "foo"])
    with pytest.raises(SystemExit):
        main()
    assert "argument --device: 'foo' is no device that is here" in capsys.readouterr().err


def test_a_variant_that_needs_more_tokens_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "--model vit_tiny_patch16_224 --img-size 48"
    run(monkeypatch, tmp_path, f"{model} --variants exact fna --no-memory --landmarks 8")
    more = "--variants fna --landmarks 11 --seconds 0.01 --device cpu --out"
    argv = ["bench", *model.split(), *more.split(), str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    assert "fna is left out at 48 px: it needs 11 tokens" in capsys.readouterr().out
