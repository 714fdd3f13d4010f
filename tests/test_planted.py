"""The positive control: what was planted is found exactly; where nothing was, nothing is."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.backbone.patch import patch
from fna_lab.backbone.planted import PlantedBackbone
from fna_lab.data.planted import PlantedData
from fna_lab.mask.detector.base import Evidence
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.norm_gap import NormGapDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.type1 import Type1Mask
from fna_lab.mask.type2 import Type2Mask

DETECTORS = [NormGapDetector(), NormRatioDetector(), ClsProxyDetector(ratio=0.3)]
COUNT = 24


@pytest.fixture(scope="module")
def backbone() -> PlantedBackbone:
    return PlantedBackbone()


@pytest.fixture(scope="module")
def samples(backbone: PlantedBackbone) -> dict[str, Tensor]:
    data = PlantedData(transform=backbone.transform, count=COUNT, seed=3)
    data.setup()
    return next(iter(data.test_dataloader()))


@pytest.fixture(scope="module")
def images(samples: dict[str, Tensor]) -> Tensor:
    return samples["image"]


def hidden(model: Any, images: Tensor) -> list[Tensor]:
    """Inputs of the blocks, and the last one's output, each `[b n c]`."""
    seen: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
             for b in model.blocks]  # fmt: skip
    hooks.append(model.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out)))
    with torch.no_grad():
        model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return seen


def evidence(model: Any, images: Tensor, layer: int) -> Evidence:
    """What block `layer` shows, written out."""
    x = hidden(model, images)[layer]
    block = model.blocks[layer]
    with torch.no_grad():
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return Evidence(x, 1, True, q=q, k=k, scale=block.attn.scale)


def slow_sinks(model: Any, image: Tensor, restart: int, detect: int) -> list[int]:
    """The published loop on one picture, one token a round, with every block written out."""
    x0 = hidden(model, image[None])[restart]
    found: list[int] = []

    def attention(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
        ).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * block.attn.scale
        scores[..., found] = -torch.inf
        return scores.softmax(-1), v

    with torch.no_grad():
        while True:
            x = x0
            for block in model.blocks[restart:detect]:
                weights, v = attention(block, x)
                x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
                x = x + block.mlp(block.norm2(x))
            row = attention(model.blocks[detect], x)[0].mean(1)[0, 0]
            best = int(row[1:].argmax()) + 1
            if row[best] <= row[0]:
                return found
            found.append(best)


def test_the_picture_tells_the_truth(backbone: PlantedBackbone, samples: Any) -> None:
    truth = backbone.truth(samples["image"])
    for kind in ("massive", "artifact"):
        assert torch.equal(truth[kind][:, 1:], samples[kind]) and not truth[kind][:, 0].any()
    assert truth["massive"].sum(1).unique().tolist() == [1, 2, 3]
    assert truth["artifact"].sum(1).unique().tolist() == [2, 3, 4]


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.name)
@pytest.mark.parametrize("layer", range(3, 8))
def test_detectors_find_massive_tokens_exactly(
    backbone: PlantedBackbone, images: Tensor, detector: Any, layer: int
) -> None:
    found = detector(evidence(backbone.host, images, layer))
    assert torch.equal(found, backbone.truth(images)["massive"])


@pytest.mark.parametrize("layer", [1, 2])
def test_before_they_are_made_there_are_none(
    backbone: PlantedBackbone, images: Tensor, layer: int
) -> None:
    for detector in DETECTORS:
        assert not detector(evidence(backbone.host, images, layer)).any(), detector.name


def test_the_published_loop_finds_massive_tokens_first_and_then_artifacts(
    backbone: PlantedBackbone, images: Tensor
) -> None:
    truth = backbone.truth(images)
    anatomy = backbone.anatomy
    for i, image in enumerate(images[:8]):
        massive = set(truth["massive"][i].nonzero().flatten().tolist())
        artifact = set(truth["artifact"][i].nonzero().flatten().tolist())
        found = slow_sinks(backbone.host, image, anatomy.restart, anatomy.detect)
        assert set(found[: len(massive)]) == massive
        assert set(found[len(massive) :]) == artifact and len(found) == len(massive | artifact)


@pytest.mark.parametrize("layer", range(3, 8))
def test_sinks_by_incoming_attention(
    backbone: PlantedBackbone, images: Tensor, layer: int
) -> None:
    massive = backbone.truth(images)["massive"]
    weights = evidence(backbone.host, images, layer).pattern()
    # The raw rule: without CLS and the diagonal, rows to 1, nine uniform shares.
    share = weights.mean(1)
    share[:, :, 0] = 0
    share = share / share.sum(-1, keepdim=True)
    share = share.masked_fill(torch.eye(share.shape[-1], dtype=torch.bool), 0)
    assert torch.equal(share.mean(1) > 9 / share.shape[-1], massive)
    # The sink rate: above 0.3 of all queries in some head; the self-attention of CLS aside.
    rate = (weights.mean(2) > 0.3).float().mean(1)
    assert torch.equal((rate > 0)[:, 1:], massive[:, 1:])


def test_register_neurons_fire_at_massive_tokens_alone(
    backbone: PlantedBackbone, images: Tensor
) -> None:
    fired: list[Tensor] = []
    layer = backbone.massive_layer
    neurons = [neuron for block, neuron in backbone.register_neurons if block == layer]
    act = backbone.host.blocks[layer].mlp.act
    hook = act.register_forward_hook(lambda _, __, out: fired.append(out[..., neurons]))
    hidden(backbone.host, images)
    hook.remove()
    for neuron in fired[0].unbind(-1):
        assert torch.equal(neuron > 0, backbone.truth(images)["massive"])


def test_massive_tokens_need_no_attention(backbone: PlantedBackbone, images: Tensor) -> None:
    massive = backbone.truth(images)["massive"]
    x = hidden(backbone.host, images)[backbone.sink_layer]
    with torch.no_grad():
        for block in backbone.blocks[backbone.sink_layer :]:
            grown = x + block.mlp(block.norm2(x))
            gain = (grown.norm(dim=-1) - x.norm(dim=-1))[massive]
            torch.testing.assert_close(gain, torch.full_like(gain, 8.0), rtol=0, atol=0.1)
            x = grown


def final_norms(backbone: PlantedBackbone, images: Tensor, mask: Any) -> Tensor:
    with patch(backbone.host, "exact", mask, mask_layers="5-7", detect=5):
        return hidden(backbone.host, images)[-1].norm(dim=-1)


def test_the_published_findings_that_are_constructed(
    backbone: PlantedBackbone, images: Tensor
) -> None:
    truth = backbone.truth(images)
    sinks, massive = truth["massive"] | truth["artifact"], truth["massive"]

    class Known(ClsProxyDetector):
        """The truth."""

        def __call__(self, evidence: Evidence) -> Tensor:
            return sinks[: evidence.x.shape[0]]

    norms = {"none": final_norms(backbone, images, "none")}
    for kind in (Type1Mask, Type2Mask):
        for stage in ("mask", "sink"):
            norms[f"{kind.pattern} {stage}"] = final_norms(
                backbone, images, kind(stage=stage, detector=Known())
            )
    mean = {name: value[massive].mean().item() for name, value in norms.items()}
    # Sinks suppress; type II keeps some of it; sinking leaves smaller tokens than masking.
    assert mean["none"] < mean["type2 sink"] < mean["type1 sink"] < mean["type1 mask"]
    assert mean["type2 mask"] < mean["type1 mask"]
    for name in ("type1 sink", "type1 mask"):
        assert (norms[name].argmax(1) == 0).all(), "the largest token after type I is CLS"
    assert (norms["none"].argmax(1) > 0).all()


@pytest.mark.parametrize("stage", ["mask", "sink"])
@pytest.mark.parametrize("kind", [Type1Mask, Type2Mask])
def test_masking_massive_tokens_costs_nothing(
    backbone: PlantedBackbone, samples: Any, kind: Any, stage: str
) -> None:
    images = samples["image"]
    with torch.no_grad():
        free, plain = backbone(images), backbone.logits(images).argmax(1)
        accuracy = (plain == samples["label"]).float().mean()
        assert 0.75 < accuracy < 1
        mask = kind(stage=stage, detector=NormRatioDetector())
        with patch(backbone.host, "exact", mask, mask_layers="5-7", detect=5) as patched:
            masked = backbone(images)
            assert patched.found == backbone.truth(images)["massive"].sum(1).tolist()
            assert torch.equal(backbone.logits(images).argmax(1), plain)
    similar = torch.cosine_similarity(masked.pooled, free.pooled)
    assert similar.min() > 0.999


def test_sinks_carry_no_content(backbone: PlantedBackbone, images: Tensor) -> None:
    massive = backbone.truth(images)["massive"]
    x = hidden(backbone.host, images)[5]
    block = backbone.blocks[5]
    with torch.no_grad():
        v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 8, -1))[:, :, 2, :3].flatten(2)
    normal = ~massive
    normal[:, 0] = False
    assert v[massive].norm(dim=-1).max() < 0.2 * v[normal].norm(dim=-1).median()


def test_artifacts_suppress_massive_tokens(backbone: PlantedBackbone, images: Tensor) -> None:
    truth = backbone.truth(images)
    block, x = backbone.blocks[5], hidden(backbone.host, images)[5]
    with torch.no_grad():
        v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 8, -1))[:, :, 2].transpose(1, 2)
        matrix = ops.suppression(x, v, block.attn.proj.weight)[:, 3]
    pairs = truth["massive"][:, :, None] & truth["artifact"][:, None, :]
    torch.testing.assert_close(matrix[pairs], torch.full_like(matrix[pairs], -4.0), rtol=0.03,
                               atol=0.0)  # fmt: skip


def test_any_size_and_no_batch_mates() -> None:
    backbone = PlantedBackbone(img_size=64)
    data = PlantedData(transform=backbone.transform, count=3, img_size=64, massive=(1, 1))
    data.setup()
    images = torch.stack([data.test_set[i]["image"] for i in range(3)])  # type: ignore[index]
    with torch.no_grad():
        together = backbone(images).pooled
        alone = torch.cat([backbone(image[None]).pooled for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    found = NormRatioDetector()(evidence(backbone.host, images, 5))
    assert torch.equal(found, backbone.truth(images)["massive"])


@pytest.mark.parametrize("control", ["planted=false", "random vit", "random mae"])
def test_negative_controls(control: str, images: Tensor) -> None:
    torch.manual_seed(0)
    if control == "planted=false":
        model = PlantedBackbone(planted=False)
        assert not any(kind.any() for kind in model.truth(images).values())
        model, sinks = model.host, [ClsProxyDetector(ratio=0.3)]
    else:
        name = "vit_tiny_patch16_224" + (".mae" if "mae" in control else "")
        name = "vit_base_patch16_224.mae" if "mae" in control else name
        shape = dict(depth=6, embed_dim=48, num_heads=4, num_classes=0, img_size=112)
        model, sinks = timm.create_model(name, **shape).eval(), []
    for layer in range(1, len(model.blocks)):
        shown = evidence(model, images[:4], layer)
        for detector in (NormRatioDetector(), NormGapDetector(), *sinks):
            # Random weights keep the planted black and white apart; hence noise for them.
            if not sinks:
                noise = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(1))
                shown = evidence(model, noise, layer)
            assert not detector(shown).any(), (detector.name, layer)


def test_it_says_that_it_is_constructed(backbone: PlantedBackbone) -> None:
    assert backbone.describe()["constructed"] is True
    data = PlantedData(transform=backbone.transform, count=2)
    data.setup()
    assert data.describe()["synthetic"] is True


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: PlantedBackbone(img_size=100), "backbone.img_size=100: expected a multiple"),
        (lambda: PlantedBackbone(planted=3), "backbone.planted=3: expected true or false"),
        (lambda: PlantedBackbone(seed=-1), "backbone.seed=-1"),
        (lambda: PlantedData(transform=None, img_size=100), "data.img_size=100"),
        (lambda: PlantedData(transform=None, massive=(3, 1)), r"data.massive=\[3, 1\]"),
        (lambda: PlantedData(transform=None, artifact=(0, 150)), "at most half of the 196"),
        (lambda: PlantedData(transform=None, jitter=-1), "data.jitter=-1"),
        (lambda: PlantedBackbone().truth(torch.zeros(1, 3, 9, 9)), "8-pixel patches"),
    ],
)
def test_bad_settings_are_named(build: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()
