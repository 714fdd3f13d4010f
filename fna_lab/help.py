"""What the command line says of itself, and of errors."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import MissingMandatoryValue
from rich.console import Console
from rich.markup import escape

USAGE = """[bold]python -m fna_lab[/] [dim]group=option  group.setting=value  ...[/]

  python -m fna_lab attn=fna mask=type2                        one run
  python -m fna_lab -m attn=exact,fna mask=none,type1,type2    every combination
  python -m fna_lab attn=fna --cfg job                         the settings, without running
"""


def print_help(conf: Path, console: Console) -> None:
    """Print usage, and every group with its options, one line each."""
    console.print(USAGE, highlight=False, soft_wrap=True)
    defaults = _defaults(conf / "config.yaml")
    folders = sorted(path for path in conf.rglob("*") if path.is_dir())
    for folder in sorted(folders, key=lambda f: _rank(f.relative_to(conf).as_posix(), defaults)):
        group = folder.relative_to(conf).as_posix()
        options = sorted(folder.glob("*.yaml"))
        if options:
            default = f"  [dim]default: {defaults[group]}[/]" if group in defaults else ""
            console.print(f"[bold]{group}=[/]{default}", highlight=False)
        for path in options:
            console.print(
                f"  {path.stem:24} {escape(first_comment(path))}", highlight=False, soft_wrap=True
            )
    console.print("[bold]other settings[/]")
    for key, value, comment in _settings(conf / "config.yaml"):
        text = f"{key}={value}"
        console.print(f"  {text:19}{comment}", highlight=False, soft_wrap=True)


def first_comment(path: Path) -> str:
    """The comment that opens a config file, behind its package where it names one."""
    lines = [line for line in path.read_text().split("\n") if not line.startswith("# @")]
    return lines[0].lstrip("# ") if lines[0].startswith("#") else ""


def explain(error: Exception, conf: Path) -> str:
    """One line that says what is wrong, with the values that would be right where known."""
    text = str(error) or type(error).__name__
    missing = re.search(r"Could not find '(?P<group>[\w/]+)/(?P<option>[^'/]*)'", text)
    if missing and (conf / missing["group"]).is_dir():
        options = sorted(path.stem for path in (conf / missing["group"]).glob("*.yaml"))
        group, option = missing["group"], missing["option"]
        return f"{group}={option}: there is no such option; expected {_list(options)}."
    unset = re.search(r"full_key: (?P<key>[\w.]+)", text)
    if unset and isinstance(error, MissingMandatoryValue):
        return f"{unset['key']} is not set: expected {unset['key']}=VALUE."
    unknown = re.search(r"Could not override '(?P<key>[^']+)'", text)
    if unknown:
        return _explain_key(unknown["key"], text)
    unread = re.match(r"(?s)(?:Error parsing override|no viable .* at input) '(.*?)'", text)
    if unread:
        return (
            f"{unread[1]}: cannot be read; expected group=option or group.setting=value, with "
            "every bracket and quote closed."
        )
    several = re.match(r"Ambiguous value for argument '(.*?)'\n", text)
    if several:
        return f"{several[1]}: expected one value; -m runs every value, [a,b] is a list."
    merged = re.match(r"Error merging override (.*)", text)
    if merged:
        key = merged[1].partition("=")[0]
        return f"{merged[1]}: expected a setting inside it, {key}.NAME=VALUE."
    line = " ".join(part.strip() for part in text.split("\n") if part.strip())
    if isinstance(error, OSError) and error.strerror:  # the system's own: what we read is wrapped
        line = f"outputs: cannot write {error.filename} ({error.strerror})"
    known = (ValueError, TypeError, NotImplementedError, OSError, ImportError)
    if not isinstance(error, known) and not type(error).__module__.startswith("hydra"):
        line = f"{type(error).__name__}: {line} (HYDRA_FULL_ERROR=1 shows the traceback)"
    return line


def _explain_key(key: str, text: str) -> str:
    hint = "python -m fna_lab --help lists groups and options"
    near = re.search(r"Did you mean to override (\S+?)\?", text)
    if near:
        return f"{key}: there is no such group; did you mean {near[1]}? {hint}."
    group, _, part = key.partition("/")
    if part:
        return f"{key}: the {group} that is chosen has no {part}; choose one that has, then {key}."
    if "." in key:
        hint = f"add --cfg job to see the settings of {key.rpartition('.')[0]}"
    return f"{key}: there is no such setting; {hint}."


def _list(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"one of {', '.join(options)}"


def _rank(group: str, defaults: dict[str, str]) -> tuple[int, str]:
    order = list(defaults)
    head = group.split("/")[0]
    return (order.index(head) if head in order else len(order), group)


def _defaults(path: Path) -> dict[str, str]:
    found = re.findall(r"^  - (\w+): (\w+)$", path.read_text(), flags=re.M)
    return dict(found)


def _settings(path: Path) -> list[tuple[str, str, str]]:
    lines = re.findall(r"^(\w+): +([^\s#{]+)[ \t]*(?:# (.*))?$", path.read_text(), flags=re.M)
    return [(key, value, comment) for key, value, comment in lines]
