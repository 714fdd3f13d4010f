"""Kernels for processors in C++ (`cpu/`), built once on a machine and kept in the user's cache.

They serve where `switch.on_cpu` says. The first call that they could serve builds them in some
twenty seconds, with g++ (10 or later) or with the one that the environment variable `CXX` names,
into `fna_lab` beneath `XDG_CACHE_HOME` or `~/.cache`. Where that fails, the log says why and
torch's operators serve.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fna_lab.ops.kernels.shapes import empty_output, mask_of_keys
from fna_lab.ops.solvers import LEAST_RIDGE

log = logging.getLogger(__name__)

SOURCES, MAIN = Path(__file__).with_name("cpu"), "kernels.cpp"
# By what torch uses (or is told to, ATEN_CPU_CAPABILITY): nodes of a cluster may share a cache.
TARGETS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}

MOST_SOLVED = 256  # rows or columns of a ridge solution: for more LAPACK is faster

ONE = threading.Lock()  # threads that ask at the same time load them once


def available() -> bool:
    """Whether the kernels are there: builds and loads them when first asked."""
    with ONE:
        return _available()


@functools.cache
def _available() -> bool:
    target = TARGETS.get(torch.backends.cpu.get_cpu_capability())
    if target is None:
        return False
    try:
        library = _library(target)
        try:
            torch.ops.load_library(library)
        except OSError:  # built on another system that shares the cache, or cut off
            library.unlink(missing_ok=True)
            torch.ops.load_library(_library(target))
        _tell_shapes()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no home, no compiler
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [""]
        told = next((line for line in lines if "error" in line), lines[0]) or repr(error)
        log.warning(
            "No compiled kernels, torch's operators serve (FNA_LAB_CPP=0 asks for that): %s", told
        )
        return False
    return True


def _library(target: tuple[str, ...]) -> Path:
    """The built library for a kind of processor."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"no compiler {compiler[0]!r} is installed")
    home = Path(torch.__file__).parent
    compile_ = [*compiler, "-std=c++20", "-O3", "-fPIC", "-fopenmp", *target, "-c", MAIN]
    compile_ += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    for folder in ("include", "include/torch/csrc/api/include"):
        compile_ += ["-isystem", str(home / folder)]
    # Without -fopenmp here: a second OpenMP beside torch's would bring threads of its own.
    link = ["-shared", f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
    made_of = [path.read_bytes() for path in sorted((*SOURCES.glob("*.h"), SOURCES / MAIN))]
    made_of += [repr((compile_, link, torch.__version__)).encode()]
    name = hashlib.sha256(b"".join(made_of)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fna_lab"
    library = cache / f"kernels-{name}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=cache) as room:
        fcntl.flock(lock, fcntl.LOCK_EX)  # jobs that start side by side build them once
        if not library.exists():
            # At a level that is seen where nobody set logging up: somebody waits.
            log.warning("Building kernels for this processor, once: some twenty seconds.")
            made, linked = f"{room}/kernels.o", f"{room}/kernels.so"
            for step in ([*compile_, "-o", made], [*compiler, made, "-o", linked, *link]):
                subprocess.run(
                    step, cwd=SOURCES, check=True, capture_output=True, text=True, errors="replace"
                )
            os.replace(linked, library)
    return library


def _tell_shapes() -> None:
    """What `torch.compile` has to know of the kernels."""
    fake = torch.library.register_fake

    @fake("fna_lab_cpu::attend_few")
    @fake("fna_lab_cpu::attend_to_few")
    def _(q, k, v, mask, scale):  # noqa: ARG001
        return empty_output(q, v)

    @fake("fna_lab_cpu::before_solve")
    def _(q, k, v, landmarks, members, rows, *more):  # noqa: ARG001
        shape, num, count = q.shape[:2], landmarks.shape[1], rows.shape[1]
        sizes = [(num, q.shape[3]), (count, num), (count, v.shape[3]), (num, v.shape[3])]
        means, kernel, left, prior = (q.new_empty((*shape, *size)) for size in sizes)
        return means, q.new_empty((shape[0], num)), kernel, left, prior, torch.empty_like(left)

    @fake("fna_lab_cpu::after_solve")
    def _(q, means, values, *more):  # noqa: ARG001
        return empty_output(q, values)

    @fake("fna_lab_cpu::clustered_ridge")
    def _(q, k, v, *more):  # noqa: ARG001
        return empty_output(q, v)

    @fake("fna_lab_cpu::means")
    def _(x, members, num):  # noqa: ARG001
        batch, heads, _, dim = x.shape
        return x.new_empty((batch, heads, num, dim)), x.new_empty((batch, num))

    @fake("fna_lab_cpu::sketch_points")
    def _(points, draw):
        return points.new_empty((*points.shape[:2], draw.shape[0] * draw.shape[2]))

    @fake("fna_lab_cpu::nearest")
    def _(points, landmarks, allowed):  # noqa: ARG001
        return points.new_empty(points.shape[:2], dtype=torch.long)

    @fake("fna_lab_cpu::farthest_points")
    @fake("fna_lab_cpu::spread_points")
    def _(points, num, first, *more):  # noqa: ARG001
        return first.new_empty((first.shape[0], num))


def attend_few(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, scale: float
) -> Tensor:
    """Attention of few queries to many keys, softmax(scale q k') v.

    Args:
        q: queries `[b h m d]`.
        k: keys `[b h n d]`.
        v: values `[b h n e]`.
        attn_mask: of each key, `[b h 1 n]`, or 1 in place of b and of h: bool, True = may be
            attended to, or a float32 bias. None = all may. Rows without a key get zeros.
        scale: factor of the logits.

    Returns:
        `[b h m e]`, a view of `[b m h e]`.
    """
    return torch.ops.fna_lab_cpu.attend_few(q, k, v, mask_of_keys(attn_mask, k), scale)


def attend_to_few(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, scale: float
) -> Tensor:
    """Attention of many queries to few keys, softmax(scale q k') v; see `attend_few`."""
    return torch.ops.fna_lab_cpu.attend_to_few(q, k, v, mask_of_keys(attn_mask, k), scale)


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    members: Tensor,
    rows: Tensor | None,
    solver: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float,
    keys: Tensor | None,
    exact_rows: int,
    removed: tuple[Tensor, Tensor] | None,
    own: bool,
    sunk: bool,
) -> Tensor | None:
    """`fna_lab.ops.clustered_attention`, which checks arguments, for landmarks `[b m]`.

    None where the solver has parameters of its own to train.
    """
    kernels, members, keys = torch.ops.fna_lab_cpu, members.contiguous(), _contiguous(keys)
    none = None, None
    apart = none if removed is None else tuple(found.contiguous() for found in removed)
    fitted = landmarks if rows is None else rows
    ridge = getattr(solver, "kernel_ridge", None) or 0
    if ridge >= LEAST_RIDGE and min(fitted.shape[1], landmarks.shape[1]) <= MOST_SOLVED:
        return kernels.clustered_ridge(
            q, k, v, landmarks, members, rows, keys, scale, ridge, exact_rows, *apart, own, sunk
        )
    tokens = fitted.contiguous()
    means, sizes, kernel, left, prior, exact = kernels.before_solve(
        q, k, v, landmarks.contiguous(), members, tokens,
        keys, scale, rows is None, *(apart if sunk else none),
    )  # fmt: skip
    solved = solver(kernel, left)
    if solved.requires_grad and torch.is_grad_enabled():
        return None
    values = prior.add_(solved)
    return kernels.after_solve(
        q, means, values, sizes, scale, tokens, exact, exact_rows, k, v,
        *(apart if own else none), members if own and sunk else None,
    )  # fmt: skip


def means(x: Tensor, members: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Means `[b h m d]` of `[b h n d]` over clusters, long `[b n]`, -1 = none; sizes `[b m]`."""
    return torch.ops.fna_lab_cpu.means(x, members.contiguous(), num)


def sketch_points(points: Tensor, draw: Tensor) -> Tensor:
    """`fna_lab.ops.sketch_points` of `[b n c]` by a draw `[g c/g d/g]` for g groups: `[b n d]`."""
    return torch.ops.fna_lab_cpu.sketch_points(points, draw.contiguous())


def nearest(points: Tensor, landmarks: Tensor, allowed: Tensor | None) -> Tensor:
    """`fna_lab.ops.nearest_landmarks`, which checks arguments: `[b n c]`, `[b m]` -> `[b n]`."""
    return torch.ops.fna_lab_cpu.nearest(
        points.contiguous(), landmarks.contiguous(), _contiguous(allowed)
    )


def farthest_points(
    points: Tensor, num: int, first: Tensor, allowed: Tensor | None, *, in_place: bool = False
) -> Tensor:
    """`fna_lab.ops.farthest_points`, which checks arguments: long `[b num]`.

    Args:
        points: `[b n c]`.
        num: how many to take, `first` included.
        first: points to take first, long `[b g]`, at least one and at most `num`.
        allowed: bool `[b n]`, False = never taken; None = all.
        in_place: take all of `first` before others, as `spread_points` does: the last points
            stand in the places of those that repeat or are not allowed.
    """
    return torch.ops.fna_lab_cpu.farthest_points(
        points.contiguous(), num, first.contiguous(), _contiguous(allowed), in_place
    )


def spread_points(
    points: Tensor,
    num: int,
    first: Tensor,
    allowed: Tensor | None,
    counts: list[int],
    runs: int,
    plenty: bool,
) -> Tensor:
    """`fna_lab.ops.spread_points`, which checks arguments: long `[b num]`.

    Args:
        points: `[b n c]`.
        num: how many to take, `first` included.
        first: points to take first, long `[b g]`, at least one and at most `num`.
        allowed: bool `[b n]`, False = never taken; None = all.
        counts: points of each round: what is missing, and one for each of `first` that gives way.
        runs: candidates of each round.
        plenty: no candidate was taken before, or must not be.
    """
    return torch.ops.fna_lab_cpu.spread_points(
        points.contiguous(), num, first.contiguous(), _contiguous(allowed), counts, runs, plenty
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
