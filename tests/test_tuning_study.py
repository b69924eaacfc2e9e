"""Every value that a study samples reaches what it trains, and a study has the trials it is to have, whoever runs them.

Where a value shows is written down for every searchable path (`AGENT`, `META`), as far from the study as it is used: in
the update rule, the objective's loss, the outer Adam. A path that is missing there fails.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

import experiments.meta_train
import experiments.train
import experiments.tuning.agents as agents_module
import experiments.tuning.outer
import experiments.tuning.study as study_module
from experiments.cli import main
from experiments.meta_train import MetaTrain
from experiments.recipes import Recipe
from experiments.tune import BEST, Tune, make_study, write_outputs
from experiments.tuning.agents import AgentSettings, AgentStudy, agent_space
from experiments.tuning.outer import SEARCHED, OuterStudy, outer_settings, outer_space, per_meta_step
from experiments.tuning.samplers import SearchConfig
from experiments.tuning.study import FINISHED, Pruned, Search, Study
from experiments.tuning.workers import Worker
from learned_rl import inner_loop
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.defaults import PPOClip
from learned_rl.ppo import Algorithm, PPOConfig
from learned_rl.spaces import (
    Choice,
    Integers,
    LogNegative,
    LogOneMinus,
    LogUniform,
    PowersOfTwo,
    Space,
    Uniform,
    get,
    replaced,
    searched,
    spaces,
)
from learned_rl.types import UserError
from learned_rl.update_rules import RULES, Adam
from meta_optimizers import outer_critic, outer_loop
from meta_optimizers.evolution import EvolutionConfig
from meta_optimizers.learning import Learning, OuterLossConfig
from meta_optimizers.outer_critic import OuterCritic
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from meta_optimizers.truncated import TruncatedConfig, TruncatedMetaGradient
from objectives.lpg import LPG

# --- what is seen at the far end ------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One agent update, from where its numbers are used.

    Attributes:
        graph: whether it was made in a window of the outer loop.
        T, P, B: of the experience.
        hyper: with which the objective was asked for its loss, at each gradient step.
        parts: agents' steps [n] of which each gradient step was made.
        rates, rules: with which the update rule was asked for a step, and its name, at each gradient step.
        norms: to which gradients were clipped, at each gradient step.
        theta: [P, D] that came out.
    """

    algorithm: Algorithm
    agent: Any
    graph: bool
    T: int
    P: int
    B: int
    hyper: list[Hyper] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    theta: torch.Tensor | None = None


@contextlib.contextmanager
def spying() -> Iterator[list[Seen]]:
    """The agent updates that are made within."""
    seen: list[Seen] = []
    present: list[Seen] = []  # at most one: updates of the outer critic, in between, are none of an agent
    update, clip = Algorithm.update, inner_loop.clip_norm

    def spied_update(self, inner, trajectory, context, hyper, generator, *rest):
        present.append(Seen(self, inner.population.agent, inner.graph, *trajectory.reward.shape))
        record = update(self, inner, trajectory, context, hyper, generator, *rest)
        present[0].theta = inner.theta.detach().clone()
        seen.append(present.pop())
        return record

    def spied_loss(loss):
        def spied(self, out, batch, hyper):
            present[0].hyper.append(hyper)
            present[0].parts.append(batch["log_prob"].numel() // present[0].P)  # [P, n] or [T, P, B]
            return loss(self, out, batch, hyper)

        return spied

    def spied_clip(grad, max_norm):
        for each in present:
            each.norms.append(max_norm)
        return clip(grad, max_norm)

    def spied_rule(step):
        def spied(self, grad, state, theta, learning_rate, *rest):
            for each in present:
                each.rules.append(self.name)
                each.rates.append(torch.as_tensor(learning_rate).flatten()[0].item())
            return step(self, grad, state, theta, learning_rate, *rest)

        return spied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Algorithm, "update", spied_update)
        patch.setattr(inner_loop, "clip_norm", spied_clip)
        for objective in (PPOClip, LPG):
            patch.setattr(objective, "loss", spied_loss(objective.loss))
        for rule in RULES.values():
            patch.setattr(rule, "update", spied_rule(rule.update))
        yield seen


def one(values: Any) -> Any:
    """The only value there is."""
    found = set(values)
    assert len(found) == 1, found
    return found.pop()


def decays(updates: list[Seen]) -> bool:
    """Whether the learning rate falls, rather than being the same from update to update."""
    rates = [one(update.rates) for update in updates]
    assert len(rates) > 1
    return any(after < before for before, after in itertools.pairwise(rates))


def number(name: str) -> Callable[[list[Seen]], float]:
    """The number of that name with which every gradient step of every update asked the objective for its loss."""
    return lambda updates: one(getattr(hyper, name) for update in updates for hyper in update.hyper)


def widths(agent: Any, trunk: str = "trunk") -> tuple[int, ...]:
    return tuple(agent.shapes[f"{trunk}{i}.weight"][1] for i in range(agent.depth))


Probe = Callable[[list[Seen]], Any]

#: Path below a `PPOConfig` -> where its value shows in agents' updates.
AGENT: dict[str, Probe] = {
    "n_envs": lambda us: one(u.B for u in us),
    "n_steps": lambda us: one(u.T for u in us),
    "n_epochs": lambda us: one(sum(u.parts) / (u.T * u.B) for u in us),
    "n_minibatches": lambda us: one(u.T * u.B / part for u in us for part in u.parts),
    "optimizer": lambda us: one(rule for u in us for rule in u.rules),
    "linear_decay": decays,
    "normalize_advantage": lambda us: one(u.algorithm.slots.objective.config.normalize_advantage for u in us),
    "agent.hidden": lambda us: widths(us[0].agent),
    "agent.activation": lambda us: us[0].agent.activation.__name__,
    "agent.shared": lambda us: us[0].agent.shared,
    "hyper.learning_rate": lambda us: us[0].rates[0],
    "hyper.max_grad_norm": lambda us: one(norm for u in us for norm in u.norms),
    "hyper.gamma": number("gamma"),
    "hyper.gae_lambda": number("gae_lambda"),
    "hyper.clip_range": number("clip_range"),
    "hyper.ent_coef": number("ent_coef"),
    "hyper.vf_coef": number("vf_coef"),
    "hyper.prediction_coef": number("prediction_coef"),
}

#: A value for each of them that is nobody's default.
OTHER: dict[str, Any] = {
    "n_envs": 2,
    "n_steps": 32,
    "n_epochs": 3,
    "n_minibatches": 8,
    "optimizer": "momentum",
    "linear_decay": True,
    "normalize_advantage": False,
    "agent.hidden": (32, 32),
    "agent.activation": "relu",
    "agent.shared": True,
    "hyper.learning_rate": 0.02,
    "hyper.max_grad_norm": 0.0625,
    "hyper.gamma": 0.93,
    "hyper.gae_lambda": 0.8,
    "hyper.clip_range": 0.3,
    "hyper.ent_coef": 0.07,
    "hyper.vf_coef": 0.25,
    "hyper.prediction_coef": 0.125,
}


class Lived(NamedTuple):
    """A trial at a point that was chosen: settings and spy's notes, and the settings file that the search left."""

    point: Any
    settings: Any
    seen: Any
    params: dict[str, Any]
    file: Path


def live(study: Study, point: Any, folder: Path, spy: Callable[[], Any] = spying) -> Lived:
    """Search a study for two trials, the defaults and the point; the point wins."""
    noted: list[tuple[Any, Any]] = []

    def evaluate(settings, trial):
        with spy() as seen:
            study.evaluate(settings, trial)
        noted.append((settings, seen))
        return float(trial.number)

    config = SearchConfig(trials=2, pruner="none")
    search = Search(replace(study, evaluate=evaluate), str(folder / "study.log"), "s", config)
    search.enqueue(point, "point")
    search.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.tune.save_figures", lambda *_: [])
        write_outputs(search, folder)
    assert len(noted) == 2 and search.best().number == 1
    return Lived(point, *noted[1], search.best().params, folder / BEST)


def parsed(*words: Any) -> Any:
    """What `train` or `meta-train` is called with, in place of what it does."""
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments.train, "train", lambda env, args, command: found.append(args))
        patch.setattr(experiments.meta_train, "meta_train", lambda args, command, group: found.append(args))
        patch.setattr(sys, "argv", ["learned-rl", *map(str, words)])
        main()
    return found.pop()


# --- agents -------------------------------------------------------------------------------------------------------

FAMILY = "chain/distractor"  # short episodes, and networks rather than tables
SMALL = {"tasks": 1, "seeds": 1, "checkpoints": 1, "episodes": 1, "test_tasks": 1, "test_seeds": 1}
EVERYTHING = {**spaces(AgentSettings()), "steps": Integers(1, 1000)}


def agent_study(algorithm: str, family: str = FAMILY, **changes: Any) -> AgentStudy:
    """Short lives of an algorithm, with two updates of its own kind."""
    study = AgentStudy.of(algorithm, family, **SMALL)
    config = replace(study.settings.config, n_envs=4, n_steps=16)
    small = replaced(replace(study.settings, config=config, steps=128), {f"config.{k}": v for k, v in changes.items()})
    return replace(study, settings=small)


def bandits(steps: int, preset: str = "bernoulli-5", **shape: int) -> AgentStudy:
    """Short lives of PPO on bandits: 32 environment steps are one update."""
    agents = replace(AgentStudy.of("ppo", f"bandit/{preset}", **SMALL), **shape)
    config = replace(agents.settings.config, n_envs=2, n_steps=16)
    return replace(agents, settings=replace(agents.settings, config=config, steps=steps))


def other(agents: AgentStudy) -> dict[str, Any]:
    """Path -> a value that is not the study's default."""
    values = OTHER | {"normalize_advantage": not agents.settings.config.normalize_advantage}
    return {f"config.{path}": value for path, value in values.items()}


@pytest.fixture(scope="module", params=["ppo", "a2c"])
def lived(request, tmp_path_factory) -> Lived:
    """A trial of which no value is the default's."""
    agents = agent_study(request.param)
    values = other(agents) | {"steps": 250}
    for path, value in values.items():
        assert get(agents.settings, path) != value, path
    folder = tmp_path_factory.mktemp(request.param)
    return live(agents.study(FAMILY, EVERYTHING), replaced(agents.settings, values), folder)


def test_all_that_agents_studies_search_is_looked_for():
    """Whoever makes a field searchable says here where its value is to be seen."""
    assert {f"config.{path}" for path in AGENT} == set(spaces(AgentSettings())) and set(AGENT) == set(OTHER)


@pytest.mark.parametrize("path", AGENT)
def test_a_sampled_value_reaches_the_agents(lived, path):
    value = get(lived.point.config, path)
    assert AGENT[path](lived.seen) == (pytest.approx(value) if path == "hyper.learning_rate" else value)


def test_sampled_steps_are_the_length_of_a_life(lived):
    assert len(lived.seen) == 250 // (32 * 2) == 3


def test_settings_are_the_point_and_its_parameters_are_stored(lived):
    assert lived.settings == lived.point
    assert len(lived.params) == len(EVERYTHING)
    study = agent_study("ppo").study(FAMILY, EVERYTHING)
    assert study.decode(lived.params).config == lived.point.config


def test_the_file_of_the_best_agents_gives_the_same_to_train(lived):
    args = parsed("train", FAMILY, "--config", lived.file)
    assert args.config == lived.point.config == one(u.algorithm.config for u in lived.seen) and args.steps == 250


def test_step_sizes_of_tables_are_searched_where_they_lie(tmp_path):
    """The values beside the fields are those of networks."""
    for algorithm, rate in (("ppo", 0.5), ("a2c", 500.0)):
        agents = agent_study(algorithm, "bandit/bernoulli-5")
        study = agents.study("bandit/bernoulli-5")
        point = replaced(agents.settings, {"config.hyper.learning_rate": rate})
        folder = tmp_path / algorithm
        folder.mkdir()
        assert AGENT["hyper.learning_rate"](live(study, point, folder).seen) == rate


READ = {
    "a2c": "learning_rate max_grad_norm gamma n_steps gae_lambda ent_coef vf_coef",
    "a2c-norm": "learning_rate max_grad_norm gamma n_steps gae_lambda ent_coef vf_coef",
    "ppo": "learning_rate max_grad_norm gamma n_steps gae_lambda ent_coef vf_coef clip_range n_epochs n_minibatches",
    "dpo": "learning_rate max_grad_norm gamma n_steps gae_lambda ent_coef vf_coef n_epochs n_minibatches",
    "lpg": "learning_rate max_grad_norm gamma n_steps prediction_coef",
}


@pytest.mark.parametrize("algorithm", READ)
def test_what_is_searched_unless_told_otherwise(algorithm):
    agents = agent_study(algorithm)
    found = agent_space(agents.settings, agents.objective, agents.family.observation_space)
    assert {path.rpartition(".")[2] for path in found} == set(READ[algorithm].split())


def outcome(agents: AgentStudy, settings: AgentSettings, space: Mapping[str, Space] | None = None) -> torch.Tensor:
    """[P, D] agents at the end of a trial's life, by way of the trial's parameters."""
    study = agents.study(FAMILY, space)
    settings = study.sample(optuna.trial.FixedTrial(study.coordinates(settings)))
    with spying() as seen:
        agents.evaluate(settings, Listener())
    return seen[-1].theta


@pytest.fixture(scope="module", params=READ)
def ordinary(request) -> tuple[AgentStudy, torch.Tensor]:
    """A study whose bounds are met, and what comes out of its defaults."""
    torch.manual_seed(0)  # weights of a learned objective
    agents = agent_study(request.param, **{"hyper.learning_rate": 0.01, "hyper.max_grad_norm": 0.5})
    if isinstance(agents.objective, LPG):
        torch.nn.init.normal_(agents.objective.policy_head.weight)
    return agents, outcome(agents, agents.settings)


def test_the_same_settings_make_the_same_agents(ordinary):
    agents, before = ordinary
    assert torch.equal(before, outcome(agents, agents.settings))


@pytest.mark.parametrize("path", AGENT)
def test_what_may_be_searched_changes_what_is_learned(ordinary, path):
    """Not only does a value arrive: other agents come out, or the study is refused."""
    agents, before = ordinary
    try:
        study, _ = make_study(agents.algorithm, Tune(env=FAMILY, parameters=f"config.{path}"))
    except UserError as error:
        assert path.rpartition(".")[2] not in READ[agents.algorithm].split() and "changes nothing" in str(error)
        return
    assert list(study.spaces) == [f"config.{path}"]
    after = outcome(
        agents, replaced(agents.settings, {f"config.{path}": other(agents)[f"config.{path}"]}), study.spaces
    )
    assert before.shape != after.shape or not torch.equal(before, after)


@pytest.mark.parametrize("path", ["agent.hidden", "agent.activation", "agent.shared"])
def test_tables_have_no_layers_to_search(path):
    with pytest.raises(UserError, match=rf"{path} changes nothing"):
        make_study("ppo", Tune(env="bandit/bernoulli-5", parameters=path))


class Listener:
    """A trial that notes what it is told."""

    number = 0

    def __init__(self, paired: bool = False) -> None:
        self.paired = paired
        self.reports: list[tuple[int, float, int | None]] = []
        self.each: list[float] = []

    def report(self, rung, score, step=None):
        self.reports.append((rung, score, step))

    def report_each(self, scores):
        self.each += list(scores)


def test_a_trial_reports_along_the_way_and_scores_its_end():
    agents = bandits(192, tasks=5, seeds=2, checkpoints=3)
    trial = Listener()
    found = agents.evaluate(agents.settings, trial)
    assert found == {"score": trial.reports[-1][1], "environment_steps": 192.0}
    assert [(rung, steps) for rung, _, steps in trial.reports] == [(1, 64), (2, 128), (3, 192)]
    assert len(trial.each) == 5 * 2 and found["score"] == pytest.approx(agents_module.iqm(np.array(trial.each)))


@pytest.mark.parametrize(("tasks", "seeds"), [(7, 2), (1, 6), (2, 1), (3, 5)])
def test_agents_that_are_compared_seed_by_seed_live_alike_in_every_trial(monkeypatch, tasks, seeds):
    """The same tasks and seeds in the same order, every agent once, a few at a time."""
    agents = bandits(32, tasks=tasks, seeds=seeds)
    groups: list[Any] = []
    original = agents_module.learning_curves

    def noted(family, algorithm, horizon, *, tasks, seeds, seed, **options):
        groups.append((tasks["mean"].tolist(), seeds, seed))
        return original(family, algorithm, horizon, tasks=tasks, seeds=seeds, seed=seed, **options)

    monkeypatch.setattr(agents_module, "learning_curves", noted)
    trials = []
    for rate in (0.1, 0.2):
        trial = Listener(paired=True)
        found = agents.evaluate(replaced(agents.settings, {"config.hyper.learning_rate": rate}), trial)
        assert len(trial.each) == tasks * seeds and found["score"] == pytest.approx(
            agents_module.iqm(np.array(trial.each))
        )
        trials.append(groups[:])
        groups.clear()
    assert trials[0] == trials[1] and len(trials[0]) == min(4, max(tasks, seeds))
    assert len({seed for *_, seed in trials[0]}) == len(trials[0]), "groups are not copies of each other"
    lives = sorted(task for means, n, _ in trials[0] for task in means for _ in range(n))
    drawn = agents.family.sample_split("validation", tasks, 0)["mean"].tolist()
    assert lives == sorted(task for task in drawn for _ in range(seeds))


def test_tasks_that_are_not_scored_end_no_trial(monkeypatch):
    """Of some groups no task may be kept."""
    agents = bandits(32, "gaussian-5", tasks=4)
    best = agents.family.optimal_return(agents.family.sample_split("validation", 4, 0))
    monkeypatch.setattr("experiments.scores.WORTH", float(best.median()) + 1e-3)
    trial = Listener(paired=True)
    score = agents.evaluate(agents.settings, trial)["score"]
    assert math.isfinite(score) and np.isfinite(trial.each).all() and 0 < len(trial.each) < 4
    assert all(math.isfinite(reported) for _, reported, _ in trial.reports)


def test_agents_that_diverge_end_their_trial():
    """Steps so large that theta overflows."""
    agents = agent_study("a2c", optimizer="sgd", **{"hyper.max_grad_norm": math.inf, "hyper.learning_rate": 1e38})
    with pytest.raises(Pruned, match=r"diverged: 1 of 1 agents after \d+ steps"):
        agents.evaluate(agents.settings, Listener())


def test_tuning_and_testing_are_on_different_tasks(monkeypatch):
    agents = bandits(32, tasks=3, test_tasks=4, test_seeds=2)
    drawn: dict[str, list[Any]] = defaultdict(list)
    original = type(agents.family).sample_split

    def noted(self, split, n, seed=0):
        tasks = original(self, split, n, seed)
        drawn[split] += tasks["mean"].tolist()
        return tasks

    monkeypatch.setattr(type(agents.family), "sample_split", noted)
    agents.evaluate(agents.settings, Listener())
    assert set(drawn) == {"validation"}
    tuned = drawn.pop("validation")
    tested = agents.test(agents.settings)
    assert set(drawn) == {"test"} and tested.returns.returns.shape[1:] == (4, 2)
    assert not any(task in tuned for task in drawn["test"])


# --- the outer loop -----------------------------------------------------------------------------------------------

WEIGHTS = {"prediction_entropy": -0.5, "pi_hat_square": 0.25, "y_hat_square": 0.125}
TINY = Recipe(
    "tiny", "", FAMILY, "lpg", {"predictions": 8, "width": 16, "core": "gru", "embedding": 8},
    MetaTrainConfig(
        lifetimes=3, horizon=3, max_grad_norm=1.0,
        agent=PPOConfig(n_envs=4, n_steps=16, n_epochs=1, n_minibatches=1, agent=AgentConfig()),
        estimator=TruncatedConfig(window=2),
        loss=OuterLossConfig(regularisers=WEIGHTS),
    ),
    validation_tasks=2,
)  # fmt: skip


@dataclass
class Outer:
    """One meta-training, from where its numbers are used.

    Attributes:
        updates:  of its agents, within windows.
        lengths:  updates of each window.
        weights:  of the policy's entropy, at each meta-step.
        scales:   of each regulariser, at each meta-step.
        norms:    to which the meta-gradient was clipped.
        rates:    learning rate of each step of the meta-parameters.
        advances: discount and trace decay of the critic's advantages, each time.
        lessons:  learning rate and number of the critic's steps, each time that it learned.
    """

    trainer: MetaTrainer | None = None
    updates: list[Seen] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    scales: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    advances: list[tuple[float, float]] = field(default_factory=list)
    lessons: list[list[float]] = field(default_factory=list)


@contextlib.contextmanager
def spying_outside() -> Iterator[Outer]:
    """The meta-training that is done within."""
    outer = Outer()
    step, run, judge, weigh = MetaTrainer.step, TruncatedMetaGradient.run, Learning.judge, Learning._weighted
    clip, advance = outer_loop.clip_norm, outer_critic.gae
    learn, inner_step = OuterCritic.learn, inner_loop.PlainInner.step

    def spied_step(self):
        outer.trainer = self
        return step(self)

    def spied_run(self, problem, eta, first, length, *rest):
        outer.lengths.append(length)
        return run(self, problem, eta, first, length, *rest)

    def spied_judge(self, state, data, eta, *rest):
        def loss(**changes):
            changed = copy.copy(self)
            changed.config = replace(self.config, **changes)
            return judge(changed, state, data, eta, *rest).detach().sum()

        none, large = loss(policy_entropy=0.0), 1e5  # so large that nothing else in the loss counts
        ours = none - loss(policy_entropy=large * self.config.policy_entropy)
        outer.weights.append(float(ours / (none - loss(policy_entropy=large, entropy_half_life=math.inf))))
        return judge(self, state, data, eta, *rest)

    def spied_weighted(self, terms, like):
        total, parts = weigh(self, terms, like)
        for name in terms:  # what the loss loses without it
            without, _ = weigh(self, {k: v for k, v in terms.items() if k != name}, like)
            outer.scales[name].append(float(((total - without).sum() / parts[name].sum()).detach()))
        return total, parts

    def spied_clip(grads, max_norm):
        outer.norms.append(max_norm)
        return clip(grads, max_norm)

    def spied_rule(step):
        def spied(self, grads, state, eta, learning_rate, *rest):
            if outer.trainer is not None and self is outer.trainer.rule:
                outer.rates.append(learning_rate)
            return step(self, grads, state, eta, learning_rate, *rest)

        return spied

    def spied_gae(reward, value, next_value, terminated, truncated, gamma, gae_lambda):
        outer.advances.append((gamma, gae_lambda))
        return advance(reward, value, next_value, terminated, truncated, gamma, gae_lambda)

    def spied_learn(self, *rest):
        outer.lessons.append([])
        return learn(self, *rest)

    def spied_inner_step(self, loss, hyper, *rest):
        if outer.trainer is not None and self is outer.trainer.critic._inner:
            outer.lessons[-1].append(hyper.learning_rate)
        return inner_step(self, loss, hyper, *rest)

    with spying() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetaTrainer, "step", spied_step)
        patch.setattr(TruncatedMetaGradient, "run", spied_run)
        patch.setattr(Learning, "judge", spied_judge)
        patch.setattr(Learning, "_weighted", spied_weighted)
        patch.setattr(outer_loop, "clip_norm", spied_clip)
        patch.setattr(Adam, "update", spied_rule(Adam.update))
        patch.setattr(outer_critic, "gae", spied_gae)
        patch.setattr(OuterCritic, "learn", spied_learn)
        patch.setattr(inner_loop.PlainInner, "step", spied_inner_step)
        yield outer
    outer.updates = [update for update in seen if update.graph]


def half_life(outer: Outer) -> float:
    """From how the entropy's weight falls."""
    return math.log(0.5) / math.log(outer.weights[1] / outer.weights[0])


#: Path below a recipe -> where its value shows in meta-training.
META: dict[str, Callable[[Any], Any]] = {
    "train.learning_rate": lambda o: one(o.rates),
    "train.max_grad_norm": lambda o: one(o.norms),
    "train.estimator.window": lambda o: one(o.lengths),
    "train.loss.policy_entropy": lambda o: o.weights[0],
    "train.loss.entropy_half_life": half_life,
    "train.critic.gamma": lambda o: one(gamma for gamma, _ in o.advances),
    "train.critic.gae_lambda": lambda o: one(gae_lambda for _, gae_lambda in o.advances),
    "train.critic.learning_rate": lambda o: one(rate for lesson in o.lessons for rate in lesson),
    "train.critic.epochs": lambda o: one(map(len, o.lessons)),
    "train.critic.agent.hidden": lambda o: widths(o.trainer.critic.population.agent),
    "train.critic.agent.activation": lambda o: o.trainer.critic.population.agent.activation.__name__,
    "train.critic.agent.shared": lambda o: o.trainer.critic.config.agent.shared,  # one trunk either way
    "settings.predictions": lambda o: one(u.agent.head_sizes["prediction"] for u in o.updates),
    "settings.width": lambda o: o.trainer.component.policy_head.in_features,
    "settings.embedding": lambda o: o.trainer.component.phi[0].out_features,
    **{f"train.loss.regularisers.{name}": lambda o, name=name: np.mean(o.scales[name]) for name in WEIGHTS},
    **{f"train.agent.{path}": lambda o, probe=probe: probe(o.updates) for path, probe in AGENT.items()},
    # LPG has no use for it
    "train.agent.normalize_advantage": lambda o: one(u.algorithm.config.normalize_advantage for u in o.updates),
}

OTHERWISE: dict[str, Any] = {
    "train.learning_rate": 0.004,
    "train.max_grad_norm": 0.25,
    "train.estimator.window": 3,
    "train.loss.policy_entropy": 0.2,
    "train.loss.entropy_half_life": 128.0,
    "train.critic.gamma": 0.97,
    "train.critic.gae_lambda": 0.75,
    "train.critic.learning_rate": 0.0125,
    "train.critic.epochs": 2,
    "train.critic.agent.hidden": (128, 128),
    "train.critic.agent.activation": "relu",
    "train.critic.agent.shared": True,
    "settings.predictions": 4,
    "settings.width": 32,
    "settings.embedding": 16,
    "train.loss.regularisers.prediction_entropy": -2.0,
    "train.loss.regularisers.pi_hat_square": 1.5,
    "train.loss.regularisers.y_hat_square": 1.0,
    **{f"train.agent.{path}": value for path, value in OTHER.items()},
}
ROUNDED = ("regularisers", "policy_entropy", "entropy_half_life", "hyper.learning_rate")  # measured in float32


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Lived:
    """A meta-training of which no value is the default's."""
    settings = outer_settings(TINY)
    for path, value in OTHERWISE.items():
        assert get(settings.recipe, path) != value, path
    point = replaced(settings, {f"recipe.{path}": value for path, value in OTHERWISE.items()})
    study = replace(OuterStudy(settings, meta_steps=3, checkpoints=1).study(), space=outer_space(settings))
    return live(study, point, tmp_path_factory.mktemp("outer"), spying_outside)


def test_all_that_outer_studies_search_is_looked_for():
    found = outer_space(outer_settings(TINY))
    assert set(found) == {f"recipe.{path}" for path in META} == {f"recipe.{path}" for path in OTHERWISE}
    assert set(spaces(MetaTrainConfig())) | set(spaces(LPG.Config())) <= {path.partition(".")[2] for path in META}


@pytest.mark.parametrize("path", META)
def test_a_sampled_value_reaches_the_meta_training(trained, path):
    value, near = OTHERWISE[path], any(part in path for part in ROUNDED)
    assert META[path](trained.seen) == (pytest.approx(value, rel=1e-4) if near else value)


def test_meta_trainings_settings_are_the_point(trained):
    assert trained.settings == trained.point and trained.seen.trainer.config == trained.point.recipe.train
    assert vars(trained.seen.trainer.component.config) == trained.point.recipe.settings
    assert len(trained.params) == len(META)


def test_every_meta_training_has_the_same_environment_steps(trained):
    budget = 3 * per_meta_step(TINY)
    assert budget == 3 * 3 * 3 * 4 * 16
    assert trained.seen.trainer.environment_steps == budget // per_meta_step(trained.point.recipe) * (4 * 3 * 2 * 32)
    assert trained.seen.trainer.steps == len(trained.seen.weights) > 1


def test_the_file_of_the_best_outer_loop_gives_the_same_to_meta_train(trained, monkeypatch):
    monkeypatch.setattr("experiments.recipes.get_recipe", lambda name: TINY)
    assert parsed("meta-train", "tiny", "--config", trained.file) == MetaTrain(trained.point.recipe)


def test_what_is_searched_of_a_recipe_unless_told_otherwise():
    study = OuterStudy(outer_settings(TINY)).study()
    weights = {f"recipe.train.loss.regularisers.{name}" for name in WEIGHTS}
    usual = {*SEARCHED} - {"recipe.train.estimator.sigma"}  # which evolution alone has
    assert set(study.spaces) == usual | weights
    bounds = {path.rpartition(".")[2]: space for path, space in study.spaces.items()}
    assert bounds["prediction_entropy"] == LogNegative(0.05, 5.0) and bounds["pi_hat_square"] == LogUniform(0.025, 2.5)
    assert bounds["width"] == PowersOfTwo(8, 32)
    fewer = replace(TINY, train=replace(TINY.train, loss=replace(TINY.train.loss, regularisers={})))
    assert set(OuterStudy(outer_settings(fewer)).study().spaces) == usual
    evolved = replace(TINY, train=replace(TINY.train, estimator=EvolutionConfig(window=2)))
    assert "recipe.train.estimator.sigma" in OuterStudy(outer_settings(evolved)).study().spaces


def test_a_width_that_is_no_power_of_two_does_not_hinder():
    odd = outer_settings(replace(TINY, settings=TINY.settings | {"width": 48}))
    assert OuterStudy(odd).study(["window"]).spaces.keys() == {"recipe.train.estimator.window"}


@pytest.mark.parametrize("seed", [0, 1, 10])
def test_the_winner_is_trained_from_seeds_that_no_trial_had(monkeypatch, seed):
    outer = OuterStudy(
        outer_settings(TINY), meta_steps=1, seeds=2, checkpoints=1, test_tasks=2, test_seeds=2, seed=seed
    )
    seeds: list[int] = []
    init = MetaTrainer.__init__

    def noted(self, family, objective, config, seed, *rest):
        seeds.append(seed)
        init(self, family, objective, config, seed, *rest)

    monkeypatch.setattr(MetaTrainer, "__init__", noted)
    splits: list[tuple[str, int]] = []
    lives = experiments.tuning.outer.fresh_lives
    monkeypatch.setattr(
        experiments.tuning.outer,
        "fresh_lives",
        lambda recipe, family, trainer, split, tasks, seed=0: (
            splits.append((split, tasks)) or lives(recipe, family, trainer, split, tasks, seed)
        ),
    )
    outer.evaluate(outer.settings, Listener())
    tuned, found = seeds[:], outer.test(outer.settings)
    assert len(tuned) == 2 and len(seeds) == 4 and not set(tuned) & set(seeds[2:])
    assert splits == [("validation", 2)] * 2 + [("test", 2)] * 2
    assert found.returns.returns.shape[1:] == (2, 2)


def test_meta_training_seeds_are_compared_one_by_one():
    outer = OuterStudy(outer_settings(TINY), meta_steps=2, seeds=2, checkpoints=2)
    together, apart = Listener(), Listener(paired=True)
    assert outer.evaluate(outer.settings, together) == outer.evaluate(outer.settings, apart)
    assert together.each == apart.each and len(apart.each) == 2 * TINY.validation_tasks
    assert [r for r, *_ in together.reports] == [1, 2] and [r for r, *_ in apart.reports] == [1, 2, 1, 2]


# --- the search ---------------------------------------------------------------------------------------------------

FORK = get_context("fork")
FILES = ("study.db", "study.log")
FAIL, COMPLETE, PRUNED, WAITING = TrialState.FAIL, TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING


@dataclass(frozen=True)
class Numbers:
    """A setting of every kind."""

    x: float = field(default=0.5, metadata=searched(Uniform(-1.0, 1.0)))
    rate: float = field(default=0.1, metadata=searched(LogUniform(1e-3, 1.0)))
    gamma: float = field(default=0.9, metadata=searched(LogOneMinus(1e-3, 0.5)))
    weight: float = field(default=-0.1, metadata=searched(LogNegative(1e-3, 1.0)))
    count: int = field(default=3, metadata=searched(Integers(1, 9)))
    units: int = field(default=5, metadata=searched(Integers(1, 99, log=True)))
    size: int = field(default=8, metadata=searched(PowersOfTwo(1, 64)))
    rule: str = field(default="sgd", metadata=searched(Choice("sgd", "adam")))
    shape: tuple[int, ...] = field(default=(8,), metadata=searched(Choice((8,), (8, 8))))
    fixed: float = 2.0


STUDY = Study("numbers", Numbers(), lambda settings, trial: settings.x)
FEW = replace(STUDY, space={"x": Uniform(-1.0, 1.0), "rate": LogUniform(1e-3, 1.0)})


def searching(url: Path, study: Study = STUDY, name: str = "s", **config: Any) -> Search:
    options = {"trials": 6, "sampler": "random", "pruner": "none"} | config
    return Search(study, str(url), name, SearchConfig(**options))  # type: ignore[arg-type]


def by(evaluate: Callable[[Any, Any], Any], study: Study = FEW, **changes: Any) -> Study:
    return replace(study, evaluate=evaluate, **changes)


def trials(search: Search, *states: TrialState) -> list[Any]:
    return search.optuna.get_trials(states=states or None)


def finished(search: Search) -> list[Any]:
    return trials(search, *FINISHED)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nothing here is to outlast a power cut."""
    monkeypatch.setattr(study_module, "POLL", 0.02)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "study.log"


# --- how many ---


def test_the_first_trial_is_the_defaults(file):
    search = searching(file)
    search.run()
    first = search.optuna.trials[0]
    assert first.params == {
        "x": 0.5, "rate": 0.1, "one_minus_gamma": 1 - 0.9, "minus_weight": 0.1, "count": 3, "units": 5, "log2_size": 3,
        "rule": "sgd", "shape": "8",
    }  # fmt: skip
    assert first.user_attrs["enqueued"] == "defaults" and STUDY.decode(first.params) == Numbers()
    assert first.user_attrs["settings"] == {
        "x": 0.5, "rate": 0.1, "gamma": 0.9, "weight": -0.1, "count": 3, "units": 5, "size": 8, "rule": "sgd",
        "shape": [8],
    }  # fmt: skip
    assert [t.user_attrs.get("enqueued") for t in search.optuna.trials] == ["defaults", *[None] * 5]


def test_defaults_outside_of_a_space_begin_at_its_end(file):
    study = replace(STUDY, settings=Numbers(x=7.0, gamma=1.0))
    search = searching(file, study, trials=1)
    search.run()
    assert search.best_settings() == Numbers(x=1.0, gamma=1 - 1e-3) and search.best().value == 1.0


@pytest.mark.parametrize("name", FILES)
def test_a_study_has_exactly_its_trials_and_can_be_extended(tmp_path, name):
    seen: list[Numbers] = []
    study = by(lambda settings, trial: seen.append(settings) or settings.x)
    first = searching(tmp_path / name, study)
    first.run()
    assert len(seen) == len(finished(first)) == len(first.optuna.trials) == 6
    again = searching(tmp_path / name, study)
    again.run()
    assert len(seen) == 6 and again.best() == first.best()
    assert again.best_settings() == max(seen, key=lambda settings: settings.x)
    more = searching(tmp_path / name, study, trials=9)
    more.run()
    assert len(seen) == len(finished(more)) == 9 == len(set(seen))
    searching(tmp_path / name, study, trials=3).run()
    assert len(seen) == 9


def test_the_seed_says_which_points_are_proposed(tmp_path):
    def points(name: str, seed: int) -> list[dict[str, Any]]:
        search = searching(tmp_path / name, seed=seed)
        search.run()
        return [t.params for t in search.optuna.trials]

    assert points("a.log", 0) == points("b.log", 0)
    assert points("c.log", 1)[1:] != points("a.log", 0)[1:]


def test_pruned_trials_count_and_failed_ones_do_not(file):
    def evaluate(settings, trial):
        if trial.number == 2:
            raise Pruned("no good")
        if trial.number == 3:
            raise ValueError("a bug")
        return settings.x

    search = searching(file, by(evaluate))
    with pytest.raises(ValueError, match="a bug"):
        search.run()
    assert [t.state for t in search.optuna.trials] == [COMPLETE, COMPLETE, PRUNED, FAIL]
    search.run()
    assert [t.state for t in search.optuna.trials[4:]] == [COMPLETE] * 3 and len(finished(search)) == 6


def test_one_trial_too_many_is_not_counted(file):
    """Two workers ask for the last trial at once: here the second asks while the first has its."""
    late: list[Search] = []
    ran: list[int] = []

    def evaluate(settings, trial):
        ran.append(trial.number)
        if trial.number == 2:
            with Worker(str(file), "s") as worker:
                late[0]._one(worker)
        return settings.x

    search = searching(file, by(evaluate), trials=3)
    late.append(searching(file, by(evaluate), trials=3))
    search.run()
    assert [t.state for t in search.optuna.trials] == [COMPLETE] * 3 + [FAIL] and ran == [0, 1, 2]


def test_no_new_trial_begins_after_the_timeout(file):
    def evaluate(settings, trial):
        time.sleep(1.0)
        return settings.x

    search = searching(file, by(evaluate), timeout=0.0)
    search.run()
    assert not finished(search)
    searching(file, by(evaluate), timeout=1.0 / 60).run()
    assert len(finished(search)) == 1


def test_progress_is_shown_after_every_trial(file):
    shown: list[int] = []
    searching(file).run(lambda study: shown.append(len(study.trials)))
    assert shown == [1, 2, 3, 4, 5, 6]


# --- what all trials have in common ---


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "other"}, "study 'numbers', and it is 'other' now"),
        ({"settings": Numbers(fixed=3.0)}, "settings.fixed 2.0, and it is 3.0 now"),
        (
            {"space": {"x": Uniform(-1.0, 1.0)}},
            r"space.rate 'LogUniform\(low=0.001, high=1.0\)', and it is 'absent' now",
        ),
        ({"space": {**spaces(Numbers()), "x": Uniform(0.0, 1.0)}}, r"space.x .*low=-1.0.*, and it is .*low=0.0.* now"),
        ({"space": {**spaces(Numbers()), "fixed": Uniform(0.0, 3.0)}}, "settings.fixed 2.0, and it is 'absent' now"),
        ({"about": {"tasks": 3}}, "tasks 2, and it is 3 now"),
        ({"about": {}}, "tasks 2, and it is 'absent' now"),
        ({"metrics": {"score": "minimize"}}, "metrics.score 'maximize', and it is 'minimize' now"),
        ({"metrics": {"loss": "maximize"}}, "metrics.score 'maximize', and it is 'absent' now"),
    ],
)
def test_trials_of_two_definitions_are_not_mixed(file, changed, said):
    study = replace(STUDY, about={"tasks": 2})
    search = searching(file, study)
    with pytest.raises(UserError, match=rf"Study 's' was made with {said}: repeat the old value or choose another"):
        searching(file, replace(study, **changed))
    searching(file, replace(study, **changed), name="another")
    assert len(searching(file, study).optuna.trials) == len(search.optuna.trials) == 1


def test_a_study_without_a_space_is_refused():
    with pytest.raises(UserError, match="Study 'empty' has no search space"):
        Study("empty", Worker, lambda settings, trial: 0.0, space={})
    with pytest.raises(UserError, match=r"mark fields with metadata=searched"):
        Study("bare", dataclasses.make_dataclass("Bare", [("x", int, 3)])(), lambda settings, trial: 0.0)


def test_parameters_are_chosen_by_their_names():
    study = AgentStudy.of("ppo", "CartPole-v1").study("CartPole-v1")
    assert list(study.select(["gamma", "config.n_envs"])) == ["config.hyper.gamma", "config.n_envs"]
    assert list(study.select(["hyper.gamma"])) == ["config.hyper.gamma"]
    for name, nearest in (("gama", "config.hyper.gamma"), ("learning_rat", "learning_rate")):
        with pytest.raises(UserError, match=rf"unknown parameter '{name}': the nearest of .*'.*{nearest}'"):
            study.select([name])
    outer = OuterStudy(outer_settings(TINY)).study()
    with pytest.raises(
        UserError, match=r"'learning_rate' fits .*train\.learning_rate and .*: name one of them in full"
    ):
        outer.select(["learning_rate"])
    assert list(outer.select(["critic.learning_rate"])) == ["recipe.train.critic.learning_rate"]


def test_names_are_as_short_as_they_can_be():
    outer = OuterStudy(outer_settings(TINY)).study()
    names = outer.names()
    assert names["recipe.settings.width"] == "width" and names["recipe.train.learning_rate"] == "train.learning_rate"
    assert names["recipe.train.agent.hyper.learning_rate"] == "hyper.learning_rate"
    assert len(set(names.values())) == len(names)


# --- several workers ---


def start(function: Callable[..., Any], *args: Any) -> Any:
    process = FORK.Process(target=function, args=args)
    process.start()
    return process


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


pytest_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*")


@pytest_fork
@pytest.mark.parametrize("name", FILES)
def test_workers_share_a_study_exactly(tmp_path, name):
    def evaluate(settings, trial):
        time.sleep(0.02)
        return settings.x

    def work() -> None:
        search = searching(tmp_path / name, by(evaluate), trials=15)
        ready.wait(60)
        search.run()

    ready = FORK.Barrier(3)
    workers = [start(work) for _ in range(3)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    search = searching(tmp_path / name, FEW)
    assert len(finished(search)) == 15 and {t.state for t in search.optuna.trials} <= {COMPLETE, FAIL}
    assert [t.user_attrs.get("enqueued") for t in finished(search)].count("defaults") == 1
    assert len({tuple(t.params.values()) for t in finished(search)}) == 15, "no point twice"
    assert len({t.user_attrs["worker"] for t in finished(search)}) > 1, "more than one did some of it"
    assert not (tmp_path / f"{name}.workers").exists()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_workers_that_join_at_the_same_moment_propose_other_points(file, sampler):
    searching(file, trials=1).run()
    first, second, third = (searching(file, trials=n, sampler=sampler) for n in (4, 7, 10))
    for search in (first, second, third):
        search.run()
    assert len({tuple(t.params.values()) for t in finished(first)}) == 10


def test_defaults_that_two_workers_enqueued_at_once_are_tried_once(file):
    """Both found a study without trials."""
    search = searching(file)
    search.optuna.enqueue_trial(STUDY.coordinates(Numbers()), user_attrs={"enqueued": "defaults"})
    search.run()
    assert [STUDY.decode(t.params) for t in finished(search)].count(Numbers()) == 1 and len(finished(search)) == 6


@pytest_fork
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("waiting", [False, True], ids=["taken up later", "taken up by who waits"])
def test_what_a_killed_worker_was_at_is_run_again(tmp_path, name, waiting):
    def hangs(settings, trial):
        if trial.number == 3:
            (tmp_path / "in").touch()
            time.sleep(600)
        return settings.x

    def work(evaluate) -> None:
        searching(tmp_path / name, by(evaluate), trials=4).run()

    doomed = start(work, hangs)
    until((tmp_path / "in").exists)
    other = start(work, FEW.evaluate) if waiting else None
    if other is not None:
        time.sleep(0.2)
        assert other.is_alive(), "it waits for the last trial"
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join()
    assert doomed.exitcode == -signal.SIGKILL
    if other is not None:
        other.join()
    search = searching(tmp_path / name, FEW, trials=4)
    search.run()
    assert len(finished(search)) == 4
    (lost,) = trials(search, FAIL)
    (again,) = [t for t in finished(search) if t.user_attrs.get("retry_of") == lost.number]
    assert lost.number == 3 and again.params == lost.params and again.state == COMPLETE


def test_what_was_interrupted_is_put_back(file):
    def evaluate(settings, trial):
        if trial.number == 2:
            raise KeyboardInterrupt
        return settings.x

    search = searching(file, by(evaluate))
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert [t.state for t in search.optuna.trials] == [COMPLETE, COMPLETE, FAIL, WAITING]
    search = searching(file, FEW)
    search.run()
    assert len(finished(search)) == 6 and len(search.optuna.trials) == 7
    assert search.optuna.trials[3].params == search.optuna.trials[2].params
    assert search.optuna.trials[3].state == COMPLETE


@pytest.mark.parametrize("name", FILES)
def test_a_worker_that_was_thought_dead_goes_on(tmp_path, name):
    """Such as on a machine that was suspended: another worker has failed its trial meanwhile."""
    found: list[Search] = []

    def evaluate(settings, trial):
        if trial.number == 2:
            (running,) = trials(found[0], TrialState.RUNNING)
            found[0].optuna._storage.set_trial_state_values(running._trial_id, state=FAIL)
        return settings.x

    found.append(searching(tmp_path / name, by(evaluate)))
    found[0].run()
    assert [t.state for t in trials(found[0])] == [COMPLETE, COMPLETE, FAIL, *[COMPLETE] * 4]


# --- trials that end otherwise ---


def reports_nan(settings, trial):
    trial.report(1, math.nan)
    pytest.fail("it went on")


def reports_nan_of_a_seed(settings, trial):
    trial.report_each([0.5, math.nan])
    pytest.fail("it went on")


def prunes_itself(settings, trial):
    raise Pruned("hopeless")


def is_infeasible(settings, trial):
    raise UserError("that cannot be")


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        (lambda settings, trial: math.nan, "diverged: score is nan"),
        (lambda settings, trial: -math.inf, "diverged: score is -inf"),
        (lambda settings, trial: {"score": math.nan}, "diverged: score is nan"),
        (reports_nan, "diverged: the score is nan at report 1"),
        (reports_nan_of_a_seed, "diverged: the score of seed 1 is nan"),
        (prunes_itself, "hopeless"),
        (is_infeasible, "infeasible: that cannot be"),
    ],
)
@pytest.mark.parametrize("pruner", ["none", "median", "wilcoxon"])
def test_a_trial_that_comes_to_nothing_is_pruned_and_says_why(file, ends, reason, pruner):
    search = searching(
        file, by(lambda settings, trial: ends(settings, trial) if trial.number == 1 else 0.0), pruner=pruner
    )
    search.run()
    states = [t.state for t in search.optuna.trials]
    assert states == [COMPLETE, PRUNED, *[COMPLETE] * 4]
    assert search.optuna.trials[1].user_attrs["reason"] == reason
    assert search.optuna.trials[1].user_attrs["seconds"] >= 0


@dataclass(frozen=True)
class Ordered:
    """Settings that check each other, as a dataclass of anyone's may."""

    low: int = field(default=1, metadata=searched(Integers(1, 9)))
    high: int = field(default=9, metadata=searched(Integers(1, 9)))

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise UserError(f"low is {self.low}: expected at most {self.high}.")


def test_settings_that_refuse_their_values_end_the_trial_only(file):
    search = searching(file, Study("ordered", Ordered(), lambda settings, trial: settings.low), trials=30)
    search.run()
    bad = [t.params["low"] > t.params["high"] for t in search.optuna.trials]
    assert [t.state == PRUNED for t in search.optuna.trials] == bad and any(bad) and not all(bad)
    assert all("infeasible: low is" in t.user_attrs["reason"] for t in trials(search, PRUNED))


def test_a_mistake_that_the_defaults_have_too_is_the_users(file):
    """Every time, and without trials that would have to be thrown away once it is corrected."""
    for _ in range(2):
        search = searching(file, by(is_infeasible))
        with pytest.raises(UserError, match=r"^that cannot be$"):
            search.run()
        assert not finished(search)
    search = searching(file, FEW)
    search.run()
    assert len(finished(search)) == 6
    assert FEW.decode(finished(search)[0].params) == Numbers(), "the defaults are still the first"


def test_a_study_without_any_completed_trial_says_so(file):
    search = searching(file, by(prunes_itself))
    search.run()
    with pytest.raises(UserError, match=r"Study 's' has no completed trial \(hopeless\)"):
        search.best()


def test_a_function_must_return_what_is_optimised(file):
    with pytest.raises(UserError, match="optimises 'score', which its function does not return"):
        searching(file, by(lambda settings, trial: {"scores": 1.0})).run()


# --- pruning ---


def along(settings, trial):
    """Better and better, as far as its x goes; at every moment the better the higher its x."""
    for rung in range(1, 7):
        trial.report(rung, settings.x * rung)
    return settings.x * 6


def seed_by_seed(settings, trial):
    noise = np.random.default_rng(0).normal(scale=0.1, size=(3, 4))  # of a seed, in whatever trial
    for group in noise:
        trial.report_each(settings.x + group + 0.01 * np.random.default_rng(trial.number).normal(size=4))
    return settings.x


@pytest.mark.parametrize(("pruner", "evaluate"), [("median", along), ("hyperband", along), ("wilcoxon", seed_by_seed)])
def test_the_hopeless_are_pruned_and_the_best_is_not(file, pruner, evaluate):
    search = searching(file, by(evaluate, rungs=6), trials=24, pruner=pruner, startup_trials=3)
    search.run()
    complete, pruned = trials(search, COMPLETE), trials(search, PRUNED)
    assert len(pruned) >= 4 and complete
    best = max(finished(search), key=lambda t: t.params["x"])
    assert best.state == COMPLETE and search.best().number == best.number
    assert all(t.user_attrs["reason"].startswith("pruned at ") for t in pruned)
    assert np.mean([t.params["x"] for t in pruned]) < np.mean([t.params["x"] for t in complete])
    steps = [len(t.intermediate_values) for t in pruned]
    assert min(steps) >= 1 and np.mean(steps) < (6 if evaluate is along else 12), "not only at their ends"


def test_the_median_pruner_waits_for_a_third_of_the_reports(file):
    search = searching(file, by(along, rungs=6), trials=3, pruner="median", startup_trials=2)
    for x in (0.6, -0.9):
        search.enqueue(Numbers(x=x), "")
    search.run()
    assert [t.state for t in search.optuna.trials] == [COMPLETE, COMPLETE, PRUNED]
    assert search.optuna.trials[2].user_attrs["reason"] == "pruned at report 2"
    assert search.optuna.trials[0].intermediate_values == {rung: 0.5 * rung for rung in range(1, 7)}


@pytest.mark.parametrize("pruner", ["none", "median"])
def test_a_trial_knows_whether_it_is_compared_seed_by_seed(file, pruner):
    asked: list[bool] = []
    searching(file, by(lambda settings, trial: asked.append(trial.paired) or 0.0), trials=1, pruner=pruner).run()
    study = by(lambda settings, trial: asked.append(trial.paired) or 0.0)
    searching(file, study, name="paired", trials=1, pruner="wilcoxon").run()
    assert asked == [False, True]
    with pytest.raises(UserError, match="was made with pruned seed by seed False, and it is True now"):
        searching(file, study, trials=2, pruner="wilcoxon")


def test_a_study_does_not_mix_defaults_or_weights():
    agents = bandits(32)
    other = replaced(agents, {"settings": replaced(agents.settings, {"config.hyper.gamma": 0.95})})
    mine, others = (a.study("bandit/bernoulli-5").definition() for a in (agents, other))
    assert mine["defaults"] != others["defaults"]
    torch.manual_seed(0)
    lpg = AgentStudy.of("lpg", "bandit/bernoulli-5", 5_120)
    torch.manual_seed(1)
    fresh = AgentStudy.of("lpg", "bandit/bernoulli-5", 5_120)
    assert lpg.study("x").about["weights"] != fresh.study("x").about["weights"]


def test_agents_are_pruned_by_what_they_report(file):
    """From a real trial's first checkpoint to the storage."""
    agents = bandits(384, tasks=3, checkpoints=3)
    search = searching(file, agents.study("bandit/bernoulli-5"), trials=1, pruner="median")
    search.run()
    assert list(search.best().intermediate_values) == [1, 2, 3]
    assert search.best().value == search.best().intermediate_values[3]
    other = searching(file, agents.study("bandit/bernoulli-5"), name="paired", trials=1, pruner="wilcoxon")
    other.run()
    assert list(other.best().intermediate_values) == [0, 1, 2]


# --- samplers ---


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "random"])
def test_every_sampler_searches_every_kind_of_space(file, sampler):
    study = by(lambda s, trial: s.x - s.rate + s.count, STUDY)
    search = searching(file, study, sampler=sampler, startup_trials=3 if sampler == "gp" else 2)
    search.run()
    assert [t.state for t in search.optuna.trials] == [COMPLETE] * 6
    tried = [STUDY.decode(t.params) for t in search.optuna.trials]
    assert len(set(tried)) == 6
    for settings in tried:
        assert -1 <= settings.x <= 1 and 0.5 <= settings.gamma <= 0.999 and -1 <= settings.weight <= -1e-3
        assert settings.size in (1, 2, 4, 8, 16, 32, 64) and settings.shape in ((8,), (8, 8)) and settings.fixed == 2.0


def test_a_model_finds_what_it_looks_for(file):
    """The later half of TPE's trials lies nearer to the top of a hill than chance would."""
    hill = by(lambda s, trial: -abs(s.x - 0.25) - abs(math.log10(s.rate / 0.01)))
    search = searching(file, hill, sampler="tpe", trials=50)
    search.run()
    values = [t.value for t in search.optuna.trials]
    assert np.mean(values[25:]) > np.mean(values[1:11]) + 0.3 and search.best().value > -0.3


@pytest.mark.parametrize(("name", "said"), [("sampler", "'tep'.* is 'tpe'"), ("pruner", "'medain'.* is 'median'")])
def test_samplers_and_pruners_have_names(name, said):
    with pytest.raises(UserError, match=f"unknown {name} {said}"):
        SearchConfig(**{name: re.findall("'(.*?)'", said)[0]})
    for wrong in ({"trials": 0}, {"timeout": -1.0}, {"startup_trials": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
            SearchConfig(**wrong)


# --- several metrics ---

BOTH = by(
    lambda s, trial: {"score": s.x, "environment_steps": (1 + s.x) * 100 + s.rate},
    metrics={"score": "maximize", "environment_steps": "minimize"},
)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_a_score_is_traded_against_its_cost(file, sampler):
    search = searching(file, BOTH, sampler=sampler, trials=8, startup_trials=6)
    search.run()
    points = [(t.params["x"], (1 + t.params["x"]) * 100 + t.params["rate"]) for t in finished(search)]
    assert [tuple(t.values) for t in finished(search)] == points
    front = [p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points)]
    assert sorted(tuple(t.values) for t in search.optuna.best_trials) == sorted(front)
    assert tuple(search.best().values) == max(points)
    assert search.optuna.metric_names == ["score", "environment_steps"]


def test_the_first_metric_decides_in_its_direction(file):
    loss = by(lambda s, trial: {"loss": s.x, "seconds": 1.0}, metrics={"loss": "minimize", "seconds": "minimize"})
    search = searching(file, loss)
    search.run()
    assert search.best().values[0] == min(t.values[0] for t in finished(search))
    alone = searching(file, by(lambda s, trial: s.x, metrics={"loss": "minimize"}), name="alone")
    alone.run()
    assert alone.best().value == min(t.value for t in finished(alone))


def test_seconds_are_measured(file):
    def evaluate(settings, trial):
        time.sleep(0.05)
        return settings.x

    search = searching(file, by(evaluate, metrics={"score": "maximize", "seconds": "minimize"}), trials=2)
    search.run()
    for trial in search.optuna.trials:
        assert trial.values == [trial.params["x"], trial.user_attrs["seconds"]] and 0.05 <= trial.values[1] < 5
    single = searching(file, by(evaluate), name="single", trials=1)
    single.run()
    assert single.best().user_attrs["seconds"] >= 0.05


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"pruner": "median"}, "pruner is 'median'.* choose 'none'"),
        ({"pruner": "wilcoxon"}, "pruner is 'wilcoxon'"),
        ({"sampler": "cmaes"}, "sampler is 'cmaes', which optimises one metric"),
    ],
)
def test_what_knows_one_metric_only_is_refused(file, config, said):
    with pytest.raises(UserError, match=said):
        searching(file, BOTH, **config)
    assert not file.exists()


# --- where to begin ---


def test_points_that_are_enqueued_come_first_and_exactly(file):
    search = searching(file)
    points = [Numbers(x=1 / 3, rate=0.123456789, gamma=0.987), Numbers(size=64, rule="adam", shape=(8, 8))]
    for _ in range(2):  # the same command again
        for i, point in enumerate(points):
            search.enqueue(point, f"point {i}")
    search.run()
    assert [STUDY.decode(t.params) for t in search.optuna.trials[:3]] == [Numbers(), *points]
    assert [t.user_attrs.get("enqueued") for t in search.optuna.trials] == [
        "defaults",
        "point 0",
        "point 1",
        *[None] * 3,
    ]
    search.enqueue(points[0], "again")
    assert not trials(search, WAITING)


def test_a_warm_start_tries_the_best_of_another_study_first(tmp_path):
    old = searching(tmp_path / "old.db", replace(STUDY, settings=Numbers(x=-1.0)), name="old", trials=8)
    old.run()
    search = searching(tmp_path / "new.log", trials=6)
    assert search.warm_start(old.optuna, best=3) == 3
    assert search.warm_start(old.optuna, best=3) == 3
    search.run()
    best = sorted(finished(old), key=lambda t: -t.value)[:3]
    found = search.optuna.trials
    assert [STUDY.decode(t.params) for t in found[:4]] == [Numbers(), *(STUDY.decode(t.params) for t in best)]
    assert [t.user_attrs["enqueued"] for t in found[1:4]] == [f"old trial {t.number}" for t in best]
    assert "enqueued" not in found[4].user_attrs and len(finished(search)) == 6


def test_a_warm_start_from_a_loss_takes_the_lowest(tmp_path):
    loss = by(lambda s, trial: s.x, metrics={"loss": "minimize"})
    old = searching(tmp_path / "study.log", loss, name="old", trials=8)
    old.run()
    search = searching(tmp_path / "study.log", loss, name="new", trials=2)
    search.warm_start(old.optuna, best=1)
    search.run()
    assert search.optuna.trials[1].params == old.best().params


def test_a_warm_start_takes_what_the_studies_share(tmp_path):
    part = replace(STUDY, space={"x": Uniform(-2.0, 2.0), "size": PowersOfTwo(1, 64)})
    old = searching(tmp_path / "study.log", part, name="old", trials=2)
    old.enqueue(Numbers(x=-1.5, size=32), "")
    old.run()
    search = searching(tmp_path / "study.log", name="new", trials=3)
    search.warm_start(old.optuna)
    search.run()
    tried = [STUDY.decode(t.params) for t in search.optuna.trials]
    assert Numbers(x=-1.0, size=32) in tried, "the nearest inside, and defaults for what is not shared"
    other = searching(tmp_path / "study.log", replace(STUDY, space={"rate": LogUniform(0.1, 1.0)}), name="other")
    with pytest.raises(UserError, match="Study 'old' has none of the parameters rate: nothing to start from"):
        other.warm_start(old.optuna)
