"""Pictures made with replaced attention against those of exact attention, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fna_lab.backbone.sd3 import SD3Backbone, Text
from fna_lab.metric.generation import closeness, psnr, timed, with_interval
from fna_lab.settings import check_integer, check_number, is_whole
from fna_lab.task.base import Task


@dataclass(frozen=True)
class Trajectory:
    """How pictures were made.

    Attributes:
        latents: before each step, `[b c h w]` each, and at last the final ones.
        velocities: of each step, `[b c h w]` each.
    """

    latents: list[Tensor]
    velocities: list[Tensor]


class Generation(Task):
    """Velocity, latents and pictures under replaced attention, step by step.

    Attention is replaced in some denoising steps alone. Each picture is made twice from the same
    noise, exactly and with these steps replaced. `teacher_*` compare the guided velocity of a
    replaced step with the exact one on the latents of the exact path; `free_*` compare the two
    paths, where errors add up. Costs are those of one step.

    Args:
        steps: first and last step whose attention is replaced, from 0 on; None = all.
        num_steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 = none.
        pictures: keep the first so many for the figure.
        **common: see `Task`.

    Raises:
        ValueError: a setting is out of range, or the backbone makes no pictures.
    """

    figures = True
    backbone: SD3Backbone

    def __init__(
        self,
        *,
        steps: Sequence[int] | None = None,
        num_steps: int = 28,
        guidance: float = 3.5,
        pictures: int = 4,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not isinstance(self.backbone, SD3Backbone):
            raise ValueError(
                f"task=generation with backbone={self.backbone.name}: expected one that makes "
                "pictures, backbone=sd3_medium or sd3_random."
            )
        check_integer("task.num_steps", num_steps)
        check_number("task.guidance", guidance, "a number >= 1", least=1)
        check_integer("task.pictures", pictures)
        self.steps = read_steps(steps, num_steps)
        self.num_steps = num_steps
        self.guidance = float(guidance)
        self.pictures = pictures
        self._text: Text | None = None
        self._over_steps: dict[str, list[Tensor]] = {}
        self._kept: dict[str, list[Tensor]] = {"exact": [], "replaced": []}

    def step(self, batch: dict[str, Any]) -> None:
        """Make each picture twice and compare."""
        noise, names = batch["image"], list(batch["text"])
        first = self._text is None
        self._text = self.backbone.encode(names)
        if first:  # warm-up, for the clock; the replaced steps have theirs in `_teach`
            self._velocity(noise, self.backbone.schedule(self.num_steps).timesteps[0], exact=True)
        exact, exact_seconds = timed(lambda: self.make(noise, exact=True), noise.device)
        self._teach(exact)
        meter, self.patched.meter = self.patched.meter, None  # it saw each replaced step once
        found, seconds = timed(lambda: self.make(noise, exact=False), noise.device)
        self.patched.meter = meter
        self._note("free", found.velocities, exact.velocities)
        values = self._compare(found.latents[-1], exact.latents[-1])
        values["exact_seconds"] = torch.full(
            (len(noise),), exact_seconds / len(noise), dtype=torch.double
        )
        values["replaced_seconds"] = torch.full(
            (len(noise),), seconds / len(noise), dtype=torch.double
        )
        errors = {key: self._over_steps[f"{key}_error"][-1] for key in ("teacher", "free")}
        values["teacher_error"] = errors["teacher"].mean(1)
        for i, name in enumerate(batch["name"]):
            row = {"index": int(batch["index"][i]), "name": name, "prompt": names[i]}
            row |= {"seed": int(batch["seed"][i])}
            row |= {key: float(value[i]) for key, value in values.items()}
            lists = {f"{key}_error_by_step": error[i].tolist() for key, error in errors.items()}
            self.rows.append(row | lists)

    def make(self, noise: Tensor, *, exact: bool) -> Trajectory:
        """Denoise `[b c h w]`, exactly or with the steps that are replaced.

        Raises:
            ValueError: the latents are not finite in the end.
        """
        scheduler = self.backbone.schedule(self.num_steps)
        path = Trajectory([noise], [])
        for i, time in enumerate(scheduler.timesteps):
            latents = path.latents[-1]
            velocity = self._velocity(latents, time, exact=exact or i not in self.steps)
            path.velocities.append(velocity)
            path.latents.append(scheduler.step(velocity, time, latents, return_dict=False)[0])
        if not torch.isfinite(path.latents[-1]).all():
            attn = "exact" if exact else self.patched.attn.name
            raise ValueError(
                f"backbone={self.backbone.name} gives latents that are NaN or infinite under "
                f"attn={attn}."
            )
        return path

    def _velocity(self, latents: Tensor, time: Tensor, *, exact: bool) -> Tensor:
        assert self._text is not None
        if not exact:
            return self.backbone.velocity(latents, time, self._text, self.guidance)
        with self.patched.disabled():
            return self.backbone.velocity(latents, time, self._text, self.guidance)

    def _teach(self, exact: Trajectory) -> None:
        """The replaced steps on the latents of the exact path."""
        times = self.backbone.schedule(self.num_steps).timesteps
        found = [self._velocity(exact.latents[i], times[i], exact=False) for i in self.steps]
        self._note("teacher", found, [exact.velocities[i] for i in self.steps])

    def _note(self, kind: str, found: list[Tensor], exact: list[Tensor]) -> None:
        pairs = [closeness(f, e) for f, e in zip(found, exact, strict=True)]
        for name, values in zip(("cosine", "error"), zip(*pairs, strict=True), strict=True):
            stacked = torch.stack(values, dim=1).cpu()
            self._over_steps.setdefault(f"{kind}_{name}", []).append(stacked)

    def _compare(self, latents: Tensor, exact: Tensor) -> dict[str, Tensor]:
        """Final latents and decoded pictures, `[b]` each; the first pictures are kept."""
        found = {}
        found["latent_cosine"], found["latent_error"] = closeness(latents, exact)
        decode = self.backbone.decode
        pictures = {"exact": decode(exact), "replaced": decode(latents)}
        found["image_cosine"] = closeness(pictures["replaced"], pictures["exact"])[0]
        colours = {key: (x / 2 + 0.5).clamp(0, 1) for key, x in pictures.items()}
        found["image_psnr"] = psnr(colours["replaced"], colours["exact"])
        room = self.pictures - sum(len(part) for part in self._kept["exact"])
        if room > 0:
            for key, x in pictures.items():
                self._kept[key].append(self.backbone.pixels(x[:room]).cpu())
        return found

    def results(self) -> dict[str, float]:
        """Means with their intervals; `velocity/<kind>/<step>` step by step."""
        found = super().results()
        for name in ("teacher_error", "latent_cosine", "latent_error", "image_cosine",
                     "image_psnr", "exact_seconds", "replaced_seconds"):  # fmt: skip
            found |= with_interval(name, [row[name] for row in self.rows])
        for name, parts in self._over_steps.items():
            values = torch.cat(parts)
            steps = self.steps if name.startswith("teacher") else range(self.num_steps)
            for step, value in zip(steps, values.mean(0).tolist(), strict=True):
                found[f"velocity/{name}/{step:02d}"] = value
            self.arrays[f"velocity/{name}"] = values.numpy()
        for key, parts in self._kept.items():
            self.arrays[f"pixels/{key}"] = torch.cat(parts).numpy()
        self.extra["generation"] = {"steps": list(self.steps), "num_steps": self.num_steps}
        shown = self.rows[: len(self.arrays["pixels/exact"])]
        keys = ("prompt", "seed", "image_psnr")
        self.extra["pictures"] = [{key: row[key] for key in keys} for row in shown]
        return found

    def work(self, images: Tensor) -> None:
        """One step with guidance, for the clock."""
        time = self.backbone.schedule(self.num_steps).timesteps[self.steps[0]]
        assert self._text is not None
        self.backbone.velocity(images, time, self._text, self.guidance)


def read_steps(steps: Sequence[int] | None, num_steps: int) -> range:
    """The steps from a first to a last one.

    Raises:
        ValueError: they are no two steps in this order.
    """
    if steps is None:
        return range(num_steps)
    good = isinstance(steps, Sequence) and not isinstance(steps, str) and len(steps) == 2
    if not good or not all(map(is_whole, steps)):
        raise ValueError(f"task.steps={steps}: expected [first, last], or null for all.")
    first, last = steps
    if not 0 <= first <= last < num_steps:
        raise ValueError(
            f"task.steps={list(steps)}: expected two steps in their order among the "
            f"{num_steps} steps 0 to {num_steps - 1}."
        )
    return range(first, last + 1)
