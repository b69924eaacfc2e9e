"""Baselines on equal terms: Optuna tunes a hand-made algorithm on validation tasks with the learned method's budget.

All trials of a batch live at once, as lifetimes with their own hyperparameters, so that a study of dozens of trials
costs a few runs. Every lifetime has exactly the environment steps that the learned method's lifetimes have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optuna
import torch

from learned_rl.evaluation import Array, Curves, iqm, learning_curves
from learned_rl.ppo import Algorithm
from learned_rl.tasks.base import TaskFamily

BATCH = 16  # trials that live side by side

Score = Callable[[Array], Array]


@dataclass(frozen=True)
class Tuned:
    """The best of a study."""

    hyper: dict[str, float]
    score: float
    trials: int


def _suggest(trial: optuna.Trial, algorithm: Algorithm, tabular: bool) -> dict[str, float]:
    """A point of the search space: step size first, then what the objective reads."""
    sgd = algorithm.config.optimizer == "sgd"
    rates = (5.0, 1000.0) if tabular and sgd else (1e-3, 1.0) if tabular else (1e-4, 3e-2)
    hyper = {"learning_rate": trial.suggest_float("learning_rate", *rates, log=True)}
    hyper["max_grad_norm"] = trial.suggest_float("max_grad_norm", 0.01, 10.0, log=True)
    if not algorithm.slots.objective.needs_value:
        return hyper | {"prediction_coef": trial.suggest_float("prediction_coef", 0.05, 2.0, log=True)}
    hyper["ent_coef"] = trial.suggest_float("ent_coef", 1e-4, 0.1, log=True)
    hyper["gae_lambda"] = 1 - trial.suggest_float("one_minus_lambda", 0.01, 1.0, log=True)
    return hyper


def _configured(algorithm: Algorithm) -> dict[str, float]:
    """The configured numbers as a point of the search space: the first trial of every study."""
    now = {k: float(v) for k, v in vars(algorithm.config.hyper).items() if v is not None}
    point = {"learning_rate": now["learning_rate"], "max_grad_norm": min(max(now["max_grad_norm"], 0.01), 10.0)}
    if not algorithm.slots.objective.needs_value:
        return point | {"prediction_coef": now["prediction_coef"]}
    return point | {"ent_coef": max(now["ent_coef"], 1e-4), "one_minus_lambda": max(1 - now["gae_lambda"], 0.01)}


def tune(
    family: TaskFamily,
    algorithm: Algorithm,
    horizon: int,
    score: Score,
    *,
    trials: int,
    tasks: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Search for the numbers with the best interquartile mean of end-of-life scores on validation tasks.

    The configured numbers are the first trial. Numbers outside the search space keep their configured values.

    Args:
        horizon: agent updates in a lifetime.
        score:   turns final returns [tasks, n] on the validation tasks into scores of the same shape.
        trials:  settings to try.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    tabular = family.observation_space.shape == ()
    study.enqueue_trial(_configured(algorithm))
    for done in range(0, trials, BATCH):
        batch = [study.ask() for _ in range(min(BATCH, trials - done))]
        points = [_suggest(trial, algorithm, tabular) for trial in batch]
        rows = {k: torch.tensor([p[k] for p in points]).repeat(tasks)[:, None] for k in points[0]}
        hyper = algorithm.config.hyper.replace(**rows)
        curves: Curves = learning_curves(
            family, algorithm, horizon, tasks=tasks, seeds=len(batch), split="validation", seed=seed, checkpoints=1,
            hyper=hyper, device=device, episodes=8,
        )  # fmt: skip
        final = score(curves.final)
        for i, (trial, point) in enumerate(zip(batch, points, strict=True)):
            trial.set_user_attr("hyper", point)
            value = iqm(final[:, i])
            study.tell(trial, value if np.isfinite(value) else -1e9)
        if progress is not None:
            progress(done + len(batch), trials)
    return Tuned(study.best_trial.user_attrs["hyper"], study.best_value, trials)
