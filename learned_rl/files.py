"""Writing files that appear whole or not at all, and saying so when they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from learned_rl.types import UserError


@contextmanager
def speaking(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write at `path` into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` in one step once it is wholly on disk; after any error, nothing changed.

    Raises:
        UserError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    with speaking(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            with suppress(OSError):
                part.unlink()
        if os.name == "posix":  # elsewhere a folder cannot be opened, and renaming is durable by itself
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
