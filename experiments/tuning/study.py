"""What is searched, and the search.

A `Study` is a dataclass of settings (its values are the defaults, and the first trial), the search spaces beside its
fields, and a function that runs one trial. Optuna proposes, keeps and prunes; any number of workers may join a study by
searching it under the same name in the same storage. A study is complete once it has its number of finished trials,
pruned ones included, however many workers came and went.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import optuna
from optuna.trial import FrozenTrial, TrialState

from experiments.runs import flatten, plain
from experiments.scores import Scorer
from experiments.tuning.outputs import TrialEvents
from experiments.tuning.requeue import withdraw
from experiments.tuning.samplers import Sampling, SearchConfig, make_pruner
from experiments.tuning.storage import open_storage, speaking_storage
from experiments.tuning.workers import Worker, requeue_lost
from learned_rl.evaluation import Array, Curves
from learned_rl.spaces import Space, get, replaced, spaces
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError

Direction = Literal["maximize", "minimize"]
#: Metrics that are costs: seconds are measured here, environment steps are what an evaluation says it took.
COSTS: dict[str, Direction] = {"seconds": "minimize", "environment_steps": "minimize"}
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
DEFINITION = "definition"  # the study's attribute that holds what all of its trials must agree about
DEFAULTS = "defaults"  # the note on the trial that tries them
POLL = 1.0  # seconds between looks at other workers' last trials


@dataclass(frozen=True)
class Tested:
    """What settings scored where nobody tuned, as `experiments.report.append_scores` takes it."""

    returns: Curves
    scores: Curves | None = None
    kept: Array | None = None

    @classmethod
    def by(cls, scorer: Scorer, curves: Curves) -> Self:
        """With scores where the family knows the best returns, and anything can be won."""
        return cls(curves, scorer(curves), scorer.kept) if scorer.exact and scorer.kept.any() else cls(curves)


@dataclass(frozen=True)
class Study:
    """A search problem.

    Attributes:
        name:     of the problem, as it appears in tables.
        settings: a dataclass instance; its values are the defaults.
        evaluate: runs one trial: (settings with the sampled values, the trial) -> score, or metric -> value. May report
                  along the way, and be pruned there.
        space:    dotted path -> search space; None: every space beside the settings' fields.
        metrics:  what is optimised, name -> direction, the most important first. "seconds" is measured, not returned.
        rungs:    how many times `evaluate` reports along the way (for median and hyperband pruning).
        about:    whatever else the scores depend on (tasks, seeds, budgets): trials that differ here do not mix.
        test:     scores settings on tasks and seeds that no trial saw; None: the search ends without.
        tested_on: what the test's scores depend on (its tasks, its seeds): with others it is run anew.
        suite:    name of the tasks in tables.
    """

    name: str
    settings: Any
    evaluate: Callable[[Any, Trial], float | Mapping[str, float]]
    space: Mapping[str, Space] | None = None
    metrics: Mapping[str, Direction] = field(default_factory=lambda: {"score": "maximize"})
    rungs: int = 1
    about: Mapping[str, Any] = field(default_factory=dict)
    test: Callable[[Any], Tested] | None = None
    tested_on: Mapping[str, Any] = field(default_factory=dict)
    suite: str = "study"

    def __post_init__(self) -> None:
        if not self.spaces:
            raise UserError(f"Study {self.name!r} has no search space: mark fields with metadata=searched(...).")

    @property
    def spaces(self) -> Mapping[str, Space]:
        return spaces(self.settings) if self.space is None else self.space

    def names(self) -> dict[str, str]:
        """Dotted path -> the shortest ending of it that no other path of the space shares."""
        paths = [path.split(".") for path in self.spaces]
        short = {}
        for path in paths:
            n = next(n for n in range(1, len(path) + 1) if sum(other[-n:] == path[-n:] for other in paths) == 1)
            short[".".join(path)] = ".".join(path[-n:])
        return short

    def sample(self, trial: Any) -> Any:
        """The settings with every value of the space as the trial proposes it."""
        names = self.names()
        return replaced(self.settings, {path: s.suggest(trial, names[path]) for path, s in self.spaces.items()})

    def coordinates(self, settings: Any) -> dict[str, Any]:
        """The point of the search space at (or nearest to) some settings, as a trial's parameters."""
        names = self.names()
        return {s.key(names[path]): s.encode(get(settings, path)) for path, s in self.spaces.items()}

    def decode(self, params: Mapping[str, Any]) -> Any:
        """The settings at a trial's parameters."""
        names = self.names()
        return replaced(self.settings, {p: s.decode(params[s.key(names[p])]) for p, s in self.spaces.items()})

    def definition(self) -> dict[str, Any]:
        """What all trials of one study must agree about, as plain values."""
        space = {path: repr(s) for path, s in self.spaces.items()}
        settings = {k: v for k, v in flatten(plain(self.settings)).items() if k not in space}
        fixed = {"study": self.name, "metrics": dict(self.metrics), **plain(dict(self.about))}
        return {**fixed, "space": space, "settings": settings, "defaults": self.coordinates(self.settings)}

    def select(self, parameters: Sequence[str]) -> dict[str, Space]:
        """The spaces beside the settings' fields that have one of the names (a path, or an unambiguous ending of it).

        Raises:
            UserError: a name that fits no path, or several.
        """
        known = dict(spaces(self.settings)) | dict(self.spaces)
        chosen = {}
        for name in parameters:
            fits = [path for path in known if path == name] or [p for p in known if p.endswith(f".{name}")]
            if not fits:
                raise unknown("parameter", name, known)
            if len(fits) > 1:
                raise UserError(f"parameter '{name}' fits {' and '.join(fits)}: name one of them in full.")
            chosen[fits[0]] = known[fits[0]]
        return chosen


class Pruned(optuna.TrialPruned):
    """A trial that ends early, and why."""


class Trial:
    """What an evaluation knows of its trial, and how it reports.

    Attributes:
        number: of the trial in its study.
        is_default: whether it tries the defaults.
        paired: whether trials are compared seed by seed (the Wilcoxon pruner): an evaluation then runs its seeds in
                groups, one after the other, and calls `report_each` after every group.
    """

    def __init__(self, trial: optuna.Trial, paired: bool, single: bool, events: TrialEvents | None) -> None:
        self.number, self.paired = trial.number, paired
        self.is_default = trial.user_attrs.get("enqueued") == DEFAULTS
        self._trial, self._single, self._events = trial, single, events
        self._instances = 0

    def report(self, rung: int, score: float, step: int | None = None) -> None:
        """A score along the way, at the `rung`-th (1, 2, ...) of as many reports as every trial makes.

        Args:
            step: environment steps (or whatever the evaluation counts), for TensorBoard; None: the rung.

        Raises:
            Pruned: the trial is not worth going on with, or its score is not finite.
        """
        if self._events is not None:
            self._events.add(rung if step is None else step, {"tune/score": score})
        if not math.isfinite(score):
            raise Pruned(f"diverged: the score is {score} at report {rung}")
        if self._single and not self.paired:
            self._trial.report(score, rung)
            self._stop_if_pruned(f"report {rung}")

    def report_each(self, scores: Sequence[float] | Array) -> None:
        """Final scores of the next seeds [n], the same seeds in the same order in every trial.

        Raises:
            Pruned: the best trial so far is better on these seeds, by a signed-rank test.
        """
        for score in scores:
            if not math.isfinite(score):
                raise Pruned(f"diverged: the score of seed {self._instances} is {score}")
            if self._single and self.paired:
                self._trial.report(float(score), self._instances)
            self._instances += 1
        if self._single and self.paired:
            self._stop_if_pruned(f"seed {self._instances}")

    def _stop_if_pruned(self, where: str) -> None:
        if self._trial.should_prune():
            raise Pruned(f"pruned at {where}")


class Search:
    """One worker on a study.

    Args:
        url:    the storage (see `experiments.tuning.storage.open_storage`).
        name:   of the study in the storage; it is created unless it exists.
        folder: where TensorBoard events of trials go; None: nowhere.

    Raises:
        UserError: a storage that cannot be used, or a study of that name with another definition.
    """

    def __init__(
        self, study: Study, url: str, name: str, config: SearchConfig | None = None, folder: Path | None = None
    ) -> None:
        self.study, self.url, self.name, self.folder = study, url, name, folder
        self.config = config or SearchConfig()
        check(study, self.config)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        with speaking_storage(url):
            self.optuna = self._open()
            self._agree()
            self._begin_with_defaults()

    def _open(self) -> optuna.Study:
        """The study, made unless it exists."""
        return optuna.create_study(
            study_name=self.name,
            storage=open_storage(self.url),
            directions=[*self.study.metrics.values()],
            sampler=Sampling(self.config),
            pruner=make_pruner(self.config, self.study.rungs),
            load_if_exists=True,
        )

    def _agree(self) -> None:
        """Note what the trials of this study have in common, or check that it is what they have."""
        new, old = self.study.definition(), self.optuna.user_attrs.get(DEFINITION)
        new["pruned seed by seed"] = self.config.pruner == "wilcoxon"  # where trials report other things
        if old is None:
            self.optuna.set_user_attr(DEFINITION, new)
            self.optuna.set_metric_names([*self.study.metrics])
            return
        was, now = flatten(old), flatten(new)
        for key in {**was, **now}:
            before, after = was.get(key, "absent"), now.get(key, "absent")
            if before != after:
                raise UserError(
                    f"Study {self.name!r} was made with {key} {before!r}, and it is {after!r} now: repeat the old "
                    "value or choose another study name."
                )

    def _begin_with_defaults(self) -> None:
        """Let the defaults be tried first, and again where they failed for a reason that may have been mended."""
        if not any(map(_tries_defaults, self.optuna.get_trials(deepcopy=False))):
            point = self.study.coordinates(self.study.settings)
            self.optuna.enqueue_trial(point, user_attrs={"enqueued": DEFAULTS})

    # --- proposing ---------------------------------------------------------------------------------------------

    def enqueue(self, settings: Any, note: str) -> None:
        """Let some settings (the nearest inside the space) be tried before anything is proposed; once."""
        with speaking_storage(self.url):
            self.optuna.enqueue_trial(
                self.study.coordinates(settings), user_attrs={"enqueued": note}, skip_if_exists=True
            )

    def warm_start(self, other: optuna.Study, best: int = 8) -> int:
        """Enqueue the best points of another study, as far as their parameters are in this space; returns how many."""
        finished = [t for t in other.trials if t.state == TrialState.COMPLETE]
        sign = -1 if other.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
        ranked = sorted(finished, key=lambda t: sign * t.values[0])[:best]
        base, names = self.study.coordinates(self.study.settings), self.study.names()
        space = {s.key(names[path]): s for path, s in self.study.spaces.items()}
        for trial in ranked:
            shared = {k: v for k, v in trial.params.items() if k in space and space[k].knows(v)}
            if not shared:
                raise UserError(
                    f"Study {other.study_name!r} has none of the parameters {', '.join(base)}: nothing to start from."
                )
            self.enqueue(self.study.decode(base | shared), f"{other.study_name} trial {trial.number}")
        return len(ranked)

    # --- working -----------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[optuna.Study], None] | None = None) -> None:
        """Work until the study has its trials; waits for those that other workers are still running.

        Args:
            progress: called after every trial, and while waiting.

        Raises:
            UserError:         the storage fails, or the default settings cannot be evaluated.
            KeyboardInterrupt: the trial in progress is put back, whatever is finished is kept.
        """
        limit = math.inf if self.config.timeout is None else self.config.timeout * 60
        began = time.monotonic()
        with speaking_storage(self.url), Worker(self.url, self.name) as worker:
            while time.monotonic() - began < limit:
                requeue_lost(self.optuna, worker)
                states = [t.state for t in self.optuna.get_trials(deepcopy=False)]
                finished, running = sum(s in FINISHED for s in states), states.count(TrialState.RUNNING)
                if finished >= self.config.trials:
                    return
                if finished + running >= self.config.trials:
                    time.sleep(POLL)  # the last trials run elsewhere: whoever dies there, its trial is taken up here
                else:
                    self._one(worker)
                if progress is not None:
                    progress(self.optuna)

    def _one(self, worker: Worker) -> None:
        """Run one trial and tell the storage."""
        asked: list[optuna.Trial] = []
        raised: list[Exception] = []  # by the evaluation, and not by the storage

        def objective(trial: optuna.Trial) -> list[float]:
            asked.append(trial)
            try:
                return self._evaluate(trial, worker)
            except Exception as error:
                raised.append(error)
                raise

        try:
            self.optuna.optimize(objective, n_trials=1, catch=(_SurplusError,))
        except KeyboardInterrupt:
            for trial in asked:
                withdraw(self.optuna, trial, "interrupted")
            raise
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as refused:
            # The storage takes no answer from a worker that was thought dead, such as a machine that was suspended.
            if refused in raised:
                raise

    def _evaluate(self, trial: optuna.Trial, worker: Worker) -> list[float]:
        """The values of one trial, in the order of the metrics."""
        trial.set_user_attr("worker", worker.name)
        earlier = self.optuna.get_trials(deepcopy=False)[: trial.number]
        if sum(t.state in (*FINISHED, TrialState.RUNNING) for t in earlier) >= self.config.trials:
            raise _SurplusError  # two workers asked for the last trial at once
        if trial.user_attrs.get("enqueued") == DEFAULTS and any(map(_tries_defaults, earlier)):
            raise _SurplusError  # two workers began the study at once
        events = TrialEvents(self.folder, trial.number) if self.folder is not None else None
        told = Trial(trial, self.config.pruner == "wilcoxon", len(self.study.metrics) == 1, events)
        began, found = time.perf_counter(), {}
        try:
            found = self._values(trial, told)
        except Pruned as reason:
            trial.set_user_attr("reason", str(reason))
            raise
        finally:
            costs = {"seconds": time.perf_counter() - began} | {k: v for k, v in found.items() if k in COSTS}
            for name, value in costs.items():
                trial.set_user_attr(name, value)
            if events is not None:
                events.finish(self.true_values(trial.params), {f"tune/{k}": v for k, v in (found | costs).items()})
        return [float((found | costs)[name]) for name in self.study.metrics]

    def _values(self, trial: optuna.Trial, told: Trial) -> dict[str, float]:
        """Metric -> value, finite."""
        try:
            settings = self.study.sample(trial)
            trial.set_user_attr("settings", self.true_values(trial.params))
            result = self.study.evaluate(settings, told)
        except UserError as error:
            if told.is_default:
                raise
            raise Pruned(f"infeasible: {error}") from error
        found = dict(result) if isinstance(result, Mapping) else {next(iter(self.study.metrics)): float(result)}
        for name in self.study.metrics:
            if name not in found and name != "seconds":
                raise UserError(f"Study {self.study.name!r} optimises {name!r}, which its function does not return.")
            if not math.isfinite(found.get(name, 0.0)):
                raise Pruned(f"diverged: {name} is {found[name]}")
        return found

    def true_values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted path -> value of each searched setting at a trial's parameters, as far as it has them."""
        names, spaces = self.study.names(), self.study.spaces
        keys = {path: space.key(names[path]) for path, space in spaces.items()}
        return {path: plain(spaces[path].decode(params[key])) for path, key in keys.items() if key in params}

    # --- what was found ----------------------------------------------------------------------------------------

    def best(self) -> FrozenTrial:
        """The best trial; with several metrics, the one of the Pareto front that is best by the first.

        Raises:
            UserError: no trial was completed.
        """
        complete = [t for t in self.optuna.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        if not complete:
            reasons = {t.user_attrs.get("reason", "unfinished") for t in self.optuna.get_trials(deepcopy=False)}
            raise UserError(f"Study {self.name!r} has no completed trial ({'; '.join(sorted(reasons)[:3]) or 'none'}).")
        if len(self.study.metrics) == 1:
            return self.optuna.best_trial
        sign = 1 if next(iter(self.study.metrics.values())) == "maximize" else -1
        return max(self.optuna.best_trials, key=lambda t: sign * t.values[0])

    def best_settings(self) -> Any:
        """The settings of the best trial."""
        return self.study.decode(self.best().params)


def _tries_defaults(trial: FrozenTrial) -> bool:
    """Whether it is, or will be, an answer for the defaults."""
    return trial.user_attrs.get("enqueued") == DEFAULTS and trial.state != TrialState.FAIL


class _SurplusError(Exception):
    """One trial more than the study is to have."""


def check(study: Study, config: SearchConfig) -> None:
    """Whether this sampler and this pruner can search this study.

    Raises:
        UserError: it has several metrics, and they know one only.
    """
    if len(study.metrics) == 1:
        return
    if config.pruner != "none":
        raise UserError(f"pruner is {config.pruner!r}: trials with several metrics cannot be pruned, choose 'none'.")
    if config.sampler == "cmaes":
        raise UserError("sampler is 'cmaes', which optimises one metric: choose tpe, gp or random.")
