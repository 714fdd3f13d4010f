"""Findings on a backbone whose truth is known, and on one that has nothing to find."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.backbone.base import Backbone
from fna_lab.backbone.planted import PlantedBackbone
from fna_lab.backbone.timm import TimmBackbone
from fna_lab.data.planted import PlantedData
from fna_lab.finding.base import Mean, compared, named_findings
from fna_lab.finding.lab import Lab

NAMES = [finding.name for finding in named_findings()]


@pytest.fixture(scope="module")
def planted() -> Backbone:
    return PlantedBackbone()


@pytest.fixture(scope="module")
def images(planted: Backbone) -> Tensor:
    data = PlantedData(transform=planted.transform, count=6, bank_count=1)
    data.setup()
    assert data.test_set is not None
    return torch.stack([data.test_set[i]["image"] for i in range(6)])


@pytest.fixture(scope="module")
def verdicts(planted: Backbone, images: Tensor) -> dict[str, bool | None]:
    lab = Lab(planted, images, rounds=8)
    return {f.name: f.verdict(f.measure(lab), planted).holds for f in named_findings()}


def test_there_are_eight_in_the_order_of_their_numbers() -> None:
    assert [finding.number for finding in named_findings()] == list(range(1, 9))


def test_what_is_built_into_the_planted_backbone_holds(verdicts: dict[str, bool | None]) -> None:
    built = ("sinking_shrinks", "type1_peak_in_cls", "type2_controls_growth",
             "growth_without_attention", "massive_cost_nothing")  # fmt: skip
    assert {name: verdicts[name] for name in built} == dict.fromkeys(built, True)
    assert verdicts["no_massive_in_mae"] is None  # it is no MAE


def test_massive_tokens_and_sinks_are_the_truth(planted: Backbone, images: Tensor) -> None:
    lab = Lab(planted, images, rounds=12)
    truth = planted.truth(images)  # type: ignore[operator]
    assert torch.equal(lab.massive(), truth["massive"])
    assert torch.equal(lab.sinks(), truth["massive"] | truth["artifact"])


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_a_picture_do_not_depend_on_its_batch_mates(
    name: str, planted: Backbone, images: Tensor
) -> None:
    (finding,) = named_findings([name])
    together = finding.measure(Lab(planted, images[:3], rounds=6))
    alone = [finding.measure(Lab(planted, image, rounds=6)) for image in images[:3].split(1)]
    for column, values in together.items():
        each = torch.cat([one[column] for one in alone])
        if "random" not in column:
            torch.testing.assert_close(values, each, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_without_massive_tokens_nothing_is_claimed() -> None:
    backbone = PlantedBackbone(planted=False)
    data = PlantedData(transform=backbone.transform, count=4, bank_count=1)
    data.setup()
    assert data.test_set is not None
    lab = Lab(backbone, torch.stack([data.test_set[i]["image"] for i in range(4)]), rounds=4)
    for finding in named_findings():
        if finding.name == "landmark_classes":
            continue  # CLS is there, and is judged alone
        assert finding.verdict(finding.measure(lab), backbone).holds is None


def _by_hand(backbone: Backbone, images: Tensor, tokens: Tensor, stage: str) -> Tensor:
    """The strongest sink that is left, with attention written out in the blocks of a timm BEiT."""
    first, last = backbone.anatomy.restart, backbone.anatomy.detect
    host: Any = backbone.host
    states: list[Tensor] = []
    hook = host.blocks[first].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    backbone(images)
    hook.remove()
    (x,) = states
    for block in host.blocks[first : last + 1]:
        normed, attn = block.norm1(x), block.attn
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        packed = F.linear(normed, attn.qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * q.shape[-1] ** -0.5 + attn._get_rel_pos_bias()
        gone = tokens[:, None, None]
        if stage == "mask":
            weights = logits.masked_fill(gone, -torch.inf).softmax(-1)
        else:
            weights = logits.softmax(-1).masked_fill(gone, 0)
        mixed = attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.gamma_1 * mixed
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
    row = weights[:, :, 0].mean(1)
    return (row / row[:, :1]).masked_fill(tokens, -torch.inf)[:, 1:].amax(1)


@pytest.mark.parametrize("stage", ["mask", "sink"])
def test_the_strongest_sink_is_that_under_the_position_bias(stage: str) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name="beit_base_patch16_224", pretrained=False, img_size=64)
    for block in backbone.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table, std=2.0)
        block.gamma_1.data.fill_(1.0)
        block.gamma_2.data.fill_(1.0)
    images = torch.randn(2, 3, 64, 64)
    tokens = torch.zeros(2, 17, dtype=torch.bool)
    tokens[0, [3, 8]] = True
    tokens[1, 16] = True
    lab = Lab(backbone, images)
    wanted = _by_hand(backbone, images, tokens, stage)
    torch.testing.assert_close(lab.strongest(tokens, stage), wanted, rtol=1e-4, atol=1e-5)


def test_the_strongest_sink_is_looked_for_in_few_blocks(planted: Backbone, images: Tensor) -> None:
    (finding,) = named_findings(["sinking_is_gradual"])
    lab = Lab(planted, images, rounds=12)
    lab.iterative("mask")
    ran = [0] * planted.depth

    def count(layer: int) -> None:
        ran[layer] += 1

    hooks = [
        block.register_forward_hook(lambda *_, layer=i: count(layer))
        for i, block in enumerate(planted.blocks)
    ]
    found = finding.measure(lab)
    for hook in hooks:
        hook.remove()
    first, last = planted.anatomy.restart, planted.anatomy.detect
    rounds = 2 * (1 + int(found["masking"].isfinite().any(0).nonzero().max()))
    assert rounds > 8
    assert ran == [1 + rounds * (first <= layer <= last) for layer in range(planted.depth)]


def test_a_cls_that_attends_evenly_has_no_massive_tokens() -> None:
    backbone = TimmBackbone(name="vit_tiny_patch16_224", pretrained=False, img_size=64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone.host.eval()
    for block in backbone.blocks:
        block.attn.qkv.weight.data[: 2 * backbone.embed_dim] = 0
        block.attn.qkv.bias.data[: 2 * backbone.embed_dim] = 0
    assert not Lab(backbone, images).massive().any()


def test_mae_is_judged_and_a_huge_activation_is_seen() -> None:
    backbone = TimmBackbone(name="vit_base_patch16_224.mae", pretrained=False, img_size=32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (finding,) = named_findings(["no_massive_in_mae"])
    assert finding.verdict(finding.measure(Lab(backbone, images)), backbone).holds is True
    backbone.host.blocks[5].mlp.fc2.bias[7] = 5000.0
    assert finding.verdict(finding.measure(Lab(backbone, images)), backbone).holds is False


def test_growth_is_that_of_a_chain_of_mlps(planted: Backbone, images: Tensor) -> None:
    (finding,) = named_findings(["growth_without_attention"])
    lab = Lab(planted, images)
    found = finding.measure(lab)
    x = lab.plain().hidden[planted.anatomy.restart - 1]
    before = lab.norms(x)
    for block in planted.blocks[planted.anatomy.restart : planted.anatomy.detect]:
        x = x + block.mlp(block.norm2(x))  # its output projection has no bias
    growth = (lab.norms(x) / before).double().log()
    chosen = lab.of_patches(lab.massive())
    wanted = torch.stack([g[c].mean().exp() for g, c in zip(growth, chosen, strict=True)])
    torch.testing.assert_close(found["massive_off"], wanted, rtol=1e-4, atol=1e-6)


def test_a_mean_leaves_out_what_cannot_tell_and_knows_its_uncertainty() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).double()
    mean = Mean.of(torch.cat([values, torch.full((9,), torch.nan, dtype=torch.double)]))
    assert mean is not None and mean.count == 500
    error = float(values.std()) / math.sqrt(500)
    assert mean.value == pytest.approx(float(values.mean()))
    assert mean.low == pytest.approx(mean.value - 1.96 * error, abs=0.2 * error)
    assert mean.high == pytest.approx(mean.value + 1.96 * error, abs=0.2 * error)
    assert Mean.of(torch.full((3,), torch.nan)) is None


def test_log_ratios_are_said_in_words() -> None:
    def said(*ratios: float) -> str:
        mean = Mean.of(torch.tensor(ratios).double().log())
        assert mean is not None
        return mean.change()

    assert said(0.997) == "0.3 % smaller [0.3, 0.3 %]"
    assert said(1.12) == "12 % larger [12, 12 %]"
    assert said(4.0) == "4 times as large [4, 4]"
    low, high = said(0.8, 0.9).split("[")[1].rstrip(" %]").split(", ")
    assert 10 <= float(low) < float(high) <= 20


def test_an_effect_that_is_sure_and_small_is_called_small() -> None:
    tiny = Mean.of(torch.tensor([-0.003, -0.0031, -0.0029]).double())
    verdict = compared(tiny, 0.0, "{change}", "x", above=False, small=0.05)
    assert verdict.holds is True
    assert verdict.says.startswith("0.3 % smaller") and verdict.says.endswith("small difference")
    large = Mean.of(torch.tensor([-0.3, -0.31]).double())
    assert "small difference" not in compared(large, 0.0, "", "x", above=False, small=0.05).says


@pytest.mark.parametrize(("shift", "holds"), [(1.0, True), (-1.0, False), (0.0, None)])
def test_a_verdict_needs_the_whole_interval(shift: float, holds: bool | None) -> None:
    values = torch.tensor([-0.2, -0.1, 0.1, 0.2]).double() + shift
    verdict = compared(Mean.of(values), 0.0, "{mean} of {n}", "x", above=True)
    assert verdict.holds is holds
    assert compared(None, 0.0, "{mean}", "x", above=True).holds is None


def test_bootstrap_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match="values to hold at least one"):
        ops.bootstrap_mean(torch.zeros(0))
    with pytest.raises(ValueError, match="level between 0 and 1"):
        ops.bootstrap_mean(torch.zeros(3), level=1.0)
    assert ops.bootstrap_mean(torch.tensor([2.0])) == (2.0, 2.0)


def test_an_unknown_finding_is_named() -> None:
    with pytest.raises(ValueError, match="task.findings: 'nine' is none of growth_without"):
        named_findings(["nine"])
