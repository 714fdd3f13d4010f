"""Token anatomy: laws that the measurements keep, on hosts with 0, 1 and 5 prefix tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from hosts import HOSTS, build, set_batch_first
from test_tasks import measure

import fna_lab
from fna_lab import ops
from fna_lab.attn.base import Context, Removal
from fna_lab.backbone.base import Backbone
from fna_lab.backbone.blocks import find_blocks
from fna_lab.backbone.replay import Replay
from fna_lab.backbone.timm import TimmBackbone
from fna_lab.data.shapes import ShapesData
from fna_lab.hosts import out_weight
from fna_lab.metric.alignment import directions, suppression_facts
from fna_lab.metric.intervention import WithoutTokens, next_sink
from fna_lab.metric.mass import attention_pattern, attention_sums, mass_facts, sink_facts
from fna_lab.report import figures
from fna_lab.report import record as records
from fna_lab.task.anatomy import MEASURES, Anatomy

NUM: dict[str, dict[str, int]] = {"subset": {"num_landmarks": 8}}
THREE = ("timm vit without cls", "timm vit", "timm dinov2 registers")
# A host of each kind, by the number of its prefix tokens.
BACKBONES = {
    0: ("vit_betwixt_patch16_gap_256", 64),
    1: ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 64),
    5: ("vit_small_patch14_reg4_dinov2.lvd142m", 56),
}


def call(seed: int = 0, batch: int = 3, n: int = 11, prefix: int = 1, **more: Any):
    """Random queries, keys, values, and their context."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = 2 * torch.randn(3, batch, 4, n, 8, generator=generator)
    x = torch.randn(batch, n, 32, generator=generator)
    return q, k, v, Context(0, 0, 8**-0.5, x, num_prefix_tokens=prefix, has_cls=prefix > 0, **more)


def classes(batch: int, n: int, prefix: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    massive, artifact = torch.rand(2, batch, n, generator=generator) < 0.3
    found = ops.token_classes(massive, artifact, prefix=prefix, has_cls=prefix > 0)
    return ops.class_members(found)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("piece", [50, 500, 10**9])
def test_class_masses_sum_to_one_whatever_the_pieces(prefix: int, piece: int) -> None:
    q, k, v, context = call(prefix=prefix)
    members = classes(3, 11, prefix)
    seen = torch.randn(3, 4, 11, 8)
    sums = attention_sums(q, k, context, members, seen=seen, v=v, piece=piece)
    pattern = attention_pattern(q, k, context)
    torch.testing.assert_close(sums.incoming, pattern.mean(2))
    torch.testing.assert_close(sums.first, pattern[:, :, 0])
    torch.testing.assert_close(sums.mass, ops.class_sums(pattern, members, members))
    pushed = ops.class_sums(pattern * (seen @ v.mT), members, members)
    torch.testing.assert_close(sums.pushed, pushed, rtol=1e-4, atol=1e-4)
    facts = mass_facts(sums, members)
    whole = torch.stack([facts[f"mass/{name}"] for name in ops.TOKEN_CLASSES]).nan_to_num().sum(0)
    torch.testing.assert_close(whole, torch.ones(3))
    present = members.any(1)
    flow = facts["flow"].sum(-1)
    torch.testing.assert_close(flow[present], torch.ones_like(flow[present]))
    assert flow[~present].isnan().all()


def test_a_sink_stage_loses_the_mass_of_its_tokens_and_a_mask_stage_none() -> None:
    q, k, _, context = call()
    tokens = torch.zeros(3, 11, dtype=torch.bool)
    tokens[0, 4], tokens[2, [5, 6]] = True, True
    whole = attention_sums(q, k, context, tokens[..., None]).mass[:, :, 0, 0]
    members = torch.stack([tokens, ~tokens], dim=-1)
    for stage in ("mask", "sink"):
        removal = Removal(tokens, "type1", stage, *ops.token_rows(tokens))
        sums = attention_sums(q, k, replace(context, removal=removal), members, piece=50)
        assert sums.incoming.transpose(1, 2)[tokens].abs().max() == 0
        total = sums.incoming.sum(-1)
        if stage == "mask":
            torch.testing.assert_close(total, torch.ones(3, 4))
        else:
            drawn = attention_pattern(q, k, context).mean(2)
            lost = (drawn * tokens[:, None]).sum(-1)
            torch.testing.assert_close(total, 1 - lost)
            assert lost[0].min() > 0
    assert whole.shape == (3, 4)


@pytest.mark.parametrize("name", THREE)
def test_suppression_with_attention_is_the_projection_of_what_attention_adds(name: str) -> None:
    """By class and head it sums up to unit(x_i) . W_o (A v)_i, class by class."""
    host, model, pictures = build(name)
    _, blocks = find_blocks(model)
    seen: list[Any] = []
    with fna_lab.patch(model, "exact", layers="all") as patched:
        with patched.observed(lambda q, k, v, context: seen.append((q, k, v, context))):
            host.run(model, pictures)
    q, k, v, context = seen[2]
    assert context.num_prefix_tokens == host.prefix
    weight = out_weight(blocks[2])
    members = classes(3, q.shape[2], host.prefix)
    see = directions(context.x, weight, q.shape[1])
    sums = attention_sums(q, k, context, members, seen=see, v=v, piece=1000)
    facts = suppression_facts(context.x, v, weight, members, sums)
    added = ops.attention(q, k, v, scale=context.scale).transpose(1, 2).flatten(2) @ weight.T
    unit = torch.nn.functional.normalize(context.x, dim=-1)
    wanted = ops.class_mean((unit * added).sum(-1), members)
    for i, kind in enumerate(ops.TOKEN_CLASSES):
        found = facts[f"suppression/{kind}"]
        torch.testing.assert_close(found, wanted[:, i], equal_nan=True, rtol=1e-4, atol=1e-5)
    matrix = ops.suppression(context.x, v, weight)
    torch.testing.assert_close(see @ v.mT, matrix, rtol=1e-4, atol=1e-5)


def test_sink_rate_counts_heads() -> None:
    q, k, _, context = call(n=12, prefix=5)
    k[:, 1, 7] = 40 * q[:, 1].mean(1)  # head 1 looks at patch 7 alone ...
    k[:, 2, 0] = 40 * q[:, 2].mean(1)  # ... and head 2 at CLS
    members = classes(3, 12, 5)
    sums = attention_sums(q, k, context, members)
    settings: Any = dict(num_prefix_tokens=5, has_cls=True)
    facts = sink_facts(sums, epsilon=0.3, **settings)
    drawn = attention_pattern(q, k, context).mean(2)
    for i, part in enumerate((drawn[..., :1], drawn[..., 1:5], drawn[..., 5:])):
        wanted = (part > 0.3).any(-1).float()
        assert torch.equal(facts["sink_heads"][..., i], wanted)
        torch.testing.assert_close(facts["sink_shares"][..., i], part.amax(-1))
    assert facts["sink_heads"][:, 1, 2].all() and facts["sink_heads"][:, 2, 0].all()
    none = sink_facts(sums, epsilon=0.3, num_prefix_tokens=0, has_cls=False)
    assert "sink_rate/cls" not in none and none["sink_heads"][..., :2].isnan().all()


@pytest.mark.parametrize("name", HOSTS)
def test_blocks_that_run_again_do_the_same_again(name: str) -> None:
    host, model, pictures = build(name)
    _, blocks = find_blocks(model)
    replay = Replay(blocks, lambda: host.run(model, pictures), 1, host.depth - 1)
    assert len(replay.outputs) == host.depth
    assert torch.equal(replay.inputs, replay.outputs[0])
    for again, once in zip(replay(), replay.outputs[1:], strict=True):
        assert torch.equal(again, once)
    with pytest.raises(ValueError, match="first=3, last=2"):
        Replay(blocks, lambda: None, 3, 2)


def test_blocks_that_keep_tokens_first_run_again_alike() -> None:
    found = []
    for batch_first in (True, False):
        host, model, pictures = build("open_clip")
        set_batch_first(model, batch_first)
        model, pictures = model.double(), pictures.double()  # rounding grows from block to block
        _, blocks = find_blocks(model)
        replay = Replay(blocks, partial(host.run, model, pictures), 1, 3)
        found.append([replay.inputs, *replay.outputs, *replay()])
        assert replay.inputs.shape[0] == len(pictures)
    torch.testing.assert_close(found[0], found[1])


def backbone(prefix: int) -> Backbone:
    torch.manual_seed(0)
    name, size = BACKBONES[prefix]
    found = TimmBackbone(name=name, pretrained=False, img_size=size, mean=[0.5] * 3, std=[0.5] * 3)
    for block in found.blocks:
        block.attn.qkv.weight.mul_(6)  # random weights attend almost uniformly
        block.attn.proj.bias.normal_()
        for name, value in block.named_parameters():
            if name.endswith("gamma"):
                value.fill_(0.5)  # 1e-5 when it is new, so that no block would do anything
    return found


def anatomy(model: Backbone, batch_size: int = 3, **settings: Any) -> Anatomy:
    patched = fna_lab.patch(model.host, "exact", layers="all")
    exact = fna_lab.patch(model.host, "exact", layers="all")
    task = Anatomy(backbone=model, patched=patched, exact=exact, measure="all", **settings)
    data = ShapesData(transform=model.transform, count=3, img_size=model.img_size,
                      batch_size=batch_size)  # fmt: skip
    measure(task, data)
    return task


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_growth_without_attention_is_a_chain_of_mlps(prefix: int) -> None:
    model = backbone(prefix)
    task = anatomy(model, rounds=1)
    data = ShapesData(transform=model.transform, count=3, img_size=model.img_size)
    data.setup()
    pictures = torch.stack([data.test_set[i]["image"] for i in range(3)])  # type: ignore[index]
    first = model.anatomy.restart
    x = Replay(model.blocks, lambda: model(pictures), first, first).inputs
    for name, bias in (("off", True), ("off_no_bias", False)):
        h, wanted = x, []
        for block in model.blocks[first:]:
            if bias:
                h = h + block.ls1(block.attn.proj.bias.expand_as(h))
            h = h + block.ls2(block.mlp(block.norm2(h)))
            wanted.append(h[:, prefix:].norm(dim=-1))
        found = torch.from_numpy(task.arrays[f"map_growth_{name}"])
        torch.testing.assert_close(found, torch.stack(wanted, 1), rtol=1e-4, atol=1e-4)
    exact, off = task.arrays["map_growth_exact"], task.arrays["map_growth_off"]
    assert not np.allclose(exact, off, rtol=1e-3)
    # The numbers follow the token that is largest where detectors look.
    place = model.anatomy.detect - 1 - first
    token = exact[:, place].argmax(1)
    last = f"{model.depth - 1:02d}"
    assert task.found[f"growth/off/{last}"] == pytest.approx(
        off[range(3), -1, token].mean(), rel=1e-5
    )


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_picture_does_not_depend_on_its_batch_mates(prefix: int) -> None:
    model = backbone(prefix)
    together, alone = anatomy(model, 3, rounds=2), anatomy(model, 1, rounds=2)
    assert set(together.found) == set(alone.found)
    for one, other in zip(together.rows, alone.rows, strict=True):
        assert one["name"] == other["name"]
        for name in set(one) - {"name"}:
            near = None if other[name] is None else pytest.approx(other[name], rel=2e-3, abs=2e-3)
            assert one[name] == near, name
    kinds = {"cls": bool(prefix), "register": prefix > 1}
    for kind, there in kinds.items():
        assert (f"norms/{kind}/03" in together.found) == there


def test_every_measure_leaves_numbers_samples_and_a_figure(tmp_path: Path) -> None:
    model = backbone(5)
    task = anatomy(model, rounds=2)
    measured = {name.split("/")[0] for name in task.found}
    for name in ("norms", "activations", "mass", "incoming", "sink_rate", "qk", "ov",
                 "suppression", "growth", "decay", "pca_explained_1", "top_norm",
                 "pairs_type2"):  # fmt: skip
        assert name in measured
        assert any(key.startswith(name) for key in task.rows[0])
    made = {
        "task": "anatomy", "metrics": task.found, "backbone": model.describe(),
        "data": {"name": "shapes", "count": 3, "synthetic": True}, "attn": {"name": "exact"},
        "mask": {"name": "none"}, "config": {"task": {"epsilon": 0.3}},
    }  # fmt: skip
    records.write(made, task.rows, tmp_path, task.arrays)
    back = records.read_arrays(tmp_path)
    assert set(back) == set(task.arrays)
    assert all(np.array_equal(back[k], task.arrays[k], equal_nan=True) for k in back)
    drawn = figures.draw(tmp_path)
    wanted = {"norms", "mass", "incoming", "sink_rate", "alignment", "suppression", "growth",
              "decay", "tokens", "pca", "topology",
              "patterns"}  # fmt: skip
    assert {path.stem for path in drawn} == wanted
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {f"{n}.png" for n in wanted}
    for path in drawn:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    # The colour of CLS is the same wherever it is drawn.
    blue = np.array([0, 0x72, 0xB2]) / 255
    for name in ("norms", "mass", "incoming", "alignment"):
        pixels = matplotlib.image.imread(tmp_path / "figures" / f"{name}.png")[..., :3]
        assert (abs(pixels - blue).max(-1) < 0.02).sum() > 50, name


def test_rounds_take_out_the_strongest_sink_and_its_attention() -> None:
    q, k, v, context = call(n=12, prefix=1)
    k[:, :, 7] = 3 * q.mean(2)
    k[0, :, 7] = k[0, :, 3]  # picture 0 has no such token
    nothing = torch.zeros(3, 12, dtype=torch.bool)
    branches = [WithoutTokens(nothing, *how) for how in
                (("mask", "type1"), ("sink", "type1"), ("sink", "type2"))]  # fmt: skip
    shown = [branch.look(q, k, context) for branch in branches]
    for drawn, score in shown[1:]:
        assert torch.equal(drawn, shown[0][0]) and torch.equal(score, shown[0][1])
    row = attention_pattern(q, k, context)[:, :, 0].mean(1)
    torch.testing.assert_close(shown[0][1][:, 1:], (row / row[:, :1])[:, 1:])
    new = next_sink(shown[0][1])
    assert new[1:, 7].all() and new.sum(1).max() == 1
    plain = ops.attention(q, k, v, scale=context.scale)
    torch.testing.assert_close(branches[0](q, k, v, context), plain)
    for stage in ("mask", "sink"):
        gone = WithoutTokens(new, stage, "type1")
        drawn, score = gone.look(q, k, context)
        assert (drawn[new] == 0).all() and (score[new] == -torch.inf).all()
        assert not (next_sink(score) & new).any()
        wanted = attention_pattern(q, k, replace(context, removal=gone.removal)) @ v
        torch.testing.assert_close(gone(q, k, v, context), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"measure": ["norm"]}, "task.measure: 'norm' is none of facts, norms"),
        ({"pictures": 0}, "task.pictures=0: expected an integer >= 1"),
        ({"rounds": 1.5}, "task.rounds=1.5: expected an integer >= 1"),
        ({"measure": ["landmarks"]}, "task.measure=.landmarks.: attn=exact takes no landmarks"),
        (
            {"samplers": ["nonsense"]},
            "task.samplers=nonsense: there is no such sampler; known",
        ),
        ({"samplers": ["fps:blok=2"]}, "task.samplers=fps:blok=2: .*blok"),
        ({"epsilon": 1}, "task.epsilon=1: expected a number between 0 and 1"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], said: str) -> None:
    model = backbone(1)
    with fna_lab.patch(model.host, "exact") as patched:
        with pytest.raises(ValueError, match=said):
            Anatomy(backbone=model, patched=patched, exact=patched, **settings)


def test_one_measure_alone_costs_no_other() -> None:
    model = backbone(1)
    for name in MEASURES:
        attn = "subset" if name == "landmarks" else "exact"
        patched = fna_lab.patch(model.host, attn, layers="all", **NUM.get(attn, {}))
        exact = fna_lab.patch(model.host, "exact", layers="all")
        task = Anatomy(backbone=model, patched=patched, exact=exact, measure=[name], rounds=1)
        measure(task, ShapesData(transform=model.transform, count=1, img_size=64))
        groups = {key.split("/")[0] for key in task.found if key.count("/") == 2}
        wanted = {"facts": set(), "norms": {"norms", "activations"}, "pca": set(),
                  "patterns": set(), "topology": set(),
                  "alignment": {"qk", "ov"}}.get(name, {name})  # fmt: skip
        assert groups == wanted
