"""The compiled kernels of the processor: equal to plain formulas and to the torch path."""

import functools
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fna_lab

pytest.importorskip("fcntl", reason="needs Linux")
from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.solver.ridge import RidgeSolver
from fna_lab.ops.kernels import compiled
from fna_lab.ops.kernels.switch import LEAST_TOKENS, chain_products, on_cpu
from fna_lab.report import record

FIT = compiled.TARGETS.get(torch.backends.cpu.get_cpu_capability()) and shutil.which("g++")
pytestmark = pytest.mark.skipif(not FIT, reason="needs g++ and an x86 processor with AVX2")


@pytest.fixture(autouse=True)
def no_gradients():
    assert compiled.available()
    with torch.no_grad():
        yield


def projection(batch, heads, tokens, dim):
    """q, k, v as a host makes them: views of one projection, tokens before heads."""
    generator = torch.Generator().manual_seed(tokens + dim)
    draw = torch.randn(batch, tokens, 3, heads, dim, generator=generator)
    return draw.permute(2, 0, 3, 1, 4)


def softmax_attention(q, k, v, scale, mask=None):
    """The formula, in float64; the mask says which keys, or is added."""
    q, k, v = q.double(), k.double(), v.double()
    logits = scale * q @ k.mT
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask.double()
    return logits.softmax(-1) @ v


def close(out, expected, error=3e-6):
    found = ((out.double() - expected).norm() / expected.norm()).item()
    assert found < error, f"relative error {found:.1e}"


def torch_path(monkeypatch, call):
    """The result without kernels."""
    with monkeypatch.context() as patch:
        patch.setenv("FNA_LAB_CPP", "0")
        return call()


@pytest.fixture
def served(monkeypatch):
    """The kernels that were asked, in order."""
    asked = []

    def listen(name, real):
        def call(*args, **more):
            asked.append(name)
            return real(*args, **more)

        return call

    for name in ("attend_few", "attend_to_few", "clustered_attention", "means", "nearest",
                 "farthest_points", "sketch_points", "spread_points"):  # fmt: skip
        monkeypatch.setattr(compiled, name, listen(name, getattr(compiled, name)))
    return asked


# Keys, head dim: no multiple of a vector or of a block, one part and several.
SIZES = [(1, 8), (13, 24), (65, 64), (150, 80), (1025, 13), (2100, 64)]


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
@pytest.mark.parametrize(("size", "dim"), SIZES)
def test_both_products_are_softmax_attention(size, dim, kind):
    q, k, v = projection(2, 3, 2100, dim)
    k, v, mask = k[:, :, :size], v[:, :, :size], None
    if kind is not None:
        mask = 3 * torch.randn(2, 1, 1, size, generator=torch.Generator().manual_seed(size))
        mask[..., 1::3] = -torch.inf
        mask = mask > -torch.inf if kind == torch.bool else mask
    expected = softmax_attention(q[:, :, :333], k, v, 0.3, mask)
    for out in (
        compiled.attend_to_few(q[:, :, :333], k, v, attn_mask=mask, scale=0.3),
        compiled.attend_few(q[:, :, :333], k, v, attn_mask=mask, scale=0.3),
    ):
        close(out, expected)
        assert out.transpose(1, 2).is_contiguous()  # the host merges heads without a copy


@pytest.mark.parametrize("name", ["attend_few", "attend_to_few"])
def test_values_may_be_of_another_width_and_in_any_strides(name):
    q = torch.randn(2, 2, 24, 40).mT  # head dim 24, far apart in memory
    k = torch.randn(2, 40, 2, 24).transpose(1, 2)
    v = torch.randn(2, 2, 80, 36)[:, :, ::2, ::2]
    close(getattr(compiled, name)(q, k, v, scale=0.2), softmax_attention(q, k, v, 0.2))


@pytest.mark.parametrize("name", ["attend_few", "attend_to_few"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_heads_without_a_key_give_zeros(name, kind):
    q, k, v = projection(2, 2, 1300, 32)
    mask = torch.ones(2, 2, 1, 1300, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = False
    mask[1, 1, :, :1290] = False  # a part without a key
    bias = mask if kind == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    out = getattr(compiled, name)(q[:, :, :9], k, v, attn_mask=bias, scale=1.0)
    assert (out[0, 1] == 0).all() and (out[1, 0] == 0).all()
    expected = softmax_attention(q[:, :, :9], k, v, 1.0, mask)
    close(out[0, 0], expected[0, 0])
    close(out[1, 1], expected[1, 1])


@pytest.mark.parametrize("name", ["attend_few", "attend_to_few"])
@pytest.mark.parametrize("size", [0.0, 30.0])
def test_extreme_logits(name, size):
    q, k, v = size * projection(1, 2, 150, 32)
    k, v = k[:, :, :40], v[:, :, :40] + 1
    close(getattr(compiled, name)(q, k, v, scale=1.0), softmax_attention(q, k, v, 1.0))


@pytest.mark.parametrize("name", ["attend_few", "attend_to_few"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(name, bad):
    q, k, v = (x.clone() for x in projection(1, 1, 100, 16))
    q[0, 0, 7, 3] = bad
    out = getattr(compiled, name)(q, k, v, scale=1.0)
    assert out[0, 0, 7].isnan().all()
    assert out[0, 0, :7].isfinite().all() and out[0, 0, 8:].isfinite().all()
    q, k, v = (x.clone() for x in projection(1, 1, 100, 16))
    k[0, 0, 50, 2] = torch.nan
    assert getattr(compiled, name)(q, k, v, scale=1.0).isnan().all()


def clusters(batch, tokens, count, repeat):
    """Landmarks, one of which may repeat, and the members of their clusters."""
    generator = torch.Generator().manual_seed(count)
    marks = torch.rand(batch, tokens - 20, generator=generator).argsort(-1)[:, :count]
    if repeat:
        marks[:, 5] = marks[:, 2]
    return marks, torch.randn(batch, tokens, 16, generator=generator)


def removed_tokens(marks, tokens, sunk):
    """Four tokens T a picture, the last of all padding; sunk ones may be landmarks."""
    rows = []
    for own in marks.tolist():
        free = [t for t in range(3, tokens - 20, 7) if t not in own]
        rows.append([own[7] if sunk else free[9], *free[:3]])
    valid = torch.ones(len(rows), 4, dtype=torch.bool)
    valid[-1, -1] = False
    return torch.tensor(rows), valid


REMOVALS = [(False, False, False), (True, False, False), (True, True, False), (True, True, True),
            (True, False, True)]  # fmt: skip


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("rows", [None, 0.5, 2])
@pytest.mark.parametrize(("dim", "count"), [(64, 64), (24, 20), (13, 33)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("removes", "own", "sunk"), REMOVALS)
def test_clustered_attention_is_that_of_torch(
    monkeypatch, served, removes, own, sunk, padded, dim, count, rows, repeat
):
    q, k, v = projection(2, 3, 700, dim)
    marks, points = clusters(2, 700, count, repeat)
    keys = torch.ones(2, 700, dtype=torch.bool)
    removed = removed_tokens(marks, 700, sunk) if removes else None
    if padded:
        keys[:, -15:] = False
    if removed and not sunk:
        keys.scatter_(1, removed[0], ~removed[1] & keys.gather(1, removed[0]))
    members = ops.nearest_landmarks(points, marks, allowed=keys)
    fitted = None if rows is None else marks[:, ::2]
    if rows == 2:
        fitted = torch.cat([marks, torch.arange(count).expand(2, -1)], 1)

    def call(*inputs):
        return ops.clustered_attention(
            *inputs, marks, members, RidgeSolver(), rows=fitted,
            keys=keys if padded or removes else None, distinct=not repeat, exact_rows=1,
            removed=removed, own=own, sunk=sunk,
        )  # fmt: skip

    served.clear()
    out = call(q, k, v)
    assert "clustered_attention" in served
    exact = torch_path(monkeypatch, lambda: call(q.double(), k.double(), v.double()))
    plain = torch_path(monkeypatch, lambda: call(q, k, v))
    assert (out - exact).norm() < 4 * (plain - exact).norm() + 1e-6 * exact.norm()


def test_means_and_nearest_landmarks_are_those_of_torch(monkeypatch, served):
    x = projection(2, 3, 900, 20)[1]
    marks, points = clusters(2, 900, 33, repeat=True)
    allowed = torch.arange(900).expand(2, -1) % 11 != 5

    def call():
        members = ops.nearest_landmarks(points, marks, allowed=allowed)
        return members, *ops.cluster_means(x, members, 33)

    members, means, sizes = call()
    assert served == ["nearest", "means"]
    expected, plain, same = torch_path(monkeypatch, call)
    assert torch.equal(members, expected) and torch.equal(sizes, same)
    torch.testing.assert_close(means, plain)


def same_points(monkeypatch, served, far, allowed, num, **more):
    """Whether the kernel takes what torch takes; sets where it has to repeat points."""
    served.clear()
    found = far(allowed=allowed, **more)
    assert served == [far.func.__name__]
    expected = torch_path(monkeypatch, lambda: far(allowed=allowed, **more))
    if allowed is not None and allowed.sum(1).min() < num:  # who repeats is nobody's business
        assert [set(row) for row in found.tolist()] == [set(row) for row in expected.tolist()]
    else:
        assert torch.equal(found, expected)


def allowed_points(batch):
    """All, none of every fiftieth, and only those: sixteen."""
    few = (torch.arange(777) % 50 == 3).expand(batch, -1)
    return [None, ~few, few]


GIVEN = torch.tensor([[3, 9, 3, 53, 700]])  # one repeats, two are of the sixteen


@pytest.mark.parametrize("channels", [19, 96, 105, 1100])  # the last by several threads
@pytest.mark.parametrize("batch", [1, 3])
def test_farthest_points_are_those_of_torch(monkeypatch, served, batch, channels):
    points = torch.randn(batch, 777, channels, generator=torch.Generator().manual_seed(batch))
    points[:, 300:500] = points[:, 100:300].clone()  # twins
    far = functools.partial(ops.farthest_points, points, 40)
    for first, allowed in itertools.product((None, GIVEN), allowed_points(batch)):
        first = None if first is None else first.expand(batch, -1)
        same_points(monkeypatch, served, far, allowed, 40, first=first)


@pytest.mark.parametrize(("dims", "groups"), [(64, 2), (10, 5), (7, 1), (32, 1)])
def test_sketches_are_those_of_torch(monkeypatch, served, dims, groups):
    x = projection(3, 2, 700, 40)[1]
    for points in (x.transpose(1, 2).flatten(2), x[:, 0].mT.contiguous().mT):
        sketch = functools.partial(ops.sketch_points, points, dims, groups=groups)
        torch.testing.assert_close(sketch(), torch_path(monkeypatch, sketch))
    assert served == ["sketch_points"] * 2


@pytest.mark.parametrize("channels", [19, 80])
def test_thin_points_are_farthest_ones_and_given_ones_keep_their_places(served, channels):
    points = torch.randn(2, 600, channels, generator=torch.Generator().manual_seed(5))
    thin = ops.spread_points(points, 40, block=32, thin=True)
    assert torch.equal(thin, ops.farthest_points(points, 40))
    assert served == ["farthest_points"] * 2
    first, allowed = torch.tensor([[3, 3, 9, 53]]).expand(2, -1), torch.ones(2, 600).bool()
    allowed[:, 9] = False
    thin = ops.spread_points(points, 40, block=32, thin=True, first=first, allowed=allowed)
    far = ops.farthest_points(points, 40, first=first[:, ::3], allowed=allowed)
    order = [0, 38, 39, 1, *range(2, 38)]  # the last two stand in for those that gave way
    assert torch.equal(thin, far[:, order])


@pytest.mark.parametrize("channels", [19, 80])
def test_points_that_are_no_numbers_spoil_no_others(served, channels):
    points = torch.randn(1, 600, channels, generator=torch.Generator().manual_seed(5))
    points[0, [7, 400]] = torch.nan
    picks = ops.farthest_points(points, 40)
    assert served and len(picks.unique()) == 40
    allowed = torch.ones(1, 600, dtype=torch.bool)
    allowed[0, [7, 400]] = False
    first = torch.tensor([[0, 7]])
    picks = ops.farthest_points(points, 40, first=first, allowed=allowed)
    points[0, [7, 400]] = 0
    assert torch.equal(picks, ops.farthest_points(points, 40, first=first, allowed=allowed))


@pytest.mark.parametrize("block", [1, 8, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_spread_points_are_those_of_torch(monkeypatch, served, batch, block):
    points = torch.randn(batch, 777, 19, generator=torch.Generator().manual_seed(batch))
    grid = torch.arange(5, 777, 25)[None]
    for first, allowed, num in itertools.product(
        (None, GIVEN, grid), allowed_points(batch), (32, 64)
    ):
        first = None if first is None else first.expand(batch, -1)
        far = functools.partial(ops.spread_points, points, num, block=block)
        same_points(monkeypatch, served, far, allowed, num, first=first)


def fna(batch, tokens=1025, **settings):
    """A call of the variant on inputs of so many pictures."""
    q, k, v = projection(batch, 2, tokens, 32)
    x = torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(3))
    variant = FastNystromAttention(**settings)

    def call(some=slice(None)):
        context = Context(layer=0, nth=0, scale=0.2, x=x[some], num_prefix_tokens=1, has_cls=True,
                          grid=(32, 32))  # fmt: skip
        return variant(q[some], k[some], v[some], context)

    return call


def test_a_picture_depends_on_no_batch_mate(served):
    call = fna(3)
    together = call()
    assert {"nearest", "spread_points", "clustered_attention"} <= set(served)
    assert torch.equal(together, torch.cat([call([i]) for i in range(3)]))


THREADS = """
import torch, test_compiled
torch.set_grad_enabled(False)
call, found = test_compiled.fna(2), []
for threads in (1, 3, 2):
    torch.set_num_threads(threads)
    found.append(call())
assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
"""


def test_nothing_depends_on_the_number_of_threads():
    """In a process of its own: solvers of torch may hang once that number was changed."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("settings", [{}, {"clusters": False}, {"per_head": True}, {"guard": 5.0}])
def test_fna_is_as_near_exact_attention_as_that_of_torch(monkeypatch, served, settings):
    call = fna(2, **settings)
    out = call()
    assert served
    plain = torch_path(monkeypatch, call)
    exact = ops.attention(*projection(2, 2, 1025, 32), scale=0.2)
    assert (out - exact).norm() <= 1.001 * (plain - exact).norm()


def test_full_landmarks_are_exact_attention():
    tokens = 520
    q, k, v = projection(1, 2, tokens, 32)
    every = torch.arange(tokens)[None]
    out = ops.clustered_attention(
        q, k, v, every, every, lambda a, b: torch.linalg.solve(a.double(), b.double()).float()
    )
    close(out, softmax_attention(q, k, v, 32**-0.5), 1e-5)


def test_what_is_out_of_range_is_refused():
    q, k, v = projection(1, 1, 600, 8)
    marks = torch.arange(20)[None]
    members = torch.zeros(1, 600, dtype=torch.long)
    members[0, 5] = 20
    with pytest.raises(IndexError, match="Expected members from -1 to 19, got 20"):
        ops.clustered_attention(q, k, v, marks, members, RidgeSolver())
    with pytest.raises(IndexError, match="Expected members from -1 to 19, got 20"):
        ops.cluster_means(k, members, 20)


@pytest.mark.parametrize(("rows", "count"), [(32, 64), (40, 33), (70, 20), (50, 50)])
def test_ridge_solutions_are_as_close_as_those_of_torch(served, rows, count):
    inputs = projection(2, 3, 600, 24)
    marks, points = clusters(2, 600, count, repeat=False)
    members, fitted = ops.nearest_landmarks(points, marks), clusters(2, 600, rows, repeat=False)[0]

    def attend(solver, *qkv):
        return ops.clustered_attention(*qkv, marks, members, solver, rows=fitted)

    served.clear()
    found, plain = attend(RidgeSolver(), *inputs), attend(ops.ridge_solve, *inputs)
    assert served == ["clustered_attention"] * 2
    expected = attend(ops.ridge_solve, *(x.double() for x in inputs))
    assert (found - expected).norm() < 2 * (plain - expected).norm() + 1e-6


@pytest.mark.parametrize("solver", [ops.ridge_solve, RidgeSolver(ridge=1e-7)])
def test_other_solvers_stand_between_the_kernels(monkeypatch, served, solver):
    q, k, v = projection(2, 2, 600, 16)
    marks, points = clusters(2, 600, 20, repeat=False)
    members = ops.nearest_landmarks(points, marks)
    call = functools.partial(ops.clustered_attention, q, k, v, marks, members, solver)
    out = call()
    assert "clustered_attention" in served
    torch.testing.assert_close(out, torch_path(monkeypatch, call), rtol=1e-3, atol=1e-4)


def test_a_solver_of_ones_own_is_asked(served):
    class Own(RidgeSolver):
        def __call__(self, kernel, values):
            served.append("own")
            return super().__call__(kernel, values)

    q, k, v = projection(1, 1, 600, 16)
    marks, points = clusters(1, 600, 20, repeat=False)
    members = ops.nearest_landmarks(points, marks)
    ops.clustered_attention(q, k, v, marks, members, Own())
    assert served[-2:] == ["clustered_attention", "own"]


def test_a_solver_with_parameters_is_trained():
    q, k, v = projection(1, 1, 600, 16)
    marks, points = clusters(1, 600, 20, repeat=False)
    members = ops.nearest_landmarks(points, marks)
    share = torch.ones((), requires_grad=True)
    with torch.enable_grad():
        out = ops.clustered_attention(
            q, k, v, marks, members, lambda a, b: share * ops.ridge_solve(a, b)
        )
        out.sum().backward()
    assert share.grad is not None and share.grad != 0


def test_more_exact_rows_than_there_are_and_no_rows(monkeypatch):
    q, k, v = projection(2, 1, 600, 8)
    marks, points = clusters(2, 600, 20, repeat=False)
    members = ops.nearest_landmarks(points, marks)
    attend = functools.partial(ops.clustered_attention, q, k, v, marks, members, RidgeSolver())
    for rows, exact in ((None, 100), (marks[:, :3], 100), (marks[:, :0], 0)):
        call = functools.partial(attend, rows=rows, exact_rows=exact)
        torch.testing.assert_close(call(), torch_path(monkeypatch, call), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="exact_rows"):
        ops.clustered_attention(q, k, v, marks, members, RidgeSolver(), exact_rows=-1)


def test_tangents_go_through_torch():
    x = torch.rand(LEAST_TOKENS, 8)
    assert on_cpu(LEAST_TOKENS, x)

    def double(x):
        assert not on_cpu(LEAST_TOKENS, x)
        return 2 * x

    with torch.enable_grad():
        _, tangent = torch.func.jvp(double, (x,), (torch.ones_like(x),))
    assert (tangent == 2).all()


def test_who_is_served(monkeypatch):
    x = torch.zeros(LEAST_TOKENS, 4)
    assert on_cpu(LEAST_TOKENS, x)
    assert not on_cpu(LEAST_TOKENS - 1, x)
    assert not on_cpu(LEAST_TOKENS, x.bfloat16()) and not on_cpu(LEAST_TOKENS, x, x.double())
    assert not on_cpu(LEAST_TOKENS, x.to("meta"))
    with torch.enable_grad():
        assert not on_cpu(LEAST_TOKENS, x, x.clone().requires_grad_())
        assert on_cpu(LEAST_TOKENS, x)
    with torch.autocast("cpu"):
        assert not on_cpu(LEAST_TOKENS, x)
    monkeypatch.setenv("FNA_LAB_CPP", "0")
    assert not on_cpu(LEAST_TOKENS, x)


def test_masks_that_differ_from_query_to_query_are_those_of_torch():
    q, k, v = projection(1, 2, 600, 16)
    few = q[:, :, :10], k[:, :, :10]
    plain = torch.nn.functional.scaled_dot_product_attention
    wide = torch.zeros(1, 1, 600, 10)
    assert chain_products(q, k, v, *few, rows=None, columns=wide) == (plain, plain)
    assert chain_products(q, k, v, *few, rows=None, columns=wide[:, :, :1])[0] is not plain


def test_gradients_are_those_of_torch():
    q, k, v = (x.clone().requires_grad_() for x in projection(1, 2, 600, 16))
    marks, points = clusters(1, 600, 20, repeat=False)
    with torch.enable_grad():
        members = ops.nearest_landmarks(points, marks)
        out = ops.clustered_attention(q, k, v, marks, members, RidgeSolver())
        out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_compiled_graphs_call_the_kernels_without_a_break(monkeypatch):
    call = fna(2)
    expected = call()
    graphs = []

    def look(graph, example):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(call, backend=look, fullgraph=True)()
    assert "fna_lab_cpu.clustered_ridge" in graphs[0]
    torch.testing.assert_close(out, expected)


def test_exported_programs_have_no_kernel_in_them():
    q, k, v = projection(1, 2, 600, 16)
    marks, points = clusters(1, 600, 20, repeat=False)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            members = ops.nearest_landmarks(points, marks, distinct=True)
            return ops.clustered_attention(q, k, v, marks, members, RidgeSolver())

    program = torch.export.export(Attention(), (q, k, v))
    assert "fna_lab_cpu" not in str(program)
    out, expected = program.module()(q, k, v), Attention()(q, k, v)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_patched_model_gives_features_as_without_kernels(monkeypatch):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=384, num_classes=0).eval()
    picture = torch.randn(1, 3, 384, 384)

    def call():
        with fna_lab.patch(model, attn="fna", layers=range(6, 12), num_landmarks=64):
            return model.forward_features(picture)

    torch.testing.assert_close(call(), torch_path(monkeypatch, call), rtol=2e-2, atol=2e-2)


def test_records_name_the_kernels_that_were_loaded():
    (name,) = record.surroundings(torch.device("cpu"))["device"]["kernels"]
    assert name.startswith("kernels-") and name.endswith(".so")


LOADS = "from fna_lab.ops.kernels import compiled; print(compiled.available())"


def loaded(**environment):
    """What a fresh process says of the kernels."""
    done = subprocess.run(
        [sys.executable, "-c", f"import logging; logging.basicConfig(level=20); {LOADS}"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_without_a_compiler_torch_serves_and_the_log_says_why(tmp_path):
    out, log = loaded(CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert out == "False"
    assert "no compiler 'no-such-compiler' is installed" in log and "FNA_LAB_CPP=0" in log
    out, log = loaded(CXX="false", XDG_CACHE_HOME=str(tmp_path))
    assert out == "False" and "torch's operators serve" in log
    assert not list((tmp_path / "fna_lab").glob("*.so"))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    out, log = loaded(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert out == "False" and "torch's operators serve" in log


@pytest.mark.slow
def test_kernels_for_avx2_give_the_same(tmp_path):
    """Built for other processors than this one: their laws in a process of their own."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    names = "products or heads or ridge or clustered or means or points or mate"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", names, "-p", "no:cacheprovider", "-n0"],
        env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
