"""The Triton kernels: their laws, interpreted or on a GPU, and that they compile for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which PyTorch brings along for CUDA on Linux")

LAWS = [Path(__file__).with_name(name) for name in ("kernel_laws.py", "point_laws.py")]


def run_laws(**environment):
    environment = os.environ | {"PYTHONPATH": str(LAWS[0].parents[1])} | environment
    command = [sys.executable, "-m", "pytest", *map(str, LAWS), "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.slow
def test_laws_under_the_interpreter():
    run_laws(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_laws_on_the_gpu():
    run_laws(TRITON_INTERPRET="0")


# The least that a program gets on any GPU since Ampere (compute capability 8.6), in bytes.
SHARED = 99 * 1024
POINTERS = {
    "points": "*fp32",
    "best": "*fp32",
    "old": "*fp32",
    "new": "*fp32",
    "peaks": "*fp32",
    "next_peaks": "*fp32",
    "places": "*i32",
    "next_places": "*i32",
    "first": "*i64",
    "picks": "*i64",
    "count": "*i64",
    "holes": "*i64",
    "allowed": "*i1",
    "partial": "*fp32",
    "weight": "*fp32",
    "keys": "*i1",
}
KIND = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
ARCHITECTURES = [80, 90]  # A100, H100; PTX and machine code are made without a GPU


def compiled(kernel, constants, architecture, dtype=torch.float32, mask=None):
    """The kernel as it is launched on tensors whose last dimension is contiguous.

    `mask` is the kind of a bias of each key.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set")
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    pointers = POINTERS | dict.fromkeys(("q", "k", "v", "out"), KIND[dtype])
    if mask is not None:
        pointers["keys"] = KIND[mask]
    signature, values, attributes = {}, dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in ("q_d", "k_d", "v_d", "o_d", "keys_n"):
            signature[name] = "constexpr"
            values.setdefault(name, 1)
        else:
            signature[name] = pointers.get(name, "fp32" if name == "scale" else "i32")
            if name in pointers or name.endswith(("_n", "_h", "_b")):
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(source, target=target, options=options)
    assert made.asm["cubin"]
    assert made.metadata.shared <= SHARED
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "dtype", "architecture"),
    [
        (64, torch.float32, 80),
        (128, torch.float32, 90),
        (128, torch.bfloat16, 80),
        (64, torch.bfloat16, 90),
        (64, torch.float16, 90),
    ],
)
def test_the_products_compile(cache, dim, dtype, architecture):
    from fna_lab.ops.kernels import nystrom

    plain = {"PRECISION": "tf32x3", "WIDEN": False}
    parts = nystrom.few_blocks(64, dim, dim, dtype) | plain | {"PARTS": True}
    made = compiled(nystrom.few_queries, parts, architecture, dtype)
    # 16 bits go to the tensor cores as they are.
    name = {torch.float32: "tf32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    assert f".{name}" in made.asm["ptx"] and "mma" in made.asm["ptx"]
    marks = next(m for m in (128, 64, 32) if nystrom.resident(m, dim, dim, dtype))
    many = nystrom.many_blocks(marks, dim, dim, dtype) | plain | {"keys": None}
    compiled(nystrom.many_queries, many, architecture, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "mask", "architecture"),
    [
        (torch.float32, torch.float32, 80),
        (torch.bfloat16, torch.bfloat16, 80),
        (torch.bfloat16, torch.float32, 90),
        (torch.float16, torch.float16, 90),
    ],
)
def test_the_products_compile_with_a_bias_of_each_key(cache, dtype, mask, architecture):
    from fna_lab.ops.kernels import nystrom

    for dim in (64, 128):
        plain = {"PRECISION": "tf32x3", "WIDEN": False}
        parts = nystrom.few_blocks(64, dim, dim, dtype) | plain | {"PARTS": True}
        compiled(nystrom.few_queries, parts, architecture, dtype, mask)
        marks = next(m for m in (128, 64, 32) if nystrom.resident(m, dim, dim, dtype))
        many = nystrom.many_blocks(marks, dim, dim, dtype) | plain
        made = compiled(nystrom.many_queries, many, architecture, dtype, mask)
        # One multiply-add a logit: none is chosen by a mask (but by TF32, which tells NaN apart).
        chosen = f"{many['BLOCK_N']}x{many['BLOCK_M']}xi1, #mma" in made.asm["ttgir"]
        assert chosen == (dtype == torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_compile(cache, architecture):
    from fna_lab.ops.kernels import nystrom

    blocks = {"PART_SLOTS": 64, "BLOCK_M": 16, "BLOCK_E": 128}
    compiled(nystrom.put_together, blocks, architecture, torch.bfloat16)


# Given points one by one, or at once: those of `farthest_points`, and of `spread_points`.
ALONE = {"TAKEN": False, "holes": None}
TOGETHER = {"TAKEN": True, "holes": None}
IN_PLACE = {"TAKEN": True}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_farthest_points_compile(cache, architecture):
    from fna_lab.ops.kernels import points

    # 224 and 518 px, many tokens; in 64 dimensions.
    for size in (257, 1370, points.MOST_IN_ONE):
        block_n, block_c, resident, warps = points.picture_blocks(size, 64)
        assert resident == (size == 257)
        blocks = {"BLOCK_N": block_n, "BLOCK_C": block_c, "RESIDENT": resident}
        for rules in ALONE, TOGETHER, IN_PLACE:
            compiled(points.sample_picture, blocks | {"num_warps": warps} | rules, architecture)
    given = {"SLOTS": 64, "BLOCK_N": 256, "BLOCK_C": 64, "num_warps": 8}
    for rules in ({"allowed": None, "holes": None}, {"allowed": None}, {}):
        compiled(points.take_given, given | rules, architecture)
    blocks = {"BLOCK_N": points.PASS_BLOCK, "BLOCK_C": 16, "BLOCKS": 64, "num_warps": 8}
    for start, rules in ((False, ALONE), (False, IN_PLACE), (True, TOGETHER)):
        compiled(points.pass_over, blocks | rules | {"START": start}, architecture)
