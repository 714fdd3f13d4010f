"""Test-time registers: what added tokens take over, and how neurons are found."""

from __future__ import annotations

import logging

import pytest
import torch
from hosts import HOSTS, build
from hydra import compose, initialize_config_dir

import fna_lab
from fna_lab.attn.registers import RegistersAttention
from fna_lab.backbone.blocks import find_blocks
from fna_lab.backbone.neurons import find_register_neurons
from fna_lab.cli import conf_dir
from fna_lab.hosts import mlp_output
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.replace import ReplaceMask
from fna_lab.run import run

REFUSED = ("timm beit", "timm beitv2", "timm eva02", "timm dinov3")
every_host = pytest.mark.parametrize("name", [name for name in HOSTS if name not in REFUSED])
NEURONS = [[1, 3], [2, 5], [2, 9]]


def spied(model, blocks, run):
    """What the MLPs' last layers receive, and what the blocks get and give."""
    said, states = [], []
    handles = []
    for block in blocks:
        handles += [
            mlp_output(block).register_forward_pre_hook(lambda m, args: said.append(args[0])),
            block.register_forward_hook(lambda m, args, out: states.append((args, out))),
        ]
    out = run()
    for handle in handles:
        handle.remove()
    return out, said, states


@every_host
@pytest.mark.parametrize("mode", ["zero", "mean", "same"])
def test_registers_take_the_strongest_value_of_the_patches(name, mode):
    host, model, x = build(name)
    _, blocks = find_blocks(model)
    size, prefix = 25 + host.prefix, host.prefix
    before = []
    handle = mlp_output(blocks[2]).register_forward_pre_hook(lambda m, a: before.append(a[0]))
    plain = host.run(model, x)
    before.clear()
    settings = dict(neurons=NEURONS, num_registers=2, mode=mode)
    with fna_lab.patch(model, "registers", layers="1-", **settings) as patched:
        out, said, _ = spied(model, blocks, lambda: host.run(model, x))
        with patched.disabled():
            assert torch.equal(host.run(model, x), plain)
    handle.remove()
    assert torch.equal(host.run(model, x), plain)
    assert out.shape == plain.shape and not torch.allclose(out, plain)
    raw, moved = before[0], said[2]  # the spy stands behind the patch, the other hook before it
    assert said[0].shape[1] == size and moved.shape[1] == size + 2
    for b in range(3):
        for neuron in range(moved.shape[2]):
            old, new = raw[b, :, neuron], moved[b, :, neuron]
            if neuron not in (5, 9):
                assert torch.equal(old, new)
                continue
            patches = old[prefix:size]
            strongest = patches[patches.abs().argmax()]
            assert (new[size:] == strongest).all() and torch.equal(new[:prefix], old[:prefix])
            wanted = {"zero": 0 * patches, "mean": patches.mean() + 0 * patches, "same": patches}
            torch.testing.assert_close(new[prefix:size], wanted[mode])


def test_found_neurons_are_those_of_the_definition(caplog):
    _, model, x = build("timm vit")
    _, blocks = find_blocks(model)
    x = torch.cat([x, 3 * x[:2].flip(3)])
    grown = model.pos_embed.data
    grown[:, 7] += 40  # constructed: one place of every picture is an outlier
    wanted = find_register_neurons(model, x, num=6, run=model.forward_features)
    tokens = []
    blocks[-1].register_forward_hook(lambda m, a, out: tokens.append(out))
    model(x)
    norms = tokens[0][:, 1:].norm(dim=-1)
    assert (norms > 3 * norms.median(1, keepdim=True).values).sum() == 5
    variant = RegistersAttention(count=5, top_k=6)
    assert variant.calibration_pictures == 5
    with caplog.at_level(logging.INFO):
        settled = variant.calibrate(lambda: model(x), blocks, range(4))
    assert settled is not variant and variant.neurons is None
    assert settled.neurons == wanted and settled.calibration_pictures == 0
    assert f"attn.neurons=[[{wanted[0][0]},{wanted[0][1]}]," in caplog.text
    batches = variant.calibrate(lambda: [model(part) for part in x.split(2)], blocks, range(4))
    assert batches.neurons == wanted
    low = RegistersAttention(top_k=6, highest_layer=1).calibrate(
        lambda: model(x), blocks, range(4)
    )
    assert {layer for layer, _ in low.neurons} <= {0, 1}
    with fna_lab.patch(model, settled, layers="all"):
        assert torch.isfinite(model(x)).all()
    late = RegistersAttention(top_k=6).calibrate(lambda: model(x), blocks, (2, 3))
    assert {layer for layer, _ in late.neurons} <= {2, 3}
    with fna_lab.patch(model, late, layers="2-3"):
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("mode", ["zero", "mean", "same"])
@pytest.mark.parametrize("every_row", [False, True])
def test_what_padding_holds_changes_nothing(mode, every_row):
    _, model, x = build("timm vit")
    size = model.patch_embed.num_patches + 1
    kept = (torch.arange(size) < size - 6).expand(len(x), 1, 1, -1)
    mask = kept & kept.mT if every_row else kept  # padding may be kept from everything
    other = x.clone()
    other[:, :, -model.patch_embed.patch_size[0] :] *= -5  # the last row of patches is padding
    neurons = [[1, i] for i in range(8)]
    variant = RegistersAttention(neurons=neurons, num_registers=2, mode=mode)
    with torch.no_grad(), fna_lab.patch(model, variant, layers="1-3"):
        a, b = (model.forward_features(part, attn_mask=mask)[:, : size - 6] for part in (x, other))
    torch.testing.assert_close(a, b)


def test_without_outliers_a_warning_says_so(caplog):
    _, model, x = build("timm vit")
    _, blocks = find_blocks(model)
    variant = RegistersAttention(outlier_ratio=50.0, top_k=3)
    settled = variant.calibrate(lambda: model(x), blocks, range(4))
    assert len(settled.neurons) == 3 and "no register neurons" in caplog.text


def test_registers_do_not_see_other_pictures():
    host, model, x = build("timm dinov2 registers")
    with fna_lab.patch(model, "registers", layers="1-", neurons=NEURONS):
        together = host.run(model, x)
        alone = torch.cat([host.run(model, one) for one in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(neurons=[]), r"attn.neurons=\[\]: expected \[\[block, neuron\]"),
        (dict(neurons=[[1]]), r"attn.neurons=\[\[1\]\]"),
        (dict(neurons=[1, 2]), r"attn.neurons=\[1, 2\]"),
        (dict(neurons=[[1, -2]]), r"attn.neurons=\[\[1, -2\]\]"),
        (dict(num_registers=0), "attn.num_registers=0: expected an integer >= 1"),
        (dict(mode="drop"), "attn.mode='drop': expected one of zero, mean, same"),
        (dict(top_k=True), "attn.top_k=True"),
        (dict(highest_layer=-1), "attn.highest_layer=-1"),
        (dict(outlier_ratio=0), "attn.outlier_ratio=0"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        RegistersAttention(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(), "attn.neurons=null: register neurons are found by a run"),
        (dict(neurons=[[0, 3]]), r"attn.neurons=\[\[0, 3\]\]: expected a block from 1"),
        (dict(neurons=[[4, 3]]), r"attn.neurons=\[\[4, 3\]\]: expected a block from 1.* to 3"),
        (dict(neurons=[[2, 192]]), r"block 2 has 192 neurons, 0 to 191"),
    ],
)
def test_neurons_that_do_not_fit_the_host_are_named(settings, words):
    _, model, _ = build("timm vit")
    with pytest.raises(ValueError, match=words):
        fna_lab.patch(model, "registers", layers="1-", **settings)


@pytest.mark.parametrize(
    ("highest", "words"), [(4, "the host has 4 blocks"), (1, "expected a block from 2, where")]
)
def test_a_highest_layer_outside_the_search_is_named(highest, words):
    _, model, x = build("timm vit")
    variant = RegistersAttention(highest_layer=highest)
    with pytest.raises(ValueError, match=f"attn.highest_layer={highest}: {words}"):
        variant.calibrate(lambda: model(x), find_blocks(model)[1], (2, 3))


@pytest.mark.parametrize("name", ["timm vit", "timm dinov2 registers", "open_clip"])
def test_an_observer_sees_added_tokens_as_added_ones_in_every_block(name):
    host, model, x = build(name)
    size, seen = 25 + host.prefix, []
    settings = dict(neurons=NEURONS, num_registers=3)
    with fna_lab.patch(model, "registers", layers=[1], **settings) as patched:
        with patched.observed(lambda q, k, v, context: seen.append((k.shape[2], context))):
            host.run(model, x)
        hooks = sum(len(block._forward_pre_hooks) for block in patched.blocks)
        host.run(model, x)
    assert hooks == 2 and len(seen) == 4  # of the other blocks nothing is left
    for layer, (keys, context) in enumerate(seen):
        extra = 3 * (layer >= 1)
        assert context.layer == layer and keys == context.x.shape[1] == size + extra
        assert (context.num_prefix_tokens, context.num_extra_tokens) == (host.prefix, extra)
        if not extra:
            assert context.kept is None
            continue
        wanted = torch.arange(size + 3) < size
        assert torch.equal(context.kept, wanted.expand(3, -1))


def test_a_detector_leaves_added_tokens_and_the_prefix_alone():
    host, model, x = build("timm dinov2 registers")
    before = build("timm dinov2 registers")[1]
    mask = ReplaceMask(how="mean", detector=NormRatioDetector(ratio=1.02))
    with fna_lab.patch(before, "exact", mask, layers="all", mask_layers="2-3", detect=0) as plain:
        host.run(before, x)
    settings = dict(neurons=NEURONS, num_registers=3)
    for detect, size in ((0, 30), (2, 33)):
        with fna_lab.patch(
            model, "registers", mask, layers="1-", mask_layers="2-3", detect=detect, **settings
        ) as patched:
            host.run(model, x)
        assert patched.tokens.shape == (3, size) and patched.tokens.any()
        assert not patched.tokens[:, :5].any() and not patched.tokens[:, 30:].any()
        if detect == 0:
            assert torch.equal(patched.tokens[:, :30], plain.tokens)


@pytest.mark.parametrize(
    "appends",
    [
        ["attn=registers", "attn.layers=4-7", "attn.neurons=[[4,1]]"],
        ["attn=exact", "mask=replace", "mask.how=concatenation", "mask.layers=5-7"],
    ],
)
def test_fidelity_leaves_added_tokens_out(appends, tmp_path):
    settings = ["backbone=planted", "data=planted", "data.limit=2", "task=fidelity"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [*settings, *appends, "trainer=cpu"])
    found = run(cfg, tmp_path)["metrics"]
    assert found["layer_error/03"] == 0 and 0 < found["layer_error/07"] < 10


@pytest.mark.parametrize("task", ["anatomy", "agreement"])
def test_tasks_that_class_every_token_refuse_added_ones(task, tmp_path):
    settings = ["backbone=planted", "data=planted", "data.limit=2", f"task={task}",
                "attn=registers", "attn.layers=4-7", "attn.neurons=[[4,1]]"]  # fmt: skip
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [*settings, "trainer=cpu"])
    with pytest.raises(ValueError, match=f"task={task} with attn=registers: the 1 tokens that"):
        run(cfg, tmp_path)
