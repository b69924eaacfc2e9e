"""Studies of an agent's algorithm: PPO, A2C, or a learned objective, on a gymnasium id or a task family.

One trial is `tasks * seeds` agents that live side by side with the same numbers. Its score is the interquartile mean,
over tasks and seeds, of the return at the end of life: divided by the task's exact best return where the family knows
it (`experiments.scores.Scorer`). Trials live on validation tasks; the winner is judged on test tasks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.spaces import Space as GymSpace

from experiments import plugs
from experiments.scores import Scorer
from experiments.tuning.study import Direction, Pruned, Study, Tested, Trial
from learned_rl import artifacts
from learned_rl.component import Component, Objective, UpdateRule
from learned_rl.evaluation import Array, Checkpoint, Curves, iqm, learning_curves
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.registry import components, make_family
from learned_rl.spaces import Integers, LogUniform, Space, spaces
from learned_rl.tasks.base import Split, TaskFamily, unknown
from learned_rl.tasks.gym import GymFamily
from learned_rl.types import Tasks, UserError, at_least, stream_seed
from objectives.dpo import DPO

GROUPS = 4  # in which the seeds of a trial live one after the other where trials are compared seed by seed

#: What a study of each kind of algorithm searches unless told otherwise, as far as the objective reads it.
SHARED = ("learning_rate", "max_grad_norm", "gamma", "n_steps")
CRITIC = ("gae_lambda", "ent_coef", "vf_coef")
SURROGATE = ("clip_range", "n_epochs", "n_minibatches")
LAYERS = ("hidden", "activation", "shared")
#: The numbers alone, without gamma: what an evaluation searches for each of its methods.
OF_EVALUATION = ("learning_rate", "max_grad_norm", "gae_lambda", "ent_coef")


@dataclass(frozen=True)
class AgentSettings:
    """What a trial may change: options of `learned-rl train`."""

    config: PPOConfig = field(default_factory=PPOConfig)
    """settings of the algorithm"""
    steps: int = 50_000
    """environment steps of one lifetime"""
    objective: str | None = None
    """component file or registered name, as the algorithm has it; None: PPO's own"""
    optimizer: str | None = None
    """component file or registered name, as the algorithm has it; None: the config's rule"""

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)

    @property
    def horizon(self) -> int:
        """Agent updates in a lifetime of at most `steps` environment steps.

        Raises:
            UserError: not even one fits.
        """
        per_update = self.config.n_steps * self.config.n_envs
        if self.steps < per_update:
            raise UserError(
                f"steps is {self.steps}, less than one update of {self.config.n_envs} environments x "
                f"{self.config.n_steps} steps: expected at least {per_update}."
            )
        return self.steps // per_update


HAND_MADE = ("a2c", "a2c-norm", "ppo", "dpo")


def algorithms() -> list[str]:
    """Whatever `competitor` knows by name: hand-made algorithms, registered objectives."""
    objectives = [name for name, component in components().items() if component.slot == "objective"]
    return [*dict.fromkeys([*HAND_MADE, *objectives])]


def competitor(name: str, observation_space: GymSpace) -> tuple[PPOConfig, Objective | None]:
    """Default settings and objective of an algorithm by name: one of `HAND_MADE`, or an objective's name or file.

    Raises:
        UserError: nothing has that name.
    """
    tabular = isinstance(observation_space, Discrete)
    if name in ("a2c", "a2c-norm"):
        a2c = PPOConfig.a2c(normalize_advantage=name == "a2c-norm", optimizer="sgd" if tabular else "adam")
        return (replace(a2c, hyper=a2c.hyper.replace(learning_rate=80.0)) if tabular else a2c), None
    if name in ("ppo", "dpo"):
        return PPOConfig.suited(None, observation_space), DPO() if name == "dpo" else None
    if name not in algorithms() and not Path(name).exists():
        raise unknown("algorithm", name, algorithms())
    learned = artifacts.get(name)
    if not isinstance(learned, Objective):
        raise UserError(f"{name} is a component of the slot {learned.slot!r}: expected an objective.")
    return PPOConfig.suited(learned, observation_space), learned


def agent_space(
    settings: AgentSettings,
    objective: Objective | None,
    observation_space: GymSpace,
    names: Sequence[str] | None = None,
    rate: float | None = None,
) -> dict[str, Space]:
    """Dotted path -> space of the settings to search.

    The step sizes of tables are worlds apart from those of networks, and their spaces from the ones beside the fields.

    Args:
        names: last parts of the paths; None: what the algorithm reads (see `SHARED`, `CRITIC`, `SURROGATE`).
        rate:  learning rate around which to search, two powers of ten up and down; None: in the field's own space.
    """
    config = settings.config
    known = spaces(settings)
    if isinstance(observation_space, Discrete):
        rates = LogUniform(5.0, 1000.0) if config.optimizer == "sgd" else LogUniform(1e-3, 1.0)
        known["config.hyper.learning_rate"] = rates
    if rate is not None:
        known["config.hyper.learning_rate"] = LogUniform(rate / 100, rate * 100)
    read = {*SHARED, *CRITIC, *(SURROGATE if config.n_epochs > 1 else ()), "prediction_coef"}
    read -= unread(config, objective, observation_space)
    if objective is not None and math.isinf(config.hyper.max_grad_norm):
        read.discard("max_grad_norm")  # there is none in how it was made or trained
    if config.replay_capacity:
        read.discard("n_steps")  # the trajectories that it keeps: long ones never fill it in a short life
    if names is not None:
        read &= {*names, "prediction_coef"}
    return {path: space for path, space in known.items() if path.rpartition(".")[2] in read}


def unread(config: PPOConfig, objective: Objective | None, observation_space: GymSpace) -> set[str]:
    """Names of searchable settings that this algorithm does not read on these observations."""
    slots = Slots.fill(config, objective=objective)
    paths = plugs.unread(config, slots, () if objective is None else ("objective",), observation_space)
    found = {path.rpartition(".")[2] for path in paths}
    if math.isinf(config.hyper.clip_range):
        found.add("clip_range")
    if slots.objective.whole_rollouts:
        found.add("n_minibatches")
    return found


def check_read(
    space: Mapping[str, Space], config: PPOConfig, objective: Objective | None, observation_space: GymSpace
) -> None:
    """Whether all settings of a search space are read.

    Raises:
        UserError: one that would change nothing.
    """
    ignored = unread(config, objective, observation_space)
    for path in space:
        name = path.rpartition(".")[2]
        of_critic = ".critic." in path  # an outer critic has numbers of its own, but the same observations
        if name in (ignored & set(LAYERS) if of_critic else ignored):
            raise UserError(f"{path} changes nothing here, where {name} is not read: choose another setting.")


def _digest(component: Component) -> str:
    """What tells a component from one with other weights."""
    weights = component.state_dict().values()  # without a graph
    return hashlib.sha256(b"".join(x.cpu().double().numpy().tobytes() for x in weights)).hexdigest()[:16]


@dataclass(frozen=True)
class AgentStudy:
    """Evaluation of agents on one family; `study()` makes it a search problem.

    Attributes:
        family:      where the agents live.
        algorithm:   name of the algorithm, see `competitor`.
        tasks:       validation tasks of a trial (a gymnasium id has one).
        seeds:       agents on each.
        checkpoints: how often agents are evaluated along their lives, the end included.
        episodes:    fresh episodes of each agent at each.
        test_tasks, test_seeds: as above, for the winner.
        seed:        from which tasks and agents derive.
        optimizer:   learned rule by which agents move; None: the settings' own.
    """

    family: TaskFamily
    algorithm: str
    objective: Objective | None
    settings: AgentSettings
    tasks: int = 32
    seeds: int = 1
    checkpoints: int = 6
    episodes: int = 8
    test_tasks: int = 64
    test_seeds: int = 4
    seed: int = 0
    device: str = "cpu"
    optimizer: UpdateRule | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        names = ("tasks", "seeds", "checkpoints", "episodes", "test_tasks", "test_seeds")
        at_least(1, **{name: getattr(self, name) for name in names})
        assert self.settings.horizon  # raises where not even one update fits

    @classmethod
    def of(cls, algorithm: str, env: str, steps: int | None = None, device: str = "cpu", **numbers: int) -> Self:
        """The study of an algorithm on an environment, both by name; a gymnasium id is one task with many seeds."""
        family = make_family(env)
        config, objective = competitor(algorithm, family.observation_space)
        named = algorithm if objective is not None else None
        settings = AgentSettings(config, AgentSettings.steps if steps is None else steps, named)
        shape = {"tasks": 1, "seeds": 8, "test_tasks": 1, "test_seeds": 32} if isinstance(family, GymFamily) else {}
        return cls(family, algorithm, objective, settings, device=device, **shape | numbers)  # type: ignore[arg-type]

    def study(
        self,
        suite: str,
        space: Mapping[str, Space] | None = None,
        metrics: Mapping[str, Direction] | None = None,
        test: bool = True,
    ) -> Study:
        """The search problem; `space` None: what the algorithm reads."""
        metrics = metrics or {"score": "maximize"}
        chosen = dict(space or agent_space(self.settings, self.objective, self.family.observation_space))
        if "environment_steps" in metrics:
            chosen["steps"] = Integers(max(1, self.settings.steps // 16), self.settings.steps, log=True)
        about: dict[str, Any] = {k: getattr(self, k) for k in ("tasks", "seeds", "checkpoints", "episodes", "seed")}
        for name, part in {"weights": self.objective, "optimizer_weights": self.optimizer}.items():
            if part is not None:
                about[name] = _digest(part)
        return Study(
            f"{self.algorithm} on {suite}",
            self.settings,
            self.evaluate,
            chosen,
            metrics,
            rungs=self.checkpoints,
            about=about,
            test=self.test if test else None,
            tested_on={k: getattr(self, k) for k in ("test_tasks", "test_seeds")},
            suite=suite,
        )

    def evaluate(self, settings: AgentSettings, trial: Trial) -> dict[str, float]:
        """One trial: agents live on validation tasks, and report along the way."""
        scorer = Scorer(self.family, "validation", self.tasks, self.seed)
        if not scorer.kept.any():
            raise UserError(f"On none of the {self.tasks} validation tasks can anything be won: choose more tasks.")
        drawn = self.family.sample_split("validation", self.tasks, self.seed)
        finals: list[Array] = []
        for which, seeds, seed in self._groups(trial.paired):

            def watch(at: Checkpoint, which: slice = which) -> None:
                if not at.alive.all():
                    raise Pruned(f"diverged: {(~at.alive).sum()} of {at.alive.size} agents after {at.steps} steps")
                scores = scorer.final(at.returns, which)
                if (rung := round(at.share * self.checkpoints)) and scores.size:
                    trial.report(rung, iqm(scores), at.steps)

            tasks = {k: v[which] for k, v in drawn.items()}
            curves = self._live(settings, "validation", tasks, seeds, seed, self.checkpoints, watch)
            finals.append(scorer.final(curves.final, which).ravel())
            trial.report_each(finals[-1])
        return {"score": iqm(np.concatenate(finals)), "environment_steps": float(curves.steps[-1])}

    def test(self, settings: AgentSettings, **plugged: Component) -> Tested:
        """Fresh agents on test tasks, with whatever is plugged into other slots than the objective's."""
        scorer = Scorer(self.family, "test", self.test_tasks, self.seed)
        curves = self._live(settings, "test", self.test_tasks, self.test_seeds, self.seed, 10, **plugged)
        return Tested.by(scorer, curves)

    def _groups(self, paired: bool) -> list[tuple[slice, int, int]]:
        """(which tasks, agents on each, seed) of the lives that are led side by side: all, unless seeds are compared
        one by one, and then a few tasks (or, where tasks are few, a few agents on each) at a time."""
        if not paired:
            return [(slice(None), self.seeds, self.seed)]
        groups = range(min(GROUPS, max(self.tasks, self.seeds)))
        seeds = [stream_seed("group", self.seed, g) % 2**31 for g in groups]
        if self.tasks >= self.seeds:
            cut = [round(g * self.tasks / len(groups)) for g in (*groups, len(groups))]
            return [(slice(cut[g], cut[g + 1]), self.seeds, seeds[g]) for g in groups]
        cut = [round(g * self.seeds / len(groups)) for g in (*groups, len(groups))]
        return [(slice(None), cut[g + 1] - cut[g], seeds[g]) for g in groups]

    def _live(
        self,
        settings: AgentSettings,
        split: Split,
        tasks: int | Tasks,
        seeds: int,
        seed: int,
        checkpoints: int,
        watch: Callable[[Checkpoint], None] | None = None,
        **plugged: Component,
    ) -> Curves:
        """Fresh agents with these settings, from birth to the end of life."""
        parts = {"objective": self.objective, "optimizer": self.optimizer} | plugged
        algorithm = Algorithm(settings.config, Slots.fill(settings.config, **parts))
        return learning_curves(
            self.family,
            algorithm,
            settings.horizon,
            tasks=tasks,
            seeds=seeds,
            split=split,
            seed=seed,
            checkpoints=checkpoints,
            episodes=self.episodes,
            device=self.device,
            watch=watch,
        )
