"""Where a study's trials are kept.

| storage | for |
|---|---|
| `study.db`, `sqlite:///study.db` | workers on one machine: one SQLite file (also `.sqlite`, `.sqlite3`) |
| `study.log`, `journal:study.log`, `journal:///study.log` | the same: one text file that only grows (also `.journal`) |
| `postgresql://user:password@host/name`, `mysql+pymysql://...` | workers on any number of machines |

After `sqlite:///` and `journal:///` a path is relative, as SQLAlchemy has it; with a fourth slash it is absolute.

Processes open a storage for themselves: what was opened before a fork is not shared.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import functools
import json
import os
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from experiments.tuning.requeue import Retries
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError

HEARTBEAT, GRACE = 30, 90  # seconds between signs of life on a server, and without any until a trial counts as lost
BUSY = 60.0  # seconds to wait for SQLite's lock
CONNECT = 10  # seconds to wait for a server
RACES = 8  # workers that create the same tables at once get in each other's way, but never this often

FILES = {".db": "sqlite", ".sqlite": "sqlite", ".sqlite3": "sqlite", ".log": "journal", ".journal": "journal"}
SCHEMES = ("journal", "mysql", "postgresql", "postgresql+psycopg", "sqlite")
RECORD = b'{"op_code":'  # how every line of a journal begins
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


# --- what a URL names ------------------------------------------------------------------------------------------------


def masked(url: str) -> str:
    """The URL without its passwords."""
    url = re.sub(r"(?i)([?&][^=&]*pass[^=&]*=)[^&]*", r"\1***", url)
    return re.sub(r"(://[^:@/]*:).*@", r"\1***@", url)  # up to the last @: who forgets to quote one has it hidden too


def place_of(url: str) -> tuple[str, Path] | None:
    """Kind and path of a storage in a file; None for a server."""
    scheme, colon, rest = url.partition(":")
    if not colon or "/" in scheme:
        return _kind(url), Path(url)
    dialect = scheme.partition("+")[0]
    if scheme not in SCHEMES and dialect != "mysql":
        raise unknown("scheme of a study storage", scheme, SCHEMES)
    if dialect in ("mysql", "postgresql"):
        return None
    path = rest.removeprefix("///")
    slashes = path != rest or (dialect == "journal" and not rest.startswith("//"))
    if not slashes or "?" in path or path in ("", ":memory:"):
        end = "db" if dialect == "sqlite" else "log"
        raise UserError(f"Study storage '{masked(url)}' names no file: expected {dialect}:///study.{end}.")
    return dialect, Path(path)


def _kind(path: str) -> str:
    """The kind of storage that a path's ending stands for."""
    ending = Path(path).suffix.lower()
    if ending in FILES:
        return FILES[ending]
    nearest = difflib.get_close_matches(ending, FILES, n=1, cutoff=0.0)[0] if ending else ".db"
    stem = path[: len(path) - len(ending)] or "study"
    raise UserError(
        f"Study storage '{path}' is neither a file that ends in {', '.join(FILES)} nor the URL of a server: expected "
        f"'{stem}{nearest}', or for example postgresql://user:password@host/name."
    )


def _server(url: str) -> str:
    """The URL as SQLAlchemy takes it."""
    try:
        parsed = sqlalchemy.make_url(url)
        if "@" in (parsed.host or ""):
            raise ValueError("an @ in a password is written %40")
    except (ArgumentError, ValueError) as error:
        raise UserError(
            f"Study storage '{masked(url)}' is no URL of a server, expected postgresql://user:password@host:port/name: "
            f"{str(error).rstrip('.')}."
        ) from error
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed.render_as_string(hide_password=False)


# --- opening ---------------------------------------------------------------------------------------------------------


def open_storage(url: str) -> BaseStorage:
    """The storage that a path or URL names, created unless it exists.

    Raises:
        UserError: it names no storage, or one that cannot be reached, read or written, or of another Optuna's version.
    """
    place = place_of(url)
    try:
        if place is None:
            return _raced(functools.partial(_Server, _server(url)))
        kind, path = place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()  # an empty file is an empty journal, and an empty database
        return _sqlite(path) if kind == "sqlite" else _journal(path)
    except ImportError as error:
        raise UserError(_missing_driver(url, error)) from error
    except RuntimeError as error:
        upgrade = f"`optuna storage upgrade --storage {masked(url) if '://' in url else f'sqlite:///{url}'}`"
        raise UserError(
            f"Study storage {masked(url)} has the tables of another version of Optuna than {optuna.__version__}: "
            f"{f'run {upgrade}' if 'storage upgrade' in str(error) else 'update Optuna'}, or name another storage."
        ) from error
    except (StorageInternalError, SQLAlchemyError, OSError) as error:
        raise _refusal(url, error, "Cannot open study storage {}: {}.") from error


def _missing_driver(url: str, error: ImportError) -> str:
    if url.startswith("postgresql"):
        return "Studies on PostgreSQL need the driver psycopg: run pip install 'learned-rl[postgresql]'."
    module = getattr(error.__cause__, "name", None) or "of a driver"
    return (
        f"Study storage {masked(url)} needs the module {module}, which is not installed: run pip install pymysql and "
        "write mysql+pymysql://, or install another driver that SQLAlchemy knows."
    )


def _raced(make: Callable[[], RDBStorage]) -> RDBStorage:
    """Makes a storage, again if another process creates the same tables at this moment."""
    for attempt in range(RACES):
        try:
            return make()
        except SQLAlchemyError as error:
            raced = isinstance(error, IntegrityError) or "already exists" in str(error)
            if not raced or attempt + 1 == RACES:
                raise
            time.sleep(0.05 * (attempt + 1))
    raise AssertionError


def _sqlite(path: Path) -> RDBStorage:
    """A database whose transactions exclude each other from their first read on.

    SQLite does not know SELECT ... FOR UPDATE, with which Optuna keeps two workers from taking the same trial. No
    write-ahead log: it would let readers read while others write, which does not happen then, and is three files.
    """
    connect = functools.partial(
        sqlite3.connect, str(path), timeout=BUSY, isolation_level=None, check_same_thread=False
    )  # a path in a URL would need quoting, which SQLAlchemy's versions do not agree about
    storage = _raced(lambda: RDBStorage("sqlite:///file", engine_kwargs={"creator": connect}))

    @sqlalchemy.event.listens_for(storage.engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    with storage.engine.begin():  # refused here where the file may only be read
        return storage


def _journal(path: Path) -> JournalStorage:
    """A journal in which every line is a record."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        for number, line in enumerate(file, 1):
            if not (_is_record(line) if line.endswith(b"\n") else _is_torn(line)):
                raise _DamagedError(f"line {number} is no record of a study")
    try:
        return JournalStorage(_Journal(str(path)))
    except StorageInternalError:
        raise
    except Exception as error:  # records that contradict each other, in whatever way
        raise _DamagedError(f"{type(error).__name__} {error}".rstrip()) from error


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "op_code" in record


def _is_torn(tail: bytes) -> bool:
    """Whether an unfinished line is what a full disk, a killed process or a power cut leaves of a record."""
    return RECORD.startswith(tail[: len(RECORD)]) or not tail.strip(b"\0")


class _DamagedError(StorageInternalError):
    """Content that no worker wrote."""


class _Journal(JournalFileBackend):
    """A journal that survives full disks and killed workers.

    Optuna's own writes on after half a line, and can never be read again from there on; and its lock outlives a killed
    process by half a minute, the kernel's does not. Whoever only reads skips half a line at the end.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with _wrapped(), open(self._file_path, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _mend(file)
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        with _wrapped():
            yield from super().read_logs(log_number_from)


@contextmanager
def _wrapped() -> Iterator[None]:
    """Turns a journal's failures into Optuna's exception, to tell them from an objective's."""
    try:
        yield
    except OSError as error:
        raise StorageInternalError(str(error)) from error
    except ValueError as error:
        raise _DamagedError(f"a line is no record of a study: {error}") from error


def _mend(file: FileIO) -> None:
    """Goes to a journal's end, and cuts off half a line there."""
    file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
    if file.read() in (b"", b"\n"):
        return
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if not _is_torn(content[whole:]):
        raise _DamagedError("its last line is no record of a study")
    file.truncate(whole)
    file.seek(whole)


class _Server(RDBStorage):
    """A database on a server, with heartbeats."""

    def __init__(self, url: str) -> None:
        self._silent: dict[int, dict[int, float]] = {}
        options = {} if "connect_timeout" in url else {"connect_timeout": CONNECT}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(
                url.replace("{", "{{").replace("}", "}}"),  # Optuna takes it for a format string
                engine_kwargs={"pool_pre_ping": True, "connect_args": options},
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=Retries(),
            )

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(StorageInternalError, SQLAlchemyError):  # the next one may get through; an error ends the thread
            super().record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Trials without a sign of life; Optuna leaves out those whose worker died before the first one."""
        silent = sqlalchemy.text(
            "SELECT trial_id FROM trials WHERE study_id = :study AND state = 'RUNNING' "
            "AND trial_id NOT IN (SELECT trial_id FROM trial_heartbeats)"
        )
        with self.engine.connect() as connection:
            found = connection.execute(silent, {"study": study_id}).scalars().all()
        seen = self._silent[study_id] = first_seen(found, self._silent.get(study_id, {}))
        lost = [trial_id for trial_id, since in seen.items() if time.monotonic() - since > GRACE]
        return super()._get_stale_trial_ids(study_id) + lost


def first_seen(trials: Sequence[int], before: dict[int, float]) -> dict[int, float]:
    """Since when this process has seen each of the trials: machines need not agree about the time."""
    now = time.monotonic()
    return {trial: before.get(trial, now) for trial in trials}


# --- failures --------------------------------------------------------------------------------------------------------


@contextmanager
def speaking_storage(url: str) -> Iterator[None]:
    """Turns a storage's failure into one sentence, and leaves an objective's exceptions alone.

    Raises:
        UserError: the disk is full, the server is gone, the file is locked or damaged.
    """
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        kept = "finished trials are kept, and the same command continues once it works again"
        raise _refusal(url, error, "Study storage {} failed ({}): " + kept + ".") from error


def _refusal(url: str, error: Exception, sentence: str) -> UserError:
    """What to tell the user: about damage, a full disk or a lock; else `sentence`, of a storage and a reason."""
    cause = error if isinstance(error, _DamagedError) else error.__cause__ or error
    cause = getattr(cause, "orig", None) or cause if isinstance(cause, SQLAlchemyError) else cause
    reason, where, kept = _reason(cause), masked(url), "finished trials are kept, and the same command continues once"
    low = reason.lower()
    if isinstance(cause, _DamagedError) or "malformed" in low or "not a database" in low:
        sentence = "Study storage {} is damaged or no storage of studies ({}): restore it from a copy, or name another."
    elif "is full" in low or "no space left" in low or getattr(cause, "errno", None) in FULL:
        sentence = "The disk of study storage {} is full ({}): " + kept + " there is room."
    elif "disk i/o error" in low:  # what SQLite says of quotas and limits too
        sentence = "The disk of study storage {} is full or failing ({}): " + kept + " it can be written."
    elif "database is locked" in low:
        sentence = "Study storage {} stayed locked by another process ({}): " + kept + " that one ends."
    return UserError(sentence.format(where, reason))


def _reason(cause: BaseException) -> str:
    """The line of an error message that says what happened."""
    if isinstance(cause, IsADirectoryError):
        return "it is a folder, expected a file in it such as study.db"
    if isinstance(cause, FileExistsError):
        return "its folder is a file"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    lines = str(cause).splitlines() or [type(cause).__name__]
    line = lines[-1] if lines[0].endswith(":") else lines[0]  # several addresses of a host, each with its failure
    return " ".join(line.split()).rstrip(".")
