"""One run, in a straight line: from a config to numbers on disk."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from omegaconf import DictConfig, OmegaConf

from fna_lab.attn.layers import parse_layers
from fna_lab.backbone.base import Backbone, compared
from fna_lab.backbone.budget import Plan as Solved
from fna_lab.backbone.budget import check_budget, solve_budget
from fna_lab.backbone.patch import Patch, patch
from fna_lab.backbone.plan import check_fit
from fna_lab.build import build
from fna_lab.data.base import PictureData
from fna_lab.report import figures
from fna_lab.report import record as records
from fna_lab.task.base import Task

log = logging.getLogger(__name__)


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Measure what a config describes.

    Args:
        cfg: the composed config.
        folder: where `metrics.json` and `samples.parquet` go, once everything is measured. Of a
            run that ends before, the samples that it has go to `unfinished.parquet`.

    Returns:
        The record, as written to `metrics.json`.

    Raises:
        ValueError: settings that do not fit each other, naming the setting and the value.
        KeyboardInterrupt: somebody stopped it.
    """
    begin = time.time()
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise ValueError(f"seed={cfg.seed!r}: expected an integer from 0 to {2**32 - 1}.")
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    backbone: Backbone = build(cfg.backbone)
    data: PictureData = build(cfg.data, transform=backbone.transform)
    patched, exact, solved = plan(cfg, backbone, data)
    data.setup("test")
    task: Task = build(cfg.task, backbone=backbone, patched=patched, exact=exact)
    logger = build(cfg.logger, save_dir=str(folder))
    try:
        if logger is not None:
            logger.log_hyperparams(config)
        with _quiet():
            trainer: L.Trainer = build(
                cfg.trainer, logger=logger or False, default_root_dir=str(folder)
            )
            if trainer.world_size != 1:  # each process would measure a part, and write it as all
                raise ValueError(
                    f"trainer.devices={cfg.trainer.devices}: expected 1; a run measures on one."
                )
            _test(trainer, task, data, folder)
        _check_found(patched)
        record = {
            "name": cfg.name,
            "task": task.name,
            "config": config,
            "config_hash": records.config_hash(config),
            "code_hash": records.code_hash(),
            **records.surroundings(trainer.strategy.root_device),
            "seed": cfg.seed,
            "data": data.describe(),
            "backbone": backbone.describe(),
            "attn": {"name": patched.attn.name, "layers": list(patched.attn_layers)},
            "budget": asdict(solved) if solved else {},
            "mask": _mask_facts(patched),
            "metrics": task.found,
            "errors": task.errors,
            "fallbacks": task.fallbacks,
            "cost": task.costs,
            **task.extra,
            "seconds": round(time.time() - begin, 1),
        }
        records.write(record, task.rows, folder, task.arrays)
        if task.figures:
            figures.draw(folder)
        return record
    finally:
        exact.remove()
        patched.remove()
        wandb.finish()


def plan(
    cfg: DictConfig, backbone: Backbone, data: PictureData
) -> tuple[Patch, Patch, Solved | None]:
    """Patch the backbone as the config says, and once more with exact attention, switched off.

    Where attention is replaced, masked and searched is the backbone's anatomy, unless set. What
    is left to a few pictures (`attn.layers=auto`, a variant's own calibration) is settled here.

    Returns:
        The patch, that of exact attention, and what kept the budget, None without one.
    """
    layers: Any = cfg.attn.get("layers")
    budget: Any = cfg.attn.get("budget")
    layers = OmegaConf.to_object(layers) if OmegaConf.is_config(layers) else layers
    if layers != "auto" and budget is not None:
        raise ValueError(
            f"attn.budget={budget} chooses the blocks: it goes with attn.layers=auto."
        )
    attn, mask = build(cfg.attn, aside=("layers", "budget")), build(cfg.mask)
    check_fit(attn, mask, backbone.blocks[0])
    anatomy, depth = backbone.anatomy, backbone.depth
    if layers == "auto":
        check_budget(attn, budget)
    elif data.name != "none":  # then the backbone is run, on as many tokens
        attn.check_tokens(backbone.num_tokens)
    masked = parse_layers(
        range(anatomy.mask, depth) if mask.layers is None else mask.layers,
        depth,
        setting="mask.layers",
    )
    before = mask.masks_before
    detect = anatomy.detect if before else min(anatomy.detect, masked[0])
    restart = min(anatomy.restart, masked[0]) if before else anatomy.restart
    patching = {
        "mask": mask,
        "blocks": backbone.blocks_path,
        "mask_layers": masked,
        "detect": detect,
        "restart": min(restart, detect if mask.detect is None else mask.detect),
    }
    solved = None
    if layers != "auto":
        layers = range(anatomy.fna, depth) if layers is None else layers
        layers = parse_layers(layers, depth, setting="attn.layers")
    if attn.calibration_pictures:
        with _calibrating(cfg, backbone, data, attn.calibration_pictures) as pictures:
            attn = attn.calibrate(lambda: backbone(pictures), backbone.blocks, layers)
    if layers == "auto":
        with _calibrating(cfg, backbone, data, cfg.calibration) as pictures:
            log.info("attn.budget=%s: choosing on %d pictures", budget, len(pictures))
            solved = solve_budget(
                backbone.host,
                pictures,
                attn,
                budget=cfg.attn.budget,
                features=lambda images: compared(backbone(images)),
                patching=patching,
            )
        attn, layers = attn.with_landmarks(solved.landmarks), sorted(solved.landmarks)
    patched = patch(backbone.host, attn, layers=layers, **patching)
    exact = patch(backbone.host, "exact", layers=patched.attn_layers, blocks=backbone.blocks_path)
    exact.enabled = False
    return patched, exact, solved


@contextmanager
def _calibrating(
    cfg: DictConfig, backbone: Backbone, data: PictureData, count: Any
) -> Iterator[torch.Tensor]:
    """So many calibration pictures, and the backbone with them, on the trainer's device.

    Raises:
        ValueError: `calibration` is no number of pictures.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"calibration={count!r}: expected a number of pictures >= 1.")
    data.setup("test")
    with _quiet(), torch.no_grad():
        trainer: L.Trainer = build(cfg.trainer, logger=False)
        device = trainer.strategy.root_device
        backbone.to(device)
        yield data.calibration(count).to(device)
    backbone.to("cpu")


def _test(trainer: L.Trainer, task: Task, data: PictureData, folder: Path) -> None:
    """Measure; what a loop that ends before its end has measured goes to the folder.

    Raises:
        KeyboardInterrupt: somebody stopped it; Lightning makes SystemExit of Ctrl-C and SIGTERM.
    """
    try:
        trainer.test(task, datamodule=data, verbose=False)
    except BaseException as error:
        if task.rows:
            kept = records.write_unfinished(task.rows, folder)
            log.warning("not finished; what was measured until then: %s", kept)
        if isinstance(error, SystemExit):
            raise KeyboardInterrupt from error
        raise


def _mask_facts(patched: Patch) -> dict[str, Any]:
    mask = patched.mask
    facts: dict[str, Any] = {"name": mask.name, "layers": list(patched.mask_layers)}
    if not mask.looks:
        return facts
    rounds = torch.tensor(patched.rounds, dtype=torch.double)
    found = torch.tensor(patched.found, dtype=torch.double)
    arisen = torch.tensor(patched.arisen, dtype=torch.double)
    return facts | {
        "pattern": mask.pattern,
        "stage": mask.stage,
        "detector": mask.detector.name,
        "threshold": mask.detector.threshold,
        "detect": patched.detect,
        "schedule": mask.schedule,
        "found": {
            "pictures": len(found),
            "mean": found.mean().item(),
            "max": int(found.max()),
            "share": (found > 0).double().mean().item(),
            "rounds": rounds.mean().item(),
            "new_per_removed": (arisen.sum() / found.sum().clamp(min=1)).item(),
            "cut_short": int((rounds == mask.rounds).sum()) if mask.rounds > 1 else 0,
        },
    }


def _check_found(patched: Patch) -> None:
    """Refuse results under a mask that masked nothing: they would be those of `mask=none`."""
    if patched.mask.depends and not any(patched.found):
        detector = patched.mask.detector
        raise ValueError(
            f"mask/detector={detector.name} ({detector.threshold}) finds no token at block "
            f"{patched.detect} in any of the {patched.pictures} pictures, so mask="
            f"{patched.mask.name} would be mask=none; lower mask.detector."
            f"{detector.threshold.split('=')[0]}, or choose another detector or mask.detect."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice: its devices stand in the record, workers are a setting."""
    talk = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = talk.level
    talk.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
            yield
    finally:
        talk.setLevel(level)
