"""Who may import whom, read from the source; and what nobody may do."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from folders import variants_in

PACKAGE = Path(__file__).parents[1] / "fna_lab"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
ROOT = str(PACKAGE.parent)
# The only files that may import triton, at their head: others import them inside functions.
KERNELS = {PACKAGE / "ops/kernels" / name for name in ("nystrom.py", "points.py")}

# Part of the package -> what it may import of the package beside itself.
MAY = {
    "ops": (),
    "settings": ("ops.checks",),
    "hosts": ("ops",),
    "attn": ("settings", "ops", "hosts"),
    "mask": ("settings", "ops", "hosts"),
    "backbone": ("settings", "ops", "hosts", "attn", "mask"),
    "data": ("settings",),
    "metric": ("ops", "attn.base", "attn.reduced", "attn.landmarks.base", "attn.stopwatch"),
    "finding": ("ops", "hosts", "attn.base", "mask", "backbone.base", "backbone.patch",
                "backbone.replay"),
    # There is one clock: task=timing runs the benchmark's.
    "task": ("settings", "hosts", "metric", "finding.base", "finding.lab", "attn.base",
             "attn.reduced", "backbone.base", "backbone.named", "backbone.neurons",
             "backbone.patch",
             "backbone.sd3", "mask.detector.base", "attn.landmarks.base",
             "bench.attention", "bench.selection", "bench.settings"),
    "report": (),
    "build": (),
    "help": (),
    "run": ("build", "report", "attn.layers", "backbone.base",
            "backbone.budget", "backbone.patch", "backbone.plan", "data.base",
            "task.base"),
    "cli": ("help", "run", "report"),
    "__main__": ("cli",),
    "__init__": ("backbone.patch", "backbone.budget"),
    "bench": ("ops", "attn", "backbone.named", "backbone.patch", "backbone.timm", "metric",
              "report"),
    "pretrain": ("backbone.tiny_clip", "data.shapes_world"),
}  # fmt: skip
# Library -> the only parts that may import it.
ONLY = {
    "timm": {"backbone", "pretrain"},
    "open_clip": {"backbone", "pretrain"},
    "transformers": {"backbone"},
    "diffusers": {"backbone"},
    "hydra": {"cli", "run", "build"},
    "omegaconf": {"cli", "run", "build", "help"},
    "wandb": {"run"},
    "lightning": {"data", "task", "run", "pretrain"},
    "torchmetrics": {"metric", "task"},
}

# Packages without names of their own: `from fna_lab.metric import cost` imports metric.cost.
HOLLOW = {"fna_lab", "fna_lab.metric", "fna_lab.report"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, those for type checking too."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module}
            if node.module in HOLLOW:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found - HOLLOW


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_in_one_direction(path: Path) -> None:
    part = part_of(path)
    allowed = [f"fna_lab.{other}" for other in (part, *MAY[part])]
    for module in imports(path):
        if module.startswith("fna_lab."):
            ok = any(module == name or module.startswith(f"{name}.") for name in allowed)
            assert ok, f"{part} must not import {module}"
        library = module.split(".")[0]
        assert part in ONLY.get(library, {part}), f"{part} must not import {library}"
        if part == "ops":
            # Steps of a few microseconds on the CPU, where a call of torch takes longer than they.
            more = {"triton"} if path in KERNELS else {"numpy"} if path.stem == "spread" else set()
            assert library in {"torch", "fna_lab"} | more | sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_kernels_are_imported_inside_functions(path: Path) -> None:
    top = {alias.name for n in TREES[path].body if isinstance(n, ast.Import) for alias in n.names}
    top |= {n.module for n in TREES[path].body if isinstance(n, ast.ImportFrom) and n.module}
    kernels = {f"fna_lab.ops.kernels.{kernel.stem}" for kernel in KERNELS}
    assert not top & kernels


def test_ops_do_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import fna_lab.ops, torch; "
    code += "fna_lab.ops.farthest_points(torch.rand(1, 9, 2), 3)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": ROOT})


# fna with other defaults; fna whose first landmarks are clusters of themselves alone.
INHERITED = {("fna_paper", "fna"), ("explicit", "fna")}
GROUPS = ("attn", "attn/landmarks", "attn/solver", "mask", "mask/detector", "task")


@pytest.mark.parametrize("group", GROUPS)
def test_no_variant_imports_another_of_its_group(group: str) -> None:
    folder = PACKAGE / group
    variants = variants_in(folder)
    for name in variants:
        for module in imports(folder / f"{name}.py"):
            other = module.removeprefix(f"fna_lab.{group.replace('/', '.')}.")
            assert other not in variants or (name, other) in INHERITED


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_class_or_forward_is_patched(path: Path) -> None:
    source = path.read_text()
    assert not re.search(r"__class__\s*=[^=]|\.forward\s*=[^=]|MethodType|\bglobal ", source)
    assert len(source.splitlines()) <= 400
