"""Stable Diffusion 3 through diffusers: a backbone that makes pictures from noise and a prompt."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fna_lab.backbone.base import Anatomy, Backbone, Features, check_img_size

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# A prompt -> its tokens `[1 t c]` and its pooled embedding `[1 p]`.
Encode = Callable[[str], tuple[Tensor, Tensor]]
Text = tuple[Tensor, Tensor]


class SD3Backbone(Backbone):
    """The denoising transformer (MM-DiT) of a Stable Diffusion 3 pipeline, with what it needs.

    Tokens of a block are those of the picture, then those of the text; there is no CLS. What a
    vision backbone calls a picture is the noise here that a picture is made from. In blocks with
    two attentions (`attn2`, 0 to 12 of Stable Diffusion 3.5 medium) the joint one is replaced.

    Text encoders stay on the CPU, where each prompt is encoded once; transformer and decoder go
    where the task goes. Latents are kept in float32.

    Args:
        name: a pipeline on the hub, or a local folder with `model_index.json`.
        img_size: side of the pictures in pixels.
        dtype: of the weights: `bfloat16`, `float16` or `float32`.
        t5: load the third text encoder; without it (4.7 of 8 billion weights) prompts mean less.
        anatomy: see `Anatomy`; `fna` is where the attention of blocks is replaced from.

    Raises:
        ImportError: diffusers is not installed.
        FileNotFoundError: the weights cannot be had.
        ValueError: a setting does not fit the model.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers".
    """

    def __init__(
        self,
        *,
        name: str,
        img_size: int = 1024,
        dtype: str = "bfloat16",
        t5: bool = True,
        anatomy: Anatomy | Mapping[str, int] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"backbone.dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
        pipe = _load(name, DTYPES[dtype], t5)

        def encode(prompt: str) -> tuple[Tensor, Tensor]:
            tokens, _, pooled, _ = pipe.encode_prompt(
                prompt, None, None, device="cpu", do_classifier_free_guidance=False
            )
            return tokens, pooled

        self._setup(
            pipe.transformer,
            pipe.vae,
            pipe.scheduler,
            encode,
            name=name,
            img_size=img_size,
            anatomy=anatomy,
        )

    def _setup(
        self,
        host: Any,
        vae: Any,
        scheduler: Any,
        encode: Encode,
        *,
        name: str,
        img_size: int,
        anatomy: Anatomy | Mapping[str, int] | None,
    ) -> None:
        shrink = 2 ** (len(vae.config.block_out_channels) - 1)
        patch_size = shrink * host.config.patch_size
        check_img_size(img_size, patch_size)
        most = host.config.pos_embed_max_size * patch_size
        if img_size > most:
            raise ValueError(f"backbone.img_size={img_size}: this model goes up to {most} pixels.")
        super().__init__(
            host,
            name=name,
            img_size=img_size,
            patch_size=patch_size,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            anatomy=anatomy,
        )
        self.vae: Any = vae.eval().requires_grad_(False)
        self._scheduler = scheduler
        self._encode = encode
        self._texts: dict[str, Text] = {}
        self._side = img_size // shrink
        self.num_text_tokens = int(self._text("")[0].shape[1])

    def forward(self, images: Tensor) -> Features:  # noqa: ARG002
        """A backbone that makes pictures reads none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"backbone={self.name} makes pictures and has no features of them; "
            "use task=generation, and attn.layers other than auto."
        )

    def noise(self, seed: int) -> Tensor:
        """What a picture begins from, `[c h w]`; the same for the same seed on any device.

        Raises:
            ValueError: the data gives something else than seeds.
        """
        if not isinstance(seed, int):
            raise ValueError(
                f"backbone={self.name} begins from noise, got {type(seed).__name__}; "
                "use data=prompts."
            )
        generator = torch.Generator().manual_seed(seed)
        shape = self.host.config.in_channels, self._side, self._side
        return torch.randn(shape, generator=generator)

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """A seed -> noise `[c h w]`."""
        return self.noise

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Text:
        """Prompts with the empty one before each for guidance.

        Returns:
            Tokens `[2*b t c]` and pooled embeddings `[2*b p]`: first of b empty prompts, then of
            the given ones; on the transformer's device.
        """
        device = next(self.host.parameters()).device
        both = [self._text(prompt) for prompt in [""] * len(prompts) + list(prompts)]
        tokens, pooled = (torch.cat(part).to(device) for part in zip(*both, strict=True))
        return tokens, pooled

    def _text(self, prompt: str) -> Text:
        if prompt not in self._texts:
            with torch.no_grad():
                self._texts[prompt] = self._encode(prompt)
        return self._texts[prompt]

    @torch.no_grad()
    def velocity(self, latents: Tensor, time: Tensor, text: Text, guidance: float) -> Tensor:
        """The predicted velocity with classifier-free guidance, `[b c h w]` in float32.

        Args:
            latents: `[b c h w]`.
            time: the time step, a scalar of `schedule(...).timesteps`.
            text: of `encode`.
            guidance: 1 = none, and half the work.
        """
        tokens, pooled = text
        if guidance == 1:
            tokens, pooled = tokens[len(latents) :], pooled[len(latents) :]
        else:
            latents = torch.cat([latents, latents])
        found = self.host(
            hidden_states=latents.to(self.host.dtype),
            timestep=time.expand(len(latents)),
            encoder_hidden_states=tokens.to(self.host.dtype),
            pooled_projections=pooled.to(self.host.dtype),
            return_dict=False,
        )[0].float()
        if guidance == 1:
            return found
        empty, asked = found.chunk(2)
        return empty + guidance * (asked - empty)

    def schedule(self, num_steps: int) -> Any:
        """A fresh scheduler of diffusers, set to so many steps: `timesteps` and `step(...)`."""
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(num_steps, device=next(self.host.parameters()).device)
        return scheduler

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[b c h w]` -> pictures `[b 3 img_size img_size]`, about -1 to 1, float32."""
        config = self.vae.config
        latents = latents / config.scaling_factor + config.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    @property
    def num_tokens(self) -> int:
        """Tokens of the picture and of the text in a block."""
        return self.grid[0] * self.grid[1] + self.num_text_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """None: the picture comes first."""
        return 0

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        return int(self.host.config.num_attention_heads)

    @property
    def embed_dim(self) -> int:
        """Channels of a token inside the blocks."""
        return self.num_heads * int(self.host.config.attention_head_dim)

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        dtype = str(self.host.dtype).removeprefix("torch.")
        dual = list(self.host.config.dual_attention_layers)
        return super().describe() | {
            "num_text_tokens": self.num_text_tokens,
            "dtype": dtype,
            "exact_second_attention": dual,
        }


def import_diffusers() -> Any:
    """The package diffusers, which is an extra.

    Raises:
        ImportError: it is not installed, with what to install.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"Stable Diffusion 3 needs the package diffusers ({error}): pip install "
            "'fna-lab[diffusion]'."
        ) from error
    return diffusers


def _load(name: str, dtype: torch.dtype, t5: bool) -> Any:
    diffusers = import_diffusers()
    parts: dict[str, Any] = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    local = Path(name).expanduser()
    try:
        with warnings.catch_warnings():  # the older name of a setting, which every version knows
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            found = diffusers.StableDiffusion3Pipeline.from_pretrained(
                str(local) if local.is_dir() else name, torch_dtype=dtype, **parts
            )
    except (OSError, ValueError, ConnectionError) as error:
        reason = (str(error).strip().split("\n") or [""])[0][:160]
        raise FileNotFoundError(
            f"backbone.name={name}: no pipeline of Stable Diffusion 3 in the local cache, nor to "
            f"be downloaded ({type(error).__name__}: {reason}). Accept the licence on the model's "
            "page and log in to the hub once (hf auth login), give backbone.name=FOLDER with a "
            "copy, or take backbone=sd3_random, which has random weights."
        ) from error
    # Without the package accelerate, diffusers may leave weights as they were stored.
    return found.to(dtype)
