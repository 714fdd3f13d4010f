"""The error meter against formulas written out, and the guard on kernels made to be singular."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import build
from rich.console import Console

import fna_lab
from fna_lab import cli, ops
from fna_lab.attn.base import Context, Removal
from fna_lab.attn.exact import ExactAttention
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.guard import Guard
from fna_lab.attn.nystromformer import NystromformerAttention
from fna_lab.attn.solver.newton_schulz import NewtonSchulzSolver
from fna_lab.attn.solver.pinv import PinvSolver
from fna_lab.attn.solver.ridge import RidgeSolver
from fna_lab.attn.tome import TomeAttention
from fna_lab.backbone.named import named_attention
from fna_lab.metric.attention_error import AttentionError, attention_facts, classes_of
from fna_lab.report import table

# Constructed: random tokens, 2 prefix tokens and a 4 x 5 grid.
B, H, N, D = 3, 2, 22, 8


def tokens(seed: int = 0, **more: Any) -> tuple[list[torch.Tensor], Context]:
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(B, H, N, D, generator=generator, dtype=torch.double) for _ in range(3)]
    x = torch.randn(B, N, 16, generator=generator, dtype=torch.double)
    settings = dict(layer=1, nth=0, scale=D**-0.5, num_prefix_tokens=2, has_cls=True, grid=(4, 5))
    return qkv, Context(x=x, **(settings | more))


def weights_of(variant: Any, q: Any, k: Any, context: Context) -> torch.Tensor:
    """The implied matrix, the slow way: one column at a time."""
    columns = []
    for j in range(N):
        v = torch.zeros(B, H, N, D, dtype=torch.double)
        v[:, :, j, 0] = 1
        columns.append(variant(q, k, v, context)[..., 0])
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("name", ["exact", "fna", "subset", "nystromformer", "tome"])
def test_weight_facts_are_those_of_the_matrix_written_out(name: str) -> None:
    (q, k, v), context = tokens()
    variant = named_attention(name, **({} if name in ("exact", "tome") else {"num_landmarks": 6}))
    matrix = weights_of(variant, q, k, context)
    torch.testing.assert_close(matrix @ v, variant(q, k, v, context))
    found = ops.weight_facts(lambda values: variant(q, k, values, context), v)
    torch.testing.assert_close(found["row_sum"], matrix.sum(-1))
    torch.testing.assert_close(found["negative_share"], (matrix < 0).double().mean(-1))
    mass = matrix.clamp(max=0).abs().sum(-1) / matrix.abs().sum(-1)
    torch.testing.assert_close(found["negative_mass"], mass)
    if name in ("exact", "subset", "tome"):
        assert found["negative_share"].max() == 0
        assert (found["row_sum"] - 1).abs().max() < 1e-12
    else:
        assert found["negative_share"].mean() > 0.01


def test_weights_are_taken_in_bounded_pieces() -> None:
    seen = []

    def attend(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.shape)
        return values

    ops.weight_facts(attend, torch.zeros(1, 1, 20, 8))
    assert seen == [(1, 1, 20, 8)] * 4  # 8 + 8 + 4 columns, then ones


def test_errors_are_norms_and_cosines_over_a_class() -> None:
    (a, b, _), _ = tokens(1)
    chosen = torch.zeros(B, N, dtype=torch.bool)
    chosen[0, 3:9] = chosen[1, 5] = True  # none in the third picture
    found = ops.relative_error(a, b, chosen)
    for i in range(2):
        for h in range(H):
            wrong = (a[i, h, chosen[i]] - b[i, h, chosen[i]]).norm()
            assert found[i, h] == pytest.approx(float(wrong / b[i, h, chosen[i]].norm()))
    assert found[2].isnan().all()
    assert ops.relative_error(b, b, chosen)[:2].max() == 0
    whole = (a - b).flatten(2).norm(dim=-1) / b.flatten(2).norm(dim=-1)
    torch.testing.assert_close(ops.relative_error(a, b), whole)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(ops.output_cosine(a, b), cosine)
    wanted = torch.stack([cosine[i, :, chosen[i]].mean(1) for i in range(2)])
    torch.testing.assert_close(ops.mean_of_tokens(cosine, chosen)[:2], wanted)


def test_condition_and_residuals_of_known_matrices() -> None:
    kernel = torch.diag(torch.tensor([4.0, 2.0, 0.5])).expand(2, 1, 3, 3)
    assert ops.condition_number(kernel).tolist() == [[8.0], [8.0]]
    assert ops.condition_number(torch.ones(1, 1, 3, 3)).item() == pytest.approx(1e16, rel=1e-3)
    assert ops.inverse_residual(kernel, lambda a, b: a.inverse() @ b).max() < 1e-12
    ones = ops.inverse_residual(kernel, lambda a, b: 0 * b)
    torch.testing.assert_close(ones, torch.ones(2, 1, dtype=torch.double))
    # Ridge leaves lambda / (s^2 + lambda) of every direction.
    left = torch.tensor([1 / (s**2 + 1) for s in (4.0, 2.0, 0.5)]).double().norm() / 3**0.5
    found = ops.inverse_residual(kernel, lambda a, b: ops.ridge_solve(a, b, 1.0))
    torch.testing.assert_close(found, left.expand(2, 1), rtol=1e-6, atol=0)
    values = torch.tensor([[3.0], [4.0], [0.0]]).expand(2, 1, 3, 1)
    wrong = ops.solve_residual(kernel, torch.zeros_like(values), values)
    assert wrong.tolist() == [[1.0], [1.0]]
    assert ops.solve_residual(kernel, values * torch.nan, values).isinf().all()


def test_exact_attention_has_no_error() -> None:
    (q, k, v), context = tokens()
    exact = ExactAttention()
    facts = attention_facts(exact, exact, q, k, v, context, exact(q, k, v, context))
    for name, values in facts.items():
        fact = name.split("/")[0]
        wanted = 1.0 if fact in ("cosine", "row_sum") else 0.0
        assert (values - wanted).abs().max() < 1e-12, name
    assert "solve_residual" not in facts


def test_landmarks_on_every_token_leave_no_error() -> None:
    (q, k, v), context = tokens()
    variant = FastNystromAttention(num_landmarks=N, solver=PinvSolver())
    facts = attention_facts(variant, ExactAttention(), q, k, v, context, variant(q, k, v, context))
    for name in ("relative_error/all", "row_sum_gap/all", "inverse_residual", "solve_residual"):
        assert facts[name].max() < 1e-6, name
    few = FastNystromAttention(num_landmarks=5)
    facts = attention_facts(few, ExactAttention(), q, k, v, context, few(q, k, v, context))
    assert facts["relative_error/patch"].min() > 0.01
    assert facts["relative_error/cls"].max() < 1e-12  # its row is exact


@pytest.mark.parametrize("stage", ["mask", "sink"])
def test_facts_of_a_picture_do_not_depend_on_its_mates(stage: str) -> None:
    (q, k, v), context = tokens(2)
    found = torch.zeros(B, N, dtype=torch.bool)
    found[0, 4] = found[1, [7, 9]] = found[2, 21] = True
    variant, exact = FastNystromAttention(num_landmarks=6), ExactAttention()

    def facts(some: slice) -> dict[str, torch.Tensor]:
        rows, valid = ops.token_rows(found[some])
        removal = Removal(found[some], "type2", stage, rows, valid)
        one = Context(**{**vars(context), "x": context.x[some], "removal": removal, "shared": {}})
        qkv = [t[some] for t in (q, k, v)]
        return attention_facts(variant, exact, *qkv, one, variant(*qkv, one))

    together = facts(slice(None))
    assert "relative_error/masked" in together
    for i in range(B):
        for name, values in facts(slice(i, i + 1)).items():
            torch.testing.assert_close(values, together[name][i : i + 1], rtol=1e-6, atol=1e-9)
    if stage == "sink":
        assert together["row_sum/all"].max() < 1  # mass is lost, and not held against the variant
        assert together["row_sum_gap/all"].max() < 0.2


def test_token_classes() -> None:
    massive = torch.zeros(B, N, dtype=torch.bool)
    _, context = tokens(classes={"massive": massive})
    found = classes_of(context, num_extra=3)
    assert {name: int(t.sum()) // B for name, t in found.items()} == {
        "all": 22, "patch": 17, "cls": 1, "register": 4, "massive": 0,
    }  # fmt: skip
    assert set(classes_of(tokens(has_cls=False, num_prefix_tokens=0)[1])) == {"all", "patch"}


def test_the_meter_is_a_mean_over_pictures_and_changes_nothing() -> None:
    host, model, x = build("timm dinov2 registers")
    with fna_lab.patch(model, "fna", layers="2-3", num_landmarks=6, renew=0) as patched:
        plain = host.run(model, x)
        meter = AttentionError(4, 4, ExactAttention())
        patched.meter = meter.attend
        assert torch.equal(host.run(model, x[:2]), plain[:2])
        host.run(model, x[2:])
        halves = meter.compute()
        meter.reset()
        host.run(model, x)
    whole = meter.compute()
    assert set(whole) == {"02", "03"}
    assert set(whole["02"]["relative_error"]) == {"all", "cls", "register", "patch"}
    flat, split = (json.dumps(each) for each in (whole, halves))
    numbers = [torch.tensor(list(_leaves(json.loads(text)))) for text in (flat, split)]
    torch.testing.assert_close(numbers[0], numbers[1], rtol=1e-4, atol=1e-6)


def _leaves(node: Any) -> Any:
    if isinstance(node, dict):
        for value in node.values():
            yield from _leaves(value)
    else:
        yield from node


@pytest.mark.parametrize("variant", [NystromformerAttention(num_landmarks=6), TomeAttention()])
def test_the_meter_works_on_every_kind_of_variant(variant: Any) -> None:
    (q, k, v), context = tokens()
    facts = attention_facts(variant, ExactAttention(), q, k, v, context, variant(q, k, v, context))
    assert ("solve_residual" in facts) == (variant.name == "nystromformer")


# --- guard ---

PLAIN: dict[str, Any] = {"clusters": False, "source": "normed"}


def singular(heads: tuple[int, ...] = (0,)) -> tuple[list[torch.Tensor], Context]:
    """Constructed: in these heads of the second picture the landmarks' keys are all alike.

    A is then 1/m everywhere, while landmark queries look at different other keys.
    """
    qkv, context = tokens(3)
    marks = FastNystromAttention(num_landmarks=6, **PLAIN).choose(qkv[0], qkv[1], None, context)
    context.shared.clear()
    for head in heads:
        qkv[1][1, head, marks[1]] = 1.0
        qkv[0][1, head] *= 8
    return qkv, context


@pytest.mark.parametrize("solver", [NewtonSchulzSolver(), RidgeSolver(), PinvSolver()])
def test_a_singular_kernel_falls_back_to_exact_in_its_head_alone(solver: Any) -> None:
    (q, k, v), context = singular()
    settings = {"num_landmarks": 6, "solver": solver, "exact_cls": False, **PLAIN}
    guarded = FastNystromAttention(**settings, guard=0.9)
    plain = FastNystromAttention(**settings)
    out, rough = guarded(q, k, v, context), plain(q, k, v, context)
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[1, 0], exact[1, 0], rtol=1e-12, atol=1e-12)
    # By hand: which heads miss too much, at the landmarks or at the queries in between.
    marks = plain.choose(q, k, None, context)
    bad = 0
    for b in range(B):
        for h in range(H):
            a = (q[b, h, marks[b]] @ k[b, h, marks[b]].T * D**-0.5).softmax(-1)
            values = exact[b, h, marks[b]]
            residual = (a @ solver(a, values) - values).norm() / values.norm()
            other = (rough[b, h] - exact[b, h]).norm() / exact[b, h].norm()
            if max(residual, other) <= 0.9:
                assert torch.equal(out[b, h], rough[b, h])
            else:
                bad += 1
    assert bad >= 1
    heads, again, exactly = guarded.guard.counts[1].tolist()
    assert heads == B * H and again == (0 if isinstance(solver, RidgeSolver) else bad)
    assert 1 <= exactly <= bad


def test_ridge_is_taken_where_it_is_enough() -> None:
    """Constructed: a solver that answers with nonsense in one head."""

    class Wild(RidgeSolver):
        def __call__(self, kernel: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            found = super().__call__(kernel, values)
            found[2, 1] = torch.nan
            return found

    (q, k, v), context = tokens(4)
    q, k = q / 4, k / 4  # almost uniform attention: ridge is good
    guarded = FastNystromAttention(num_landmarks=8, solver=Wild(), guard=0.9)
    wanted = FastNystromAttention(num_landmarks=8)(q, k, v, context)
    torch.testing.assert_close(guarded(q, k, v, context), wanted, rtol=1e-10, atol=1e-10)
    assert guarded.guard.counts[1].tolist() == [B * H, 1, 0]


def test_ridge_of_another_penalty_is_tried_before_exact_attention() -> None:
    (q, k, v), context = tokens(4)
    heavy = {"num_landmarks": 8, "solver": RidgeSolver(ridge=1e6), **PLAIN}
    guarded = FastNystromAttention(**heavy, guard=0.9)
    wanted = FastNystromAttention(num_landmarks=8, **PLAIN)(q / 4, k / 4, v, context)
    torch.testing.assert_close(guarded(q / 4, k / 4, v, context), wanted, rtol=1e-9, atol=1e-9)
    assert guarded.guard.counts[1].tolist() == [B * H, B * H, 0]


def test_a_guard_that_sees_nothing_wrong_changes_nothing() -> None:
    (q, k, v), context = tokens()
    plain = FastNystromAttention(num_landmarks=6)(q, k, v, context)
    guarded = FastNystromAttention(num_landmarks=6, guard=1e6)
    assert torch.equal(guarded(q, k, v, context), plain)
    assert guarded.guard.counts[1].tolist() == [B * H, 0, 0]


def test_the_guard_honours_padding_bias_and_batch_mates() -> None:
    (q, k, v), context = singular((0, 1))
    keep = torch.arange(N).expand(B, 1, 1, -1) < 19
    bias = torch.randn(1, H, N, N, dtype=torch.double)
    exact = ExactAttention()
    for mask, settings in itertools.product((keep, bias), ({}, PLAIN, {"per_head": True})):
        variant = FastNystromAttention(num_landmarks=6, guard=1e-9, **settings)  # nothing passes
        given = Context(**{**vars(context), "attn_mask": mask, "shared": {}})
        out = variant(q, k, v, given)
        torch.testing.assert_close(out, exact(q, k, v, given))
        assert variant.guard.counts[1].tolist() == [B * H, 0, B * H]
    variant = FastNystromAttention(num_landmarks=6, guard=0.9)
    together = variant(q, k, v, context)
    for i in range(B):
        one = Context(**{**vars(context), "x": context.x[i : i + 1], "shared": {}})
        alone = variant(*(t[i : i + 1] for t in (q, k, v)), one)
        torch.testing.assert_close(alone, together[i : i + 1])


def test_without_a_guard_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "solve_residual", None)
    (q, k, v), context = tokens()
    FastNystromAttention(num_landmarks=6)(q, k, v, context)
    with pytest.raises(TypeError):
        FastNystromAttention(num_landmarks=6, guard=0.5, **PLAIN)(q, k, v, context)


@pytest.mark.parametrize("value", [0, -1.0, "half", True])
def test_bad_thresholds_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"attn.guard=.*expected a number > 0"):
        Guard(value)


# --- command line ---


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, code: int = 0) -> Any:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["fna_lab", "trainer=cpu", "task.cost=false", *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    found = sorted(Path("outputs").rglob("metrics.json"))
    return json.loads(found[-1].read_text()) if found else None


FNA = ("attn=fna", "attn.num_landmarks=24", "task.meter=true", "attn.guard=0.08")


@pytest.mark.parametrize(
    "task", [["task=fidelity"], ["task.protocols=[zero_shot]", "data.count=6"],
             ["task=anatomy", "data.count=6"]],
)  # fmt: skip
def test_meter_and_guard_stand_in_the_record_of_every_task(
    task: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    record = run(tmp_path, monkeypatch, *FNA, *task)
    assert set(record["errors"]) == set(record["fallbacks"]) == {"04", "05", "06", "07"}
    block = record["errors"]["05"]
    assert set(block["relative_error"]) == {"all", "cls", "patch"}
    assert len(block["negative_share"]["patch"]) == record["backbone"]["num_heads"]
    assert len(block["log10_condition"]) == record["backbone"]["num_heads"]
    pictures = record["metrics"]["n"]
    assert record["fallbacks"]["05"]["heads"] == pictures * record["backbone"]["num_heads"]
    assert not any("relative_error" in name for name in record["metrics"])
    said = " ".join(capsys.readouterr().out.split())
    assert "attention against exact attention" in said and "guard (0.08): of" in said


def test_the_table_of_errors() -> None:
    """Constructed numbers."""
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    row = {"relative_error": {"patch": [0.1, 0.3]}, "log10_condition": [2.0, 4.0]}
    console.print(table.error_table({"03": row}))
    text = console.export_text()
    assert "0.2" in text and "1e+03" in text and "CLS" not in text
