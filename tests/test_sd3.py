"""Stable Diffusion 3: the seam on joint blocks, sampling against diffusers, loading."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from test_seam import ATTN, settings
from test_seam import Explicit as PlainExplicit
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

import fna_lab
from fna_lab.attn.base import NoAttention
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.joint import JointLandmarks
from fna_lab.attn.solver.pinv import PinvSolver
from fna_lab.attn.subset import SubsetAttention
from fna_lab.backbone.sd3 import SD3Backbone
from fna_lab.backbone.sd3_random import RandomSD3Backbone
from fna_lab.cli import conf_dir

diffusers = pytest.importorskip(
    "diffusers", reason="needs diffusers: pip install 'fna-lab[diffusion]'"
)
from test_landmarks import SAMPLERS  # noqa: E402

PICTURE, TEXT, TOKENS = 64, 20, 84
JOINS = {"exact", "explicit", "fna", "fna_paper", "performer", "subset"}


class Explicit(PlainExplicit):
    """Attention written out, which has no trouble with a text behind the picture."""

    joins = True


@pytest.fixture(scope="module")
def backbone() -> RandomSD3Backbone:
    made = RandomSD3Backbone()
    # Random weights change little by attention; open the gates so that errors show.
    for block in made.blocks:
        block.norm1.linear.weight.data.mul_(4)
        block.attn.to_q.weight.data.mul_(1.5)
    return made


@pytest.fixture(scope="module")
def latents(backbone: Any) -> Tensor:
    return torch.stack([backbone.noise(seed) for seed in (0, 1)])


def predict(backbone: SD3Backbone, latents: Tensor, guidance: float = 1) -> Tensor:
    text = backbone.encode([f"prompt {i}" for i in range(len(latents))])
    return backbone.velocity(latents, torch.tensor(600.0), text, guidance)


def test_the_seam_tells_what_a_joint_block_is(backbone: Any, latents: Tensor) -> None:
    before = predict(backbone, latents)
    given: list[Tensor] = []

    def look(block: Any, args: Any, kwargs: Any) -> None:
        given.append(torch.cat([kwargs["hidden_states"], kwargs["encoder_hidden_states"]], 1))

    hooks = [b.register_forward_pre_hook(look, with_kwargs=True) for b in backbone.blocks]
    explicit = Explicit()
    with fna_lab.patch(backbone.host, explicit, layers="all"):
        after = predict(backbone, latents)
    for hook in hooks:
        hook.remove()
    seen = explicit.seen
    # Blocks 0 to 3 attend twice; once in each is the joint one.
    assert [c.layer for c in seen] == list(range(6)) == [c.nth for c in seen]
    assert {(c.grid, c.num_prefix_tokens, c.num_suffix_tokens) for c in seen} == {
        ((8, 8), 0, TEXT)
    }
    assert not any(c.has_cls for c in seen)
    assert all(torch.equal(c.x, x) for c, x in zip(seen, given, strict=True))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_blocks_called_by_position_are_served_too(backbone: Any) -> None:
    block = backbone.blocks[1]
    x, text, time = torch.randn(2, 9, 64), torch.randn(2, 5, 64), torch.randn(2, 64)
    wanted = block(x, text, time)
    explicit = Explicit()
    with fna_lab.patch(backbone.host, explicit, layers=[1]):
        found = block(x, text, time)
    assert explicit.seen[0].num_suffix_tokens == 5
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attn", ATTN)
def test_unpatching_restores_every_bit(backbone: Any, latents: Tensor, attn: str) -> None:
    before = predict(backbone, latents)
    state = {key: value.clone() for key, value in backbone.host.state_dict().items()}
    if attn not in JOINS:
        with pytest.raises(NotImplementedError, match=f"attn={attn} cannot honour joint blocks"):
            fna_lab.patch(backbone.host, attn, layers="3-5", **settings(attn))
    else:
        patched = fna_lab.patch(backbone.host, attn, layers="2-4", **settings(attn))
        during = predict(backbone, latents)
        alone = torch.cat([predict(backbone, latents[:1])])
        torch.testing.assert_close(during[:1], alone, rtol=1e-3, atol=1e-4)
        with patched.disabled():
            assert torch.equal(before, predict(backbone, latents))
        patched.remove()
        assert torch.isfinite(during).all()
        if attn == "exact":
            torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-5)
        else:
            assert (during - before).norm() > 1e-3 * before.norm()
    assert torch.equal(before, predict(backbone, latents))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.host.modules())
    assert all(torch.equal(state[k], v) for k, v in backbone.host.state_dict().items())
    assert not _get_current_function_mode_stack()


def test_the_second_attention_of_a_block_stays_exact(backbone: Any, latents: Tensor) -> None:
    block, seen = backbone.blocks[0], []
    hooks = [
        block.attn2.register_forward_hook(lambda m, a, out: seen.append(out)),
        block.attn.to_out[0].register_forward_hook(lambda m, a, out: seen.append(out)),
    ]
    before = predict(backbone, latents)
    with fna_lab.patch(backbone.host, NoAttention(), layers=[0]):
        after = predict(backbone, latents)
    for hook in hooks:
        hook.remove()
    joint, second, joint_off, second_off = seen
    assert torch.equal(second, second_off)  # its input does not depend on the joint one
    assert joint.std() > 0 and torch.equal(joint_off, block.attn.to_out[0].bias.expand_as(joint))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", ["subset", "fna"])
@pytest.mark.parametrize("sampler", [JointLandmarks(text=TEXT), None], ids=["joint", "default"])
def test_full_landmarks_are_exact(latents: Tensor, kind: str, sampler: Any) -> None:
    backbone = RandomSD3Backbone()
    backbone.host.double()
    before = predict(backbone, latents.double())
    attn: Any = SubsetAttention(num_landmarks=TOKENS, landmarks=sampler, source="k")
    if kind == "fna":
        attn = FastNystromAttention(num_landmarks=TOKENS, landmarks=sampler, solver=PinvSolver())
    with fna_lab.patch(backbone.host, attn, layers="all"):
        after = predict(backbone, latents.double())
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


def test_reduced_keys_and_values_by_hand(backbone: Any, latents: Tensor) -> None:
    attn = SubsetAttention(num_landmarks=24, landmarks=JointLandmarks(text=8), source="k")
    seen: dict[str, Any] = {}

    def meter(variant: Any, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        out = variant(q, k, v, context)
        picks = context.shared["landmarks"]
        seen.update(picks=picks)
        for i in range(len(q)):
            keys, values = k[i][:, picks[i]], v[i][:, picks[i]]
            wanted = F.softmax(q[i] @ keys.mT * context.scale, -1) @ values
            torch.testing.assert_close(out[i], wanted, rtol=1e-4, atol=1e-5)
        return out

    with fna_lab.patch(backbone.host, attn, layers=[3]) as patched:
        patched.meter = meter
        predict(backbone, latents)
    for row in seen["picks"].tolist():
        assert sum(token >= PICTURE for token in row) == 8 and len(set(row)) == 24
    assert not torch.equal(*seen["picks"])


@pytest.mark.parametrize(
    ("num", "text", "words"),
    [(24, 8, 8), (24, 0, 0), (24, 99, TEXT), (80, 4, 16), (84, 0, TEXT), (1, 8, 0), (9, 20, 8)],
)
def test_shares_of_picture_and_text(num: int, text: int, words: int) -> None:
    points = torch.randn(2, TOKENS, 12)
    picks = JointLandmarks(text=text)(
        points,
        num,
        guaranteed=torch.zeros(2, 0, dtype=torch.long),
        allowed=None,
        num_prefix_tokens=0,
        grid=(8, 8),
    )
    assert picks.shape == (2, num)
    for row in picks.tolist():
        assert len(set(row)) == num and sum(token >= PICTURE for token in row) == words


@pytest.mark.parametrize("bad", [dict(text=-1), dict(text=True), dict(block=0)])
def test_bad_shares_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"attn.landmarks.{next(iter(bad))}="):
        JointLandmarks(**bad)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_serves_joint_blocks(backbone: Any, latents: Tensor, name: str) -> None:
    attn = SubsetAttention(num_landmarks=30, landmarks=SAMPLERS[name](), source="k")
    picks = []

    def meter(variant: Any, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        out = variant(q, k, v, context)
        picks.append(context.shared["landmarks"])
        return out

    with fna_lab.patch(backbone.host, attn, layers="3-4") as patched:
        patched.meter = meter
        together = predict(backbone, latents)
        alone = torch.cat([predict(backbone, latents[:1])])
    for row in torch.cat(picks).tolist():
        assert len(set(row)) == 30 and 0 <= min(row) and max(row) < TOKENS
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mask", ["type1", "type2", "replace", "redistribute", "projection"])
def test_masks_are_refused_by_name(backbone: Any, mask: str) -> None:
    with pytest.raises(NotImplementedError, match=f"mask={mask} cannot be used on joint blocks"):
        fna_lab.patch(backbone.host, "exact", mask, layers="3-5")
    with pytest.raises(NotImplementedError, match="attn=subset with detected classes"):
        fna_lab.patch(backbone.host, "subset", guarantee=["massive"])


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_sampling_is_that_of_diffusers(backbone: Any, guidance: float) -> None:
    names = ["a cat", "a dog"]
    tokens, pooled = backbone.encode(names)
    noise = torch.stack([backbone.noise(seed) for seed in (3, 4)])
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=backbone.host,
        vae=backbone.vae,
        scheduler=backbone.schedule(1),
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3",
             "tokenizer_3")
        ),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    given = dict(
        prompt_embeds=tokens[2:],
        pooled_prompt_embeds=pooled[2:],
        negative_prompt_embeds=tokens[:2],
        negative_pooled_prompt_embeds=pooled[:2],
    )
    common: dict[str, Any] = dict(
        guidance_scale=guidance, num_inference_steps=7, height=64, width=64
    )
    wanted = pipe(latents=noise, output_type="latent", **given, **common).images
    pictures = pipe(latents=noise, output_type="pt", **given, **common).images

    scheduler, found = backbone.schedule(7), noise
    for time in scheduler.timesteps:
        velocity = backbone.velocity(found, time, (tokens, pooled), guidance)
        found = scheduler.step(velocity, time, found, return_dict=False)[0]
    assert torch.equal(found, wanted)
    colours = (backbone.decode(found) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(colours, pictures)
    assert not torch.equal(*found)


def test_noise_and_prompts_are_the_same_each_time(backbone: Any) -> None:
    assert torch.equal(backbone.noise(3), RandomSD3Backbone().noise(3))
    assert not torch.equal(backbone.noise(3), backbone.noise(4))
    first, second = RandomSD3Backbone(), RandomSD3Backbone(seed=1)
    x = torch.stack([first.noise(0)])
    assert torch.equal(predict(first, x), predict(RandomSD3Backbone(), x))
    assert not torch.equal(predict(first, x), predict(second, x))
    tokens, pooled = backbone.encode(["a", "b"])
    assert tokens.shape == (4, TEXT, 32) and pooled.shape == (4, 32)
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[2], tokens[3])


def test_facts_of_the_random_one(backbone: Any) -> None:
    facts = backbone.describe()
    assert (facts["num_tokens"], facts["num_text_tokens"], facts["depth"]) == (TOKENS, TEXT, 6)
    assert facts["random_weights"] and facts["exact_second_attention"] == [0, 1, 2, 3]
    assert backbone.has_cls is False and backbone.grid == (8, 8)


def test_the_published_model_by_names_and_shapes() -> None:
    """The configuration of stable-diffusion-3.5-medium's transformer, without its weights."""
    with torch.device("meta"):
        host = diffusers.SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
            attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        ).eval().requires_grad_(False)  # fmt: skip
    assert 2.2e9 < sum(p.numel() for p in host.parameters()) < 2.6e9
    names = set(host.state_dict())
    assert "transformer_blocks.12.attn2.to_q.weight" in names
    assert "transformer_blocks.13.attn2.to_q.weight" not in names
    explicit = Explicit()
    attn = SubsetAttention(num_landmarks=512, landmarks=JointLandmarks(text=256), source="k")
    given = dict(
        hidden_states=torch.empty(2, 16, 128, 128, device="meta"),
        encoder_hidden_states=torch.empty(2, 333, 4096, device="meta"),
        pooled_projections=torch.empty(2, 2048, device="meta"),
        timestep=torch.empty(2, device="meta"),
    )
    with fna_lab.patch(host, attn, layers="12-23"), fna_lab.patch(host, explicit, layers="0-11"):
        assert host(**given).sample.shape == (2, 16, 128, 128)
    assert {c.grid for c in explicit.seen} == {(64, 64)}
    assert {tuple(c.x.shape) for c in explicit.seen} == {(2, 4096 + 333, 1536)}
    anatomy = OmegaConf.load(conf_dir() / "backbone" / "sd3_medium.yaml").anatomy
    assert max(anatomy.values()) == anatomy.fna == 18 < len(host.transformer_blocks)


def tiny_pipeline(folder: Path) -> None:
    """A pipeline with random weights in the layout of the hub, without the third text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    random = RandomSD3Backbone()
    words = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>", "cat</w>", "c", "at</w>", "t</w>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\nc at</w>\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12
    )
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12, projection_dim=16,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=random.host, vae=random.vae, scheduler=random.schedule(1),
        text_encoder=CLIPTextModelWithProjection(config), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipe")


def test_a_local_pipeline_is_loaded(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "made")
    folder = str(tmp_path / "made" / "pipe")
    backbone = SD3Backbone(name=folder, img_size=64, dtype="float32", t5=False)
    # 12 tokens of the two text encoders side by side, and 256 of the third, which are zero.
    tokens, pooled = backbone.encode(["a cat"])
    assert tokens.shape == (2, 12 + 256, 32) and backbone.num_tokens == 64 + 12 + 256
    assert tokens[1, :12].abs().sum() > 0 and tokens[1, 12:].abs().sum() == 0
    assert not torch.equal(tokens[0], tokens[1]) and not torch.equal(pooled[0], pooled[1])
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    noise = backbone.noise(0)[None]
    wanted = pipe("a cat", latents=noise, num_inference_steps=3, guidance_scale=3.5, height=64,
                  width=64, output_type="latent").images  # fmt: skip
    scheduler = backbone.schedule(3)
    for time in scheduler.timesteps:
        velocity = backbone.velocity(noise, time, (tokens, pooled), 3.5)
        noise = scheduler.step(velocity, time, noise, return_dict=False)[0]
    assert torch.equal(noise, wanted)
    half = SD3Backbone(name=folder, img_size=64, t5=False)
    assert half.describe()["dtype"] == "bfloat16" and "random_weights" not in half.describe()
    assert half.velocity(noise, time, half.encode(["a cat"]), 3.5).dtype == torch.float32
    assert half.decode(noise).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (dict(dtype="int8"), ValueError, "backbone.dtype='int8': expected one of bfloat16"),
        (dict(name="/nowhere/sd3"), FileNotFoundError, "backbone.name=/nowhere/sd3: no pipeline"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], error: Any, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        SD3Backbone(**{"name": "none", **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "said"),
    [(60, "img_size=60: expected a multiple of the patch size 8"), (200, "goes up to 192 pixels")],
)
def test_sizes_that_do_not_fit(size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RandomSD3Backbone(img_size=size)
    assert RandomSD3Backbone(img_size=32).num_tokens == 16 + TEXT


def test_pictures_are_not_read(backbone: Any) -> None:
    with pytest.raises(NotImplementedError, match="backbone=sd3_random makes pictures"):
        backbone(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="begins from noise, got Tensor; use data=prompts"):
        backbone.transform(torch.zeros(3))


@pytest.mark.parametrize("make", [RandomSD3Backbone, lambda: SD3Backbone(name="any")])
def test_without_diffusers_it_says_what_to_install(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'fna-lab\[diffusion\]'") as error:
        make()
    assert "\n" not in str(error.value)
