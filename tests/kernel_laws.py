"""What the Triton kernels must give: run by test_kernels.py, interpreted on the CPU or on a GPU.

A file of its own, since Triton decides at its import whether kernels are interpreted. Those of
sampling are in point_laws.py.
"""

import os

import pytest
import torch

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.ops.kernels import nystrom, points
from fna_lab.ops.kernels.switch import chain_products, use_kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CLOSE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def projection(batch, heads, tokens, dim, dtype):
    """q, k, v as a host makes them: views of one projection, tokens before heads."""
    generator = torch.Generator().manual_seed(tokens)
    draw = torch.randn(batch, tokens, 3, heads, dim, generator=generator)
    return draw.to(DEVICE, dtype).permute(2, 0, 3, 1, 4)


def softmax_attention(q, k, v, mask=None, scale=None):
    """The formula, in float64; the mask says which keys, or is added."""
    q, k, v = q.double(), k.double(), v.double()
    logits = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask.double()
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


def key_mask(shape, kind):
    """A mask of each key, every third left out: bool, or a bias of about the size of log n."""
    mask = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) + 3
    mask[..., 1::3] = -torch.inf
    return (mask > -torch.inf if kind == torch.bool else mask.to(kind)).to(DEVICE)


# Those of all queries in one kind of numbers, and the sizes of clusters as they come.
KINDS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bool),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_mask_of_each_key_in_every_broadcast_shape(shape, dtype, kind):
    q, k, v = projection(2, 3, 333, 24, dtype)
    mask = key_mask((*shape, 1, 333), kind)
    out = nystrom.attend_few(q[:, :, :11], k, v, attn_mask=mask, scale=0.3)
    close(out, softmax_attention(q[:, :, :11], k, v, mask, 0.3), dtype)

    few, mask = (k[:, :, :35], v[:, :, :35]), mask[..., :35]
    out = nystrom.attend_to_few(q, *few, attn_mask=mask, scale=0.3)
    close(out, softmax_attention(q, *few, mask, 0.3), dtype)


def test_a_bias_on_more_keys_than_stay_on_chip_and_in_any_strides():
    q, k, v = projection(1, 2, 150, 32, torch.float32)
    assert not nystrom.resident(150, 32, 32, torch.float32)
    bias = key_mask((1, 2, 1, 300), torch.float32)[..., ::2]
    out = nystrom.attend_to_few(q, k, v, attn_mask=bias, scale=0.3)
    close(out, softmax_attention(q, k, v, bias, 0.3), torch.float32)


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_heads_without_a_key_give_zeros(kind):
    q, k, v = projection(2, 2, 700, 32, torch.float32)
    mask = key_mask((2, 2, 1, 700), kind)
    mask[0, 1] = mask[1, 0] = False if kind == torch.bool else -torch.inf
    few = k[:, :, :20], v[:, :, :20]
    for out, expected in [
        (
            nystrom.attend_few(q[:, :, :9], k, v, attn_mask=mask, scale=1.0),
            softmax_attention(q[:, :, :9], k, v, mask, 1.0),
        ),
        (
            nystrom.attend_to_few(q, *few, attn_mask=mask[..., :20], scale=1.0),
            softmax_attention(q, *few, mask[..., :20], 1.0),
        ),
    ]:
        assert (out[0, 1] == 0).all() and (out[1, 0] == 0).all()
        for b, h in [(0, 0), (1, 1)]:
            close(out[b, h], expected[b, h], torch.float32)


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


@pytest.fixture
def served(monkeypatch):
    """How often each kernel of the chain is asked."""
    asked = dict.fromkeys(("attend_few", "attend_to_few"), 0)

    def listen(name, real):
        def call(*args, **more):
            asked[name] += 1
            return real(*args, **more)

        return call

    for name in asked:
        monkeypatch.setattr(nystrom, name, listen(name, getattr(nystrom, name)))
    return asked


def clusters(batch, heads, tokens, count, per_head):
    """Landmarks, the last of which repeats, and the members of their clusters."""
    generator = torch.Generator().manual_seed(count)
    shape = (batch, heads) if per_head else (batch,)
    marks = torch.rand(*shape, tokens, generator=generator).argsort(-1)[..., :count]
    marks[..., -1] = marks[..., 2]
    members = torch.randint(0, count - 1, (*shape, tokens), generator=generator)
    members.scatter_(-1, marks[..., :-1], torch.arange(count - 1).expand(*shape, -1))
    return marks.to(DEVICE), members.to(DEVICE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_clustered_attention_is_that_of_torch(monkeypatch, served, per_head, masked):
    q, k, v = projection(2, 3, 205, 24, torch.float32)
    marks, members = clusters(2, 3, 205, 17, per_head)
    keys = None
    if masked:
        keys = torch.ones(2, 205, dtype=torch.bool, device=DEVICE)
        dropped = [t for t in range(205) if t not in marks.flatten().tolist()][::3]
        keys[:, dropped] = False
        members[..., dropped] = -1

    def call():
        return ops.clustered_attention(
            q, k, v, marks, members, ops.ridge_solve, keys=keys, distinct=False, exact_rows=1
        )

    out = call()
    assert served == {"attend_few": 1, "attend_to_few": 1}
    torch.testing.assert_close(out, torch_path(monkeypatch, call), rtol=1e-4, atol=2e-5)
    assert served == {"attend_few": 1, "attend_to_few": 1}


def test_nystrom_attention_with_landmarks_of_each_head_is_that_of_torch(monkeypatch, served):
    q, k, v = projection(2, 3, 205, 24, torch.float32)
    marks, _ = clusters(2, 3, 205, 17, True)

    def call():
        return ops.nystrom_attention(q, k, v, marks, solver="ridge", distinct=False)

    out = call()
    assert served == {"attend_few": 1, "attend_to_few": 1}
    torch.testing.assert_close(out, torch_path(monkeypatch, call), rtol=1e-4, atol=1e-4)


def test_clustered_attention_in_bfloat16_is_as_close_as_that_of_torch(monkeypatch):
    q, k, v = projection(1, 2, 300, 32, torch.bfloat16)
    marks, members = clusters(1, 2, 300, 16, False)

    def call(*inputs):
        return ops.clustered_attention(
            *inputs, marks, members, ops.ridge_solve, distinct=False
        ).double()

    exact = call(q.double(), k.double(), v.double())
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    error = (call(q, k, v) - exact).norm()
    assert error < 2 * (torch_path(monkeypatch, lambda: call(q, k, v)) - exact).norm()


@pytest.mark.parametrize("masked", [False, True])
def test_fna_is_that_of_torch(monkeypatch, served, masked):
    """With landmarks that any sampler takes: CLS, the grid, and tokens far from all others."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 2, 2, 82, 16, generator=generator).to(DEVICE)
    x = torch.randn(2, 82, 32, generator=generator)
    x[:, [7, 31, 60]] *= torch.tensor([30.0, 60.0, 90.0])[:, None]
    mask = (torch.arange(82) != 33).expand(2, 1, 1, -1).to(DEVICE) if masked else None
    context = Context(
        layer=0, nth=0, scale=0.25, x=x.to(DEVICE), num_prefix_tokens=1, has_cls=True,
        grid=(9, 9), attn_mask=mask,
    )  # fmt: skip
    variant = FastNystromAttention(num_landmarks=20, source="input")
    chosen = []
    renewed = variant.renewed
    monkeypatch.setattr(variant, "renewed", lambda *a: chosen.append(renewed(*a)) or chosen[-1])

    def call():
        context.shared.clear()
        return variant(q, k, v, context)

    out, expected = call(), torch_path(monkeypatch, call)
    assert served == {"attend_few": 1, "attend_to_few": 1}
    assert torch.equal(*(marks.sort(1).values for marks in chosen))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)


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
    bias = torch.zeros(1, 2, 1, 16, device=DEVICE)
    assert kernels(q, k, v, bias, bias.bfloat16()) and kernels(q, k, v, keys.expand(-1, 2, -1, -1))
    # Of each query, of other numbers, learned.
    assert not kernels(q, k, v, rows=bias.expand(-1, -1, 16, -1))
    assert not kernels(q, k, v, columns=bias.double())
    assert not kernels(q, k, v, columns=bias.clone().requires_grad_())
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


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_graph_breaks():
    q, k, v = projection(2, 2, 90, 32, torch.float32)
    x = torch.randint(-9, 9, (2, 90, 8)).float().to(DEVICE)

    def run(q, k, v, x):
        marks = ops.farthest_points(x, 12)
        return ops.nystrom_attention(q, k, v, marks, exact_rows=1)

    def run_clusters(q, k, v, x):
        first = torch.zeros(2, 3, dtype=torch.long, device=x.device)
        marks = ops.spread_points(x, 12, first=first, repeats=2)
        members = ops.nearest_landmarks(x, marks)
        return ops.clustered_attention(q, k, v, marks, members, ops.ridge_solve, exact_rows=1)

    for call in (run, run_clusters):
        torch._dynamo.reset()
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, x)
        torch.testing.assert_close(found, call(q, k, v, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["_attend_few", "_attend_to_few"])
def test_ops_are_what_they_say(name):
    q, k, v = projection(2, 2, 40, 32, torch.float32)
    keys = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    each = keys[:, None].expand(2, 2, 40)
    for mask in (None, each, each.float()):
        torch.library.opcheck(getattr(nystrom, name), (q, k, v, mask, 0.2), test_utils=checks)
    first = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    for in_place in (False, True):
        given = (q[:, 0], first, keys, 5, 0, in_place, in_place)
        torch.library.opcheck(points._farthest_points, given, test_utils=checks)
