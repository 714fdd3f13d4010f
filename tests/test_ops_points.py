"""Spread points: what they share with farthest points, and where they may differ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fna_lab import ops
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks


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
@pytest.mark.parametrize("thin", [False, True])
def test_one_at_a_time_they_are_farthest_points(repeats, thin):
    points, first = random_points(), random_first()
    wanted = ops.farthest_points(points, 20, first=first)
    assert torch.equal(
        ops.spread_points(points, 20, first=first, repeats=repeats, block=1, thin=thin), wanted
    )
    alone = ops.spread_points(points, 20, block=1, candidates=1, thin=thin)
    assert torch.equal(alone, ops.farthest_points(points, 20))
    many = random_points(size=700)  # so many that others would be left out
    alone = ops.spread_points(many, 9, block=1, candidates=4, thin=thin)
    assert torch.equal(alone, ops.farthest_points(many, 9))


@pytest.mark.parametrize("allowed", [None, torch.ones(1, 60, dtype=torch.bool)])
@pytest.mark.parametrize("thin", [False, True])
def test_a_repeat_gives_way_in_its_own_picture_alone(allowed, thin):
    points, first = random_points(), random_first()
    plain = ops.spread_points(points, 20, first=first, repeats=1, block=1, thin=thin)
    first[1, 5] = first[1, 2]
    allowed = None if allowed is None else allowed.expand(3, -1)
    found = ops.spread_points(
        points, 20, first=first, repeats=1, block=1, allowed=allowed, thin=thin
    )
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2])
    assert len(set(found[1].tolist())) == 20 and set(first[1].tolist()) < set(found[1].tolist())
    alone = ops.spread_points(points[1:2], 20, first=first[1:2], block=1, thin=thin)
    assert torch.equal(found[1], alone[0])


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("thin", [False, True])
def test_points_that_are_not_allowed_are_never_taken(block, thin):
    points, first = random_points(), random_first()
    allowed = torch.arange(60).expand(3, -1) % 3 == 1
    picks = ops.spread_points(points, 15, first=first, allowed=allowed, block=block, thin=thin)
    assert (picks % 3 == 1).all() and all(len(set(row)) == 15 for row in picks.tolist())
    kept = allowed.gather(1, first)
    assert torch.equal(picks[:, :9][kept], first[kept])


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("thin", [False, True])
def test_with_fewer_allowed_points_than_asked_for_picks_repeat(block, thin):
    allowed = torch.arange(60).expand(3, -1) < 5
    picks = ops.spread_points(random_points(), 20, allowed=allowed, block=block, thin=thin)
    assert all(set(row) == {0, 1, 2, 3, 4} for row in picks.tolist())


@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize("which", ["bare", "given", "repeats", "barred", "all but few barred"])
def test_half_of_a_sample_keeps_every_promise(which, promised):
    """Lists so long that a sample is drawn and others are left out, beside all that is given."""
    points = random_points(size=700)
    first, allowed, repeats, barred = None, None, 0, None
    if which != "bare":
        first = random_first(size=700, given=3)
    if which == "repeats":
        assert first is not None
        first[1, 2], repeats = first[1, 0], 1
    if "barred" in which:  # so few that the sample holds others, or nearly all
        gone = slice(None, None, 40) if which == "barred" else slice(660)
        allowed = torch.ones(3, 700, dtype=torch.bool)
        allowed[:, gone] = False
        assert first is not None
        allowed[0, first[0, 1]] = False
        barred = 19 if which == "barred" else 661
    promises = {"repeats": repeats, "barred": barred} if promised else {}
    picks = ops.spread_points(points, 21, first=first, allowed=allowed, thin=True, **promises)
    assert all(len(set(row)) == 21 for row in picks.tolist())
    assert allowed is None or allowed.gather(1, picks).all()
    if first is not None:
        good = ~(first[:, :, None] == first[:, None]).tril(-1).any(2)
        good = good if allowed is None else good & allowed.gather(1, first)
        assert torch.equal(picks[:, :3][good], first[good])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("sketch", [None, 8])
@pytest.mark.parametrize("thin", [False, True])
def test_points_are_distinct_whatever_their_size(dtype, size, sketch, thin):
    points = (size * random_points(channels=16)).to(dtype)
    for num in (1, 2, 3, 10, 60):
        picks = ops.spread_points(points, num, sketch=sketch, thin=thin)
        assert all(len(set(row)) == num for row in picks.tolist())


def test_half_of_a_sample_is_distinct_where_all_points_are_one():
    for value in (0.0, 1.0, 3e4):
        picks = ops.spread_points(torch.full((2, 700, 40), value), 30, thin=True)
        assert all(len(set(row)) == 30 for row in picks.tolist())


def test_half_of_a_sample_covers_what_the_sample_misses():
    # Constructed: a few tokens far out, each on its own, among 2,000 that are nearly alike.
    generator = torch.Generator().manual_seed(0)
    points = 0.1 * torch.randn(1, 2000, 48, generator=generator)
    alone = torch.randperm(1999, generator=generator)[:20] + 1
    points[0, alone] += 9 * torch.eye(48)[:20]
    picks = ops.spread_points(points, 64, block=16, candidates=64, thin=True)
    assert set(alone.tolist()) < set(picks[0].tolist())


@pytest.mark.parametrize("width", [37, 77, 96])
def test_half_of_a_sample_covers_pictures_of_any_width(width):
    """Synthetic smooth pictures, the hardest: no token is rare, and many lie far out together.

    Evenly spaced places of 77 in a row would be two columns.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 24, 9, 9, generator=generator)
    points = F.interpolate(coarse, size=(width, width), mode="bicubic").flatten(2).mT
    noise = torch.randn(4, width * width + 1, 24, generator=generator)
    points = F.pad(points, (0, 0, 1, 0)) + 0.05 * noise
    exact = radius(points, ops.farthest_points(points, 64))
    picks = ops.spread_points(points, 64, block=8, candidates=64, thin=True)
    assert (radius(points, picks) < 1.03 * exact).all()
    cls = torch.zeros(4, 1, dtype=torch.long)
    more = dict(guaranteed=cls, allowed=None, num_prefix_tokens=1, grid=(width, width))
    picks = FarthestPointLandmarks(block=32)(points, 64, **more)
    assert (radius(points, picks) < 1.12 * exact).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distances_are_as_close_under_autocast(dtype):
    points = random_points(2, 500, 32).float() + 9  # what all share would drown in half precision
    everything = torch.ones(2, 500, dtype=torch.bool)

    def chosen():
        picks = ops.spread_points(points, 32)
        thin = ops.spread_points(points, 32, thin=True)
        members = ops.nearest_landmarks(points, picks)
        return picks, thin, members, ops.cluster_medoids(points, picks, allowed=everything)

    with torch.autocast("cpu", dtype):
        found = chosen()
    assert all(len(set(row)) == 32 for row in found[1].tolist())
    assert all(torch.equal(a, b) for a, b in zip(found, chosen(), strict=True))


@pytest.mark.parametrize("thin", [False, True])
def test_blocks_cover_nearly_as_well_as_farthest_points(thin):
    # Synthetic: many tokens alike, few clusters far out, as in pictures.
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 32, generator=generator) * torch.rand(40, 1, generator=generator) * 9
    member = torch.randint(40, (4, 2000), generator=generator)
    points = centres[member] + torch.randn(4, 2000, 32, generator=generator)
    exact = radius(points, ops.farthest_points(points, 64))
    bound = 1.06 if thin else 1.04  # clusters of equal chance are harder than pictures for `thin`
    assert (radius(points, ops.spread_points(points, 64, thin=thin)) < bound * exact).all()
    random = torch.randperm(2000, generator=generator)[:64].expand(4, -1)
    assert (radius(points, random) > 1.2 * exact).all()  # so the bound above says something


@pytest.mark.parametrize(
    ("thin", "size", "given"), [(False, 60, 9), (True, 60, 9), (True, 700, 3), (True, 700, 0)]
)
def test_no_picture_sees_its_mates(thin, size, given):
    points, first = random_points(batch=4, size=size), random_first(4, size, given)
    together = ops.spread_points(points, 30, first=first, thin=thin)
    alone = [
        ops.spread_points(points[i : i + 1], 30, first=first[i : i + 1], thin=thin)
        for i in range(4)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("free", [0, 5, 25, 400])
@pytest.mark.parametrize("block", [4, 16])
def test_what_mates_must_not_take_changes_nothing_of_half_a_sample(free, block):
    points, first = random_points(size=900), random_first(size=900, given=3)
    allowed = torch.ones(3, 900, dtype=torch.bool)
    allowed[1, free:] = False

    def take(mine, **rest):
        return ops.spread_points(
            points[mine], 30, first=first[mine], block=block, thin=True, **rest
        )

    alone = take(slice(0, 1))
    together = take(slice(None), allowed=allowed)
    assert torch.equal(together[:1], alone)
    assert torch.equal(together[2:], take(slice(2, 3), allowed=allowed[2:], barred=0))
    promised = take(slice(None), allowed=allowed, barred=900 - free)
    assert torch.equal(together, promised)
    if free:
        assert allowed[1, together[1]].all() and len(set(together[1].tolist())) == min(free, 30)


@pytest.mark.parametrize("batch", [1, 3])
def test_points_in_runs_are_as_far_as_at_once(monkeypatch, batch):
    points = random_points(batch=batch, size=50, channels=7)
    known = ops.farthest_points(points, 20)
    monkeypatch.setattr("fna_lab.ops.points.AT_A_TIME", 7 * batch * 16)  # 50 = 3 x 16 + 2
    assert torch.equal(ops.farthest_points(points, 20), known)
    learned = points.clone().requires_grad_()
    assert torch.equal(ops.farthest_points(learned, 20), known)


@pytest.mark.parametrize("thin", [False, True])
def test_points_that_learn_are_chosen_as_others_are(thin):
    points = random_points(size=700)
    found = ops.spread_points(points.clone().requires_grad_(), 20, thin=thin)
    assert torch.equal(found, ops.spread_points(points, 20, thin=thin))


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


@pytest.mark.parametrize(("thin", "size"), [(False, 60), (True, 60), (True, 700)])
def test_nothing_breaks_the_graph_of_a_compiled_call(thin, size):
    def run(points, first, allowed):
        return ops.spread_points(points, 20, first=first, allowed=allowed, barred=0, thin=thin)

    points, first = random_points(size=size), random_first(size=size, given=3)
    allowed = torch.ones(3, size, dtype=torch.bool)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(points, first, allowed), run(points, first, allowed))


@pytest.mark.parametrize(("size", "num"), [(197, 64), (1370, 64), (5477, 64), (1370, 128)])
def test_the_flops_of_half_of_a_sample_are_those_that_torch_counts(size, num):
    points = random_points(batch=1, size=size, channels=48)
    with FlopCounterMode(display=False) as counter:
        ops.spread_points(points, num, block=16, candidates=64, thin=True)
    told = ops.spread_points_flops(size, 48, num, None, thin=(64, num // 32))
    assert told == pytest.approx(counter.get_total_flops(), rel=0.15)
