"""A small random BERT on disk, for tests of what reads sentences."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] there is are a and red circle square large on ,".split()


def random_bert(path: Path) -> Path:
    """Write it, of 16 words, 4 blocks and 32 positions."""
    torch.manual_seed(0)
    shape = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **shape)
    model = BertModel(config)
    for key, value in model.named_parameters():
        if key.endswith(("query.weight", "key.weight")):
            value.data.mul_(20)
        if "LayerNorm.weight" in key:  # norms that differ
            value.data.add_(0.4 * torch.randn_like(value))
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return path
