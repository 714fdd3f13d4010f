"""Every YAML composes, names a class that takes its settings, and has its Python half."""

from __future__ import annotations

import copy
import importlib
import inspect
from pathlib import Path

import pytest
from folders import variants_in
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from fna_lab.build import mistyped
from fna_lab.cli import conf_dir
from fna_lab.help import first_comment

CONF = conf_dir()
FILES = sorted(CONF.rglob("*.yaml"))
OPTIONS = [path.relative_to(CONF).with_suffix("").as_posix() for path in FILES]
EXPERIMENTS = [option for option in OPTIONS if option.startswith("experiment/")]
OPTIONS = [option for option in OPTIONS if "/" in option and option not in EXPERIMENTS]
PAIRED = ("attn", "attn/landmarks", "attn/solver", "mask", "mask/detector", "data", "task")
# What only a run can give, and what only a run reads.
GIVEN = {"data": {"transform"}, "task": {"backbone", "patched", "exact"}, "logger": {"save_dir"}}
READ_BY_RUN = {"attn": {"layers", "budget"}}


def composed(option: str) -> DictConfig:
    """The node of one option, composed as the command line would."""
    group, _, name = option.rpartition("/")
    overrides = [f"{group}={name}"]
    if group in ("attn/landmarks", "attn/solver"):
        overrides.insert(0, "attn=fna")
    if group == "mask/detector":
        overrides.insert(0, "mask=type2")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.select(compose("config", overrides=overrides), group.replace("/", "."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(CONF).as_posix())
def test_opens_with_a_comment(path: Path) -> None:
    assert len(first_comment(path)) > 10
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("option", OPTIONS)
def test_settings_bind_to_the_target(option: str) -> None:
    node, group = composed(option), option.rpartition("/")[0]
    if node.get("_target_") is None:
        assert option == "logger/none"
        return
    target = get_object(node["_target_"])
    settings = {key for key in node if not key.startswith("_")} - READ_BY_RUN.get(group, set())
    parameters = inspect.signature(target).parameters
    given = GIVEN.get(group, set())
    inspect.signature(target).bind(**dict.fromkeys(settings | given))
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        assert settings <= set(parameters)


@pytest.mark.parametrize("option", OPTIONS)
def test_values_are_of_the_types_that_signatures_say(option: str) -> None:
    node = composed(option)
    assert node.get("_target_") is None or mistyped(node) == ""


def test_a_value_of_another_type_is_named() -> None:
    node = composed("attn/fna")
    for key, value, said in (
        ("attn.sketch", "x", "attn.sketch='x': expected an integer or null."),
        ("attn.sketch", True, "attn.sketch=True: expected an integer or null."),
        ("attn.clusters", 1, "attn.clusters=1: expected true or false."),
        ("attn.guarantee", [3], "attn.guarantee=[3]: expected a list of names."),
        ("attn.landmarks.share", "a", "attn.landmarks.share='a': expected a number."),
    ):
        wrong = copy.deepcopy(node)
        OmegaConf.update(wrong, key.removeprefix("attn."), value)
        assert mistyped(wrong) == said


def parents_of(target: type) -> set[str]:
    """Names of every setting that a class and its parents take."""
    names: set[str] = set()
    for cls in target.__mro__:
        if "__init__" in vars(cls):
            names |= set(inspect.signature(cls.__init__).parameters)
    return names


@pytest.mark.parametrize(
    "option", [o for o in OPTIONS if o.rpartition("/")[0] in ("data", "task")]
)
def test_settings_behind_keywords_exist(option: str) -> None:
    node = composed(option)
    settings = {key for key in node if not key.startswith("_")}
    assert settings <= parents_of(get_object(node["_target_"]))


@pytest.mark.parametrize("option", EXPERIMENTS)
def test_an_experiment_says_what_it_is_and_changes_what_exists(option: str) -> None:
    name = option.rpartition("/")[2]
    text = (CONF / f"{option}.yaml").read_text()
    for words in (f"python -m fna_lab experiment={name}\n", "# Published: ", "# Expected: "):
        assert words in text
    smoke = OmegaConf.create(text)["smoke_overrides"]
    assert len(smoke) >= 1
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={name}"])
        assert cfg.name == name
        for group in ("backbone", "attn", "mask", "task", "data"):
            target = cfg[group]["_target_"]
            settings = {str(key) for key in cfg[group] if not str(key).startswith("_")}
            known = parents_of(get_object(target))
            assert settings - READ_BY_RUN.get(group, set()) <= known, group


@pytest.mark.parametrize("group", PAIRED)
def test_every_variant_is_one_file_and_one_yaml(group: str) -> None:
    package = importlib.import_module(f"fna_lab.{group.replace('/', '.')}")
    assert package.__file__ is not None
    variants = variants_in(Path(package.__file__).parent)
    assert {p.stem for p in (CONF / group).glob("*.yaml")} == variants
    for name in variants:
        target = composed(f"{group}/{name}")["_target_"]
        assert target.rpartition(".")[0] == f"fna_lab.{group.replace('/', '.')}.{name}"
        assert get_object(target).__module__ == target.rpartition(".")[0]


@pytest.mark.parametrize(
    ("overrides", "data"),
    [(["task=fidelity"], "Photos"), ([], "Shapes"), (["task=fidelity", "data=shapes"], "Shapes")],
)
def test_a_task_names_its_default_data(overrides: list[str], data: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config", overrides=overrides).data["_target_"].endswith(f"{data}Data")


def test_yaml_defaults_are_those_of_the_signature() -> None:
    wrong = []
    for option in OPTIONS:
        node = composed(option)
        if not str(node.get("_target_")).startswith("fna_lab."):
            continue
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        raw = OmegaConf.to_container(node, resolve=False)
        assert isinstance(raw, dict)
        for key, value in raw.items():
            default = getattr(parameters.get(str(key)), "default", inspect.Parameter.empty)
            plain = isinstance(value, int | float | bool | str) and not str(value).startswith("$")
            if option.startswith(("backbone", "data")) or default is inspect.Parameter.empty:
                continue
            if plain and value != default:
                wrong.append(f"{option}: {key}={value}, signature {default}")
    assert not wrong
