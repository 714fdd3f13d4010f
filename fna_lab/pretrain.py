"""Train `fna_tiny`, the embedded backbone, on the synthetic world of `shapes`.

    python -m fna_lab.pretrain --out fna_lab/weights

A CLIP-like pair learns from pictures drawn on demand and captions about them. Which caption is
true of which picture is known exactly, so that the contrastive loss has all its positives and no
false negative. The captions that name one attribute alone ("a red object") are in every batch.
Most steps see small pictures (few tokens), the last ones the final size.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from open_clip.model import CLIP, resize_pos_embed
from safetensors.torch import load_file, save_file
from timm.optim.muon import Muon
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fna_lab.backbone.tiny_clip import PATCH_SIZE, WordTokenizer, build_clip
from fna_lab.data.shapes_world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    render,
    sample_scene,
)

MEAN = STD = 0.5
GROUPS = (SHAPES, tuple(COLOURS), tuple(SIZES), TEXTURES)
ANY = -1
CAPTIONS = 1  # captions a picture
PREFIXES = ("", "a photo of ", "a picture of ")
MODEL = dict(width=128, depth=8, heads=4, text_width=128, text_depth=3)


def caption(attributes: tuple[int, ...]) -> str:
    """Words for (shape, colour, size, texture) indices, `ANY` = not said."""
    shape, colour, size, texture = (
        None if i == ANY else group[i] for i, group in zip(attributes, GROUPS, strict=True)
    )
    return " ".join(word for word in ("a", size, texture, colour, shape or "object") if word)


def single_claims() -> list[list[tuple[int, ...]]]:
    """For each group of attributes, the claims that say one of them and nothing else."""
    return [
        [tuple(i if g == place else ANY for g in range(len(GROUPS))) for i in range(len(group))]
        for place, group in enumerate(GROUPS)
    ]


class Lessons(IterableDataset):
    """Batches of pictures, captions, and what both say, without end.

    Args:
        img_size: side of the pictures.
        batch_size: pictures of a batch.
        seed: seed of the stream.
        start: batches to skip.
        single: share of pictures with one object.
        uniform: share of pictures with a uniform background.
    """

    def __init__(
        self,
        *,
        img_size: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        single: float = 0.6,
        uniform: float = 0.5,
    ) -> None:
        self.img_size = img_size
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.single = single
        self.uniform = uniform
        self.tokenize = WordTokenizer()
        self.claims = np.stack([claim for claims in single_claims() for claim in claims])

    def __iter__(self) -> Any:
        step = self.start
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch number `step`, the same on every machine."""
        rng = np.random.default_rng([self.seed, self.img_size, step])
        pictures = np.empty((self.batch_size, self.img_size, self.img_size, 3), np.uint8)
        side = self.img_size // PATCH_SIZE
        shapes = np.empty((self.batch_size, side, side), int)
        things = np.full((self.batch_size, 5, 4), -2)
        grounds = np.empty(self.batch_size, int)
        texts, claims, claimed_grounds = [], [], []
        for i in range(self.batch_size):
            objects = (1, 1) if rng.random() < self.single else (2, 5)
            scene = sample_scene(
                int(rng.integers(2**40)), objects=objects, split="train", uniform=self.uniform
            )
            pictures[i], drawn = render(scene, self.img_size)
            centre = PATCH_SIZE // 2
            shapes[i] = drawn[centre::PATCH_SIZE, centre::PATCH_SIZE]
            for j, thing in enumerate(scene.things):
                things[i, j] = [g.index(a) for g, a in zip(GROUPS, thing.attributes, strict=True)]
            grounds[i] = BACKGROUNDS.index(scene.background)
            for _ in range(CAPTIONS):
                text, claim, ground = self._caption(things[i], len(scene.things), grounds[i], rng)
                texts.append(text)
                claims.append(claim)
                claimed_grounds.append(ground)
        for claim in self.claims:
            texts.append(PREFIXES[rng.integers(3)] + caption(tuple(claim)))
            claims.append(np.stack([claim, np.full(4, ANY)]))
            claimed_grounds.append(ANY)
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(255)
        true = _truth(things, grounds, np.stack(claims), np.array(claimed_grounds))
        return {
            "image": (images - MEAN) / STD,
            "text": self.tokenize(texts),
            "true": torch.from_numpy(true),
            "shapes": torch.from_numpy(shapes).flatten(1),
        }

    def _caption(
        self, things: np.ndarray, count: int, ground: int, rng: np.random.Generator
    ) -> tuple[str, np.ndarray, int]:
        claim = np.full((2, 4), ANY)
        told = rng.choice(count, size=min(count, 1 + int(rng.random() < 0.5)), replace=False)
        for row, thing in zip(claim, told, strict=False):
            said = rng.random(4) < 0.5
            if not said.any():
                said[rng.integers(4)] = True
            row[said] = things[thing][said]
        text = " and ".join(caption(tuple(claim[i])) for i in range(len(told)))
        prefix = PREFIXES[rng.integers(3)]
        if rng.random() < 0.1:
            return f"{prefix}{text} on a {BACKGROUNDS[ground]} background", claim, ground
        return prefix + text, claim, ANY


def _truth(
    things: np.ndarray, grounds: np.ndarray, claims: np.ndarray, claimed: np.ndarray
) -> np.ndarray:
    """bool `[pictures captions]`: every claimed description fits some object."""
    fits = (claims[None, :, :, None] == things[:, None, None]) | (claims == ANY)[None, :, :, None]
    true = fits.all(-1).any(-1).all(-1)  # attributes, objects, descriptions
    return true & ((claimed[None] == ANY) | (claimed[None] == grounds[:, None]))


class Pretraining(L.LightningModule):
    """Contrastive learning with every true pair as a positive."""

    def __init__(
        self, model: CLIP, *, rate: float, steps: int, floor: float, optimizer: str = "muon"
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.rate = rate
        self.steps = steps
        self.floor = floor

    @property
    def _visual(self) -> Any:
        return self.model.visual

    def on_fit_start(self) -> None:
        """Make the vision tower return its patch tokens too."""
        self._visual.output_tokens = True

    def on_fit_end(self) -> None:
        """Give the tower back as it was."""
        self._visual.output_tokens = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Cross-entropies to the uniform distribution over the true partners.

        Picture to all texts, text to all pictures, picture to the attributes of each group, and
        every patch of an object to the captions of the shapes.
        """
        pooled, tokens = self._visual(batch["image"])
        image = F.normalize(pooled.float(), dim=-1)
        patches = F.normalize((tokens @ self._visual.proj).float(), dim=-1)
        text = F.normalize(self.model.encode_text(batch["text"]).float(), dim=-1)
        scale = self.model.logit_scale.clamp(max=math.log(100)).exp()
        logits, true = scale * image @ text.mT, batch["true"].float()
        pairs = 0.5 * (_soft_loss(logits, true) + _soft_loss(logits.mT, true.mT))
        start = logits.shape[1] - sum(len(group) for group in GROUPS)
        shape_texts = text[start : start + len(SHAPES)]
        attributes = torch.zeros_like(pairs)
        for group in GROUPS:
            part = slice(start, start + len(group))
            attributes = attributes + _soft_loss(logits[:, part], true[:, part])
            start = part.stop
        covered = batch["shapes"] > 0
        dense = F.cross_entropy(
            scale * patches[covered] @ shape_texts.mT, batch["shapes"][covered] - 1
        )
        loss = pairs + attributes + dense
        said = {"loss": loss, "pairs": pairs, "attributes": attributes, "dense": dense}
        self.log_dict({key: value.detach() for key, value in said.items()}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Muon on the blocks' matrices (or not), AdamW on the rest; warm-up, cosine to a floor."""
        blocks = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.ndim == 2 and ".resblocks." in f".{name}"
        }
        rest = [p for name, p in self.model.named_parameters() if name not in blocks]
        matrices = {"params": list(blocks.values()), "weight_decay": 0.05}
        optimizer: torch.optim.Optimizer
        if self.optimizer == "muon":
            groups = [
                matrices | {"lr": 2 * self.rate},
                {"params": rest, "lr": self.rate, "use_fallback": True},
            ]
            optimizer = Muon(groups, nesterov=True, betas=(0.9, 0.98))
        else:
            groups = [matrices, {"params": rest, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98))
        warm = min(50, self.steps // 10 + 1)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            part = min(1.0, (step - warm) / max(1, self.steps - warm))
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * part))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def _soft_loss(logits: Tensor, true: Tensor) -> Tensor:
    target = true / true.sum(1, keepdim=True).clamp(min=1)  # an attribute nobody has: no loss
    return -(target * logits.log_softmax(1)).sum(1).mean()


@torch.no_grad()
def held_out_accuracy(model: CLIP, *, img_size: int, count: int = 600) -> dict[str, float]:
    """Zero-shot accuracy on single objects of unseen compositions, attribute by attribute."""
    tokenize, right = WordTokenizer(), {}
    scenes = [sample_scene(i, objects=(1, 1), split="test") for i in range(count)]
    pictures = np.stack([render(scene, img_size)[0] for scene in scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).sub(MEAN).div(STD)
    features = torch.cat([model.encode_image(x, normalize=True) for x in images.split(50)])
    for place, name in enumerate(("shape", "colour", "size", "texture")):
        texts = [caption(claim) for claim in single_claims()[place]]
        words = torch.stack(
            [model.encode_text(tokenize([p + text for text in texts]), True) for p in PREFIXES]
        ).sum(0)
        guess = (features @ F.normalize(words, dim=-1).mT).argmax(1)
        truth = torch.tensor(
            [GROUPS[place].index(scene.things[0].attributes[place]) for scene in scenes]
        )
        right[name] = (guess == truth).double().mean().item()
    return right


def train(args: argparse.Namespace) -> None:
    """Run the stages one after the other and write the weights, whole or not at all."""
    L.seed_everything(args.seed)
    stages = [tuple(int(x) for x in stage.split(":")) for stage in args.stages.split(",")]
    model, log, begin = None, [], time.time()
    for number, (img_size, steps) in enumerate(stages):
        last = number == len(stages) - 1
        fresh = build_clip(img_size=img_size, **MODEL, pool=args.pool)
        state = model.state_dict() if model is not None else None
        if args.start and model is None:
            state = {key: value.float() for key, value in load_file(args.start).items()}
        if state is not None:
            resize_pos_embed(state, fresh)
            fresh.load_state_dict(state)
        model = fresh
        rate = args.rate if number == 0 else args.rate / 2
        module = Pretraining(
            model, rate=rate, steps=steps, floor=0.0 if last else 0.2, optimizer=args.optimizer
        )
        lessons = Lessons(
            img_size=img_size, batch_size=args.batch_size, seed=args.seed, uniform=args.uniform
        )
        work = Path(args.work) / f"stage{number}"
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu" if args.cpu else "auto",
            devices=1,
            precision=args.precision,
            gradient_clip_val=1.0,
            logger=False,
            callbacks=[
                TQDMProgressBar(refresh_rate=20),
                ModelCheckpoint(work, save_last=True, every_n_train_steps=200, save_top_k=0),
            ],
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        saved = work / "last.ckpt"
        resume = saved if args.resume and saved.exists() else None
        if resume:
            lessons.start = torch.load(resume, weights_only=True)["global_step"]
        loader = DataLoader(lessons, batch_size=None, num_workers=args.workers)
        trainer.fit(module, loader, ckpt_path=resume)
        model = model.float().cpu().eval()
        accuracy = held_out_accuracy(model, img_size=img_size, count=args.count)
        row = {"img_size": img_size, "steps": steps, "pictures": steps * args.batch_size}
        row |= {"loss": float(trainer.callback_metrics["loss"]), "accuracy": accuracy}
        log.append(row | {"minutes": round((time.time() - begin) / 60, 1)})
        print(json.dumps(log[-1]), flush=True)
    assert model is not None
    _write(model, log, stages[-1][0], args)


def _write(
    model: CLIP, log: list[dict[str, Any]], img_size: int, args: argparse.Namespace
) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    state = {key: value for key, value in state.items() if key != "attn_mask"}
    facts = {
        "model": MODEL | {"pool": args.pool},
        "img_size": img_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "synthetic: fna_lab.data.shapes_world, split train",
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "work")},
        "stages": log,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    parts = [out / "fna_tiny.safetensors.part", out / "fna_tiny.json.part"]
    save_file(state, parts[0])
    parts[1].write_text(json.dumps(facts, indent=2) + "\n")
    for part in parts:
        part.replace(part.with_suffix(""))
    print(f"wrote {out / 'fna_tiny.safetensors'}")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m fna_lab.pretrain", description=__doc__)
    parser.add_argument("--stages", default="56:4000,112:600", help="img_size:steps, ...")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--optimizer", default="muon", choices=["muon", "adamw"])
    parser.add_argument(
        "--precision", default="bf16-mixed", help="32-true where a processor is slow in bfloat16"
    )
    parser.add_argument("--start", default=None, help="weights to begin with, a .safetensors file")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument(
        "--pool",
        default="tok",
        choices=["tok", "avg", "patches"],
        help="what speaks for the picture: CLS; the mean of the patches; that, and no CLS at all",
    )
    parser.add_argument(
        "--uniform", type=float, default=0.5, help="share of pictures on a uniform background"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=600, help="held-out pictures")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--out", default="outputs/pretrain", help="folder of the weights")
    parser.add_argument("--work", default="outputs/pretrain", help="folder of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
