"""FLOPs by formula against those that torch counts, with every product in the open."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.random import RandomLandmarks
from fna_lab.attn.registers import RegistersAttention
from fna_lab.attn.solver.lstsq import LeastSquaresSolver
from fna_lab.attn.solver.newton_schulz import NewtonSchulzSolver
from fna_lab.attn.solver.pinv import PinvSolver
from fna_lab.attn.solver.ridge import RidgeSolver
from fna_lab.backbone.named import named_attention

N, HEADS, DIM = 1370, 6, 64


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("exact", {}),
        ("subset", {}),
        ("fna", {}),
        ("fna", {"rows": 2}),
        ("fna", {"clusters": False}),
        ("fna", {"source": "normed", "sketch": None}),
        ("fna", {"source": "qk", "per_head": True}),
        ("fna_paper", {"landmarks": RandomLandmarks()}),  # distances are no products
        ("fna_paper", {"landmarks": RandomLandmarks(), "solver": NewtonSchulzSolver(iters=60)}),
        ("nystromformer", {}),
        ("linformer_pool", {}),
        ("explicit", {}),
        ("tome", {}),
        ("prune", {}),
    ],
)
def test_flops_of_an_attention_are_those_that_torch_counts(monkeypatch, name, settings):
    monkeypatch.setenv("FNA_LAB_CPP", "0")
    q, k, v = torch.randn(1, N, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
    x = torch.randn(1, N, HEADS * DIM)
    context = Context(
        layer=0, nth=0, scale=DIM**-0.5, x=x, num_prefix_tokens=1, has_cls=True, grid=(37, 37)
    )
    attention = named_attention(name, **settings)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        attention(q, k, v, context)
    told = attention.flops(N, heads=HEADS, head_dim=DIM, channels=HEADS * DIM, layers=1)
    assert told == pytest.approx(counter.get_total_flops(), rel=0.07)


def test_performer_is_two_attentions_with_as_many_directions():
    # Without the fused kernel it takes the logits again, so that torch would count more.
    performer = named_attention("performer", num_features=64)
    shape = dict(heads=HEADS, head_dim=DIM, channels=HEADS * DIM, layers=1)
    assert performer.flops(N, **shape) == 2 * ops.subset_flops(N, HEADS, DIM, 64)


def test_clusters_that_serve_several_blocks_are_sought_once():
    shape = dict(heads=HEADS, head_dim=DIM, channels=HEADS * DIM, layers=5)
    once, always = (FastNystromAttention(renew=renew) for renew in ("never", "every"))
    again = always.selection_flops(N, HEADS * DIM, 64)
    assert again > always.landmarks.flops(N, 64, 64) + 2 * N * 64 * 64  # the sketch on top
    assert always.flops(N, **shape) - once.flops(N, **shape) == 4 * again


@pytest.mark.parametrize(
    "solver", [RidgeSolver(), NewtonSchulzSolver(), PinvSolver(), LeastSquaresSolver()]
)
def test_what_a_solver_costs_is_in_the_total(solver):
    settings = dict(clusters=False, solver=solver)
    shape = dict(heads=HEADS, head_dim=DIM, channels=HEADS * DIM, layers=1)
    small, large = (FastNystromAttention(num_landmarks=m, **settings) for m in (32, 64))
    grown = large.flops(N, **shape) - small.flops(N, **shape)
    mine = HEADS * (solver.flops(64, 64, DIM) - solver.flops(32, 32, DIM))
    assert 0 < mine < grown


def test_flops_count_the_added_tokens():
    shape = dict(heads=HEADS, head_dim=DIM, channels=HEADS * DIM, layers=3)
    added = RegistersAttention(neurons=[[1, 2]], num_registers=4)
    assert added.flops(196, **shape) == named_attention("exact").flops(200, **shape)
