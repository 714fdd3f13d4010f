"""The world of `shapes`: procedural pictures with exact ground truth, drawn from a seed.

Everything is synthetic. A scene is sampled first (what, where), at no resolution; `render` draws
it at any size with antialiased signed distances. A *composition* is the multiset of the objects'
attributes; a hash of it decides the split, so that no composition occurs in two splits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "hexagon", "star", "ring", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "orange": (240, 140, 25),
    "yellow": (240, 220, 50),
    "green": (50, 160, 60),
    "cyan": (60, 205, 215),
    "blue": (45, 75, 205),
    "purple": (130, 50, 170),
    "pink": (245, 140, 190),
}
SIZES = {"small": (0.10, 0.13), "medium": (0.17, 0.21), "large": (0.28, 0.34)}
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("uniform", "gradient", "noise", "stripes")
SPLITS = ("train", "val", "test")
NUMBERS = ("zero", "one", "two", "three", "four", "five")

Attributes = tuple[str, str, str, str]  # shape, colour, size, texture


@dataclass(frozen=True)
class Thing:
    """One object: attributes, centre and radius as shares of the side."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float

    @property
    def attributes(self) -> Attributes:
        """(shape, colour, size, texture)."""
        return self.shape, self.colour, self.size, self.texture


@dataclass(frozen=True)
class Scene:
    """What a picture shows; the last thing lies on top.

    Attributes:
        things: the objects in drawing order.
        background: a name of `BACKGROUNDS`.
        seed: seed of everything that `render` draws at random.
    """

    things: tuple[Thing, ...]
    background: str
    seed: int

    @property
    def composition(self) -> tuple[Attributes, ...]:
        """The multiset of attributes, sorted."""
        return tuple(sorted(thing.attributes for thing in self.things))

    @property
    def split(self) -> str:
        """The split that the composition belongs to: 80 % train, 10 % val, 10 % test."""
        return split_of(self.composition)

    @property
    def main(self) -> Thing:
        """The largest object."""
        return max(self.things, key=lambda thing: thing.radius)

    @cached_property
    def captions(self) -> list[str]:
        """True English captions, from the most to the least specific."""
        full = [f"a {t.size} {t.texture} {t.colour} {t.shape}" for t in self.things]
        brief = [f"{_article(t.colour)} {t.shape}" for t in self.things]
        if len(self.things) == 1:
            thing = self.things[0]
            return [
                full[0],
                f"{full[0]} on a {self.background} background",
                brief[0],
                f"a {thing.size} {thing.shape}",
                f"a {thing.texture} object",
            ]
        left, right = sorted(self.things, key=lambda t: t.x)[:: len(self.things) - 1]
        return [
            " and ".join(full),
            " and ".join(brief),
            f"{NUMBERS[len(self.things)]} objects on a {self.background} background",
            f"{_article(left.colour)} {left.shape} to the left of "
            f"{_article(right.colour)} {right.shape}",
            brief[-1],
        ]

    @cached_property
    def questions(self) -> list[tuple[str, str]]:
        """(question, answer) pairs whose answers the scene settles."""
        shapes = [thing.shape for thing in self.things]
        colours = [thing.colour for thing in self.things]
        absent = next(s for s in SHAPES if s not in shapes)
        pairs = [
            ("how many objects are there?", NUMBERS[len(self.things)]),
            ("what shape is the largest object?", self.main.shape),
            ("what colour is the largest object?", self.main.colour),
            (f"is there a {shapes[0]}?", "yes"),
            (f"is there a {absent}?", "no"),
            (f"how many {_plural(shapes[0])} are there?", NUMBERS[shapes.count(shapes[0])]),
        ]
        pairs += [
            (f"what colour is the {thing.shape}?", thing.colour)
            for thing in self.things
            if shapes.count(thing.shape) == 1
        ]
        pairs += [
            (f"what shape is the {thing.colour} object?", thing.shape)
            for thing in self.things
            if colours.count(thing.colour) == 1
        ]
        if len(set(shapes)) == len(shapes) > 1:
            first, last = self.things[0], self.things[-1]
            answer = "left" if first.x < last.x else "right"
            pairs.append((f"is the {first.shape} left or right of the {last.shape}?", answer))
        return pairs


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith("s") else f"{word}s"


def split_of(composition: tuple[Attributes, ...]) -> str:
    """The split of a composition: a hash that is the same on every machine."""
    digest = hashlib.blake2b(repr(composition).encode(), digest_size=4).digest()
    place = int.from_bytes(digest, "little") % 10
    return "test" if place == 0 else "val" if place == 1 else "train"


def sample_scene(
    seed: int, *, objects: tuple[int, int] = (1, 5), split: str = "train", uniform: float = 0.5
) -> Scene:
    """A random scene whose composition belongs to a split.

    Args:
        seed: any non-negative integer; the same seed gives the same scene.
        objects: fewest and most objects, 1 to 5.
        split: `train`, `val` or `test`.
        uniform: share of scenes with a uniform background.

    Raises:
        ValueError: a setting is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"data.split={split!r}: expected one of {', '.join(SPLITS)}.")
    low, high = objects
    if not 1 <= low <= high <= 5:
        raise ValueError(f"data.objects={list(objects)}: expected two numbers, 1 to 5, in order.")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    while True:
        count = int(rng.integers(low, high + 1))
        attributes = [_attributes(rng) for _ in range(count)]
        if split_of(tuple(sorted(attributes))) == split:
            break
    things = _place(rng, attributes)
    rest = 1 - uniform
    shares = (uniform, 0.4 * rest, 0.3 * rest, 0.3 * rest)
    background = BACKGROUNDS[rng.choice(len(BACKGROUNDS), p=shares)]
    return Scene(tuple(things), background, int(rng.integers(2**31)))


def _attributes(rng: np.random.Generator) -> Attributes:
    groups = (SHAPES, tuple(COLOURS), tuple(SIZES), TEXTURES)
    shape, colour, size, texture = (group[rng.integers(len(group))] for group in groups)
    return shape, colour, size, texture


def _place(rng: np.random.Generator, attributes: list[Attributes]) -> list[Thing]:
    # Large ones first, so that they lie below; the largest object is then never in doubt.
    attributes = sorted(attributes, key=lambda a: -SIZES[a[2]][0])
    things: list[Thing] = []
    for shape, colour, size, texture in attributes:
        radius = rng.uniform(*SIZES[size])
        best, best_room = (0.5, 0.5), -np.inf
        for _ in range(12):
            x, y = rng.uniform(radius, 1 - radius, 2)
            room = min(
                (np.hypot(x - t.x, y - t.y) / (radius + t.radius) for t in things), default=9.0
            )
            if room > best_room:
                best, best_room = (float(x), float(y)), room
            if room > 0.9:  # a little overlap is welcome, hiding is not
                break
        things.append(Thing(shape, colour, size, texture, *best, float(radius)))
    return things


def render(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: side of the picture in pixels.

    Returns:
        The picture, uint8 `[size size 3]`, and the segmentation, uint8 `[size size]`:
        0 = background, else 1 + the index in `SHAPES` of the object on top.
    """
    rng = np.random.default_rng(scene.seed)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    picture = _background(scene.background, axis, rng)
    segmentation = np.zeros((size, size), np.uint8)
    for thing in scene.things:
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.normal(0, 8, 3), 0, 255)
        phase, tilt = rng.uniform(0, 1), rng.uniform(-0.25, 0.25)
        # Only the box around the object is touched.
        reach = thing.radius * 1.15 + 2 / size
        columns = slice(*np.searchsorted(axis, (thing.x - reach, thing.x + reach)))
        rows = slice(*np.searchsorted(axis, (thing.y - reach, thing.y + reach)))
        u = ((axis[columns] - thing.x) / thing.radius)[None, :]
        v = ((axis[rows] - thing.y) / thing.radius)[:, None]
        u, v = np.cos(tilt) * u + np.sin(tilt) * v, np.cos(tilt) * v - np.sin(tilt) * u
        distance = _distance(thing.shape, u, v)
        cover = np.clip(0.5 - distance * thing.radius * size, 0, 1)[..., None]
        shade = _texture(thing.texture, u, v, phase)[..., None]
        paint = colour * (1 - 0.45 * shade)
        picture[rows, columns] = cover * paint + (1 - cover) * picture[rows, columns]
        segmentation[rows, columns][cover[..., 0] > 0.5] = 1 + SHAPES.index(thing.shape)
    picture += rng.normal(0, 2.0, picture.shape).astype(np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8), segmentation


def _background(kind: str, axis: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Greyish colours, so that a background is never one of the colours of objects.
    first, second = (rng.uniform(40, 215) + rng.normal(0, 10, 3) for _ in range(2))
    u, v = axis[None, :], axis[:, None]
    if kind == "uniform":
        mix = np.zeros((len(axis), len(axis)), np.float32)
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        mix = 0.5 + 0.5 * (np.cos(angle) * (u - 0.5) + np.sin(angle) * (v - 0.5)) / 0.71
    elif kind == "stripes":
        angle, waves = rng.uniform(0, np.pi), rng.uniform(4, 10)
        wave = np.sin(2 * np.pi * waves * (np.cos(angle) * u + np.sin(angle) * v))
        mix = 0.5 + 0.25 * np.clip(4 * wave, -1, 1)
    else:
        coarse = rng.uniform(0, 1, (17, 17)).astype(np.float32)
        place = axis * 16
        low = np.minimum(place.astype(int), 15)
        part = (place - low).astype(np.float32)
        across = coarse[:, low] * (1 - part) + coarse[:, low + 1] * part
        mix = across[low] * (1 - part[:, None]) + across[low + 1] * part[:, None]
    mix = np.broadcast_to(mix, (len(axis), len(axis)))[..., None]
    return (first * (1 - mix) + second * mix).astype(np.float32)


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance in units of the radius, negative inside (exact up to corners)."""
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.75) - 0.25
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.85
    if shape == "diamond":
        return (np.abs(u) / 0.62 + np.abs(v) - 1) * 0.53
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(u) - 0.5 * v - 0.5, v - 0.65)
    if shape == "hexagon":
        a, b = np.abs(u), np.abs(v)
        return np.maximum(0.866 * a + 0.5 * b, b) - 0.87
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 1, b - 0.33), np.maximum(a - 0.33, b - 1))
    # Star: five points; fold the plane into one of ten equal wedges.
    angle = np.arctan2(u, -v)
    wedge = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(u, v)
    # The edge runs from the tip (1, 0) to the inner corner (0.42 at 36 degrees).
    x, y = radius * np.cos(wedge), radius * np.sin(wedge)
    inner = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([inner[1], 1 - inner[0]]) / np.hypot(inner[1], 1 - inner[0])
    return (x - 1) * normal[0] + y * normal[1]


def _texture(texture: str, u: np.ndarray, v: np.ndarray, phase: float) -> np.ndarray:
    """How much darker a place is, 0 to 1."""
    if texture == "striped":
        return ((2.0 * (u + v) + phase) % 1 < 0.5).astype(np.float32)
    if texture == "checkered":
        return ((np.floor(2.2 * u + phase) + np.floor(2.2 * v + phase)) % 2).astype(np.float32)
    if texture == "dotted":
        a, b = (2.5 * u + phase) % 1 - 0.5, (2.5 * v + phase) % 1 - 0.5
        return (np.hypot(a, b) < 0.3).astype(np.float32)
    return np.zeros(np.broadcast_shapes(u.shape, v.shape), np.float32)
