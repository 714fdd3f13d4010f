"""A ViT whose weights are constructed: its massive tokens, artifacts and sinks are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fna_lab.backbone.base import Anatomy, Backbone, Features, check_img_size
from fna_lab.settings import check_integer

PATCH_SIZE = 8
DEPTH, WIDTH, HEADS, HIDDEN = 8, 64, 8, 10
HEAD_DIM = WIDTH // HEADS
NUM_CLASSES = 12
MASSIVE_LAYER = 2  # its MLP makes massive tokens and artifacts
SINK_LAYER = MASSIVE_LAYER + 1  # the first block in which they are sinks

# Channels of the residual stream: what a token is, and from CONTENT on what its patch shows.
CONST, LIGHT, MASSIVE_MARK, ARTIFACT_MARK, CLS, ARTIFACT, MASSIVE, CLS_MASSIVE = range(8)
CONTENT = tuple(range(8, 24))

# Mean pixel in [-1, 1], beyond which a patch is planted.
BRIGHT, DARK = 0.8, -0.8

BASE, MARK, ARTIFACT_SIZE = 4.0, 2.0, 9.0  # sizes of the channels in ordinary tokens
BORN, GROWTH = 60.0, 8.0  # what the MLPs add to a massive token: at birth, and in later blocks
SUPPRESSION, PUSH = 4.0, 1.0  # what sinks take from a massive token in a block, others give
CLS_GROWTH = 120.0  # what CLS gives itself in a block, and sinks take back
STEP = 8.0  # distance of the rungs of the sinks' ladder, in logits
APART = 16.0  # logit that leaves nothing to the rest


class PlantedBackbone(Backbone):
    """A small timm ViT without training: every weight is written by hand.

    Constructed, and only a control: it shows that a detector, mask or schedule finds what is
    there, and nothing about real models. `truth` tells what is there.

    A patch is massive where its mean pixel, in [-1, 1], exceeds 0.8 (white), and an artifact below
    -0.8 (black); the first MLP turns that into marks, over a ramp of 0.03. After that:

    - The MLP of block 2 turns the mark of massive patches into one huge channel (norm 60 against
      4), that of artifacts into another (norm 10, 2.5 medians). Later MLPs let massive tokens grow
      by 8 a block. No attention is needed for that.
    - From block 3 on every query of three heads attends to massive tokens; to artifacts once
      those are gone; then to CLS. The final logits are 24, 16, 8, and 0 for other tokens. Sinks
      are RMS-normed before attention, so that nothing of their patch is left in their value.
    - One head lets massive tokens attend to artifacts and to themselves, whose values take 4 off
      the massive channel; other tokens' values add 1. So exact attention gives growth of 4 a
      block, type I in stage `sink` 8, in stage `mask` 9, and type II less than type I.
    - CLS attends to itself in one head, which adds 120 to a channel of its own, and to sinks in
      another, which takes 120 away. Without sinks CLS holds the largest activation.
    - MLPs take small values of the huge channels back, so that nothing drifts.
    - Two heads, and the sinks' heads before block 3, carry what the patches show. CLS collects it;
      the head reads the hue of the picture (12 classes). Masking massive tokens costs nothing.

    These hold by construction. Not constructed are the rounds of iterative schedules
    and what approximate attention makes of all this. An iterative schedule must mask before the
    softmax to find artifacts: while a massive token is part of it, its mass does not move on.

    Args:
        planted: False leaves the massive channel, the artifacts and all that follows out: the
            negative control, with the same pictures.
        img_size: side of the pictures, a multiple of 8.
        seed: of the random projections that the content channels hold.
        anatomy: see `Anatomy`.

    Attributes:
        massive_layer: block whose MLP makes massive tokens; they are in the input of the next.
        sink_layer: first block in which they are sinks.

    Raises:
        ValueError: a setting does not fit.
    """

    massive_layer = MASSIVE_LAYER
    sink_layer = SINK_LAYER

    def __init__(
        self,
        *,
        planted: bool = True,
        img_size: int = 112,
        seed: int = 0,
        anatomy: Anatomy | Mapping[str, int] | None = None,
    ) -> None:
        check_img_size(img_size, PATCH_SIZE)
        if not isinstance(planted, bool):
            raise ValueError(f"backbone.planted={planted!r}: expected true or false.")
        check_integer("backbone.seed", seed, least=0)
        host = VisionTransformer(
            img_size=img_size,
            patch_size=PATCH_SIZE,
            num_classes=NUM_CLASSES,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=HIDDEN / WIDTH,
            qkv_bias=False,
            norm_layer=_RMSNorm,  # type: ignore[arg-type]
            act_layer=nn.ReLU,  # type: ignore[arg-type]
        )
        with torch.no_grad():
            _write(host, planted, seed)
        self.planted = planted
        super().__init__(
            host,
            name="planted",
            img_size=img_size,
            patch_size=PATCH_SIZE,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            anatomy=anatomy or {"restart": SINK_LAYER, "detect": 5, "mask": 5, "fna": 5},
        )

    def truth(self, images: Tensor) -> dict[str, Tensor]:
        """Which tokens are massive and which are artifacts, read off the pictures alone.

        Args:
            images: normalised pictures `[b 3 h w]`.

        Returns:
            `massive` and `artifact`, bool `[b n]`, CLS False; all False with `planted=False`.

        Raises:
            ValueError: `images` is not `[b 3 h w]` of whole patches.
        """
        if images.ndim != 4 or any(side % PATCH_SIZE for side in images.shape[2:]):
            raise ValueError(
                f"Expected images to be [b 3 h w] of {PATCH_SIZE}-pixel patches, got "
                f"{tuple(images.shape)}."
            )
        light = F.avg_pool2d(images.mean(1, keepdim=True), PATCH_SIZE).flatten(1)
        light = F.pad(light, (1, 0))  # CLS
        return {
            "massive": (light > BRIGHT) & self.planted,
            "artifact": (light < DARK) & self.planted,
        }

    @property
    def register_neurons(self) -> list[tuple[int, int]]:
        """The `(block, neuron)` pairs of the MLP that makes massive tokens."""
        return [(MASSIVE_LAYER, 0), (MASSIVE_LAYER, 1)]

    def forward(self, images: Tensor) -> Features:
        """Normalised pictures `[b 3 h w]` -> features; `pooled` is the content that CLS holds."""
        tokens = self.host.forward_features(images)
        rows, columns = (side // PATCH_SIZE for side in images.shape[-2:])
        pooled = tokens[:, 0, list(CONTENT)]
        return Features(pooled, tokens[:, 0], tokens[:, 1:], (rows, columns))

    def logits(self, images: Tensor) -> Tensor:
        """The constructed classifier of hues, `[b 3 h w]` -> `[b 12]`."""
        return self.host(images)

    @property
    def num_classes(self) -> int:
        """Classes of the constructed classifier."""
        return NUM_CLASSES

    @property
    def num_prefix_tokens(self) -> int:
        """CLS."""
        return 1

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        return HEADS

    @property
    def embed_dim(self) -> int:
        """Channels of a token inside the blocks."""
        return WIDTH

    def describe(self) -> dict[str, Any]:
        """Plain facts for `metrics.json`, which say that the weights are constructed."""
        return super().describe() | {"constructed": True, "planted": self.planted}


def hue_plane() -> Tensor:
    """Two unit colours, at right angles to grey and to each other: `[2 3]`."""
    plane = torch.tensor([[2.0, -1.0, -1.0], [0.0, 1.0, -1.0]])
    return F.normalize(plane, dim=1)


class _RMSNorm(nn.RMSNorm):
    """Root mean square norm without weights; its rows are as long as sqrt(channels)."""

    def __init__(self, channels: int, **settings: Any) -> None:  # noqa: ARG002 (timm's call)
        super().__init__(channels, eps=1e-6, elementwise_affine=False)


def _normed(**sizes: float) -> dict[str, float]:
    """Channels of a token after the RMS norm, by their sizes before."""
    length = math.sqrt(sum(size**2 for size in sizes.values()))
    return {name: math.sqrt(WIDTH) * size / length for name, size in sizes.items()}


# The kinds of token as attention sees them.
NORMAL = _normed(const=BASE)
CLS_TOKEN = _normed(const=BASE, cls=BASE)
ARTIFACT_TOKEN = _normed(const=BASE, artifact=ARTIFACT_SIZE, mark=MARK, light=0.2)
MASSIVE_TOKEN = _normed(const=BASE, massive=BORN + 1.5 * GROWTH, mark=MARK, light=0.2)


def _write(host: Any, planted: bool, seed: int) -> None:
    for value in host.parameters():
        value.zero_()
    _write_embedding(host, seed)
    for layer, block in enumerate(host.blocks):
        sinks = planted and layer >= SINK_LAYER
        for head in range(HEADS):
            _write_content(block.attn, head, sinks)
        if sinks:
            _write_sinks(block.attn)
            _write_suppression(block.attn)
            _write_cls_balance(block.attn)
        mlp = _Mlp(block.mlp)
        if layer == 0:
            # A step is a ramp from 0 to 1; the light is a fifth of the mean pixel.
            mlp.step({LIGHT: 100.0, CONST: -100.0 * 0.2 * BRIGHT / BASE}, 0.0, MASSIVE_MARK, MARK)
            mlp.step({LIGHT: -100.0, CONST: 100.0 * 0.2 * DARK / BASE}, 0.0, ARTIFACT_MARK, MARK)
        elif planted and layer == MASSIVE_LAYER:
            mlp.step({MASSIVE_MARK: 2.0}, -2.0, MASSIVE, BORN)
            mlp.step({ARTIFACT_MARK: 2.0}, -2.0, ARTIFACT, ARTIFACT_SIZE)
        elif sinks:
            # Less the constant: a token that is only drawn along does not grow.
            mlp.step({MASSIVE: 2.0, CONST: -2.0}, -12.0, MASSIVE, GROWTH)
            mlp.settle(MASSIVE, BASE / math.sqrt(WIDTH))
            mlp.settle(CLS_MASSIVE, BASE / math.sqrt(WIDTH))
    plane = torch.arange(NUM_CLASSES) * (2 * math.pi / NUM_CLASSES)
    host.head.weight[:, CONTENT[0]] = plane.cos()
    host.head.weight[:, CONTENT[1]] = plane.sin()


def _write_embedding(host: Any, seed: int) -> None:
    conv = host.patch_embed.proj
    pixels = PATCH_SIZE**2
    conv.bias[CONST] = BASE
    conv.weight[LIGHT] = 0.2 / (3 * pixels)
    conv.weight[list(CONTENT[:2])] = hue_plane()[:, :, None, None] * (0.5 / pixels)
    # The rest are random views of the patch that see neither its light nor its hue.
    generator = torch.Generator().manual_seed(seed)
    shape = (WIDTH - CONTENT[2], 3, PATCH_SIZE, PATCH_SIZE)
    views = torch.randn(shape, generator=generator)
    views = views - views.mean((2, 3), keepdim=True)
    conv.weight[CONTENT[2] :] = 0.1 * F.normalize(views.flatten(1), dim=1).view(shape)
    host.cls_token[0, 0, CONST] = host.cls_token[0, 0, CLS] = BASE


class _Head:
    """The rows of one head: queries, keys and values by channel, outputs by channel."""

    def __init__(self, attn: Any, head: int) -> None:
        size = HEAD_DIM
        weight = attn.qkv.weight.view(3, HEADS, size, WIDTH)
        self.q, self.k, self.v = weight[0, head], weight[1, head], weight[2, head]
        self.out = attn.proj.weight[:, head * size : (head + 1) * size]

    def logit(self, dim: int, query: Mapping[int, float], key: Mapping[int, float]) -> None:
        """Add the product of two linear functions of the channels to the logits."""
        for channel, factor in query.items():
            self.q[dim, channel] = factor * math.sqrt(HEAD_DIM)  # undoes the scale d^-1/2
        for channel, factor in key.items():
            self.k[dim, channel] = factor

    def write(self, values: Mapping[int, float], channel: int) -> None:
        """Let the value be a linear function of the channels, and write it to one channel."""
        for source, factor in values.items():
            self.v[0, source] = factor
        self.out[channel, 0] = 1.0


def _write_content(attn: Any, head: int, sinks: bool) -> None:
    """Attend to all alike and to CLS ten times as much; carry half of the content channels."""
    one = _Head(attn, head)
    if head > 2 and head < 6 and sinks:
        return
    one.logit(0, {CONST: 1 / NORMAL["const"], CLS: 0.4 / NORMAL["const"]},
              {CLS: math.log(10) / CLS_TOKEN["cls"]})  # fmt: skip
    half = CONTENT[:HEAD_DIM] if head % 2 == 0 else CONTENT[HEAD_DIM:]
    for dim, channel in enumerate(half):
        one.v[dim, channel] = 1.0
        one.out[channel, dim] = 0.02


def _anyone() -> dict[int, float]:
    """A query that is about 1 for every kind of token."""
    unit = NORMAL["const"]
    rest = (unit - ARTIFACT_TOKEN["const"]) / ARTIFACT_TOKEN["artifact"]
    own = (unit - CLS_TOKEN["const"]) / CLS_TOKEN["cls"]
    huge = {MASSIVE: 1 / unit, CLS_MASSIVE: 1 / unit}
    return {CONST: 1 / unit, ARTIFACT: rest / unit, CLS: own / unit} | huge


def _ladder() -> dict[int, float]:
    """A key of 3, 2 and 1 steps for massive tokens, artifacts and CLS."""
    return {
        MASSIVE: 3 * STEP / MASSIVE_TOKEN["massive"],
        ARTIFACT: 2 * STEP / ARTIFACT_TOKEN["artifact"],
    } | _cls(STEP)


def _cls(size: float = 1.0) -> dict[int, float]:
    """CLS and nothing else, ordinary or grown."""
    return {CLS: size / CLS_TOKEN["cls"], CLS_MASSIVE: size / math.sqrt(WIDTH)}


def _write_sinks(attn: Any) -> None:
    """Heads 0 to 2: every query climbs the ladder."""
    for head in range(3):
        one = _Head(attn, head)
        one.q[0], one.k[0] = 0.0, 0.0
        one.logit(0, _anyone(), _ladder())


def _write_suppression(attn: Any) -> None:
    """Head 3: massive tokens and CLS look at the sinks, the others at CLS."""
    one = _Head(attn, 3)
    # The constants of CLS are its own; of massive tokens nothing but the massive channel is left.
    one.logit(0, {CONST: 1 / NORMAL["const"], CLS: -1 / NORMAL["const"]}, _cls(APART))
    one.logit(
        1,
        {MASSIVE: 1 / MASSIVE_TOKEN["massive"]},
        {
            ARTIFACT: (APART + 1) / ARTIFACT_TOKEN["artifact"],
            MASSIVE: APART / MASSIVE_TOKEN["massive"],
        }
        | _cls(-APART),
    )
    one.logit(2, _cls(), _ladder() | _cls(-APART))
    push = PUSH / NORMAL["const"]
    one.write(
        {
            CONST: push,
            CLS: -push,  # the value of CLS is 0
            ARTIFACT: -(SUPPRESSION + push * ARTIFACT_TOKEN["const"]) / ARTIFACT_TOKEN["artifact"],
            MASSIVE: -(SUPPRESSION + push * MASSIVE_TOKEN["const"]) / MASSIVE_TOKEN["massive"],
        },
        MASSIVE,
    )


def _write_cls_balance(attn: Any) -> None:
    """Head 4: the sinks take from CLS what head 5 gives it; other queries stay away from both."""
    others = {CONST: 1 / NORMAL["const"], CLS: -1 / NORMAL["const"],
              MASSIVE: 1 / MASSIVE_TOKEN["massive"]}  # fmt: skip
    taken = _Head(attn, 4)
    away = {
        MASSIVE: -2 * APART / MASSIVE_TOKEN["massive"],
        ARTIFACT: -2 * APART / ARTIFACT_TOKEN["artifact"],
    }
    taken.logit(0, others, away)
    taken.logit(1, _cls(), _ladder() | _cls(-APART))
    taken.write(
        {
            MASSIVE: -CLS_GROWTH / MASSIVE_TOKEN["massive"],
            ARTIFACT: -CLS_GROWTH / ARTIFACT_TOKEN["artifact"],
        },
        CLS_MASSIVE,
    )
    given = _Head(attn, 5)
    given.logit(0, others, _cls(-2 * APART))
    given.logit(1, _cls(), _cls(APART))
    given.write({CLS: CLS_GROWTH / CLS_TOKEN["cls"]}, CLS_MASSIVE)
    given.out[MASSIVE, 0] = SUPPRESSION / CLS_GROWTH  # what head 3 takes from CLS as well


class _Mlp:
    """Writes neurons of a ReLU MLP, two at a time."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp
        self.used = 0

    def step(self, read: Mapping[int, float], bias: float, channel: int, size: float) -> None:
        """Add `size` to a channel where `read` + `bias` > 1, nothing where it is < 0."""
        for shift, sign in ((0.0, 1.0), (-1.0, -1.0)):
            for source, factor in read.items():
                self.mlp.fc1.weight[self.used, source] = factor
            self.mlp.fc1.bias[self.used] = bias + shift
            self.mlp.fc2.weight[channel, self.used] = sign * size
            self.used += 1

    def settle(self, channel: int, size: float) -> None:
        """Take small values of a channel back to 0, and leave large ones alone."""
        # -u up to 4, back to 0 at 6.5; a massive token has 8.
        for knot, slope in ((-6.5, 1.6), (-4.0, -2.6), (4.0, 2.6), (6.5, -1.6)):
            self.mlp.fc1.weight[self.used, channel] = 1.0
            self.mlp.fc1.bias[self.used] = -knot
            self.mlp.fc2.weight[channel, self.used] = slope * size
            self.used += 1
