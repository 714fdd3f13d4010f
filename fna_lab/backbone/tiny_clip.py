"""The architecture of `fna_tiny`: a small CLIP in open_clip's own class, and its tokenizer."""

from __future__ import annotations

import re

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor

PATCH_SIZE = 8
CONTEXT_LENGTH = 24
WORDS = (
    "a and on of to the is are there in with photo picture image background object objects left "
    "right zero one two three four five circle square triangle diamond hexagon star ring cross "
    "red orange yellow green cyan blue purple pink small medium large plain striped dotted "
    "checkered uniform gradient noise stripes"
).split()


class WordTokenizer:
    """One token a word of a closed vocabulary; 0 pads, the highest id ends a text.

    Called like open_clip's tokenizers: texts -> long `[t context_length]`.
    """

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(WORDS, start=2)}
        self.ids["an"] = self.ids["a"]
        self.end = len(WORDS) + 2
        self.vocab_size = self.end + 1

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Tokenize; a longer text is cut.

        Raises:
            ValueError: a word is not in the vocabulary.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            words = re.findall(r"[a-z]+", text.lower())
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                raise ValueError(
                    f"backbone=fna_tiny does not know {unknown[0]!r} of {text!r}; its vocabulary "
                    f"is the {len(WORDS)} words of the shapes world."
                )
            ids = [1, *(self.ids[word] for word in words[: CONTEXT_LENGTH - 2]), self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def build_clip(
    *,
    img_size: int,
    width: int,
    depth: int,
    heads: int,
    text_width: int,
    text_depth: int,
    pool: str = "tok",
) -> CLIP:
    """The untrained pair: a ViT with 8-pixel patches, and a small text tower.

    `pool` is what speaks for the picture: `tok` = CLS, `avg` = the mean of the patch tokens,
    `patches` = the same, and there is no CLS in the sequence.
    """
    clip = CLIP(
        width,
        vision_cfg=CLIPVisionCfg(
            image_size=img_size,
            layers=depth,
            width=width,
            head_width=width // heads,
            patch_size=PATCH_SIZE,
            pool_type="avg" if pool == "patches" else pool,
        ),
        text_cfg=CLIPTextCfg(
            context_length=CONTEXT_LENGTH,
            vocab_size=WordTokenizer().vocab_size,
            width=text_width,
            heads=text_width // 32,
            layers=text_depth,
        ),
    )
    if pool == "patches":
        clip.visual = _WithoutCls(
            image_size=img_size,
            patch_size=PATCH_SIZE,
            width=width,
            layers=depth,
            heads=heads,
            mlp_ratio=4.0,
            output_dim=width,
            pool_type="avg",
        )
    return clip


class _WithoutCls(VisionTransformer):
    """open_clip's ViT whose CLS leaves the sequence before the first block."""

    num_prefix_tokens = 0
    has_class_token = False

    def _embeds(self, x: Tensor) -> Tensor:
        return super()._embeds(x)[:, 1:]  # what is left out so far works on each token alone

    def _global_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(dim=1), x
