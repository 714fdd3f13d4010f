"""The wheel holds everything, and works from any working directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def test_every_folder_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    code = {p.parent.relative_to(ROOT) for p in (ROOT / "fna_lab").rglob("__init__.py")}
    data = {p.parent.relative_to(ROOT) for s in ("jpg", "safetensors")
            for p in (ROOT / "fna_lab").rglob(f"*.{s}")}  # fmt: skip
    conf = {p.parent.relative_to(ROOT) for p in (ROOT / "conf").rglob("*.yaml")}
    wanted = {".".join(path.parts) for path in code | data}
    wanted |= {".".join(("fna_lab", *path.parts)) for path in conf}
    assert set(settings["packages"]) == wanted


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, outside of the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # setuptools leaves a build folder where it builds
    ignored = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    # Without isolation, so that the build needs no network: the backend is in the dev extra.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    site = out / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_wheel_holds_configs_weights_and_pictures(installed: Path) -> None:
    held = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"fna_lab/{path.relative_to(ROOT).as_posix()}" in held
    for path in (ROOT / "fna_lab").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in held
    assert not [name for name in held if name.startswith(("tests/", "conf/", "outputs/"))]


def test_wheel_runs_from_another_directory(installed: Path, tmp_path: Path) -> None:
    script = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); import fna_lab;"
        "assert fna_lab.__file__.startswith(sys.argv[1]), fna_lab.__file__;"
        "sys.argv = ['fna_lab', *sys.argv[2:]];"
        "runpy.run_module('fna_lab', run_name='__main__')"
    )
    overrides = ["attn=fna", "data.count=4", "task.protocols=[zero_shot]", "task.cost=false"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(installed), *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "zero shot accuracy" in done.stdout
    assert len(list(tmp_path.glob("outputs/default/*/metrics.json"))) == 1


def test_import_is_silent_and_light() -> None:
    script = (
        "import sys, fna_lab; print(fna_lab.__version__);"
        "heavy = {'torch', 'timm', 'lightning', 'hydra', 'wandb'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
