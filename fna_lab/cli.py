"""The command line: compose `conf/`, run, print a table; every error ends in one line."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fna_lab.help import explain, print_help

log = logging.getLogger(__name__)


def conf_dir() -> Path:
    """The folder of configs: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def main() -> None:
    """Entry point of `python -m fna_lab` and `fna-lab`."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_help(conf_dir(), Console())
        return
    OmegaConf.register_new_resolver("pid", lambda: str(os.getpid()), replace=True)
    done: list[Path] = []
    failed: dict[str, Exception] = {}

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def job(cfg: DictConfig) -> dict[str, float]:
        return _job(cfg, done, failed)

    # Without this, Hydra prints a traceback of its own and leaves no chance to say what is wrong.
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    stopped = False
    try:
        check_arguments(sys.argv[1:], conf_dir())
        sys.argv[1:] = spread(smoke(flags_last(sys.argv[1:]), conf_dir()))
        job()
    except Exception as error:
        if error not in failed.values():
            failed[""] = error
    except KeyboardInterrupt:
        stopped = True
    _print_sweep(done)
    if failed and full:
        raise next(iter(failed.values()))
    for label, error in failed.items():
        print(f"error: {label}{explain(error, conf_dir())}", file=sys.stderr)
    if stopped:
        print("interrupted; a sweep started again keeps what is finished", file=sys.stderr)
        sys.exit(130)  # as shells expect it
    sys.exit(1 if failed else 0)


def check_arguments(arguments: list[str], conf: Path) -> None:
    """Refuse what Hydra takes in silence, or refuses without a word on how it is written here.

    Raises:
        ValueError: an empty folder name, a part that is left out, or a setting with dashes.
    """
    for text in arguments:
        key, equal, value = text.partition("=")
        if key in ("name", "outputs") and equal and value.strip("'\"") in ("", "null"):
            raise ValueError(f"{text}: expected the name of a folder.")
        bare = key.lstrip("~-")
        part = bare and (conf / bare).is_dir()
        if part and key.startswith("~") and "/" not in bare and bare != "experiment":
            raise ValueError(f"{text}: a run needs its {bare}; expected {bare}=NAME.")
        if part and key.startswith("--"):
            raise ValueError(f"{text}: settings have no dashes; expected {bare}=NAME.")


def flags_last(arguments: list[str]) -> list[str]:
    """Make `attn=fna -m mask=type1,type2` work: settings on both sides of a flag are refused."""
    flags = [text for text in arguments if text in ("-m", "--multirun")]
    return [text for text in arguments if text not in flags] + flags


def smoke(arguments: list[str], conf: Path) -> list[str]:
    """Put what an experiment's `smoke_overrides` say before the user's own settings.

    Raises:
        ValueError: `smoke=true` without an experiment.
    """
    said = dict(text.split("=", 1) for text in arguments if "=" in text)
    if said.get("smoke", "false").lower() not in ("true", "false"):
        raise ValueError(f"smoke={said['smoke']}: expected true or false.")
    if said.get("smoke", "false").lower() == "false":
        return arguments
    path = conf / "experiment" / f"{said.get('experiment')}.yaml"
    if "experiment" not in said:
        raise ValueError("smoke=true: expected an experiment beside it, experiment=NAME.")
    if not path.is_file():
        return arguments  # Hydra says which experiments there are
    node = OmegaConf.load(path)
    more = OmegaConf.select(node, "smoke_overrides") or []
    keys = {text: text.split("=")[0] for text in more}
    # Settings of an option that smoke would have chosen itself are no use with another one.
    gone = {*keys.values()} & {*said} - {"data"}
    mine = [
        text
        for text, key in keys.items()
        if key not in said and key.split(".")[0] not in gone and _fits(key, said, conf)
    ]
    sweeps = OmegaConf.select(node, "hydra.mode") == "MULTIRUN"  # over what smoke names
    return [*mine, *arguments, *(["--multirun"] if sweeps else [])]


def _fits(key: str, said: dict[str, str], conf: Path) -> bool:
    """Whether a setting exists in the option that the user chose of its group, if any."""
    group, _, name = key.partition(".")
    if not name or group not in said or group == "data":  # those of data, all data sets have
        return True
    paths = [conf / group / f"{option}.yaml" for option in said[group].split(",")]
    return all(path.is_file() and name.split(".")[0] in OmegaConf.load(path) for path in paths)


def spread(arguments: list[str]) -> list[str]:
    """Make `-m attn=fna,subset attn.num_landmarks=32` work, though the default has no landmarks.

    Hydra first composes a multirun without its swept options, and would refuse the settings that
    only those options have. A setting of a swept group is therefore swept, too, over one value.
    """
    if not {"-m", "--multirun"} & set(arguments):
        return arguments
    parser = OverridesParser.create()
    parsed = {}
    for text in arguments:
        if "=" in text and not text.startswith("-"):
            try:
                parsed[text] = parser.parse_override(text)
            except HydraException:
                return arguments  # Hydra says what is wrong with it
    swept = {one.key_or_group for one in parsed.values() if one.is_sweep_override()}
    heads = tuple(f"{group}{mark}" for group in swept for mark in "./")
    out = []
    for text in arguments:
        one = parsed.get(text)
        if one and not one.is_sweep_override() and one.key_or_group.startswith(heads or ("\0",)):
            key, _, value = text.partition("=")
            text = f"{key}=choice({value})"
        out.append(text)
    return out


def _job(cfg: DictConfig, done: list[Path], failed: dict[str, Exception]) -> dict[str, float]:
    from fna_lab.report import record, table  # torch: not for --help and --cfg
    from fna_lab.run import run

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    sweep = hydra_cfg.mode == RunMode.MULTIRUN
    try:
        old = None
        if not isinstance(cfg.force, bool):
            raise ValueError(f"force={cfg.force!r}: expected true or false.")
        if sweep and not cfg.force:
            config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            old = record.find(Path(cfg.outputs) / cfg.name, config)
        if old is not None:
            log.info("already measured with this config and code: %s (force=true to repeat)", old)
            found = record.read(old)
        else:
            found = run(cfg, folder)
            table.show(found, table.console_for([found]))
            log.info("results: %s", folder)
    except Exception as error:
        log.debug("", exc_info=True)  # the traceback, to run.log
        failed[f"job {hydra_cfg.job.num}: " if sweep else ""] = error
        if sweep:  # so that any launcher and sweeper learns of it; the other jobs go on
            log.error("job %s failed: %s", hydra_cfg.job.num, explain(error, conf_dir()))
            raise
        return {}
    done.append(old or folder)
    return found["metrics"]


def _print_sweep(done: list[Path]) -> None:
    if len(done) < 2:
        return
    from fna_lab.report import record, sweep, table

    records = [record.read(folder) for folder in done]
    sweep.show_sweep(records, table.console_for(records))
