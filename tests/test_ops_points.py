"""Spread points: what they share with farthest points, and where they may differ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fna_lab import ops


def random_points(batch=3, size=60, channels=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size, channels, generator=generator, dtype=torch.float64)


def random_first(batch=3, size=60, given=9):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(size, generator=generator)[:given] for _ in range(batch)])


def radius(points, picks):
    taken = points.gather(1, picks[..., None].expand(-1, -1, points.shape[2]))
    return torch.cdist(points, taken).amin(2).amax(1)


@pytest.mark.parametrize("repeats", [None, 0])
def test_one_at_a_time_they_are_farthest_points(repeats):
    points, first = random_points(), random_first()
    wanted = ops.farthest_points(points, 20, first=first)
    assert torch.equal(
        ops.spread_points(points, 20, first=first, repeats=repeats, block=1), wanted
    )
    alone = ops.spread_points(points, 20, block=1, candidates=1)
    assert torch.equal(alone, ops.farthest_points(points, 20))


@pytest.mark.parametrize("allowed", [None, torch.ones(1, 60, dtype=torch.bool)])
def test_a_repeat_gives_way_in_its_own_picture_alone(allowed):
    points, first = random_points(), random_first()
    plain = ops.spread_points(points, 20, first=first, repeats=1, block=1)
    first[1, 5] = first[1, 2]
    allowed = None if allowed is None else allowed.expand(3, -1)
    found = ops.spread_points(points, 20, first=first, repeats=1, block=1, allowed=allowed)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2])
    assert len(set(found[1].tolist())) == 20 and set(first[1].tolist()) < set(found[1].tolist())
    assert torch.equal(found[1], ops.spread_points(points[1:2], 20, first=first[1:2], block=1)[0])


@pytest.mark.parametrize("block", [1, 4, 16])
def test_points_that_are_not_allowed_are_never_taken(block):
    points, first = random_points(), random_first()
    allowed = torch.arange(60).expand(3, -1) % 3 == 1
    picks = ops.spread_points(points, 15, first=first, allowed=allowed, block=block)
    assert (picks % 3 == 1).all() and all(len(set(row)) == 15 for row in picks.tolist())
    kept = allowed.gather(1, first)
    assert torch.equal(picks[:, :9][kept], first[kept])


@pytest.mark.parametrize("block", [1, 16])
def test_with_fewer_allowed_points_than_asked_for_picks_repeat(block):
    allowed = torch.arange(60).expand(3, -1) < 5
    picks = ops.spread_points(random_points(), 20, allowed=allowed, block=block)
    assert all(set(row) == {0, 1, 2, 3, 4} for row in picks.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("sketch", [None, 8])
def test_points_are_distinct_whatever_their_size(dtype, size, sketch):
    points = (size * random_points(channels=16)).to(dtype)
    for num in (1, 10, 60):
        picks = ops.spread_points(points, num, sketch=sketch)
        assert all(len(set(row)) == num for row in picks.tolist())


def test_blocks_cover_nearly_as_well_as_farthest_points():
    # Synthetic: many tokens alike, few clusters far out, as in pictures.
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 32, generator=generator) * torch.rand(40, 1, generator=generator) * 9
    member = torch.randint(40, (4, 2000), generator=generator)
    points = centres[member] + torch.randn(4, 2000, 32, generator=generator)
    exact = radius(points, ops.farthest_points(points, 64))
    assert (radius(points, ops.spread_points(points, 64)) < 1.04 * exact).all()
    random = torch.randperm(2000, generator=generator)[:64].expand(4, -1)
    assert (radius(points, random) > 1.2 * exact).all()  # so the bound above says something


def test_no_picture_sees_its_mates():
    points, first = random_points(batch=4), random_first(batch=4)
    together = ops.spread_points(points, 30, first=first)
    alone = [ops.spread_points(points[i : i + 1], 30, first=first[i : i + 1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_the_sketch_of_normed_points_is_the_sketch_of_what_layer_norm_gives():
    points = 3 + 5 * random_points(channels=48)
    found = ops.sketch_points(points, 12, normed=True)
    normed = F.layer_norm(points, (48,))
    draw = torch.randn(48, 12, generator=torch.Generator().manual_seed(0)).double() * 48**-0.5
    torch.testing.assert_close(found, normed @ draw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.sketch_points(points, 12), points @ draw, rtol=1e-5, atol=1e-5)


def test_a_sketch_keeps_distances_up_to_a_factor():
    points = random_points(batch=1, size=200, channels=384)
    wide = torch.cdist(points, points)
    thin = torch.cdist(*2 * [ops.sketch_points(points, 64)])
    ratio = (thin / wide)[wide > 0]
    assert ratio.std() / ratio.mean() < 0.12


def test_wrong_arguments_are_named():
    points = random_points()
    with pytest.raises(ValueError, match="num to be an integer from 1 to 60, got 61"):
        ops.spread_points(points, 61)
    with pytest.raises(ValueError, match="block=8, candidates=4"):
        ops.spread_points(points, 6, block=8, candidates=4)
    with pytest.raises(ValueError, match="first to hold at most num=6 points, got 9"):
        ops.spread_points(points, 6, first=random_first())
    with pytest.raises(TypeError, match="allowed to be a bool tensor"):
        ops.spread_points(points, 6, allowed=torch.ones(3, 60))
    with pytest.raises(ValueError, match="dims to be an integer >= 1, got 0"):
        ops.sketch_points(points, 0)


def test_groups_of_channels_keep_distances_as_well():
    points = torch.randn(1, 60, 96, generator=torch.Generator().manual_seed(3))
    far = torch.cdist(points, points)[0]
    pairs = far > 0
    spreads = []
    for groups in (1, 2, 4):
        thin = torch.cdist(*2 * [ops.sketch_points(points, 48, groups=groups)])[0]
        ratio = (thin[pairs] / far[pairs]) ** 2 * 96 / 48
        assert ratio.mean() == pytest.approx(1, abs=0.1)
        spreads.append(ratio.std())
    # Of a chi-squared number with 48 degrees of freedom, whatever the number of groups.
    torch.testing.assert_close(
        torch.stack(spreads), torch.full((3,), (2 / 48) ** 0.5), rtol=0.2, atol=0
    )


@pytest.mark.parametrize(("groups", "normed"), [(5, False), (0, False), (2, True)])
def test_groups_that_do_not_fit_are_named(groups, normed):
    with pytest.raises(ValueError, match="groups"):
        ops.sketch_points(torch.randn(1, 6, 8), 4, groups=groups, normed=normed)


def test_nothing_breaks_the_graph_of_a_compiled_call():
    def run(points, first, allowed):
        return ops.spread_points(points, 20, first=first, allowed=allowed)

    points, first = random_points(), random_first()
    allowed = torch.ones(3, 60, dtype=torch.bool)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(points, first, allowed), run(points, first, allowed))


@pytest.fixture
def no_draw_yet():
    from fna_lab.ops import sketch

    sketch._drawn.cache_clear()
    yield
    sketch._drawn.cache_clear()


def export(points):
    class Model(torch.nn.Module):
        def forward(self, x):
            return ops.sketch_points(x, 4)

    return torch.export.export(Model(), (points,)).module()(points)


def in_float64(points):
    torch.set_default_dtype(torch.float64)
    try:
        return ops.sketch_points(points, 4)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "first",
    [
        export,
        in_float64,
        torch.func.vmap(lambda x: ops.sketch_points(x[None], 4)[0]),
        torch.inference_mode()(lambda x: ops.sketch_points(x, 4)),
    ],
    ids=["export", "float64", "vmap", "inference"],
)
def test_the_draw_is_the_same_whatever_the_first_call_runs_under(no_draw_yet, first):
    points = random_points(2, 5, 6).float()
    generator = torch.Generator().manual_seed(0)
    wanted = points @ (torch.randn(6, 4, generator=generator) * 6**-0.5)
    torch.testing.assert_close(first(points), wanted)
    again = points.clone().requires_grad_()
    found = ops.sketch_points(again, 4)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), wanted)
