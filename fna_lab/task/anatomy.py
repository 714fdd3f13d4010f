"""What the tokens of a backbone are and do, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fna_lab.attn.reduced import LandmarkAttention
from fna_lab.backbone.named import named_sampler
from fna_lab.backbone.patch import patch
from fna_lab.metric.alignment import alignment_facts, directions, suppression_facts
from fna_lab.metric.anatomy import (
    ArrayMean,
    components,
    members_of,
    norm_facts,
    some_of_each,
    token_facts,
    without_padding,
)
from fna_lab.metric.intervention import Onlooker
from fna_lab.metric.landmarks import LandmarkLook
from fna_lab.metric.mass import (
    attention_sums,
    first_pictures,
    incoming_facts,
    mass_facts,
    sink_facts,
)
from fna_lab.metric.pairs import EACH, drawn_patterns, drawn_tokens, massive_of, pair_facts
from fna_lab.metric.topology import Topology
from fna_lab.settings import check_integer, check_number
from fna_lab.task.base import Task
from fna_lab.task.closely import decay, growth

if TYPE_CHECKING:
    from fna_lab.attn.base import Context

MEASURES = (
    "facts",
    "norms",
    "mass",
    "incoming",
    "sink_rate",
    "alignment",
    "suppression",
    "growth",
    "decay",
    "pca",
    "topology",
    "patterns",
    "landmarks",
)
SAMPLERS = ("fps", "grid", "grid_fps", "random")
DEFAULT = ("facts", "norms", "mass", "incoming", "sink_rate", "growth", "pca")
# What stands in the maps for the class of tokens that are none.
PADDING = -1
# Tokens of one picture whose suppression matrix is kept whole, for its figure.
MATRIX = 400


class Anatomy(Task):
    """Norms, massive tokens, attention sinks and what tokens do to each other.

    Facts are means over pictures, `<fact>/<block>` or `<measure>/<fact>/<block>`, and stand in the
    samples picture by picture. What has heads, or lies on the grid of the picture, goes to the
    arrays beside them, and from there to the figures. With a data set that knows its
    segmentation, `background` is the share of patches without any object, which is what
    `top_on_background` would be if the most attended patch were any patch.

    Args:
        measure: what is measured: a list of `MEASURES`, or `all`.
        pictures: the first so many pictures are looked at closely: maps, suppression, growth,
            decay, components, topology, patterns; the figure of landmarks.
        rounds: of `decay`: most tokens that are taken out, one a round.
        epsilon: of `sink_rate`: share of a head's attention that makes a token a sink.
        topology: of `topology`: settings of `metric.topology.Topology`.
        samplers: of `landmarks`: samplers that stand beside the run's own, as
            `name:setting=value,...`.
        figures: draw the figures of the run.
        cost: measure latency and memory on the first batch.
        **common: see `Task`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        measure: Sequence[str] | str = DEFAULT,
        pictures: int = 4,
        rounds: int = 8,
        epsilon: float = 0.3,
        topology: Mapping[str, Any] | None = None,
        samplers: Sequence[str] = SAMPLERS,
        figures: bool = True,
        cost: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(cost=cost, **common)
        self.refuse_extra_tokens()
        landmarks = isinstance(self.patched.attn, LandmarkAttention)
        if measure == "all":
            measure = [name for name in MEASURES if name != "landmarks" or landmarks]
        elif isinstance(measure, str):
            measure = (measure,)
        self.measure = tuple(measure)
        for name in self.measure:
            if name not in MEASURES:
                raise ValueError(
                    f"task.measure: {name!r} is none of {', '.join(MEASURES)}; expected a list of "
                    "these, or all."
                )
        if "landmarks" in self.measure and not landmarks:
            raise ValueError(
                f"task.measure=[landmarks]: attn={self.patched.attn.name} takes no landmarks; "
                "expected attn=fna, fna_paper or subset."
            )
        for name, value in (("pictures", pictures), ("rounds", rounds)):
            check_integer(f"task.{name}", value)
        check_number("task.epsilon", epsilon, "a number between 0 and 1", above=0, below=1)
        self.pictures = pictures
        self.rounds = rounds
        self.epsilon = epsilon
        self.topology = Topology(**(topology or {}))
        anatomy, depth = self.backbone.anatomy, self.backbone.depth
        self.topology.choose(anatomy.restart, anatomy.detect, depth)
        self.samplers = {name: named_sampler(name, f"task.samplers={name}") for name in samplers}
        self.figures = figures
        self.means = nn.ModuleDict()
        self.maps: dict[str, list[Tensor]] = {}

    def step(self, batch: dict[str, Any]) -> None:
        """Look at every block of the patched model."""
        images = batch["image"]
        few = min(len(images), max(0, self.pictures - len(self.rows)))
        objects = self._objects(batch)
        with self.patched.disabled():
            members = self.members(images)
        noted: dict[str, Tensor] = {}

        def observe(q: Tensor, k: Tensor, v: Tensor, context: Context) -> None:
            facts = self._block(q, k, v, context, members, objects, few)
            noted.update({f"{name}/{context.layer:02d}": fact for name, fact in facts.items()})

        look = None
        if "landmarks" in self.measure:
            first = self.patched.attn_layers[0]
            look = LandmarkLook(members, first, self.samplers, self.patched.meter)
            self.patched.meter = look
        with self.patched.observed(observe):
            found = self.features(images)
        if look is not None:
            noted |= look.facts
            self._keep_landmarks(look, few)
        if few and "patterns" in self.measure:
            noted |= self._patterns(images[:few], members[:few])
        if few:
            # What tokens do without attention or sinks is asked of the model as it came.
            with self.patched.disabled():
                noted |= self._closely(images[:few], members[:few], found.patches[:few])
        if objects is not None:
            noted["background"] = (objects == 0).double().mean(1)
        self._note(noted, batch)

    def members(self, images: Tensor) -> Tensor:
        """The class of every token at the detection block, bool `[b n k]`.

        Massive: the CLS proxy at 0.3, or what stands in for it without a CLS. Artifact: sinks
        that are not massive, found one a round.
        """
        backbone, anatomy = self.backbone, self.backbone.anatomy
        with patch(
            backbone.host,
            Onlooker(),
            layers=[anatomy.detect],
            blocks=backbone.blocks_path,
            restart=min(anatomy.restart, anatomy.detect),
        ) as onlooker:
            self.features(images)
        prefix, has_cls = backbone.num_prefix_tokens, backbone.has_cls
        kept = backbone.kept(images)
        return members_of(**onlooker.classes, prefix=prefix, has_cls=has_cls, kept=kept)

    def _block(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        members: Tensor,
        objects: Tensor | None,
        few: int,
    ) -> dict[str, Tensor]:
        """Every fact of one block: `[b]`, or an array a picture."""
        x, wanted, layer, kept = context.x, self.measure, context.layer, context.kept
        facts: dict[str, Tensor] = {}
        sums = attention_sums(q, k, context, members)
        if "facts" in wanted:
            facts |= token_facts(sums, context, objects)
        if "norms" in wanted:
            facts |= norm_facts(x, members, kept)
        if "mass" in wanted:
            facts |= mass_facts(sums, members)
        if "incoming" in wanted:
            facts |= incoming_facts(sums, members)
        if "sink_rate" in wanted:
            prefix, cls = context.num_prefix_tokens, context.has_cls
            facts |= sink_facts(sums, num_prefix_tokens=prefix, has_cls=cls, epsilon=self.epsilon)
        if "alignment" in wanted:
            weight = self.backbone.out_weight(layer)
            facts |= alignment_facts(q, k, v, x, weight, members, kept)
        if not few:
            return facts
        self._keep("norm", without_padding(x[:few].float().norm(dim=-1), kept), layer)
        self._keep("incoming", without_padding(sums.incoming[:few].mean(1), kept), layer)
        self._keep("cls_row", without_padding(sums.first[:few].mean(1), kept), layer)
        if "suppression" in wanted:
            weight = self.backbone.out_weight(layer)
            near = first_pictures(context, few)
            seen = directions(near.x, weight, q.shape[1])
            sums = attention_sums(q[:few], k[:few], near, members[:few], seen=seen, v=v[:few])
            facts |= suppression_facts(near.x, v[:few], weight, members[:few], sums)
            if layer == self.backbone.anatomy.detect and "matrix" not in self.maps:
                tokens = some_of_each(members[0], MATRIX)
                part = (seen[0, :, tokens] @ v[0, :, tokens].float().mT).sum(0)
                self.maps |= {"matrix": [part], "matrix_tokens": [tokens]}
        if "pca" in wanted and layer == self.backbone.anatomy.detect:
            self._components("detect", x[:few, context.num_prefix_tokens :], kept)
        if "topology" in wanted and layer == self.topology.blocks[0]:
            patches = x[:few, context.num_prefix_tokens :]
            self.topology.add(patches, None if kept is None else _of_patches(kept, patches))
        return facts

    def _closely(self, images: Tensor, members: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """What only the first pictures are asked."""
        self.maps.setdefault("pixels", []).append(self.backbone.pixels(images))
        classes = members.int().argmax(-1).masked_fill(~members.any(-1), PADDING)
        self.maps.setdefault("classes", []).append(classes)
        facts: dict[str, Tensor] = {}
        if "pca" in self.measure:
            shares = self._components("final", patches, self.backbone.kept(images))
            facts |= {f"pca_explained_{i + 1}": shares[:, i] for i in range(shares.shape[1])}
        if "growth" in self.measure:
            found, maps = growth(self.backbone, images)
            facts |= found
            for name, value in maps.items():
                self.maps.setdefault(name, []).append(value)
        if "decay" in self.measure:
            facts |= decay(self.backbone, images, self.rounds)
        return facts

    def _keep_landmarks(self, look: LandmarkLook, few: int) -> None:
        """For the figure: what was taken in the first replaced block, and by other samplers."""
        if not few:
            return
        self.maps["landmarks_block"] = [torch.tensor([look.first])]
        if look.clusters is not None:
            self._keep_map("clusters", look.clusters[:few])
        for name, picks in look.picks.items():
            self._keep_map(f"picks_{name}", picks[:few])
            self._keep_map(f"coverage_{name}", look.coverage[name][:few])

    def _patterns(self, images: Tensor, members: Tensor) -> dict[str, Tensor]:
        """T of the run's mask, or the massive tokens, and the pairs that patterns take away."""
        tokens, kept = self.patched.tokens, self.backbone.kept(images)
        if tokens is None or not self.patched.mask.looks:
            tokens = massive_of(members)
        tokens = tokens[: len(images)]
        self._keep_map("tokens", tokens)
        here = torch.ones_like(tokens) if kept is None else kept
        self._keep_map("tokens_kept", here)
        return pair_facts(tokens, here)

    def _keep_map(self, name: str, value: Tensor) -> None:
        self.maps.setdefault(name, []).append(value)

    def _components(self, name: str, x: Tensor, kept: Tensor | None) -> Tensor:
        """Keep the first components of patch tokens; the shares that they explain `[b k]`."""
        scores, shares = components(x, None if kept is None else _of_patches(kept, x))
        self.maps.setdefault(f"pca_{name}", []).append(scores.float())
        return shares

    def _keep(self, name: str, value: Tensor, layer: int) -> None:
        self.maps.setdefault(f"{name}/{layer:02d}", []).append(value)

    def _note(self, noted: dict[str, Tensor], batch: dict[str, Any]) -> None:
        """Into metrics, rows and arrays."""
        plain = {name: value for name, value in noted.items() if value.ndim == 1}
        means = [name for name in plain if not name.startswith("top_channel")]  # a name, no size
        for name in sorted(means, key=lambda n: n.split("/")[-1:] if "/" in n else [""]):
            if name not in self.scores:
                mean = MeanMetric(nan_strategy="ignore").set_dtype(torch.float64)
                self.scores[name] = mean.to(self.device)
            self.score(name).update(plain[name].double())
        for name, value in noted.items():
            if value.ndim > 1:
                if name not in self.means:
                    self.means[name] = ArrayMean(tuple(value.shape[1:])).to(self.device)
                self.means[name].update(value)  # type: ignore[operator]
        lists = {name: value.tolist() for name, value in plain.items()}
        for i, name in enumerate(batch["name"]):
            row = {"index": int(batch["index"][i]), "name": name}
            # A class that a picture lacks has no value, and NaN would say that something failed.
            self.rows.append(row | {
                key: value[i] if i < len(value) and value[i] == value[i] else None
                for key, value in lists.items()
            })  # fmt: skip

    def results(self) -> dict[str, float]:
        """The metrics as plain numbers by name, without classes that no picture has."""
        # The first row says which columns there are.
        names = dict.fromkeys(name for row in self.rows for name in row)
        self.rows = [{name: row.get(name) for name in names} for row in self.rows]
        anatomy = vars(self.backbone.anatomy)
        self.arrays = {name: torch.tensor(block).numpy() for name, block in anatomy.items()}
        for name, value in _stacked({k: m.compute() for k, m in self.means.items()}).items():  # type: ignore[operator]
            self.arrays[name] = value.cpu().numpy()
        pictures = {name: torch.cat(parts) for name, parts in self.maps.items()}
        if "tokens" in pictures:
            tokens, kept = pictures["tokens"], pictures.pop("tokens_kept")
            drawn = int(tokens.sum(1).clamp(max=EACH).argmax())  # the first that shows it best
            chosen = drawn_tokens(
                tokens[drawn], kept[drawn], self.backbone.num_prefix_tokens, self.backbone.has_cls
            )
            pictures |= {
                "patterns": drawn_patterns(tokens[drawn], chosen),
                "patterns_tokens": chosen,
                "patterns_picture": torch.tensor(drawn),
            }
        for name, value in _stacked(pictures).items():
            self.arrays[f"map_{name}"] = value.cpu().numpy()
        for name, value in self.topology.results().items():
            self.arrays[name] = value.cpu().numpy()
        return {name: value for name, value in super().results().items() if value == value}

    def _objects(self, batch: dict[str, Any]) -> Tensor | None:
        """Share of each patch that objects cover `[b p]`."""
        if "segmentation" not in batch:
            return None
        covered = (batch["segmentation"] > 0).float()[:, None]
        return F.adaptive_avg_pool2d(covered, self.backbone.grid).flatten(1)


def _of_patches(kept: Tensor, patches: Tensor) -> Tensor:
    """The part of bool `[b n]` that belongs to patch tokens `[b p ...]`, of the first pictures."""
    return kept[: len(patches), kept.shape[1] - patches.shape[1] :]


def _stacked(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`name/00`, `name/01`, ... as one array `name` with blocks first."""
    found: dict[str, list[Tensor]] = {}
    for name in sorted(values):
        found.setdefault(name.partition("/")[0], []).append(values[name])
    return {
        name: torch.stack(parts) if f"{name}/00" in values else parts[0]
        for name, parts in found.items()
    }
