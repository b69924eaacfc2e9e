"""Settings as TOML: what a study found best, as `train` and `meta-train` take it with `--config FILE`.

The file's tables are the command's options: `[config.hyper] gamma = 0.99` is `--config.hyper.gamma 0.99`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from learned_rl.files import replacing
from learned_rl.spaces import get, replaced
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError


def config_option(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that `--config FILE` names among a command's words, and the words without it.

    Raises:
        UserError: no file follows the option.
    """
    file, rest = early_option("--config", "a file, such as the best.toml that `learned-rl tune` writes", words)
    return None if file is None else Path(file), rest


def early_option(option: str, what: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of an option on which the others' defaults depend, and the words without it.

    Raises:
        UserError: it is given twice, or no value follows.
    """
    rest, value = list(words), None
    if sum(word == option or word.startswith(f"{option}=") for word in words) > 1:
        raise UserError(f"{option} was given twice: name one.")
    for i, word in enumerate(words):
        if word == option and i + 1 < len(words) and not words[i + 1].startswith("-"):
            value, rest = words[i + 1], [*words[:i], *words[i + 2 :]]
        elif word == option:
            raise UserError(f"{option} needs {what}.")
        elif word.startswith(f"{option}="):
            value, rest = word.partition("=")[2], [*words[:i], *words[i + 1 :]]
    return value, rest


def write_config(path: Path, settings: Any, about: str) -> Path:
    """Write a dataclass of settings, with comment lines above; None is left out, for TOML has no word for it."""
    comment = "".join(f"# {line}\n" for line in about.splitlines())
    with replacing(path) as file:
        file.write((comment + "\n" + tomli_w.dumps(_plain(settings))).encode())
    return path


def read_config(path: Path, defaults: Any) -> Any:
    """`defaults` (a dataclass) with what the file says.

    Raises:
        UserError: it cannot be read, is no TOML, names a setting that does not exist, or gives it a value of another
            kind.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML file: {error}.") from error
    return configured(defaults, values, str(path))


def configured(defaults: Any, values: dict[str, Any], source: str) -> Any:
    """`defaults` (a dataclass) with values as TOML has them.

    Raises:
        UserError: a setting that does not exist, or a value of another kind; it begins with the `source`.
    """
    try:
        return replaced(defaults, dict(_leaves(values, defaults)))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {k: _plain(v) for k, v in named.items() if v is not None}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _leaves(values: dict[str, Any], defaults: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every value in the file, checked against the kind of the setting that it replaces."""
    free = isinstance(defaults, dict)  # such as a component's settings, which the component itself checks
    kinds = {} if free else get_type_hints(type(defaults))
    for name, value in values.items():
        where = f"{prefix}{name}"
        if free:
            yield where, tuple(value) if isinstance(value, list) else value
            continue
        if name not in kinds:
            raise unknown("setting", where, [f"{prefix}{k}" for k in kinds])
        default = get(defaults, name)
        if isinstance(value, dict) and (dataclasses.is_dataclass(default) or isinstance(default, dict)):
            yield from _leaves(value, default, f"{where}.")
        else:
            yield where, _of_kind(where, value, default, kinds[name])


def _of_kind(where: str, value: Any, default: Any, kind: Any) -> Any:
    """The value as the setting holds it."""
    held = tuple(value) if isinstance(value, list) else value
    if get_origin(kind) is Literal and held not in get_args(kind):
        raise unknown(where, str(value), get_args(kind))
    try:
        check_type(held, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        truths = [x for x in (held if isinstance(held, tuple) else (held,)) if isinstance(x, bool)]
        if truths and "bool" not in str(kind):  # True is an int to Python
            raise TypeCheckError("a truth value")
    except TypeCheckError:
        name = kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
        such = "" if dataclasses.is_dataclass(default) else f", such as {default!r}"
        raise UserError(f"{where} is {value!r}: expected {name}{such}.") from None
    return float(held) if isinstance(held, int) and isinstance(default, float) else held
