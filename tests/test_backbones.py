"""Every backbone: its names and facts against timm and open_clip, its features, its weights."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import fna_lab
from fna_lab.backbone.base import Backbone
from fna_lab.backbone.open_clip import OpenClipBackbone
from fna_lab.backbone.timm import TimmBackbone
from fna_lab.backbone.transformers import TransformersBackbone

ROOT = Path(__file__).parent.parent
CONF = {p.stem: OmegaConf.load(p) for p in sorted((ROOT / "conf" / "backbone").glob("*.yaml"))}
GENERIC = {"timm", "open_clip", "transformers"}
OTHER = {"fna_tiny", "planted", "minilm", "sd3_medium", "sd3_random"}
NAMED = [name for name in CONF if name not in GENERIC | OTHER]
WANTED = """
clip_b32 clip_b16 clip_l14 clip_l14_336 clip_l14_laion2b clip_l14_datacomp dinov2_small dinov2_base
dinov2_large dinov2_giant dinov2_small_reg dinov2_base_reg dinov2_large_reg dinov2_giant_reg
dinov3_small dinov3_base dinov3_large mae_base mae_large mae_huge siglip_base siglip_large
siglip_so400m siglip2_base siglip2_large siglip2_so400m deit3_base deit3_large augreg_small
augreg_base augreg_large eva02_base eva02_large beitv2_base beitv2_large
""".split()
TINY = dict(name="vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False)


def test_every_promised_backbone_has_its_file():
    assert set(WANTED) == set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_facts_are_those_of_the_library(name):
    conf = CONF[name]
    with torch.device("meta"):
        backbone = instantiate(conf, pretrained=False)
    assert isinstance(backbone, Backbone)
    assert (backbone.img_size, backbone.patch_size) == (conf.img_size, conf.patch_size)
    if conf._target_.endswith("TimmBackbone"):
        assert conf.name in timm.list_pretrained()
        facts = timm.get_pretrained_cfg(conf.name).to_dict()
        assert conf.img_size == facts["input_size"][-1]
        assert conf.crop_pct == facts["crop_pct"]
        quick = False
    else:
        assert conf.pretrained_tag in open_clip.list_pretrained_tags_by_model(conf.name)
        facts = open_clip.get_pretrained_cfg(conf.name, conf.pretrained_tag)
        assert conf.img_size == open_clip.get_model_config(conf.name)["vision_cfg"]["image_size"]
        quick = bool(facts.get("quick_gelu"))
    assert tuple(conf.mean) == pytest.approx(tuple(facts["mean"]))
    assert tuple(conf.std) == pytest.approx(tuple(facts["std"]))
    assert conf.interpolation == facts["interpolation"]
    has_quick = any("QuickGELU" in type(m).__name__ for m in backbone.host.modules())
    assert has_quick == quick
    start = 13 * backbone.depth // 24
    assert vars(backbone.anatomy) == {
        "restart": 9 * backbone.depth // 24,
        "detect": start,
        "mask": start,
        "fna": start,
    }
    assert backbone.embed_dim % backbone.num_heads == 0


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "vit_small_patch16_dinov3.lvd1689m",
        "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
        "deit3_small_patch16_224.fb_in1k",
    ],
)
def test_features_of_timm(name, size):
    torch.manual_seed(0)
    backbone = TimmBackbone(name=name, pretrained=False, img_size=size)
    patches = (size // 16) ** 2
    found = backbone(torch.randn(2, 3, size, size))
    assert found.patches.shape == (2, patches, backbone.embed_dim)
    assert found.cls.shape == (2, backbone.embed_dim)
    assert found.grid == (size // 16, size // 16)
    assert backbone.num_tokens == patches + backbone.num_prefix_tokens
    # The final norm was taken: no scale is left.
    spread = found.patches.std(-1)
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0.1, atol=0.0)
    if backbone.num_classes:
        assert backbone.logits(torch.randn(1, 3, size, size)).shape == (1, backbone.num_classes)
    else:
        with pytest.raises(NotImplementedError, match="no classification head"):
            backbone.logits(torch.randn(1, 3, size, size))


@pytest.mark.parametrize(
    ("name", "size", "cls"), [("ViT-B-32-quickgelu", 96, True), ("ViT-B-16-SigLIP", 64, False)]
)
def test_features_of_open_clip(name, size, cls):
    torch.manual_seed(0)
    backbone = OpenClipBackbone(name=name, pretrained=False, img_size=size)
    found = backbone(torch.randn(2, 3, size, size))
    side = size // backbone.patch_size
    assert found.patches.shape == (2, side * side, backbone.embed_dim)
    assert (found.cls is not None) == cls
    expected = backbone.host.encode_image(torch.zeros(1, 3, size, size))
    torch.testing.assert_close(backbone(torch.zeros(1, 3, size, size)).pooled, expected)
    assert not any(m._forward_hooks for m in backbone.host.modules())


def test_text_of_open_clip():
    backbone = OpenClipBackbone(name="ViT-B-32-quickgelu", pretrained=False, img_size=32)
    text = backbone.encode_text(["a photo of a cat", "a dog"])
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
@pytest.mark.parametrize("size", [80, 64])
def test_features_of_transformers(kind, size, tmp_path):
    from hosts import HOSTS

    HOSTS[f"transformers {kind}"].build().save_pretrained(tmp_path)
    backbone = TransformersBackbone(name=str(tmp_path), img_size=size)
    found = backbone(torch.randn(2, 3, size, size))
    assert found.patches.shape == (2, (size // 16) ** 2, 48) and found.cls.shape == (2, 48)
    assert backbone.num_prefix_tokens == 1 and backbone.has_cls


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("size", [64, 32])
def test_a_local_file_is_loaded_at_any_resolution(suffix, size, tmp_path):
    torch.manual_seed(0)
    first = TimmBackbone(**TINY, img_size=64)
    path = tmp_path / f"weights{suffix}"
    state = {k: v.half() for k, v in first.host.state_dict().items()}
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path)
    again = TimmBackbone(name=TINY["name"], checkpoint=str(path), img_size=size)
    for key, value in again.host.state_dict().items():
        assert value.dtype == torch.float32
        if key != "pos_embed" or size == 64:
            torch.testing.assert_close(value, first.host.state_dict()[key].half().float())


def test_open_clip_loads_a_local_file(tmp_path):
    first = OpenClipBackbone(name="ViT-B-32-quickgelu", pretrained=False, img_size=64)
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": first.host.state_dict()}, path)
    again = OpenClipBackbone(name="ViT-B-32-quickgelu", checkpoint=str(path), img_size=64)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(first(x).pooled, again(x).pooled)
    with pytest.raises(ValueError, match="does not fit backbone=ViT-B-16") as error:
        OpenClipBackbone(name="ViT-B-16", checkpoint=str(path))
    assert "\n" not in str(error.value)


def broken(tmp_path: Path, kind: str) -> str:
    path = tmp_path / "weights.safetensors"
    if kind == "corrupt":
        path.write_bytes(b"not a checkpoint at all")
    elif kind == "pickle":
        path = path.with_suffix(".pth")
        path.write_bytes(b"not a checkpoint at all")
    elif kind == "code":
        path = path.with_suffix(".pth")
        torch.save({"model": pytest.raises}, path)
    elif kind == "nan":
        state = TimmBackbone(**TINY, img_size=32).host.state_dict()
        state["blocks.3.attn.qkv.weight"][0, 0] = float("nan")
        safetensors.torch.save_file(state, path)
    elif kind == "other":
        state = TimmBackbone(name="vit_small_patch16_224", pretrained=False).host.state_dict()
        safetensors.torch.save_file(state, path)
    elif kind == "suffix":
        path = path.with_suffix(".onnx")
        path.write_bytes(b"")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("missing", FileNotFoundError, "there is no such file"),
        ("corrupt", ValueError, "cannot be read"),
        ("pickle", ValueError, "cannot be read"),
        ("code", ValueError, "cannot be read"),
        ("nan", ValueError, r"blocks.3.attn.qkv.weight holds 1 values that are NaN"),
        ("other", ValueError, "does not fit backbone=vit_tiny.*(size mismatch|Missing)"),
        ("suffix", ValueError, "ends in .safetensors"),
    ],
)
def test_a_wrong_checkpoint_is_one_clear_line(kind, error, words, tmp_path):
    path = broken(tmp_path, kind)
    with pytest.raises(error, match=words) as caught:
        TimmBackbone(name=TINY["name"], checkpoint=path)
    assert str(caught.value).startswith(f"backbone.checkpoint={path}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(name="vit_tiny_patch17_224"), "timm has no such model"),
        (dict(img_size=100, patch_size=16), "backbone.img_size=100: .* such as 96 or 112"),
        (dict(patch_size=14), "backbone.patch_size=14: .* has 16-pixel patches"),
        (
            dict(anatomy=dict(restart=3, detect=6, mask=6, fna=12)),
            "backbone.anatomy.fna=12: the backbone has 12 blocks, 0 to 11",
        ),
        (dict(anatomy=dict(start=3)), "expected restart, detect, mask, fna"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        TimmBackbone(**{**TINY, **settings})


@pytest.mark.parametrize("kind", ["timm", "open_clip", "transformers"])
def test_no_weights_and_no_network_says_what_to_do(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    build = {
        "timm": lambda: TimmBackbone(name="vit_small_patch14_dinov2.lvd142m"),
        "open_clip": lambda: OpenClipBackbone(
            name="ViT-B-16-SigLIP", pretrained_tag="webli", img_size=32
        ),
        "transformers": lambda: TransformersBackbone(name="facebook/dinov2-nothing"),
    }[kind]
    with pytest.raises(FileNotFoundError, match="backbone.checkpoint=PATH.*pretrained=false"):
        build()


@pytest.mark.parametrize(
    ("name", "grid"), [("vit_base_mci_224", (14, 14)), ("vit_tiny_r_s16_p8_224", (7, 7))]
)
def test_the_grid_of_a_stem_of_several_convolutions(name: str, grid: tuple[int, int]) -> None:
    model = timm.create_model(name, pretrained=False, img_size=224).eval()
    seen = []
    with torch.no_grad(), fna_lab.patch(model, "fna", layers=[11], num_landmarks=16) as patched:
        with patched.observed(lambda q, k, v, context: seen.append(context)):
            model(torch.randn(1, 3, 224, 224))
    assert seen[0].grid == grid and seen[0].num_prefix_tokens == 1
