"""Numbers that are drawn once: the same under whatever they are asked for first."""

import pytest
import torch

from fna_lab import ops
from fna_lab.attn.landmarks.leverage import LeverageLandmarks
from fna_lab.attn.landmarks.random import RandomLandmarks


def export(call):
    class Model(torch.nn.Module):
        def forward(self, x):
            return call(x)

    return lambda x: torch.export.export(Model(), (x,)).module()(x)


def in_float64(call):
    def run(x):
        torch.set_default_dtype(torch.float64)
        try:
            return call(x)
        finally:
            torch.set_default_dtype(torch.float32)

    return run


def as_vmap(call):
    return torch.func.vmap(lambda x: call(x[None])[0])


# Channels that nothing else has drawn for, or the draw of another test would come.
every_first = pytest.mark.parametrize(
    ("first", "channels"),
    [(export, 91), (in_float64, 92), (as_vmap, 93), (torch.inference_mode(), 94)],
    ids=["export", "float64", "vmap", "inference"],
)


@every_first
def test_a_sketch_is_the_same(first, channels):
    points = torch.randn(2, 5, channels)
    generator = torch.Generator().manual_seed(0)
    wanted = points @ (torch.randn(channels, 4, generator=generator) * channels**-0.5)

    def call(x):
        return ops.sketch_points(x, 4)

    torch.testing.assert_close(first(call)(points), wanted)
    again = points.clone().requires_grad_()
    found = call(again)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), wanted)


@every_first
def test_random_features_are_the_same(first, channels):
    x = torch.randn(2, 5, channels)
    first(lambda x: x @ ops.orthogonal_features(3, channels).mT.to(x))(x)
    features = ops.orthogonal_features(3, channels)
    assert features.dtype == torch.float32 and not features.is_inference()
    (x.requires_grad_() @ features.mT).sum().backward()
    gram = features @ features.mT
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "draw", [lambda: ops.orthogonal_features(3, 8), lambda: ops.uniform_numbers(3, 0)]
)
def test_who_writes_into_a_draw_spoils_nobody_elses(draw):
    before = draw()
    draw().zero_()
    assert torch.equal(draw(), before) and before.any()


@pytest.mark.parametrize("sampler", [RandomLandmarks, LeverageLandmarks])
def test_samplers_that_draw_break_no_compiled_graph_at_any_size(sampler):
    def run(points, guaranteed, seed):
        return sampler(seed=seed)(
            points, 9, guaranteed=guaranteed, allowed=None, num_prefix_tokens=1, grid=(4, 5)
        )

    guaranteed = torch.zeros(2, 1, dtype=torch.long)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens, seed in ((21, 0), (21, 1), (26, 1), (31, 2)):
        points = torch.randn(2, tokens, 6)
        found = compiled(points, guaranteed, seed)
        assert torch.equal(found, run(points, guaranteed, seed))
        assert not torch.equal(found, run(points, guaranteed, seed + 1))
