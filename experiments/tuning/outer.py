"""Studies of the outer loop: the numbers of a meta-training recipe.

One trial meta-trains on a budget of environment steps, the same for every trial whatever its window, and stops there.
Its score is what fresh agents reach on validation tasks with the component as it is then: the interquartile mean over
tasks of the mean of final score and area under the learning curve, by which `meta-train` chooses as well. Several
meta-training seeds are trained side by side, so that pruning sees all of them; the winner is trained anew from seeds
that no trial had, and judged on test tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from experiments.meta_train import fresh_lives
from experiments.recipes import Recipe
from experiments.scores import Scorer
from experiments.tuning.agents import check_read, unread
from experiments.tuning.study import Direction, Pruned, Study, Tested, Trial
from learned_rl.component import Objective
from learned_rl.evaluation import Array, Curves, iqm
from learned_rl.registry import make_family
from learned_rl.spaces import LogNegative, LogUniform, PowersOfTwo, Space, spaces
from learned_rl.tasks.base import Split
from learned_rl.types import UserError, at_least
from meta_optimizers.estimators import make_estimator
from meta_optimizers.trainer import MetaTrainer

SEEDS, TEST = 1000, 9  # meta-training seeds of trials begin at SEEDS * seed, those of the test at SEEDS * (seed + TEST)

#: What a study of a recipe searches unless told otherwise, beside the weights of the recipe's regularisers.
SEARCHED = (
    "recipe.train.learning_rate",
    "recipe.train.max_grad_norm",
    "recipe.train.estimator.window",
    "recipe.train.estimator.sigma",
    "recipe.train.loss.policy_entropy",
    "recipe.train.agent.hyper.learning_rate",
    "recipe.train.agent.hyper.prediction_coef",
    "recipe.settings.width",
)


@dataclass(frozen=True)
class OuterSettings:
    """What a trial may change: options of `learned-rl meta-train`."""

    recipe: Recipe


def outer_settings(recipe: Recipe) -> OuterSettings:
    """The recipe with all of its component's settings written out, so that each of them can be searched."""
    component = recipe.make_component()
    return OuterSettings(replace(recipe, settings=vars(component.config) | recipe.settings))


def outer_space(settings: OuterSettings) -> dict[str, Space]:
    """Every search space in a recipe: of meta-training, of the component's settings, of the regularisers' weights."""
    recipe = settings.recipe
    known = spaces(settings) | spaces(recipe.make_component().config, "recipe.settings.")
    if width := recipe.settings.get("width"):  # time grows with its square, and trials have equal environment steps
        exponent = round(math.log2(width))
        known["recipe.settings.width"] = PowersOfTwo(2 ** max(0, exponent - 1), 2 ** (exponent + 1))
    if recipe.train.agent.optimizer == "sgd":
        known["recipe.train.agent.hyper.learning_rate"] = LogUniform(5.0, 1000.0)
    for name, weight in recipe.train.loss.regularisers.items():
        if weight:
            bounds = abs(weight) / 10, abs(weight) * 10
            path = f"recipe.train.loss.regularisers.{name}"
            known[path] = LogUniform(*bounds) if weight > 0 else LogNegative(*bounds)
    return known


@dataclass(frozen=True)
class OuterStudy:
    """Evaluation of a recipe on a short budget; `study()` makes it a search problem.

    Attributes:
        meta_steps:  of the recipe as it stands; a trial has as many environment steps as these take.
        seeds:       meta-training seeds of a trial.
        checkpoints: how often it is validated, the end included.
        test_tasks, test_seeds: test tasks, and meta-training seeds, for the winner.
    """

    settings: OuterSettings
    meta_steps: int = 200
    seeds: int = 1
    checkpoints: int = 4
    test_tasks: int = 64
    test_seeds: int = 3
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = ("meta_steps", "seeds", "checkpoints", "test_tasks", "test_seeds")
        at_least(1, **{name: getattr(self, name) for name in names})

    @property
    def budget(self) -> int:
        """Environment steps of one meta-training."""
        return self.meta_steps * per_meta_step(self.settings.recipe)

    def study(
        self,
        parameters: Sequence[str] | None = None,
        metrics: Mapping[str, Direction] | None = None,
        test: bool = True,
    ) -> Study:
        """The search problem; `parameters` None: `SEARCHED` and the regularisers."""
        recipe = self.settings.recipe
        known = outer_space(self.settings)
        about = {"meta_steps": self.meta_steps, "seeds": self.seeds, "checkpoints": self.checkpoints, "seed": self.seed}
        everything = Study(
            recipe.name,
            self.settings,
            self.evaluate,
            known,
            metrics or {"score": "maximize"},
            rungs=self.checkpoints,
            about=about,
            test=self.test if test else None,
            tested_on={k: getattr(self, k) for k in ("test_tasks", "test_seeds")},
            suite=recipe.family,
        )
        observations = make_family(recipe.family).observation_space
        component = recipe.make_component()
        objective = component if isinstance(component, Objective) else None
        ignored = unread(recipe.train.agent, objective, observations)
        usual = [
            path
            for path in known
            if (path in SEARCHED or ".regularisers." in path)
            and path.rpartition(".")[2] not in ignored
            and not _of_judging(recipe, path)
        ]
        chosen = everything.select(parameters or usual)
        check_read(chosen, recipe.train.agent, objective, observations)
        for path in chosen:
            if _of_judging(recipe, path):
                raise UserError(f"{path} changes nothing here: evolution compares returns; choose another setting.")
        return replace(everything, space=chosen)

    def evaluate(self, settings: OuterSettings, trial: Trial) -> dict[str, float]:
        """One trial: meta-train, and validate along the way."""
        tasks = settings.recipe.validation_tasks
        scorer = Scorer(make_family(settings.recipe.family), "validation", tasks)
        seeds = [self.seed * SEEDS + s for s in range(self.seeds)]
        scores: list[Array] = []
        for group in [[seed] for seed in seeds] if trial.paired else [seeds]:
            found: list[Array] = []
            for rung, curves in enumerate(self._train(settings.recipe, group, "validation", tasks), start=1):
                scored = [scorer(c) for c in curves]
                found = [(s.final + s.area).mean(1) / 2 for s in scored]
                trial.report(rung, iqm(np.stack(found)), rung * self.budget // self.checkpoints)
            scores.append(np.concatenate(found))
            trial.report_each(scores[-1])
        steps = float(self.budget * self.seeds)
        return {"score": iqm(np.concatenate(scores)), "environment_steps": steps}

    def test(self, settings: OuterSettings) -> Tested:
        """Meta-train from fresh seeds, one after the other; then fresh agents on test tasks."""
        scorer = Scorer(make_family(settings.recipe.family), "test", self.test_tasks, self.seed)
        each: list[Curves] = []
        for s in range(self.test_seeds):
            *_, (curves,) = self._train(
                settings.recipe, [(self.seed + TEST) * SEEDS + s], "test", self.test_tasks, last=True
            )
            each.append(curves)
        curves = Curves(each[0].steps, np.concatenate([c.returns for c in each], axis=2))
        return Tested.by(scorer, curves)

    def _train(
        self, recipe: Recipe, seeds: Sequence[int], split: Split, tasks: int, last: bool = False
    ) -> Iterator[list[Curves]]:
        """Meta-train from each seed; yields fresh agents' curves [C, tasks, 1] for each, at every rung or the last.

        Raises:
            Pruned: the component is not finite any more.
        """
        family = make_family(recipe.family)
        trainers = []
        for seed in seeds:
            torch.manual_seed(seed)  # initial weights of the component; everything else has streams of its own
            trainers.append(MetaTrainer(family, recipe.make_component(), recipe.train, seed, self.device))
        for rung in range(1, self.checkpoints + 1):
            for trainer in trainers:
                # A meta-step more would exceed the budget.
                while trainer.environment_steps + per_meta_step(recipe) <= self.budget * rung / self.checkpoints:
                    trainer.step()
                if not all(bool(p.isfinite().all()) for p in trainer.eta.values()):
                    raise Pruned(f"diverged: meta-parameters are not finite after {trainer.steps} meta-steps")
            if not last or rung == self.checkpoints:
                drawn = self.seed if last else 0
                yield [fresh_lives(recipe, family, trainer, split, tasks, drawn) for trainer in trainers]


def _of_judging(recipe: Recipe, path: str) -> bool:
    """Whether only an outer loss reads the setting, and there is none."""
    judging = ".critic." in path or path.endswith(("loss.policy_entropy", "loss.entropy_half_life"))
    return judging and make_estimator(recipe.train.estimator).stacked


def per_meta_step(recipe: Recipe) -> int:
    """Environment steps of one meta-step, over all lifetimes."""
    train = recipe.train
    return make_estimator(train.estimator).rollouts * train.lifetimes * train.agent.n_envs * train.agent.n_steps
