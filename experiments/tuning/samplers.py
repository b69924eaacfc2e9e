"""Who proposes a study's settings, and who ends its trials early: Optuna's samplers and pruners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import optuna
from optuna.trial import FrozenTrial, TrialState

from learned_rl.tasks.base import unknown
from learned_rl.types import at_least, stream_seed

Sampler = Literal["tpe", "gp", "cmaes", "random"]
Pruner = Literal["median", "hyperband", "wilcoxon", "none"]


@dataclass(frozen=True)
class SearchConfig:
    """How a study is searched."""

    trials: int = 64
    """finished trials that the study is to have, pruned ones included, whoever runs them"""
    timeout: float | None = None
    """minutes after which no new trial begins; None: never"""
    sampler: Sampler = "tpe"
    """who proposes: tpe (Bergstra et al., 2011), gp (Gaussian process), cmaes (Hansen, 2016), random"""
    pruner: Pruner = "median"
    """who ends trials early: median, hyperband (Li et al., 2018), wilcoxon (seed by seed against the best), none"""
    startup_trials: int = 10
    """random trials before the sampler models anything, and trials before the median pruner prunes"""
    seed: int = 0
    """of the sampler"""

    def __post_init__(self) -> None:
        at_least(1, trials=self.trials, startup_trials=self.startup_trials)
        at_least(0, timeout=self.timeout, seed=self.seed)
        for name, kinds in (("sampler", Sampler), ("pruner", Pruner)):
            if getattr(self, name) not in get_args(kinds):
                raise unknown(name, getattr(self, name), get_args(kinds))


class Sampling(optuna.samplers.BaseSampler):
    """A sampler whose random numbers depend on its seed and the trial's number alone.

    So no two workers propose the same, and a study that was interrupted proposes what it would have proposed.
    """

    def __init__(self, config: SearchConfig) -> None:
        self._config, self._sampler = config, make_sampler(config, 0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = make_sampler(self._config, trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        return self._sampler.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._sampler.after_trial(study, trial, state, values)


def make_sampler(config: SearchConfig, trial: int) -> optuna.samplers.BaseSampler:
    """The sampler of the trial of that number."""
    seed, startup = stream_seed("sampler", config.seed, trial) % 2**31, config.startup_trials
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup)
    if config.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
    if config.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(config: SearchConfig, rungs: int) -> optuna.pruners.BasePruner:
    """The pruner of trials that report `rungs` times."""
    if config.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials, n_warmup_steps=rungs // 3)
    if config.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(rungs, 1), reduction_factor=3)
    if config.pruner == "wilcoxon":
        return optuna.pruners.WilcoxonPruner(p_threshold=0.1)
    return optuna.pruners.NopPruner()
