"""Settings are dataclasses filled from YAML files and the command line by jsonargparse.

YAML strings may hold `${NAME}` or `${NAME:-default}` for environment variables, so that no recipe contains a machine's
paths. Unknown keys are errors that name the nearest valid key. On the command line dashes may stand for underscores, a
dataclass may declare short names of nested keys (`aliases: ClassVar[dict[str, str]]`; one that is `config` takes the place
of `--config FILE`), and a field whose type has a
classmethod `from_string` takes a plain string; `from_string` returns the keys that the string stands for. A dataclass whose
required fields are given by position may name optional ones that can follow them (`by_position: ClassVar[tuple[str, ...]]`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import typing
from collections import deque
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from lift.common.errors import UserError
from lift.common.files import write_text

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Settings = TypeVar("Settings")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def parse_settings(
    settings_class: type[Settings], arguments: list[str], prog: str, description: str, positional: bool = False
) -> Settings:
    """Fills `settings_class` from `--config FILE` (repeatable, later files win) and `--key value` (wins over files).

    Args:
        positional: required fields are given by position instead of by name (the dataclass must not be `kw_only`).
    Raises:
        UserError: unreadable file, unknown key, value of the wrong type, missing key.
    """
    parser = ArgumentParser(prog=prog, description=description, epilog=_short_forms(settings_class), exit_on_error=False)
    own_config = "config" in getattr(settings_class, "aliases", {})
    if not own_config:
        parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file with settings; repeatable")
    parser.add_class_arguments(settings_class, as_group=False, as_positional=positional, sub_configs=False)
    files, rest = ([], arguments) if own_config else _split_config_files(arguments)
    rest = _write_out(settings_class, rest)
    if positional:
        rest = _place_optional(settings_class, rest)
    merged: dict[str, Any] = {}
    for file in files:
        merged = _merge(merged, load_yaml(Path(file), settings_class))
    try:
        if merged:
            parser.set_defaults(_flatten(settings_class, merged))
        namespace = parser.parse_args(_spell_out_flags(settings_class, rest))
        namespace.pop("config", None)
        values = parser.instantiate(namespace)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            raise
        raise UserError(f"{prog}: {' '.join(str(error).split())} (see {prog} --help)") from error
    try:
        return settings_class(**vars(values))
    except ValueError as error:
        raise UserError(f"{prog}: {error}") from error


def load_yaml(path: Path, settings_class: type) -> dict[str, Any]:
    """Reads a settings file; raises UserError when it is missing, not YAML, has an unknown key or an unset variable."""
    if not path.is_file():
        raise UserError(f"{path}: expected a YAML settings file, but there is no such file. Check the path after --config.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(values).__name__}.")
    check_keys(settings_class, values, str(path))
    return _expand_variables(values, path)


def check_keys(settings_class: type, values: dict[str, Any], where: str, prefix: str = "") -> None:
    """Raises UserError at the first key of `values` that `settings_class` does not have, naming the nearest one."""
    fields = _field_types(settings_class)
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}: unknown key '{prefix}{key}'. {nearest(prefix + str(key), [prefix + f for f in fields])}")
        nested = _dataclass_in(fields[key])
        for item in value if isinstance(value, list) else [value]:
            if nested is not None and isinstance(item, dict):
                check_keys(nested, item, where, f"{prefix}{key}.")


def nearest(name: str, valid: list[str], what: str = "keys") -> str:
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"Did you mean '{matches[0]}'?" if matches else f"Valid {what}: {', '.join(sorted(valid))}."


def save_settings(settings: Any, path: Path) -> None:
    """Writes the resolved settings as YAML; the file can be given back with `--config`."""
    write_text(path, yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True))


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, paths to strings, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _split_config_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    files, rest, index = [], [], 0
    while index < len(arguments):
        if arguments[index] == "--config":
            if index + 1 == len(arguments):
                raise UserError("--config: expected a YAML file after it, found nothing.")
            files.append(arguments[index + 1])
            index += 2
        elif arguments[index].startswith("--config="):
            files.append(arguments[index].removeprefix("--config="))
            index += 1
        else:
            rest.append(arguments[index])
            index += 1
    return files, rest


def _short_forms(settings_class: type) -> str:
    """What `--help` says of the forms that only the command line has."""
    fields = _field_types(settings_class).items()
    strings = [(name, getattr(_dataclass_in(annotation), "from_string", None)) for name, annotation in fields]
    sentences = [f"--{name} takes {' '.join(read.__doc__.split())}" for name, read in strings if read is not None]
    short = [f"--{alias} for --{name}" for alias, name in getattr(settings_class, "aliases", {}).items()]
    return " ".join([*sentences, f"Short names: {', '.join(short)}." if short else "", "Dashes may stand for underscores."])


def _write_out(settings_class: type, arguments: list[str]) -> list[str]:
    """The arguments as the parser knows them: full names with underscores, values after `=`, strings written out as keys.

    A switch without a value is true. Lists of dataclasses append when an option is repeated.

    Raises:
        UserError: an option or a key that does not exist, or a string that `from_string` refuses.
    """
    aliases = getattr(settings_class, "aliases", {})
    valid = [*_option_names(settings_class), *aliases, "help"]
    written: list[str] = []
    lists: set[str] = set()
    waiting = deque(arguments)
    while waiting:
        argument = waiting.popleft()
        if not argument.startswith("--"):
            written.append(argument)
            continue
        option, equals, value = argument[2:].partition("=")
        name, plus = option.removesuffix("+").replace("-", "_"), "+" * option.endswith("+")
        if name.removesuffix(".help") not in valid:
            raise UserError(f"unknown option '--{option}'. {nearest(name, valid)}")
        name = aliases.get(name, name)
        annotation = _type_of(settings_class, name)
        if not equals and annotation is bool and (not waiting or waiting[0].lower() not in ("true", "false")):
            equals, value = "=", "true"
        elif not equals and annotation is not None and waiting and not waiting[0].startswith("--"):
            equals, value = "=", waiting.popleft()
        nested = _dataclass_in(annotation)
        if equals and (choices := _choices(annotation)) and value not in choices:
            raise UserError(f"--{option}: unknown value '{value}'. {nearest(value, choices, 'values')}")
        if equals and annotation == list[Path]:  # one path is a list of one; repeated, they add up
            value = value if value[:1] == "[" else json.dumps([value])
            written.append(f"--{name}{'+' if name in lists else plus}={value}")
            lists.add(name)
        elif not equals or nested is None:
            written.append(f"--{name}{plus}{equals}{value}")
        elif typing.get_origin(annotation) is list:
            written.append(f"--{name}{'+' if name in lists else plus}={_keys_of(nested, option, value)}")
            lists.add(name)
        elif hasattr(nested, "from_string") and value[:1] != "{" and value != "null":
            written += [f"--{name}.{key}={item}" for key, item in _from_string(nested, option, value).items()]
        else:
            written.append(f"--{name}={value}")
    return written


def _place_optional(settings_class: type, arguments: list[str]) -> list[str]:
    """The arguments, words after the required ones written as the options of `by_position`: the parser places only those.

    Raises:
        UserError: an option is given by position and by name.
    """
    without_default = (dataclasses.MISSING, dataclasses.MISSING)
    fields = dataclasses.fields(settings_class)
    required = sum((field.default, field.default_factory) == without_default for field in fields)
    words = [index for index, argument in enumerate(arguments) if not argument.startswith("-")]
    placed = list(arguments)
    for index, name in zip(words[required:], getattr(settings_class, "by_position", ()), strict=False):
        if any(argument.startswith(f"--{name}=") for argument in arguments):
            raise UserError(f"--{name}: given also by position, as '{arguments[index]}'. Give it once.")
        placed[index] = f"--{name}={arguments[index]}"
    return placed


def _keys_of(nested: type, option: str, value: str) -> str:
    """The list of dataclasses that `value` gives: JSON or YAML of one or of a list, or a string that stands for one."""
    if hasattr(nested, "from_string") and value[:1] not in ("[", "{"):
        return json.dumps([_from_string(nested, option, value)])
    try:
        items = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--{option}: not valid JSON: {' '.join(str(error).split())}") from error
    for item in items if isinstance(items, list) else [items]:
        if isinstance(item, dict):
            check_keys(nested, item, f"--{option}")
    return value if isinstance(items, list) else f"[{value}]"


def _from_string(nested: Any, option: str, value: str) -> dict[str, str]:
    try:
        keys = nested.from_string(value)
    except ValueError as error:
        raise UserError(f"--{option}: {error}") from error
    check_keys(nested, keys, f"--{option}")
    return keys


def _spell_out_flags(settings_class: type, arguments: list[str]) -> list[str]:
    """`--raw` to `--raw=true`: the parser wants a value after every option, people leave it out after a yes-or-no one."""
    flags = {f"--{name}" for name, annotation in _field_types(settings_class).items() if annotation is bool}
    spelt = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        bare = argument in flags and following.lower() not in ("true", "false", "yes", "no")
        spelt.append(f"{argument}=true" if bare else argument)
    return spelt


def _option_names(settings_class: type, prefix: str = "") -> list[str]:
    names = []
    for name, annotation in _field_types(settings_class).items():
        names.append(prefix + name)
        nested = _dataclass_in(annotation)
        if nested is not None:
            names += _option_names(nested, f"{prefix}{name}.")
    return names


def _field_types(settings_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(settings_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings_class)}  # type: ignore[arg-type]


def _type_of(settings_class: type, name: str) -> Any:
    """The annotation of the field with the dotted name, None when there is none (`help`)."""
    first, _, rest = name.partition(".")
    annotation = _field_types(settings_class).get(first)
    nested = _dataclass_in(annotation)
    return _type_of(nested, rest) if rest and nested is not None else annotation if not rest else None


def _choices(annotation: Any) -> list[str]:
    """The strings of `Literal[...]` or `Literal[...] | None`, `null` among them for None; nothing for other types."""
    choices: list[str] = []
    for part in typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, UnionType) else (annotation,):
        if part is type(None):
            choices.append("null")
        elif typing.get_origin(part) is typing.Literal and all(isinstance(value, str) for value in typing.get_args(part)):
            choices += typing.get_args(part)
        else:
            return []
    return choices


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass in `X`, `X | None` or `list[X]`, if there is one."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _flatten(settings_class: type, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts of dataclass fields to dotted keys, which is how the parser knows them."""
    fields = _field_types(settings_class)
    flat: dict[str, Any] = {}
    for key, value in values.items():
        annotation = fields[key]
        if isinstance(value, dict) and isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            flat |= _flatten(annotation, value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        both_dicts = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_dicts else value
    return merged


def _expand_variables(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _expand_variables(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_variables(item, path) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise UserError(f"{path}: '{value}' needs the environment variable {match[1]}. Set it: export {match[1]}=...")
        return found

    return _VARIABLE.sub(replace, value)
