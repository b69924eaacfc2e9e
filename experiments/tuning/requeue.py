"""Trials that came to no end, tried again: those of workers that died, and those that were interrupted."""

from __future__ import annotations

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

MAX_ATTEMPTS = 3  # a point that has killed its worker so often is dropped


def withdraw(study: optuna.Study, trial: optuna.Trial | FrozenTrial, reason: str) -> None:
    """Gives up a trial of this process, and lets its point be tried again without that this counts as an attempt.

    What was completed or pruned meanwhile, or re-queued by another worker, stays as it is.

    Args:
        reason: kept beside the new trial, as "retry_reason".
    """
    failed = fail(study, trial._trial_id)
    found = study._storage.get_trial(trial._trial_id)
    if not failed:  # Optuna fails a trial by itself when its function is interrupted
        again = any(t.user_attrs.get("retry_of") == trial.number for t in study.get_trials(deepcopy=False))
        if again or found.state != TrialState.FAIL:
            return
    _again(study, found, _attempt(found), reason)


class Retries:
    """Re-queues trials that this process failed, and notes their numbers.

    On servers it is Optuna that calls it, for exactly these trials, in `requeue_lost` and before it asks for a trial.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if _again(study, trial, _attempt(trial) + 1, "worker lost"):
            self._numbers.append(trial.number)

    def taken(self) -> list[int]:
        """The numbers since it was last asked."""
        numbers, self._numbers = self._numbers, []
        return numbers


def fail(study: optuna.Study, trial_id: int) -> bool:
    """Fails a trial; whether it was this process that did."""
    try:
        return study._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def _attempt(trial: FrozenTrial) -> int:
    return trial.user_attrs.get("attempt", 1)


def _again(study: optuna.Study, trial: FrozenTrial, attempt: int, reason: str) -> bool:
    """Enqueues a trial's point, if it had come to one and has not had all of its attempts."""
    point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}  # it may have ended before it read them all
    if not point or attempt > MAX_ATTEMPTS:
        return False
    notes = {"retry_of": trial.number, "attempt": attempt, "retry_reason": reason}
    if "enqueued" in trial.user_attrs:  # where the point came from, if no sampler proposed it
        notes["enqueued"] = trial.user_attrs["enqueued"]
    study.enqueue_trial(point, user_attrs=notes)
    return True
