"""The configuration of a run: the settings every run has and those of its method; its YAML form, and what may change.

Order of precedence: preset < `--config` file < flags. A method is one line in `METHODS`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from .durable import write_durably
from .flags import AvoidSubcommands, OmitArgPrefixes
from .methods.settings.dacl import DACLConfig
from .methods.settings.dino import DINOConfig
from .methods.settings.imix import IMixConfig
from .methods.settings.method import Settings
from .methods.settings.mochi import MoCHiConfig
from .methods.settings.mocov3 import MoCoV3Config
from .methods.settings.supervised import SupervisedConfig
from .reading import read_yaml
from .settings import ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig, near, with_channels
from .text import brief, one_line

if typing.TYPE_CHECKING:
    from .methods.method import Method

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "Config",
    "ConfigError",
    "DataConfig",
    "MethodName",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "drift",
    "from_dict",
    "load_config",
    "near",
    "save_config",
    "to_dict",
    "with_method",
]

METHODS: dict[str, type[Settings]] = {
    "mocov3": MoCoV3Config,
    "dino": DINOConfig,
    "imix": IMixConfig,
    "dacl": DACLConfig,
    "mochi": MoCHiConfig,
    "supervised": SupervisedConfig,
}
"""Settings by the name that `--method` knows them by; they know their method."""

DEFAULT_METHOD = next(iter(METHODS))

# Built from the registry, where mypy cannot follow; tyro reads them at run time.
if typing.TYPE_CHECKING:
    MethodName = str
    MethodSettings = Any
else:
    MethodName = Literal[tuple(METHODS)]
    MethodSettings = Union[tuple(METHODS.values())]  # noqa: UP007


def first_settings() -> MethodSettings:
    """The settings of the default method."""
    return METHODS[DEFAULT_METHOD]()


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    model: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    method: OmitArgPrefixes[AvoidSubcommands[MethodSettings]] = field(default_factory=first_settings)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)

    @property
    def method_name(self) -> str:
        """What `--method` calls the method whose settings these are."""
        return next(name for name, settings in METHODS.items() if settings is type(self.method))

    @property
    def method_class(self) -> type[Method]:
        """The method itself, which needs torch; the settings do not."""
        return self.method.method_class()

    @property
    def backbone_options(self) -> dict[str, Any]:
        """What the method asks of the backbone besides the settings in `model`; see `models.timm_arguments`."""
        return self.method_class.backbone_options(self.method)


def with_method(config: Config, name: str) -> Config:
    """`config` for the method of this name: as it is where that is its method, else with that one's defaults.

    Raises:
        ConfigError: for an unknown name, with near matches.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"method is {brief(name)}; expected one of {', '.join(METHODS)}.{near(name, METHODS)}")
    return config if name == config.method_name else dataclasses.replace(config, method=METHODS[name]())


# Fields that may differ between a run and its resumption: they move no number of the training itself. The data folder
# may move, but its list of files is digested and compared.
NOT_MATHS = frozenset(
    {"data.data", "data.test_data", "data.bad_images", "data.workers"}
    | {"data.max_bad_frac", "data.check", "data.max_pixels"}
    | {"run.preset", "run.device", "run.log_every_steps", "run.save_every_epochs", "run.keep_checkpoints"}
    | {"run.save_every_minutes", "run.tensorboard", "run.wandb", "run.mlflow"}
    | {"run.knn_every_epochs", "run.knn_max_images", "run.max_steps", "run.max_bad_steps"}
)


def flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """All settings as ("group.field", value); the method's begin with its name."""
    for group in dataclasses.fields(config):
        if group.name == "method":
            yield "method.name", config.method_name
        for item in dataclasses.fields(getattr(config, group.name)):
            yield f"{group.name}.{item.name}", getattr(getattr(config, group.name), item.name)


def drift(old: Config, new: Config) -> list[str]:
    """The settings that differ and would change the training, one line each."""
    if old.method_name != new.method_name:
        return [f"method.name: {old.method_name!r} -> {new.method_name!r}"]
    before = dict(flatten(old))
    return [
        f"{name}: {before[name]!r} -> {value!r}"
        for name, value in flatten(new)
        if name not in NOT_MATHS and value != before[name]
    ]


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dictionaries, tuples as lists: what YAML and JSON hold."""
    plain: dict[str, dict[str, Any]] = {}
    for name, value in flatten(config):
        group, _, key = name.partition(".")
        plain.setdefault(group, {})[key] = list(value) if isinstance(value, tuple) else value
    return plain


def from_dict(settings: Mapping[str, Any], base: Config, source: str = "config") -> Config:
    """`base` with the given groups' fields replaced. Unknown names and wrong types raise `ConfigError`."""
    known_groups = [item.name for item in dataclasses.fields(base)]
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{source}: expected groups ({', '.join(known_groups)}), found {type(settings).__name__}")
    settings = in_todays_groups(settings)
    groups = {}
    for group, values in settings.items():
        if group not in known_groups:
            raise ConfigError(f"{source}: unknown group {brief(group)}.{near(group, known_groups)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: {group} must hold names and values, found {brief(values)}")
        if group == "method" and "name" in values:
            base = with_method(base, values["name"])
            values = {key: value for key, value in values.items() if key != "name"}
        current = getattr(base, group)
        hints = typing.get_type_hints(type(current))
        for key in values:
            if key not in hints:
                name = one_line(key) if isinstance(key, str) else brief(key)
                raise ConfigError(f"{source}: unknown setting {group}.{name}.{near(key, hints)}")
        if group == "data" and "channels" in values:
            current = with_channels(current, coerce(values["channels"], int, f"{source}: data.channels"))
        coerced = {key: coerce(value, hints[key], f"{source}: {group}.{key}") for key, value in values.items()}
        groups[group] = dataclasses.replace(current, **coerced)
    return dataclasses.replace(base, **groups)


def in_todays_groups(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Files of version 0.1 had a group `mixing`, called the method's name `method`, and froze patches in `model`."""
    groups = {name: dict(values) if isinstance(values, Mapping) else values for name, values in settings.items()}
    moved: dict[str, Any] = {}
    if isinstance(groups.get("mixing"), dict):
        moved |= groups.pop("mixing")
    if isinstance(groups.get("model"), dict) and "stop_grad_conv1" in groups["model"]:
        moved["stop_grad_conv1"] = groups["model"].pop("stop_grad_conv1")
    method = groups.setdefault("method", {}) if moved else groups.get("method")
    if isinstance(method, dict):
        if "method" in method:
            moved["name"] = method.pop("method")
        method.update({name: value for name, value in moved.items() if name not in method})
    return groups


def coerce(value: Any, wanted: Any, name: str) -> Any:
    """`value` read from YAML as the type of the field; `ConfigError` when it is not one."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is Literal and value in inner:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        kinds = [kind for kind in inner if kind is not type(None)]
        listed = [kind for kind in kinds if (get_origin(kind) is tuple) == isinstance(value, list | tuple)]
        return coerce(value, (listed or kinds)[0], name)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if Ellipsis in inner else list(inner)
        if len(kinds) == len(value):
            return tuple(coerce(v, kind, name) for v, kind in zip(value, kinds, strict=True))
    if wanted is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 (no point) as text
        except (ValueError, OverflowError):
            pass
    if wanted is int and type(value) is int and abs(value) < 2**63:
        return value
    if wanted is str and type(value) is str and "\0" not in value:
        return value
    if wanted is bool and type(value) is bool:
        return value
    expected = f"one of {', '.join(map(str, inner))}" if origin is Literal else str(getattr(wanted, "__name__", wanted))
    raise ConfigError(f"{name} is {brief(value)}; expected {expected}.{near(value, map(str, inner))}")


def save_config(config: Config, path: Path) -> None:
    """Write the YAML that `--config` accepts; a kill leaves the former file or the new one."""
    write_durably(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def load_config(path: Path, base: Config) -> Config:
    """`base` overridden by a YAML file."""
    return from_dict(read_settings(path), base, str(path))


def read_settings(path: Path) -> Any:
    """What a YAML file of settings holds; nothing is a mapping without names."""
    try:
        settings = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config file {path}: {one_line(error)}") from error
    return {} if settings is None else settings
