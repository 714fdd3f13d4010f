"""What the Triton kernels must give: run by test_kernels.py, interpreted on the CPU or on a GPU.

A file of its own, since Triton decides at its import whether kernels are interpreted.
"""

import os

import pytest
import torch

from fna_lab import ops
from fna_lab.ops.kernels import nystrom, points
from fna_lab.ops.kernels.switch import chain_products, use_kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CLOSE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def projection(batch, heads, tokens, dim, dtype):
    """q, k, v as a host makes them: views of one projection, tokens before heads."""
    generator = torch.Generator().manual_seed(tokens)
    draw = torch.randn(batch, tokens, 3, heads, dim, generator=generator)
    return draw.to(DEVICE, dtype).permute(2, 0, 3, 1, 4)


def softmax_attention(q, k, v, keys=None, scale=None):
    """The formula, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    logits = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    if keys is not None:
        logits = logits.masked_fill(~keys, -torch.inf)
    return logits.softmax(-1) @ v


def close(out, expected, dtype):
    assert out.dtype == dtype
    error = (out.double() - expected).norm() / expected.norm()
    assert error < CLOSE[dtype], f"relative error {error:.1e}"


def torch_path(monkeypatch, call):
    """The result without kernels."""
    with monkeypatch.context() as patch:
        patch.setenv("FNA_LAB_TRITON", "0")
        return call()


# batch, heads, tokens, landmarks, head dim, and whether keys are left out: no sizes of a block,
# keys in several parts, more landmarks than stay on chip.
SHAPES = [
    (2, 3, 101, 13, 32, True),
    (1, 1, 600, 64, 64, True),
    (2, 1, 150, 100, 80, False),
    (1, 2, 130, 70, 128, True),
    (1, 1, 200, 150, 64, False),
    (1, 2, 5, 1, 24, False),
]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_products_are_softmax_attention(shape, dtype):
    batch, heads, tokens, marks, dim, masked = shape
    q, k, v = projection(batch, heads, tokens, dim, dtype)
    keys = None
    if masked:
        keys = torch.arange(tokens, device=DEVICE).expand(batch, 1, 1, -1) % 3 != 1
    out = nystrom.attend_few(q[:, :, :marks], k, v, attn_mask=keys, scale=0.3)
    close(out, softmax_attention(q[:, :, :marks], k, v, keys, 0.3), dtype)

    keys = None if keys is None else keys[..., :marks]
    few = k[:, :, :marks], v[:, :, :marks]
    out = nystrom.attend_to_few(q, *few, attn_mask=keys, scale=0.3)
    close(out, softmax_attention(q, *few, keys, 0.3), dtype)
    # The host merges heads without a copy.
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["attend_few", "attend_to_few"])
def test_values_may_be_of_another_width_and_in_any_strides(name):
    q = torch.randn(2, 2, 24, 40, device=DEVICE).mT  # head dim 24, far apart in memory
    k = torch.randn(2, 40, 2, 24, device=DEVICE).transpose(1, 2)
    v = torch.randn(2, 2, 80, 36, device=DEVICE)[:, :, ::2, ::2]
    out = getattr(nystrom, name)(q, k, v, scale=0.2)
    close(out, softmax_attention(q, k, v, scale=0.2), torch.float32)


def test_parts_without_a_key_and_pictures_without_a_key():
    q, k, v = projection(3, 1, 700, 32, torch.float32)
    keys = torch.ones(3, 1, 1, 700, dtype=torch.bool, device=DEVICE)
    keys[0, ..., :600] = False
    keys[1, ..., 3:] = False
    keys[2] = False
    out = nystrom.attend_few(q[:, :, :9], k, v, attn_mask=keys, scale=1.0)
    close(out[:2], softmax_attention(q[:2, :, :9], k[:2], v[:2], keys[:2], 1.0), torch.float32)
    assert (out[2] == 0).all()
    out = nystrom.attend_to_few(
        q, k[:, :, :20], v[:, :, :20], attn_mask=keys[..., :20] & False, scale=1.0
    )
    assert (out == 0).all()


@pytest.mark.parametrize("name", ["attend_few", "attend_to_few"])
@pytest.mark.parametrize("size", [0.0, 30.0])
def test_extreme_logits(name, size):
    q, k, v = size * projection(1, 2, 150, 32, torch.float32)
    k, v = k[:, :, :40], v[:, :, :40]
    out = getattr(nystrom, name)(q, k, v + 1, scale=1.0)
    close(out, softmax_attention(q, k, v + 1, scale=1.0), torch.float32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("solver", ["ridge", "newton_schulz"])
def test_nystrom_attention_is_that_of_torch(monkeypatch, solver, masked):
    q, k, v = projection(2, 1, 330, 64, torch.float32)
    marks = torch.stack([torch.arange(0, 320, 10), torch.arange(1, 321, 10)]).to(DEVICE)
    keys = None
    if masked:
        keys = torch.arange(330, device=DEVICE).expand(2, -1) < 325
        marks[0, 5] = marks[0, 4]  # a repeat, as samplers give where too few tokens are left

    def call():
        return ops.nystrom_attention(q, k, v, marks, solver=solver, keys=keys, exact_rows=1)

    torch.testing.assert_close(
        call(), torch_path(monkeypatch, call), rtol=1e-4, atol=1e-4 if masked else 2e-5
    )


def test_a_picture_does_not_see_its_batch_mates():
    q, k, v = projection(2, 1, 400, 32, torch.float32)
    marks = torch.arange(0, 400, 20, device=DEVICE).expand(2, -1)
    both = ops.nystrom_attention(q, k, v, marks)
    alone = ops.nystrom_attention(q[1:2], k[1:2], v[1:2], marks[1:2])
    # Keys are dealt out by the size of the batch too: equal up to rounding.
    torch.testing.assert_close(both[1:2], alone, rtol=1e-4, atol=1e-4)


def kernels(q, k, v, rows=None, columns=None):
    return chain_products(q, k, v, q, k, rows=rows, columns=columns) == (
        nystrom.attend_few,
        nystrom.attend_to_few,
    )


def test_when_kernels_are_used(monkeypatch):
    q, k, v = projection(2, 2, 16, 32, torch.float32)
    keys = torch.ones(2, 1, 1, 16, dtype=torch.bool, device=DEVICE)
    assert kernels(q, k, v) and kernels(q, k, v, keys, keys)
    assert use_kernels(q)
    assert not kernels(q, k, v, rows=torch.zeros(2, 1, 1, 16, device=DEVICE))
    assert not kernels(q, k, v, columns=keys.expand(-1, 2, -1, -1))
    assert not kernels(q.double(), k.double(), v.double())
    assert not kernels(q, k, v.half())
    wide = torch.zeros(1, 1, 4, 160, device=DEVICE)
    assert not kernels(wide, wide, wide)
    asked = q.clone().requires_grad_()
    assert not kernels(asked, k, v)
    with torch.no_grad():
        assert kernels(asked, k, v)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert not kernels(q, k, v)
        assert kernels(q.bfloat16(), k.bfloat16(), v.bfloat16())
    monkeypatch.setenv("FNA_LAB_TRITON", "0")
    assert not kernels(q, k, v) and not use_kernels(q)


def picks_one_by_one(x, num, first, allowed):
    """Farthest points of one picture by the rules in words; whole numbers, so that it is exact."""
    size = len(x)
    may = allowed.tolist() if allowed is not None else [True] * size
    taken: list[int] = []

    def rank(i):
        if not may[i]:
            return -1.0
        if i in taken:
            return -0.5
        return min((float((x[i] - x[j]).square().sum()) for j in taken), default=float("inf"))

    for step in range(num):
        if step < len(first) and rank(first[step]) >= 0:
            taken.append(first[step])
        else:
            ranks = [rank(i) for i in range(size)]
            taken.append(ranks.index(max(ranks)))
    return taken


FORMS = ["on chip", "streamed", "passes"]


def choose_form(monkeypatch, form):
    if form != "on chip":
        monkeypatch.setattr(points, "MOST_RESIDENT", 0)
    if form == "passes":
        monkeypatch.setattr(points, "MOST_IN_ONE", 0)
        monkeypatch.setattr(points, "PASS_BLOCK", 32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("size", "channels", "num"), [(45, 3, 12), (70, 19, 7), (9, 2, 9)])
def test_farthest_points_by_the_rules(monkeypatch, size, channels, num, some, form):
    choose_form(monkeypatch, form)
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(-2, 3, (3, size, channels), generator=generator).float()  # many ties
    first = torch.randint(0, size, (3, 4), generator=generator)
    first[0, 2] = first[0, 0]
    allowed = torch.rand(3, size, generator=generator) > 0.4 if some else None
    found = ops.farthest_points(
        x.to(DEVICE),
        num,
        first=first.to(DEVICE),
        allowed=None if allowed is None else allowed.to(DEVICE),
    )
    for b in range(3):
        may = None if allowed is None else allowed[b]
        assert found[b].tolist() == picks_one_by_one(x[b], num, first[b].tolist(), may)


@pytest.mark.parametrize("form", FORMS)
def test_too_few_allowed_points_and_equal_points(monkeypatch, form):
    choose_form(monkeypatch, form)
    x = torch.zeros(2, 50, 2, device=DEVICE)
    allowed = torch.zeros(2, 50, dtype=torch.bool, device=DEVICE)
    allowed[0, 7] = allowed[0, 40] = True

    def call():
        return ops.farthest_points(x, 5, allowed=allowed)

    assert torch.equal(call(), torch_path(monkeypatch, call))
    assert ops.farthest_points(x, 4).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_points_at_once(monkeypatch, form, dtype):
    choose_form(monkeypatch, form)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (3, 77, 19), generator=generator).to(DEVICE, dtype)
    first = torch.randint(1, 77, (3, 6), generator=generator).to(DEVICE)
    first[:, 0] = 0
    first[1, 3] = 0  # CLS lies on a cell of the grid
    first[2, 5] = first[2, 2]

    def call():
        return ops.farthest_points(x, 12, first=first, repeats=3)

    found = call()
    assert torch.equal(found, torch_path(monkeypatch, call))
    assert all(len(set(row)) == 12 for row in found.tolist())


def test_farthest_points_at_the_size_of_a_picture(monkeypatch):
    """Random features, sketched: the picks of float64 distances, a tie being unlikely."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 257, 96, generator=generator).to(DEVICE)
    first = torch.arange(0, 250, 50, device=DEVICE)[None]

    def call(x):
        return ops.farthest_points(x, 16, first=first, repeats=0)

    assert torch.equal(call(x), call(x.double()))
    sketched = ops.farthest_points(x, 16, first=first, repeats=1, sketch=64, gram=True)
    assert len(set(sketched[0].tolist())) == 16


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_graph_breaks():
    q, k, v = projection(2, 2, 90, 32, torch.float32)
    x = torch.randint(-9, 9, (2, 90, 8)).float().to(DEVICE)

    def run(q, k, v, x):
        marks = ops.farthest_points(x, 12, repeats=0)
        return ops.nystrom_attention(q, k, v, marks, exact_rows=1)

    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, x)
    torch.testing.assert_close(found, run(q, k, v, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["_attend_few", "_attend_to_few"])
def test_ops_are_what_they_say(name):
    q, k, v = projection(2, 2, 40, 32, torch.float32)
    keys = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    for mask in (None, keys):
        torch.library.opcheck(getattr(nystrom, name), (q, k, v, mask, 0.2), test_utils=checks)
    first = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    given = (q[:, 0], first, keys, 5, 0, False)
    torch.library.opcheck(points._farthest_points, given, test_utils=checks)
