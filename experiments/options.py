"""From words of a command line to a typed dataclass; whatever is wrong with them is one sentence.

Parsing is tyro's. It explains mistakes in boxes of several lines, which are condensed here; for options that do not
exist the nearest one is proposed.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from typing import Any

import torch
import tyro

from learned_rl.tasks.base import unknown
from learned_rl.types import UserError


def parse(kind: Any, command: str, words: list[str], default: Any = None) -> Any:
    """The options of a command as its dataclass `kind`.

    Args:
        default: an instance with the defaults; None: those of `kind`.

    Raises:
        UserError: an option or value that does not exist.
        SystemExit: help was asked for, and printed.
    """
    prog, said = f"learned-rl {command}", io.StringIO()
    config = (tyro.conf.AvoidSubcommands,)
    try:
        with redirect_stderr(said):
            args, rest = tyro.cli(kind, prog=prog, args=words, default=default, config=config, return_unknown_args=True)
    except SystemExit as end:
        if end.code in (None, 0):
            raise
        raise UserError(f"{_condensed(said.getvalue())}; see `{prog} --help`.") from None
    sys.stderr.write(said.getvalue())
    if rest:
        word = rest[0].partition("=")[0]
        if word.startswith("-"):
            raise unknown(f"option of {prog}", word, ["--help", *_flags(default or kind)])
        raise UserError(f"{prog} has no use for the word {word!r}; see `{prog} --help`.")
    return args


def _flags(settings: Any, prefix: str = "") -> Iterator[str]:
    """Every option that a dataclass, or its instance, stands for."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name, None)
        name = f.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _flags(value, f"{prefix}{name}.")
            continue
        yield f"--{prefix}{name}"
        if isinstance(value, bool):
            yield f"--{prefix}no-{name}"


def _condensed(box: str) -> str:
    """What tyro says in a box: its first section, the expected form, and the nearest choice where choices are named."""
    lines = "\n".join(line.strip("│ ") for line in box.splitlines())
    sections = [part.strip() for part in re.split(r"^(?:[─╭╰]|----).*$", lines, flags=re.MULTILINE)]
    title = not box.lstrip().startswith("╭")  # where the terminal knows no such characters the title is a section
    message, *others = list(filter(None, sections))[title:] or [box]
    message = " ".join(message.split()).rstrip(".")
    if form := re.match(r"Argument helptext:\s+(--.*)", "".join(others)):
        message += f"; expected {form[1]}"
    if quoted := re.match(r"invalid choice '(.*?)' .*\((.*)\)$", message):
        nearest = difflib.get_close_matches(quoted[1], re.findall(r"'(.*?)'", quoted[2]), n=1, cutoff=0.0)
        message += f"; the nearest is {nearest[0]!r}"
    return message


def listed(names: str) -> list[str]:
    """The names of a comma-separated option, without the spaces around them; an empty one stays, to be refused."""
    return [name.strip() for name in names.split(",")]


def usable_device(name: str) -> None:
    """Checks that tensors can be made and read on a device.

    Raises:
        UserError: they cannot.
    """
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        accelerators = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        choices = ", ".join(["cpu", *accelerators])
        raise UserError(f"device is {name!r}: expected one that works here, such as {choices}.") from error
