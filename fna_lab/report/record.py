"""What a run leaves: one JSON record and one row a sample, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "torchvision", "timm", "open_clip_torch", "transformers", "diffusers", "lightning",
)  # fmt: skip
CODE = ("*.py", "*.h", "*.cpp")
METRICS = "metrics.json"
SAMPLES = "samples.parquet"
UNFINISHED = "unfinished.parquet"
ARRAYS = "arrays.npz"
# Settings that change where results go, never what they are.
ASIDE = ("name", "outputs", "logger", "force")


def config_hash(config: dict[str, Any]) -> str:
    """16 hex digits of the resolved config without name, output folder and logger."""
    kept = {key: value for key, value in config.items() if key not in ASIDE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def code_hash() -> str:
    """16 hex digits of all code of the package, so that old results are told apart."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in CODE for path in PACKAGE.rglob(kind)):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def surroundings(device: torch.device) -> dict[str, Any]:
    """Git state, versions and device of this process."""
    versions = {"fna_lab": _version("fna-lab"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    facts: dict[str, Any] = {"type": device.type, "processor": processor()}
    if device.type == "cuda":
        facts["name"] = torch.cuda.get_device_name(device)
    else:
        facts["threads"] = torch.get_num_threads()
        # What was built for this processor: rounding differs from torch's own.
        loaded = (Path(path) for path in torch.ops.loaded_libraries)
        facts["kernels"] = sorted(path.name for path in loaded if path.parent.name == "fna_lab")
    return {"git": _git(), "versions": versions, "device": facts}


def processor() -> str:
    """The name of this machine's processor, and the widest instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has this file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = named[0] if named else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def write(
    record: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    folder: Path,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write samples and arrays, then the record, whose presence says that the run is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    if arrays:
        with _whole(folder / ARRAYS) as part, part.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    _write_rows(rows, folder / SAMPLES)
    (folder / UNFINISHED).unlink(missing_ok=True)
    write_json(record, folder / METRICS)


def write_unfinished(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write the samples of a run that did not get to its end; without a record it is none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(rows, folder / UNFINISHED)
    return folder / UNFINISHED


def write_json(facts: Mapping[str, Any], path: Path) -> None:
    """Write facts whole or not at all.

    Raises:
        ValueError: a number is not finite.
    """
    with _whole(path) as part:
        part.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The record of a finished run."""
    return json.loads((folder / METRICS).read_text())


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a finished run, empty where it left none."""
    if not (folder / ARRAYS).exists():
        return {}
    with np.load(folder / ARRAYS) as packed:
        return dict(packed)


def nature(record: Mapping[str, Any]) -> str:
    """What a reader must know of the weights, to stand behind the name; empty for trained ones."""
    if record["backbone"].get("constructed"):
        return " (constructed)"
    if record["backbone"].get("random_weights"):
        return " (random weights)"
    settings = record["config"].get("backbone", {})
    random = settings.get("pretrained") is False and not settings.get("checkpoint")
    return " (random weights)" if random else ""


def samples(record: Mapping[str, Any]) -> str:
    """What the data calls its samples, in the plural: `pictures`, `sentences`."""
    return record["data"].get("samples", "pictures")


def counted(record: Mapping[str, Any]) -> str:
    """How many samples there are: `1 picture`, `4 sentences`."""
    count = record["data"]["count"]
    return f"{count} {samples(record)[:-1] if count == 1 else samples(record)}"


def finished(folder: Path) -> list[Path]:
    """Folders of the finished runs at or below a folder, in natural order."""
    found = [path.parent for path in folder.rglob(METRICS)]
    return sorted(found, key=lambda p: [(len(part), part) for part in p.parts])


def find(folder: Path, config: dict[str, Any]) -> Path | None:
    """The newest finished run below a folder with the same config and the same code."""
    wanted = config_hash(config), code_hash()
    for path in sorted(finished(folder), key=lambda p: (p / METRICS).stat().st_mtime)[::-1]:
        try:
            record = read(path)
        except (OSError, json.JSONDecodeError):
            continue
        if (record.get("config_hash"), record.get("code_hash")) == wanted:
            return path
    return None


def _write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    names = dict.fromkeys(name for row in rows for name in row)  # pyarrow takes the first row's
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    with _whole(path) as part:
        pq.write_table(table, part)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is to be there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    yield part
    os.replace(part, path)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that holds this very file, None outside of one."""

    def ask(*args: str) -> str:
        command = ["git", "-C", str(PACKAGE), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", __file__)  # an installed copy in another repository
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
