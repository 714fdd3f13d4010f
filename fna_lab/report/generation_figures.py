"""Figures of `task=generation`: pictures side by side, and errors over the steps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fna_lab.report import canvas
from fna_lab.report.figure import COLOURS
from fna_lab.report.token_maps import picture, plain

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]


def draw(record: Record, arrays: Arrays, folder: Path) -> list[Path]:
    """Both figures, from what the run left.

    Args:
        record: of the run.
        arrays: of the run, `pixels/*` and `velocity/*`.
        folder: where they go.
    """
    return [pictures(record, arrays, folder), velocity(record, arrays, folder)]


def pictures(record: Record, arrays: Arrays, folder: Path) -> Path:
    """A row a prompt and seed: exact, replaced, and how far they lie apart."""
    exact, replaced = arrays["pixels/exact"], arrays["pixels/replaced"]
    figure, panels = canvas.sheet(
        record, f"The same noise, denoised twice\n{_where(record)}", len(exact), 3, size=(3.2, 3.3)
    )
    for i, said in enumerate(record["pictures"]):
        left, middle, right = panels[i]
        apart = np.abs(exact[i].astype(float) - replaced[i].astype(float)).mean(-1)
        picture(left, exact[i])
        picture(middle, replaced[i])
        plain(figure, right, apart, "difference (0 to 255)")
        prompt = "\n".join(textwrap.wrap(said["prompt"], 46))
        left.set_title(f"{prompt}\nexact (seed {said['seed']})", fontsize=9, loc="left")
        middle.set_title(f"replaced, PSNR {said['image_psnr']:.1f} dB", fontsize=9)
    return canvas.save(figure, folder / "pictures.png")


def velocity(record: Record, arrays: Arrays, folder: Path) -> Path:
    """Relative error of the velocity over the steps: means as lines, pictures as thin ones."""
    figure, panels = canvas.sheet(
        record, f"Error of the predicted velocity\n{_where(record)}", size=(6.4, 3.8)
    )
    axes = panels[0, 0]
    told = record["generation"]
    steps = {"teacher": told["steps"], "free": range(told["num_steps"])}
    names = {"teacher": "from the same latents", "free": "each from its own latents"}
    for i, (kind, where) in enumerate(steps.items()):
        values = arrays[f"velocity/{kind}_error"]
        for row in values:
            axes.plot(where, row, color=COLOURS[i], alpha=0.25, linewidth=0.8)
        axes.plot(where, values.mean(0), color=COLOURS[i], marker="o^"[i], markersize=4,
                  linestyle=("-", "--")[i], label=names[kind])  # fmt: skip
    axes.axvspan(told["steps"][0] - 0.5, told["steps"][-1] + 0.5, color="0.92", zorder=0)
    canvas.over_blocks(axes, "relative error", x="denoising step (grey: replaced)")
    canvas.from_zero(axes)
    axes.set_xlim(-0.7, told["num_steps"] - 0.3)
    axes.legend(frameon=False)
    return canvas.save(figure, folder / "velocity.png")


def _where(record: Record) -> str:
    """Which blocks and steps are replaced."""
    layers, told = record["attn"]["layers"], record["generation"]
    blocks = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return (
        f"replaced in blocks {blocks}, steps {told['steps'][0]}-{told['steps'][-1]} "
        f"of {told['num_steps']}"
    )
