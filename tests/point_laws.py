"""What the Triton kernels of sampling must give: run by test_kernels.py, as kernel_laws.py is."""

import pytest
import torch
from kernel_laws import DEVICE, torch_path

from fna_lab import ops
from fna_lab.ops.kernels import points


def farthest(x, taken, may):
    """The farthest point by the rules in words; whole numbers, so that it is exact."""

    def rank(i):
        if not may[i]:
            return -1.0
        if i in taken:
            return -0.5
        return min((float((x[i] - x[j]).square().sum()) for j in taken), default=float("inf"))

    ranks = [rank(i) for i in range(len(x))]
    return ranks.index(max(ranks))


def picks_one_by_one(x, num, first, may):
    """`farthest_points` of one picture: a given point that is not free gives way in its turn."""
    taken: list[int] = []
    for step in range(num):
        given = step < len(first) and may[first[step]] and first[step] not in taken
        taken.append(first[step] if given else farthest(x, taken, may))
    return taken


def spread_one_by_one(x, num, first, may):
    """`spread_points` of one picture, one at a time: what is given and free is taken at once."""
    free = [may[pick] and pick not in first[:place] for place, pick in enumerate(first)]
    taken = [pick for pick, good in zip(first, free, strict=True) if good]
    more = []
    while len(taken) < num:
        more.append(farthest(x, taken, may))
        taken.append(more[-1])
    there = [pick if good else more.pop(0) for pick, good in zip(first, free, strict=True)]
    return there + more


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
    may = torch.ones(3, size, dtype=torch.bool) if allowed is None else allowed
    for b in range(3):
        expected = picks_one_by_one(x[b], num, first[b].tolist(), may[b].tolist())
        assert found[b].tolist() == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize(("size", "channels", "num"), [(45, 3, 12), (270, 19, 7), (9, 2, 6)])
def test_spread_points_keep_the_places_of_the_given(
    monkeypatch, size, channels, num, promised, some, form
):
    choose_form(monkeypatch, form)
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(-2, 3, (3, size, channels), generator=generator).float()  # many ties
    first = torch.randint(0, size, (3, 6), generator=generator)
    first[0, 2] = first[0, 4] = first[0, 1]
    first[2] = first[2, :1]
    may = torch.rand(3, size, generator=generator) > 0.4
    may[2, first[2]] = False  # nothing of what is given
    may = may if some else torch.ones_like(may)
    found = ops.spread_points(
        x.to(DEVICE),
        num,
        first=first.to(DEVICE),
        allowed=may.to(DEVICE) if some else None,
        repeats=5 if promised else None,
    )
    for b in range(3):
        expected = spread_one_by_one(x[b], num, first[b].tolist(), may[b].tolist())
        assert found[b].tolist() == expected


@pytest.mark.parametrize("form", FORMS)
def test_spread_points_obey_the_rules_of_torch(monkeypatch, form):
    """Which points are taken is the kernel's own: exact ones. Places and places left are not."""
    choose_form(monkeypatch, form)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 300, 24, generator=generator).to(DEVICE)
    first = torch.rand(4, 300, generator=generator).argsort(1)[:, :8].to(DEVICE)
    first[1, 5] = first[1, 2]
    allowed = torch.rand(4, 300, generator=generator).to(DEVICE) > 0.3
    allowed[3] = torch.arange(300, device=DEVICE) < 9  # fewer than are asked for
    kept = allowed.gather(1, first)
    kept[1, 5] = False

    def call():
        return ops.spread_points(x, 20, first=first, allowed=allowed)

    for found in (call(), torch_path(monkeypatch, call)):
        assert torch.equal(found[:, :8][kept], first[kept])
        assert allowed.gather(1, found).all()
        assert [len(set(row)) for row in found.tolist()] == [20, 20, 20, 9]


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


def test_farthest_points_at_the_size_of_a_picture(monkeypatch):
    """Random features, sketched: the picks of float64 distances, a tie being unlikely."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 257, 96, generator=generator).to(DEVICE)
    first = torch.arange(0, 250, 50, device=DEVICE)[None]

    def call(x):
        return ops.farthest_points(x, 16, first=first)

    assert torch.equal(call(x), call(x.double()))
    sketched = ops.farthest_points(x, 16, first=first, sketch=64)
    assert len(set(sketched[0].tolist())) == 16
