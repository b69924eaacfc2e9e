"""Which of a study's workers still live.

Whose worker died is run again. A worker on a file holds a lock of the operating system, which the kernel releases
however the process ends, so that its death is known at once and no clock is asked; a worker on a server sends
heartbeats.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from experiments.tuning.requeue import Retries, fail
from experiments.tuning.storage import first_seen, place_of
from learned_rl.files import speaking

UNCLAIMED = 60.0  # seconds for which a trial may run before its worker has put its name to it


class Worker:
    """One process that works on a study; its trials bear its name as the attribute "worker".

    While it lasts it holds a lock on a file of its name in `<storage>.workers/`. On a server it holds nothing: there
    Optuna sends heartbeats for the trial that it runs.

    Raises:
        UserError: the URL names no storage, or its folder cannot be written.
    """

    def __init__(self, url: str, study_name: str) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        place = place_of(url)
        path = None if place is None else place[1].resolve()
        self.folder = None if path is None else path.with_name(f"{path.name}.workers")
        self._study = study_name
        self._file: BinaryIO | None = None
        self._unclaimed: dict[int, float] = {}

    def __enter__(self) -> Self:
        if self.folder is not None:
            with speaking(self.folder):
                self._file = self._lock(self.folder / self.name)
            os.register_at_fork(after_in_child=self._file.close)  # a child that outlives this process is not it
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None and self._file is not None and not self._file.closed:  # it is, in a forked child
            with suppress(OSError):
                os.unlink(self.folder / self.name)
                self.folder.rmdir()  # refused while there are other workers
            self._file.close()

    def _lock(self, path: Path) -> BinaryIO:
        """The file of this worker, locked; made anew where another process takes it for a dead worker's meanwhile."""
        while True:
            with suppress(FileNotFoundError):  # the last worker before this one takes the folder away
                path.parent.mkdir(parents=True, exist_ok=True)
                file = path.open("wb")
                file.write(self._study.encode())
                file.flush()
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink:
                    return file
                file.close()

    def _locks(self, how: int) -> Iterator[tuple[Path, bytes, bool]]:
        """Every worker's file, the study in it, and whether this process got a lock on it (for as long as it looks)."""
        assert self.folder is not None
        for path in self.folder.glob("*"):
            with suppress(FileNotFoundError), path.open("rb") as file:
                study = file.read()
                try:
                    fcntl.flock(file, how | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield path, study, False
                else:
                    yield path, study, True

    def lost(self, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the study's running trials whose worker is dead; for a storage in a file.

        The trials must have been read before: who had one then and still lives holds a lock now, and who finished it
        in between, and left, is found out when it is to be failed. A trial is nobody's for a moment after it was asked
        for; where nobody else works on this study, its worker died in that moment.
        """
        live = {self.name} | {
            path.name for path, study, dead in self._locks(fcntl.LOCK_SH) if not dead and study == self._study.encode()
        }
        unclaimed = [t._trial_id for t in running if "worker" not in t.user_attrs]
        seen = self._unclaimed = first_seen(unclaimed, self._unclaimed)
        patience = UNCLAIMED if len(live) > 1 else 0.0
        old = {trial_id for trial_id, since in seen.items() if time.monotonic() - since >= patience}
        return [t for t in running if t._trial_id in old or t.user_attrs.get("worker", self.name) not in live]

    def bury(self) -> None:
        """Removes the files of dead workers: without one a worker is dead too."""
        for path, _, dead in self._locks(fcntl.LOCK_EX):
            if dead:
                path.unlink(missing_ok=True)


def requeue_lost(study: optuna.Study, worker: Worker) -> list[int]:
    """Fails the running trials of dead workers, and lets their points be tried again; returns the trials' numbers.

    Any number of workers may do so at once: the storage lets one of them fail a trial, and that one re-queues it. Who
    is killed between the two loses a point, but never runs one twice; the study, which counts what was finished, asks
    for another.

    Raises:
        UserError: the folder of the workers' locks cannot be read.
    """
    storage: Any = study._storage
    if worker.folder is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(study)
        return storage.get_heartbeat_stale_trial_callback().taken()
    retries = Retries()
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    with speaking(worker.folder):
        lost = worker.lost(running)
    for trial in lost:
        if fail(study, trial._trial_id):
            retries(study, storage.get_trial(trial._trial_id))
    with speaking(worker.folder):
        worker.bury()
    return retries.taken()
