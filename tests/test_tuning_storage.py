"""Where studies live: what names a storage, what is said when it fails, and that no trial is lost or run twice."""

from __future__ import annotations

import itertools
import json
import os
import pwd
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.storages import JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from experiments.tuning import storage as module
from experiments.tuning import workers
from experiments.tuning.requeue import MAX_ATTEMPTS, withdraw
from experiments.tuning.storage import masked, open_storage, speaking_storage
from experiments.tuning.workers import Worker, requeue_lost
from learned_rl.types import UserError

FORK = get_context("fork")
FILES = ("study.db", "study.log")
WAITING, RUNNING, COMPLETE, FAIL = TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.FAIL

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*"),
]


@pytest.fixture(autouse=True)
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Processes die here and disks fill up, but the power stays on: nothing waits for the disk."""
    connect = sqlite3.connect

    def hasty(*args, **options):
        connection = connect(*args, **options)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", hasty)
    monkeypatch.setattr(os, "fsync", lambda file: None)


def opened(url: str | Path, name: str = "s") -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=os.getpid())
    storage = open_storage(str(url))
    return optuna.create_study(study_name=name, storage=storage, load_if_exists=True, sampler=sampler)


def point(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 1e-6, 1.0, log=True)


def add(study: optuna.Study, n: int = 1) -> list[float]:
    """Completes trials whose values are their parameters."""
    for _ in range(n):
        trial = study.ask()
        study.tell(trial, point(trial))
    return values(study)


def values(study: optuna.Study) -> list[float]:
    complete = study.get_trials(states=(COMPLETE,))
    assert all(t.values == [t.params["x"]] for t in complete)
    return [t.values[0] for t in complete]


def waiting(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=(WAITING,))


def refusal(action: Callable[[], object]) -> str:
    """The one sentence with which something is refused."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and "secret" not in text
    return text


# --- child processes -------------------------------------------------------------------------------------------------


class Children:
    """Forked processes that end with the test; each gets a connection to the test as its first argument."""

    def __init__(self) -> None:
        self.all: list[BaseProcess] = []

    def start(self, function: Callable[..., object], *args: object) -> tuple[BaseProcess, Connection]:
        here, there = FORK.Pipe()
        child = FORK.Process(target=function, args=(there, *args))
        child.start()
        there.close()
        self.all.append(child)
        return child, here

    def result(self, function: Callable[..., object], *args: object) -> Any:
        """What a child sends, once it has ended."""
        child, here = self.start(function, *args)
        sent = here.recv()
        child.join()
        return sent


@pytest.fixture
def children() -> Iterator[Children]:
    started = Children()
    yield started
    for child in started.all:
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
        child.join()


def kill(child: BaseProcess) -> None:
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()


def hang(told: Connection, *words: object) -> None:
    told.send(words)
    time.sleep(600)


def run_trial(told: Connection, url: str, claim: bool) -> None:
    """A worker that never finishes its trial."""
    study = opened(url)
    with Worker(url, "s") as worker:
        trial = study.ask()
        point(trial)
        if claim:
            trial.set_user_attr("worker", worker.name)
        hang(told, trial.number, trial.params, worker.name)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@host:5432/name", "postgresql://u:***@host:5432/name"),
        ("postgresql://u:se@cr:et/@host/name", "postgresql://u:***@host/name"),
        ("postgresql://:secret@host/name", "postgresql://:***@host/name"),
        ("postgresql:///name?user=u&password=secret&host=h", "postgresql:///name?user=u&password=***&host=h"),
        ("postgresql://u@host/name", "postgresql://u@host/name"),
        ("postgresql://host:5432/name", "postgresql://host:5432/name"),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
        ("a b.db", "a b.db"),
    ],
)
def test_passwords_are_masked(url, shown):
    assert masked(url) == shown


@pytest.mark.parametrize(
    ("url", "file", "kind"),
    [
        ("deep/er/study.db", "deep/er/study.db", RDBStorage),
        ("study.SQLITE", "study.SQLITE", RDBStorage),
        ("study.sqlite3", "study.sqlite3", RDBStorage),
        ("sqlite:///deep/study.db", "deep/study.db", RDBStorage),
        ("sqlite:///named", "named", RDBStorage),
        ("sqlite:///{here}/absolute.db", "absolute.db", RDBStorage),
        ("a b%20{c}#?é.db", "a b%20{c}#?é.db", RDBStorage),
        ("deep/er/study.log", "deep/er/study.log", JournalStorage),
        ("study.journal", "study.journal", JournalStorage),
        ("journal:deep/named", "deep/named", JournalStorage),
        ("journal:///deep/study.log", "deep/study.log", JournalStorage),
        ("journal:{here}/absolute.log", "absolute.log", JournalStorage),
        ("journal:///{here}/absolute.log", "absolute.log", JournalStorage),
    ],
)
def test_every_name_of_a_file(url, file, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = url.replace("{here}", str(tmp_path))
    storage = open_storage(url)
    assert isinstance(storage, kind)
    found = add(opened(url), 2)
    assert len(found) == 2 and (tmp_path / file).stat().st_size > 0
    scheme = "sqlite:///" if kind is RDBStorage else "journal:///"
    again = str(tmp_path / file) if "?" in file else f"{scheme}{tmp_path / file}"
    assert values(opened(again)) == found
    assert Worker(url, "s").folder == Worker(again, "s").folder == tmp_path / f"{file}.workers"
    if kind is RDBStorage:
        assert sqlite3.connect(tmp_path / file).execute("SELECT count(*) FROM trials").fetchone() == (2,)


def test_workers_meet_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert Worker(str(tmp_path / "link" / "a.db"), "s").folder == tmp_path / "real" / "a.db.workers"


EXPECTED = "expected '{}', or for example postgresql://user:password@host/name."


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "Study storage '' is neither a file that ends in .db, .sqlite, .sqlite3, .log, .journal nor the URL"),
        ("", EXPECTED.format("study.db")),
        ("memory", EXPECTED.format("memory.db")),
        ("runs/study", EXPECTED.format("runs/study.db")),
        ("study.sqlit", EXPECTED.format("study.sqlite")),
        ("runs/12:30.jurnal", EXPECTED.format("runs/12:30.journal")),
        ("sqlite://", "Study storage 'sqlite://' names no file: expected sqlite:///study.db."),
        ("sqlite:///", "expected sqlite:///study.db."),
        ("sqlite:///:memory:", "names no file: expected sqlite:///study.db."),
        ("sqlite:study.db", "expected sqlite:///study.db."),
        ("sqlite:///study.db?timeout=1", "expected sqlite:///study.db."),
        ("journal:", "names no file: expected journal:///study.log."),
        ("journal://study.log", "expected journal:///study.log."),
        (
            "postgres://u:secret@h/d",
            "unknown scheme of a study storage 'postgres': the nearest of journal, mysql, postgresql, "
            "postgresql+psycopg, sqlite is 'postgresql'",
        ),
        ("postgresql+psycopg2://u:secret@h/d", "is 'postgresql+psycopg'"),
        ("sqlit:///study.db", "is 'sqlite'"),
        ("postgresql:u:secret@h", "is no URL of a server, expected postgresql://user:password@host:port/name: Could"),
        ("postgresql://u:secret@h:port/d", "Study storage 'postgresql://u:***@h:port/d' is no URL of a server"),
        ("postgresql://u:se@cret@h/d", "an @ in a password is written %40."),
        (
            "mysql://u:secret@h/d",
            "Study storage mysql://u:***@h/d needs the module MySQLdb, which is not installed: run pip install pymysql",
        ),
        ("mysql+foo://u:secret@h/d", "Cannot open study storage mysql+foo://u:***@h/d: Can't load plugin"),
    ],
)
def test_names_of_nothing(url, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if url.startswith("mysql:"):
        monkeypatch.setitem(sys.modules, "MySQLdb", None)
    if "postgresql:u" in url:
        with pytest.raises(UserError, match=said):
            open_storage(url)  # without slashes nothing tells a password from the rest
        return
    assert said in refusal(lambda: open_storage(url))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_driver_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "psycopg"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    said = refusal(lambda: open_storage("postgresql://u:secret@127.0.0.1/d"))
    assert said == "Studies on PostgreSQL need the driver psycopg: run pip install 'learned-rl[postgresql]'."


# --- files that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_a_folder_and_a_file_for_a_folder(file, tmp_path):
    (tmp_path / file).mkdir()
    said = refusal(lambda: open_storage(str(tmp_path / file)))
    expected = "it is a folder, expected a file in it such as study.db"
    assert said == f"Cannot open study storage {tmp_path / file}: {expected}."
    (tmp_path / "taken").touch()
    under = tmp_path / "taken" / file
    assert refusal(lambda: open_storage(str(under))) == f"Cannot open study storage {under}: its folder is a file."


def without_rights(told: Connection, url: str) -> None:
    if os.geteuid() == 0:
        os.setuid(pwd.getpwnam("nobody").pw_uid)
    try:
        open_storage(url)
    except UserError as error:
        told.send(str(error))


@pytest.mark.parametrize("file", FILES)
def test_no_permission(file, tmp_path, children):
    add(opened(tmp_path / file))
    os.chmod(tmp_path / file, 0o444)
    said = children.result(without_rights, str(tmp_path / file))
    assert said == f"Cannot open study storage {tmp_path / file}: Permission denied."


def test_damaged_databases(tmp_path):
    path = tmp_path / "a.db"
    path.write_text("step,tag,value\n" * 100)
    before = path.read_bytes()
    said = refusal(lambda: open_storage(str(path)))
    assert said == (
        f"Study storage {path} is damaged or no storage of studies (file is not a database): restore it from a copy, "
        "or name another."
    )
    assert path.read_bytes() == before
    add(opened(tmp_path / "b.db"))
    with (tmp_path / "b.db").open("r+b") as file:
        file.truncate(8192)
    said = refusal(lambda: open_storage(str(tmp_path / "b.db")))
    assert "is damaged or no storage of studies (database disk image is malformed)" in said


@pytest.mark.parametrize(
    "text", ["epoch 1\n", "epoch 1", "epoch 1\nepoch 2\nepo", "3\n", '{"a": 1}\n', '["op_code"]\n', "\0\0\n", "\n"]
)
def test_a_text_that_is_no_journal_stays_as_it_is(text, tmp_path):
    path = tmp_path / "train.log"
    path.write_text(text)
    said = refusal(lambda: open_storage(str(path)))
    assert f"Study storage {path} is damaged or no storage of studies (line 1 is no record of a study)" in said
    assert path.read_text() == text


def test_a_damaged_journal_names_the_line(tmp_path):
    path = tmp_path / "a.log"
    study = opened(path)
    add(study, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[4][:20] + lines[5], *lines[6:]]))
    assert "(line 5 is no record of a study)" in refusal(lambda: open_storage(str(path)))
    path.write_bytes(b"".join([*lines, b'{"op_code":99,"worker_id":"a"}\n']))
    assert f"{path} is damaged or no storage of studies (AssertionError" in refusal(lambda: open_storage(str(path)))
    path.write_bytes(b"".join(lines))

    def read_on():
        with speaking_storage(str(path)):
            path.write_bytes(b"".join([*lines, b"nonsense\n", lines[-1]]))
            study.get_trials()

    assert "is damaged or no storage of studies (a line is no record of a study" in refusal(read_on)


def test_tables_of_another_version(tmp_path):
    path = tmp_path / "a.db"
    open_storage(str(path))
    database = sqlite3.connect(path)
    for version, advice in (("v2.6.0.a", f"run `optuna storage upgrade --storage sqlite:///{path}`"),
                            ("v99.0.0.a", "update Optuna")):  # fmt: skip
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))
        database.commit()
        said = refusal(lambda: open_storage(str(path)))
        assert said == (
            f"Study storage {path} has the tables of another version of Optuna than {optuna.__version__}: {advice}, or "
            "name another storage."
        )


def test_an_unreachable_server():
    pytest.importorskip("psycopg")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: whoever connects is refused
        port = taken.getsockname()[1]
        said = refusal(lambda: open_storage(f"postgresql://u:secret@127.0.0.1:{port}/d"))
    assert said.startswith(f"Cannot open study storage postgresql://u:***@127.0.0.1:{port}/d: connection failed: ")
    assert said.endswith("Connection refused.")
    said = refusal(lambda: open_storage("postgresql://u:secret@{host}:1/d"))
    assert said.startswith("Cannot open study storage postgresql://u:***@{host}:1/d: ")


# --- failures later on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ValueError("mine"), FileNotFoundError("mine"), KeyboardInterrupt(), UserError("mine"), KeyError("mine")]
)
def test_other_exceptions_pass(error):
    with pytest.raises(type(error)) as caught, speaking_storage("a.db"):
        raise error
    assert caught.value is error


def test_a_storage_error_is_one_sentence():
    def fail():
        with speaking_storage("postgresql://u:secret@h/d"):
            raise optuna.exceptions.StorageInternalError("two\nlines.") from sqlalchemy.exc.SQLAlchemyError("gone.\nx")

    assert refusal(fail) == (
        "Study storage postgresql://u:***@h/d failed (gone): finished trials are kept, and the same command continues "
        "once it works again."
    )


def test_locked_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUSY", 0.1)
    path = tmp_path / "a.db"
    study = opened(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    kept = "finished trials are kept, and the same command continues once that one ends."
    expected = f"Study storage {path} stayed locked by another process (database is locked): {kept}"

    def note():
        with speaking_storage(str(path)):
            study.set_user_attr("a", 1)

    assert refusal(note) == expected == refusal(lambda: open_storage(str(path)))
    other.execute("ROLLBACK")
    note()
    assert study.user_attrs == {"a": 1}


def test_a_full_database(tmp_path):
    path = tmp_path / "a.db"
    study = opened(path)
    found = add(study, 2)
    engine = study._storage._backend.engine  # type: ignore[attr-defined]

    @sqlalchemy.event.listens_for(engine, "begin")
    def limit(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # no less than it has

    def fill():
        with speaking_storage(str(path)):
            study.set_user_attr("long", "x" * 100_000)

    kept = "finished trials are kept, and the same command continues once there is room."
    assert refusal(fill) == f"The disk of study storage {path} is full (database or disk is full): {kept}"
    assert values(opened(path)) == found


def fill_the_disk(told: Connection, url: str) -> None:
    """Works until the disk is full, sends what was said, and works on once there is room."""
    study = opened(url)
    add(study, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = 9_000 if url.endswith(".log") else 40_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(url).st_size + room, limits[1]))
    said = ""
    try:
        with speaking_storage(url):
            while True:
                trial = study.ask()
                trial.set_user_attr("note", "x" * 3_000)
                study.tell(trial, point(trial))
    except UserError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    before = values(study)
    told.send((said, before, add(study, 2)))


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_costs_nothing_that_was_finished(file, tmp_path, children, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.0)  # Optuna waits before it tries again
    path = tmp_path / file
    said, before, after = children.result(fill_the_disk, str(path))
    if file == "study.log":
        assert said == (
            f"The disk of study storage {path} is full (File too large): finished trials are kept, and the same "
            "command continues once there is room."
        )
        assert all(json.loads(line) for line in path.read_bytes().splitlines())
    else:
        assert said == (
            f"The disk of study storage {path} is full or failing (disk I/O error): finished trials are kept, and the "
            "same command continues once it can be written."
        )
    assert len(before) >= 3 and after[:-2] == before and len(after) == len(before) + 2
    study = opened(path)
    assert values(study) == after
    with Worker(str(path), "s") as worker:  # what was running when the disk filled up is run again
        lost = [t.number for t in study.get_trials(states=(RUNNING,)) if t.params]
        assert requeue_lost(study, worker) == lost
    assert len(add(study, 3)) == len(after) + 3


# --- journals --------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_forgotten(tmp_path):
    path, copy = tmp_path / "a.log", tmp_path / "b.log"
    study = opened(path)
    found = add(study, 2)
    whole = path.read_bytes()
    add(study)
    record = path.read_bytes()[len(whole) :].splitlines()[0]
    for tail in [record[:n] for n in (1, 5, 11, 40, len(record))] + [record[:30] + b"\0" * 50, b"\0" * 100]:
        copy.write_bytes(whole)
        early = opened(copy)
        copy.write_bytes(whole + tail)
        late = opened(copy)
        assert values(early) == values(late) == found
        assert add(late)[:2] == found and len(add(early)) == 4
        assert values(opened(copy)) == values(late) == values(early)
        assert copy.read_bytes().startswith(whole) and tail not in copy.read_bytes()[len(whole) :].splitlines()


def test_a_strange_tail_is_not_overwritten(tmp_path):
    path = tmp_path / "a.log"
    study = opened(path)
    add(study)
    with path.open("ab") as file:
        file.write(b"my notes")
    content = path.read_bytes()

    def go_on():
        with speaking_storage(str(path)):
            add(study)

    assert "is damaged or no storage of studies (its last line is no record of a study)" in refusal(go_on)
    assert path.read_bytes() == content


def test_a_deleted_journal_is_no_empty_one(tmp_path):
    path = tmp_path / "a.log"
    study = opened(path)
    path.unlink()

    def go_on():
        with speaking_storage(str(path)):
            add(study)

    assert f"Study storage {path} failed (No such file or directory)" in refusal(go_on)
    assert not path.exists()


def write_forever(told: Connection, url: str) -> None:
    study = opened(url)
    told.send("ready")
    while True:
        add(study)


def test_a_writer_killed_at_any_moment_leaves_a_journal_and_no_lock(tmp_path, children):
    path, moments = tmp_path / "a.log", random.Random(0)
    found: list[float] = []
    for _ in range(6):
        child, told = children.start(write_forever, str(path))
        told.recv()
        time.sleep(moments.uniform(0.0, 0.1))
        kill(child)
        study = opened(path)
        assert values(study)[: len(found)] == found
        found = add(study)
    assert found == values(opened(path)) and sorted(p.name for p in tmp_path.iterdir()) == ["a.log"]


def hold_the_journal(told: Connection, path: str) -> None:
    import fcntl

    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        hang(told)


def test_a_writer_waits_for_a_living_one_only(tmp_path, children):
    path = tmp_path / "a.log"
    study = opened(path)
    child, told = children.start(hold_the_journal, str(path))
    told.recv()
    writer = threading.Thread(target=add, args=(study,))
    writer.start()
    writer.join(0.2)
    assert writer.is_alive()
    kill(child)
    writer.join(5)
    assert not writer.is_alive() and len(values(study)) == 1


# --- several processes on one file -----------------------------------------------------------------------------------


def join_in(told: Connection, url: str, gate: Any, n: int) -> None:
    gate.wait()
    study = opened(url)
    told.send(len(add(study, n)) >= n)


@pytest.mark.parametrize("file", FILES)
def test_a_storage_created_by_all_at_once(file, tmp_path, children):
    gate = FORK.Barrier(4)
    started = [children.start(join_in, str(tmp_path / file), gate, 3) for _ in range(4)]
    assert all(told.recv() for _, told in started)
    study = opened(tmp_path / file)
    assert sorted(t.number for t in study.trials) == list(range(12)) and len(set(values(study))) == 12


WAIT = 20


def take_all(told: Connection, url: str, gate: Any) -> None:
    study = opened(url)
    gate.wait()
    taken = []
    while (trial := study.ask()).number < WAIT:
        taken.append(trial.number)
    told.send(taken)


@pytest.mark.parametrize("file", FILES)
def test_a_waiting_trial_goes_to_one_worker(file, tmp_path, children):
    study, gate = opened(tmp_path / file), FORK.Barrier(3)
    for i in range(WAIT):
        study.enqueue_trial({"x": i / WAIT})
    started = [children.start(take_all, str(tmp_path / file), gate) for _ in range(3)]
    taken = [told.recv() for _, told in started]
    assert sorted(itertools.chain(*taken)) == list(range(WAIT))


# --- workers ---------------------------------------------------------------------------------------------------------


def test_a_worker_leaves_nothing_behind(tmp_path):
    url = str(tmp_path / "a.db")
    with Worker(url, "s") as one, Worker(url, "s") as two:
        assert one.name != two.name and one.name.startswith(f"{socket.gethostname()}-{os.getpid()}-")
        assert {p.name for p in (tmp_path / "a.db.workers").iterdir()} == {one.name, two.name}
    assert list(tmp_path.iterdir()) == []


def test_a_starting_worker_that_was_taken_for_a_dead_one(tmp_path, monkeypatch):
    url, lock = str(tmp_path / "a.db"), module.fcntl.flock
    met: list[str] = []

    def flock(file, how):
        if not met:  # before it holds its lock another worker comes by, and the last of all others leaves
            met.append(file.name)
            Path(file.name).unlink()
            Path(file.name).parent.rmdir()
        return lock(file, how)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with Worker(url, "s") as worker:
        monkeypatch.undo()
        assert met == [str(tmp_path / "a.db.workers" / worker.name)]
        study = opened(url)
        study.ask().set_user_attr("worker", worker.name)
        with Worker(url, "s") as other:
            assert requeue_lost(study, other) == [] and study.trials[0].state == RUNNING


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "a.db.workers").touch()
    said = refusal(lambda: Worker(str(tmp_path / "a.db"), "s").__enter__())
    assert said == f"Cannot write {tmp_path / 'a.db.workers'}: File exists."


@pytest.mark.parametrize("file", FILES)
def test_a_killed_workers_trial_is_run_again(file, tmp_path, children):
    url = str(tmp_path / file)
    child, told = children.start(run_trial, url, True)
    number, params, name = told.recv()
    study = opened(url)
    with Worker(url, "s") as worker:
        assert requeue_lost(study, worker) == []
        os.kill(child.pid or 0, signal.SIGSTOP)  # asleep is not dead, for however long
        assert requeue_lost(study, worker) == []
        kill(child)
        assert (tmp_path / f"{file}.workers" / name).exists()
        assert requeue_lost(study, worker) == [number]
        assert requeue_lost(study, worker) == [] and len(waiting(study)) == 1
        assert [p.name for p in (tmp_path / f"{file}.workers").iterdir()] == [worker.name]
        trial = study.ask()
        assert point(trial) == params["x"]  # bit for bit
        assert trial.user_attrs == {"retry_of": number, "attempt": 2, "retry_reason": "worker lost"}
    assert study.trials[number].state == FAIL and study.trials[number].user_attrs == {"worker": name}


def leave_a_child(told: Connection, url: str) -> None:
    """A worker whose forked child outlives it."""
    study = opened(url)
    with Worker(url, "s") as worker:
        trial = study.ask()
        point(trial)
        trial.set_user_attr("worker", worker.name)
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        hang(told, pid)


def test_a_child_that_lives_on_is_not_the_worker(tmp_path, children):
    url = str(tmp_path / "a.db")
    child, told = children.start(leave_a_child, url)
    (orphan,) = told.recv()
    kill(child)
    study = opened(url)
    try:
        with Worker(url, "s") as worker:
            assert requeue_lost(study, worker) == [0]
    finally:
        os.kill(orphan, signal.SIGKILL)


def leave_as_a_copy(told: Connection, worker: Worker) -> None:
    worker.__exit__()
    told.send("left")


def test_a_forked_copy_does_not_sign_the_worker_off(tmp_path, children):
    url = str(tmp_path / "a.log")
    study = opened(url)
    with Worker(url, "s") as worker, Worker(url, "s") as other:
        trial = study.ask()
        trial.set_user_attr("worker", worker.name)
        assert children.result(leave_as_a_copy, worker) == "left"
        assert requeue_lost(study, other) == [] and study.trials[0].state == RUNNING


@pytest.mark.parametrize("file", FILES)
def test_a_trial_whose_worker_died_before_it_signed(file, tmp_path, children, monkeypatch):
    url = str(tmp_path / file)
    child, told = children.start(run_trial, url, False)
    told.recv()
    study = opened(url)
    with Worker(url, "s") as worker:
        monkeypatch.setattr(workers, "UNCLAIMED", 0.0)
        with Worker(url, "another study"):
            monkeypatch.setattr(workers, "UNCLAIMED", 60.0)
            assert requeue_lost(study, worker) == []  # it may be the living worker's
            kill(child)
            with Worker(url, "s"):
                assert requeue_lost(study, worker) == []  # or this one's
                monkeypatch.setattr(workers, "UNCLAIMED", 0.0)
                assert requeue_lost(study, worker) == [0]
            study.ask()
            monkeypatch.setattr(workers, "UNCLAIMED", 60.0)
            assert requeue_lost(study, worker) == [1]  # nobody else works on this study
    assert [t.user_attrs["attempt"] for t in waiting(study)] == [3]


def test_a_trial_that_ends_while_it_is_looked_at_counts(tmp_path, monkeypatch):
    study = opened(tmp_path / "a.db")
    trial = study.ask()
    x = point(trial)

    def lost(self: Worker, running: list[FrozenTrial]) -> list[FrozenTrial]:
        study.tell(trial, x)  # its worker finishes it, and leaves
        return running

    monkeypatch.setattr(Worker, "lost", lost)
    with Worker(str(tmp_path / "a.db"), "s") as worker:
        assert requeue_lost(study, worker) == []
    assert values(study) == [x] and len(study.trials) == 1


def requeue_at_once(told: Connection, url: str, gate: Any) -> None:
    study = opened(url)
    with Worker(url, "s") as worker:
        gate.wait()
        told.send(requeue_lost(study, worker))
        gate.wait()


@pytest.mark.parametrize("file", FILES)
def test_racing_workers_run_a_lost_trial_again_once(file, tmp_path, children):
    url = str(tmp_path / file)
    study, gate = opened(url), FORK.Barrier(2)
    trials = [study.ask() for _ in range(12)]
    points = [point(trial) for trial in trials]
    for trial in trials:
        trial.set_user_attr("worker", "gone")
    started = [children.start(requeue_at_once, url, gate) for _ in range(2)]
    one, two = (told.recv() for _, told in started)
    assert sorted(one + two) == list(range(12))
    assert sorted(t.system_attrs["fixed_params"]["x"] for t in waiting(study)) == sorted(points)
    assert [t.state for t in study.trials[:12]] == [FAIL] * 12


def test_a_point_that_always_kills_its_worker_is_dropped(tmp_path):
    study = opened(tmp_path / "a.db")
    study.enqueue_trial({"x": 0.5}, user_attrs={"enqueued": "defaults"})
    with Worker(str(tmp_path / "a.db"), "s") as worker:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            trial = study.ask()
            assert point(trial) == 0.5 and trial.user_attrs["enqueued"] == "defaults"
            assert trial.user_attrs.get("attempt", 1) == attempt
            assert trial.user_attrs.get("retry_of") == (attempt - 2 if attempt > 1 else None)
            trial.set_user_attr("worker", "gone")
            assert requeue_lost(study, worker) == ([trial.number] if attempt < MAX_ATTEMPTS else [])
    assert waiting(study) == [] and [t.state for t in study.trials] == [FAIL] * MAX_ATTEMPTS


@pytest.mark.parametrize("file", FILES)
def test_every_kind_of_parameter_is_kept(file, tmp_path):
    study = opened(tmp_path / file)

    def suggest(trial: optuna.Trial, n: int) -> dict[str, object]:
        kinds = (
            lambda: trial.suggest_float("log", 1e-9, 1e3, log=True),
            lambda: trial.suggest_float("step", -1.0, 1.0, step=0.1),
            lambda: trial.suggest_int("int", 1, 2**40, log=True),
            lambda: trial.suggest_categorical("choice", [None, True, "a", 0.1]),
        )
        return {str(i): kind() for i, kind in enumerate(kinds[:n])}

    trial = study.ask()
    drawn = suggest(trial, 4)
    trial.set_user_attr("worker", "gone")
    with Worker(str(tmp_path / file), "s") as worker:
        assert requeue_lost(study, worker) == [0]
        again = study.ask()
        assert suggest(again, 2) == {k: drawn[k] for k in "01"}  # killed before it had read all of them
        again.set_user_attr("worker", "gone too")
        assert requeue_lost(study, worker) == [1]
        last, empty = study.ask(), study.ask()
        assert suggest(last, 4) == drawn
        empty.set_user_attr("worker", "gone as well")
        assert requeue_lost(study, worker) == []  # the third attempt, and a trial that had come to no point
    assert [t.state for t in study.trials] == [FAIL] * 4


def test_an_interrupted_trial_is_put_back(tmp_path):
    study = opened(tmp_path / "a.db")
    asked: list[optuna.Trial] = []

    def objective(trial: optuna.Trial) -> float:
        asked.append(trial)
        point(trial)
        raise KeyboardInterrupt

    for number in range(MAX_ATTEMPTS + 2):
        with pytest.raises(KeyboardInterrupt):
            study.optimize(objective, n_trials=1)
        for _ in range(2):
            withdraw(study, asked[-1], "interrupted")  # once
        (put_back,) = waiting(study)
        assert put_back.system_attrs["fixed_params"] == asked[0].params
        assert put_back.user_attrs == {"retry_of": number, "attempt": 1, "retry_reason": "interrupted"}


def test_withdrawn_while_it_runs_and_after_it_ended(tmp_path):
    study = opened(tmp_path / "a.log")
    running, ended, fresh = study.ask(), study.ask(), study.ask()
    point(running)
    study.tell(ended, point(ended))
    for trial in (running, ended, fresh):
        withdraw(study, trial, "interrupted")
    assert [t.state for t in study.trials] == [FAIL, COMPLETE, FAIL, WAITING]
    assert waiting(study)[0].system_attrs["fixed_params"] == running.params


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


class Server:
    """A PostgreSQL server of this test, run by a user who is not root."""

    PASSWORD = "secret{@}%"
    QUOTED = "secret%7B%40%7D%25"

    def __init__(self, folder: Path, binaries: Path, user: str | None) -> None:
        self.folder, self.binaries, self.user = folder, binaries, user
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def call(self, *words: str) -> None:
        as_user: dict[str, Any] = {} if self.user is None else {"user": self.user, "extra_groups": []}
        command = [str(self.binaries / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **as_user)
        assert done.returncode == 0, done.stdout.decode()

    def create(self) -> None:
        (self.folder / "password").write_text(self.PASSWORD + "\n")
        data, password = str(self.folder / "data"), str(self.folder / "password")
        self.call("initdb", "-D", data, "-U", "u", "-A", "scram-sha-256", "--pwfile", password, "-E", "UTF8", "-N")

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder} -F"
        self.call(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start"
        )

    def stop(self) -> None:
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def url(self, name: str = "postgres", password: str = QUOTED, scheme: str = "postgresql") -> str:
        return f"{scheme}://u:{password}@127.0.0.1:{self.port}/{name}"

    def database(self, name: str) -> str:
        import psycopg

        place = {"host": "127.0.0.1", "port": self.port, "user": "u", "password": self.PASSWORD, "dbname": "postgres"}
        with psycopg.connect(**place, autocommit=True) as connection:  # type: ignore[arg-type]
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return self.url(name)


def binaries() -> Path | None:
    """Where PostgreSQL's server programs are: Debian keeps them out of the path."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((p for p in reversed(places) if (p / "initdb").exists() and (p / "pg_ctl").exists()), None)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="the optional extra postgresql is not installed")
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL's server programs (initdb, pg_ctl) are not installed")
    user = None
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() == 0:  # whom PostgreSQL refuses
            user = next((n for n in ("postgres", "nobody") if n in {p.pw_name for p in pwd.getpwall()}), None)
            if user is None:
                pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres or nobody")
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        own = Server(Path(folder), programs, user)
        own.create()
        own.start()
        yield own
        own.stop()


@pytest.mark.slow
class TestPostgreSQL:
    """On a real server."""

    def test_studies_and_refusals(self, server):
        url = server.database("studies")
        found = add(opened(url), 3)
        assert values(opened(url.replace("postgresql:", "postgresql+psycopg:"))) == found
        assert Worker(url, "s").folder is None
        shown = f"Cannot open study storage postgresql://u:***@127.0.0.1:{server.port}/"
        said = refusal(lambda: open_storage(server.url("studies", "wrongsecret")))
        assert said.startswith(f"{shown}studies: ") and said.endswith('password authentication failed for user "u".')
        said = refusal(lambda: open_storage(server.url("nowhere")))
        assert said.startswith(f"{shown}nowhere: ") and said.endswith('database "nowhere" does not exist.')

    def test_created_by_all_at_once(self, server, children):
        url, gate = server.database("raced"), FORK.Barrier(4)
        started = [children.start(join_in, url, gate, 3) for _ in range(4)]
        assert all(told.recv() for _, told in started)
        assert sorted(t.number for t in opened(url).trials) == list(range(12))

    def test_a_killed_workers_trial_is_run_again_once(self, server, children, monkeypatch):
        monkeypatch.setattr(module, "HEARTBEAT", 1)
        monkeypatch.setattr(module, "GRACE", 60)
        url, gate = server.database("killed"), FORK.Barrier(2)
        (dead, one), (alive, two) = (children.start(optimize_forever, url) for _ in range(2))
        (number, params), _ = one.recv(), two.recv()
        kill(dead)
        study = opened(url)
        with Worker(url, "s") as worker:
            assert requeue_lost(study, worker) == []  # its last heartbeat is fresh
        monkeypatch.setattr(module, "GRACE", 5)  # several of the live worker's heartbeats
        time.sleep(7)
        racing = [children.start(requeue_at_once, url, gate) for _ in range(2)]
        assert sorted(itertools.chain(*(told.recv() for _, told in racing))) == [number]
        assert alive.is_alive() and sorted(t.state for t in study.trials) == [RUNNING, FAIL, WAITING]
        (again,) = waiting(study)
        assert again.system_attrs["fixed_params"] == params and again.user_attrs["retry_of"] == number

    def test_optuna_requeues_what_it_finds_stale_by_itself(self, server, children, monkeypatch):
        monkeypatch.setattr(module, "HEARTBEAT", 1)
        monkeypatch.setattr(module, "GRACE", 1)
        url = server.database("stale")
        child, told = children.start(optimize_forever, url)
        number, params = told.recv()
        kill(child)
        time.sleep(2.5)
        study = opened(url)
        study.optimize(point, n_trials=1)  # fails the stale trial before it asks for one
        assert values(study) == [params["x"]] and study.trials[number].state == FAIL
        with Worker(url, "s") as worker:
            assert requeue_lost(study, worker) == [number] and requeue_lost(study, worker) == []

    def test_a_trial_without_a_single_heartbeat(self, server, monkeypatch):
        study = opened(url := server.database("silent"))
        point(study.ask())
        with Worker(url, "s") as worker:
            assert requeue_lost(study, worker) == []
            monkeypatch.setattr(module, "GRACE", 0)
            time.sleep(0.01)
            assert requeue_lost(study, worker) == [0] and requeue_lost(study, worker) == []
        assert [t.state for t in study.trials] == [FAIL, WAITING]

    def test_a_server_that_goes_and_comes_back(self, server, monkeypatch, capfd):
        monkeypatch.setattr(random, "random", lambda: 0.0)  # Optuna waits before it tries again
        url = server.database("gone")
        storage = open_storage(url)
        study = optuna.create_study(study_name="s", storage=storage)
        found = add(study, 2)
        server.stop()

        def go_on():
            with speaking_storage(url):
                add(study)

        try:
            said = refusal(go_on)
            assert isinstance(storage, RDBStorage)
            storage.record_heartbeat(1)  # the thread that sends them goes on
        finally:
            server.start()
        assert said.startswith(f"Study storage postgresql://u:***@127.0.0.1:{server.port}/gone failed (")
        assert said.endswith("): finished trials are kept, and the same command continues once it works again.")
        assert add(study)[:2] == found
        assert "Traceback" not in capfd.readouterr().err


def optimize_forever(told: Connection, url: str) -> None:
    """Speaks once its first heartbeat is on the server: that comes from a thread, which may be slow to start."""

    def objective(trial: optuna.Trial) -> float:
        point(trial)
        await_heartbeat(url, trial.number)
        hang(told, trial.number, trial.params)
        return 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened(url).optimize(objective, n_trials=1)


def await_heartbeat(url: str, number: int) -> None:
    query = sqlalchemy.text("SELECT count(*) FROM trial_heartbeats JOIN trials USING (trial_id) WHERE number = :number")
    storage, deadline = open_storage(url), time.monotonic() + 60
    assert isinstance(storage, RDBStorage)
    with storage.engine.connect() as connection:
        while not connection.execute(query, {"number": number}).scalar():
            assert time.monotonic() < deadline, "no heartbeat within a minute"
            time.sleep(0.05)


def test_a_server_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Worker("postgresql://u:secret@h/d", "s") as worker:
        assert worker.folder is None
    assert list(tmp_path.iterdir()) == []
