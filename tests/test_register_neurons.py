"""Register neurons: scores against the formula by hand, and finding them on real hosts."""

from __future__ import annotations

import pytest
import torch
from hosts import HOSTS, build, set_batch_first

import fna_lab
from fna_lab import ops
from fna_lab.backbone.blocks import find_blocks
from fna_lab.backbone.neurons import find_register_neurons
from fna_lab.hosts import mlp_output
from fna_lab.mask.detector.register_neurons import RegisterNeuronsDetector
from fna_lab.mask.type1 import Type1Mask


def case(batch=4, tokens=11, width=6):
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    outliers = torch.rand(batch, tokens, generator=generator) < 0.3
    outliers[2] = False
    return activations, outliers


@pytest.mark.parametrize("sparse_below", [None, 0.0, 0.3])
def test_scores_are_the_published_formula(sparse_below):
    activations, outliers = case()
    wanted = []
    for n in range(6):
        pictures = []
        for b in range(4):
            at = [abs(activations[b, t, n].item()) for t in range(11) if outliers[b, t]]
            if at:
                pictures.append(sum(at) / len(at))
        score = sum(pictures) / len(pictures)
        low = [value < (sparse_below or 0) for value in activations[:, :, n].flatten().tolist()]
        wanted.append(score if sparse_below is None or sum(low) / len(low) >= 0.5 else 0.0)
    found = ops.register_neuron_scores(activations, outliers, sparse_below=sparse_below)
    assert found.tolist() == pytest.approx(wanted)
    if sparse_below == 0.0:
        assert 0 < (found == 0).sum() < 6  # the filter takes some, and not all
    none = ops.register_neuron_scores(activations, torch.zeros_like(outliers))
    assert torch.equal(none, torch.zeros(6, dtype=torch.float64))


def test_top_neurons_are_in_order_of_their_scores():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.0, 0.7]])
    assert ops.top_register_neurons(scores, 4) == [(0, 1), (1, 0), (1, 2), (0, 2)]
    assert ops.top_register_neurons(scores, 2, layers=[3, 5]) == [(3, 1), (5, 0)]
    for num in (0, 7, True):
        with pytest.raises(ValueError, match="num to be an integer from 1 to 6"):
            ops.top_register_neurons(scores, num)
    with pytest.raises(ValueError, match="layers to name 2 rows, got 1"):
        ops.top_register_neurons(scores, 1, layers=[1])


def test_the_strongest_activation_keeps_its_sign():
    activations, outliers = case()
    found = ops.strongest_activation(activations, outliers)
    for b in range(4):
        for n in range(6):
            values = [activations[b, t, n].item() for t in range(11) if outliers[b, t]]
            assert found[b, n].item() == (max(values, key=abs) if values else 0)
    assert (found < 0).any() and (found > 0).any()


@pytest.mark.parametrize("name", HOSTS)
def test_a_neuron_that_makes_outliers_is_found(name):
    host, model, x = build(name)
    _, blocks = find_blocks(model)
    block = blocks[1]
    # Constructed: neuron 5 of block 1 fires at one token alone, by way of its output's input.
    mlp, token = mlp_output(block), host.prefix + 3

    def fire(module, args):
        wide = args[0].clone()
        wide[..., 5] = 0.0
        wide[:, token, 5] = 50.0
        return (wide, *args[1:])

    mlp.weight[:, 5] = 1e6  # LayerScale may be 1e-5
    handle = mlp.register_forward_pre_hook(fire)

    def run(pictures):
        return host.run(model, pictures)

    found = find_register_neurons(model, x, num=2, run=run, prefix=host.prefix, outliers_at=1)
    assert found[0] == (1, 5)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hosts_that_keep_tokens_first_have_the_same_neurons():
    found = []
    for batch_first in (True, False):
        host, model, x = build("open_clip")
        set_batch_first(model, batch_first)
        found.append(
            find_register_neurons(
                model,
                x,
                num=4,
                run=lambda x, host=host, model=model: host.run(model, x),
                prefix=host.prefix,
                outliers=lambda x, prefix: ops.norm_ratio(x, prefix=prefix, ratio=1.05),
            )
        )
    assert found[0] == found[1]


def test_pictures_without_outliers_are_refused():
    _, model, x = build("timm vit")
    with pytest.raises(ValueError, match="None of the 3 pictures has an outlier token after bl"):
        find_register_neurons(model, x)
    with pytest.raises(ValueError, match="outliers_at=4: the host has 4 blocks"):
        find_register_neurons(model, x, outliers_at=4)
    with pytest.raises(ValueError, match="highest=9: the host has 4 blocks"):
        find_register_neurons(model, x, highest=9)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("iterative", [False, True])
def test_the_detector_reads_the_neurons_of_the_host(name, iterative):
    host, model, x = build(name)
    _, blocks = find_blocks(model)
    neurons = [(1, 7), (0, 3), (1, 2)]
    said = {}
    for layer in (0, 1):
        mlp_output(blocks[layer]).register_forward_pre_hook(
            lambda _, args, layer=layer: said.setdefault(layer, args[0])
        )
    host.run(model, x)
    strength = sum(said[layer][..., neuron].abs() for layer, neuron in neurons)
    strength = strength[:, host.prefix :]
    wanted = strength > 1.5 * strength.mean(1, keepdim=True)
    schedule = {"schedule": "iterative", "max_rounds": 1, "per_round": None} if iterative else {}
    mask = Type1Mask(detector=RegisterNeuronsDetector(neurons=neurons, ratio=1.5), **schedule)
    with fna_lab.patch(model, "exact", mask, detect=2, mask_layers="2-3") as patched:
        host.run(model, x)
        assert patched.tokens is not None and wanted.any()
        assert torch.equal(patched.tokens[:, host.prefix :], wanted)
    assert all(len(mlp_output(blocks[i])._forward_pre_hooks) == 1 for i in (0, 1))


def test_neurons_that_the_host_lacks_are_named():
    _, model, _ = build("timm vit")
    for neurons, words in (
        ([[0, 999]], r"neurons=\[\[0, 999\]\]: block 0 has 192 neurons, 0 to 191"),
        ([[2, 0]], "before block 2"),
        (None, "neurons=null"),
    ):
        mask = Type1Mask(detector=RegisterNeuronsDetector(neurons=neurons))
        with pytest.raises(ValueError, match=words):
            fna_lab.patch(model, "exact", mask, detect=2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
