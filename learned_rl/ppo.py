"""PPO with five slots. The same update serves plain training, meta-training in a graph, and evaluation.

An update reads one trajectory, asks each slot for its part, and moves the population through an `Inner`. What the
inner loop is, in place or differentiable, the update does not know.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import gymnasium
import torch
from torch import Tensor

from learned_rl.agents import AgentConfig, make_agent
from learned_rl.architecture import Agent, AgentOutput, Heads, HeadShape
from learned_rl.component import (
    Auxiliary,
    Batch,
    Component,
    Context,
    Hyper,
    Hyperparameters,
    Metrics,
    Objective,
    Reward,
    UpdateRule,
    finite,
    per_lifetime,
    shield,
)
from learned_rl.defaults import Constants, ConstantsConfig, EnvironmentReward, NoAuxiliary, PPOClip, PPOClipConfig
from learned_rl.inner_loop import Inner
from learned_rl.layout import StepContext
from learned_rl.spaces import Choice, Integers, PowersOfTwo, searched
from learned_rl.streams import Streams, noise
from learned_rl.trajectory import Trajectory, flatten_time
from learned_rl.types import Tree, UserError, at_least
from learned_rl.update_rules import RULES, select_rows


@dataclass(frozen=True)
class PPOConfig:
    """Settings of one agent's learning algorithm."""

    n_envs: int = field(default=8, metadata=searched(PowersOfTwo(1, 64)))
    """B: parallel copies of the environment in one lifetime"""
    n_steps: int = field(default=128, metadata=searched(PowersOfTwo(16, 1024)))
    """T: environment steps of each copy between updates"""
    n_epochs: int = field(default=4, metadata=searched(Integers(1, 16, log=True)))
    """passes over the experience in one update"""
    n_minibatches: int = field(default=4, metadata=searched(PowersOfTwo(1, 16)))
    """parts into which each pass is cut; each is one gradient step"""
    optimizer: str = field(
        default="adam", metadata=searched(Choice("sgd", "momentum", "rmsprop", "adam", "clipped_adam"))
    )
    """hand-made update rule, unless one is plugged in: sgd, momentum, rmsprop, adam, clipped_adam"""
    stop_denominator: bool = False
    """treat the denominator of rmsprop and adam as a constant of the meta-gradient, as clipped_adam always does"""
    linear_decay: bool = field(default=False, metadata=searched(Choice(False, True)))
    """let the learning rate fall linearly to zero over the lifetime"""
    normalize_advantage: bool = field(default=True, metadata=searched(Choice(False, True)))
    """normalise the advantages of each minibatch"""
    replay_capacity: int = 0
    """trajectories (rollouts of one copy) that a lifetime keeps, of which each update draws some; 0: no replay, each
    update learns from its own rollout. In plain training only"""
    replay_batch: int = 64
    """trajectories that an update draws from the replay, evenly and with replacement"""
    target_kl: float | None = None
    """stop a lifetime's update once its mean KL from the policy that acted exceeds this, in nats"""
    hyper: Hyper = field(default_factory=Hyper)
    """the numbers that may also be learned"""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """the agent's architecture"""

    def __post_init__(self) -> None:
        at_least(1, n_envs=self.n_envs, n_steps=self.n_steps, n_epochs=self.n_epochs, n_minibatches=self.n_minibatches)
        at_least(0, replay_capacity=self.replay_capacity)
        at_least(1, replay_batch=self.replay_batch)
        if 0 < self.replay_capacity < self.replay_batch:
            raise UserError(
                f"replay_batch is {self.replay_batch}: expected at most the replay_capacity, {self.replay_capacity}."
            )
        columns, what = (self.replay_batch, "trajectories") if self.replay_capacity else (self.n_envs, "environments")
        if self.n_minibatches > columns * self.n_steps:
            raise UserError(
                f"n_minibatches is {self.n_minibatches}, but an update has only {columns * self.n_steps} steps "
                f"({columns} {what} x {self.n_steps} steps): choose at most that many."
            )
        if self.optimizer not in RULES:
            raise UserError(f"optimizer is {self.optimizer!r}: expected one of {', '.join(RULES)}.")
        if self.agent.value_support and self.hyper.clip_range_vf is not None:
            raise UserError(
                f"clip_range_vf is {self.hyper.clip_range_vf}, but a categorical value has no distance that could be "
                "clipped: expected none, or value_support 0."
            )
        if self.stop_denominator and not hasattr(RULES[self.optimizer].Config(), "stop_denominator"):
            raise UserError(f"stop_denominator is on, but {self.optimizer!r} has none: expected rmsprop or adam.")

    @property
    def collects(self) -> int:
        """Rollouts of a lifetime before the first from which it learns: replay must hold what an update draws."""
        return math.ceil(self.replay_batch / self.n_envs) - 1 if self.replay_capacity else 0

    def check_learns(self, updates: int) -> None:
        """Whether lifetimes of so many updates do more than fill their replay.

        Raises:
            UserError: they do not.
        """
        if updates <= self.collects:
            least = (self.collects + 1) * self.n_steps * self.n_envs
            raise UserError(
                f"{updates} rollouts of {self.n_envs} trajectories do not fill a replay of which an update draws "
                f"{self.replay_batch}: expected at least {self.collects + 1} rollouts ({least} environment steps)."
            )

    @classmethod
    def a2c(cls, **changes: object) -> Self:
        """Advantage actor-critic: one epoch, one minibatch, no clipping, short rollouts (Mnih et al., 2016)."""
        hyper = Hyper(learning_rate=7e-4, clip_range=float("inf"), gae_lambda=1.0)
        base = cls(n_steps=20, n_epochs=1, n_minibatches=1, optimizer="rmsprop", normalize_advantage=False, hyper=hyper)
        return dataclasses.replace(base, **changes)  # type: ignore[arg-type]

    @classmethod
    def suited(
        cls, objective: Objective | None, observation_space: gymnasium.Space, optimizer: UpdateRule | None = None
    ) -> Self:
        """The settings with which the objective or the optimizer was meta-trained, or else the defaults with what they
        ask for.

        What was trained on tables says nothing of networks, whose step sizes are worlds apart, and the other way round.
        On networks an objective keeps the settings only if it asks for some as it comes: others are plugged into an
        ordinary PPO. One that asks for an architecture of its own has the same networks on both. An optimizer beside an
        objective adds its step size.
        """
        tabular = isinstance(observation_space, gymnasium.spaces.Discrete)
        if optimizer is not None:
            if objective is None and optimizer.trained_numbers(tabular):
                return cls.from_plain(optimizer.provenance["agent"])
            base = cls.suited(objective, observation_space)
            rate = optimizer.trained_rate(tabular)
            return base if rate is None else dataclasses.replace(base, hyper=base.hyper.replace(learning_rate=rate))
        if objective is None:
            return cls(hyper=Hyper(learning_rate=0.05)) if tabular else cls()
        trained, asked = objective.provenance.get("agent"), objective.settings(tabular)
        alike = "agent" in asked or objective.provenance.get("tabular", True) == tabular
        if trained and (tabular or asked) and alike:
            return cls.from_plain(trained)
        return cls(**asked)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Self:
        """From nested plain values, as a component file or a run folder holds them (infinity as "inf")."""
        try:
            numbers = {k: None if v is None else float(v) for k, v in values["hyper"].items()}
            agent: dict[str, Any] = values["agent"] | {"hidden": tuple(values["agent"]["hidden"])}
            agent |= {k: tuple(agent[k]) for k in ("head_hidden",) if k in agent}
            return cls(**values | {"hyper": Hyper().replace(**numbers), "agent": AgentConfig(**agent)})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"The agent settings kept with the component do not fit this version: {error}.") from error


@dataclass(frozen=True)
class Slots:
    """What fills the five slots."""

    objective: Objective
    reward: Reward
    hyperparameters: Hyperparameters
    auxiliary: Auxiliary
    optimizer: UpdateRule

    @classmethod
    def fill(cls, config: PPOConfig, **plugged: Component | None) -> Self:
        """The hand-made default of every slot in which nothing (or None) is plugged.

        Raises:
            UserError: a component that belongs to another slot.
        """
        for slot, component in plugged.items():
            if component is not None and component.slot != slot:
                raise UserError(f"Component {component.name!r} fits the slot {component.slot!r}, not {slot!r}.")
        kind = RULES[config.optimizer]
        rule = kind(kind.Config(stop_denominator=True)) if config.stop_denominator else kind()
        defaults: dict[str, Component] = {
            "objective": PPOClip(PPOClipConfig(config.normalize_advantage)),
            "reward": EnvironmentReward(),
            "hyperparameters": Constants(ConstantsConfig(config.linear_decay)),
            "auxiliary": NoAuxiliary(),
            "optimizer": rule,
        }
        return cls(**defaults | {k: v for k, v in plugged.items() if v is not None})  # type: ignore[arg-type]

    @property
    def reads(self) -> set[str]:
        """Names of the numbers on which an update depends."""
        found = {"learning_rate", "max_grad_norm", *self.objective.reads, *self.hyperparameters.conditions}
        return found if isinstance(self.auxiliary, NoAuxiliary) else found | {"aux_coef", *self.auxiliary.reads}

    def items(self) -> Iterator[tuple[str, Component]]:
        for f in dataclasses.fields(self):
            yield f.name, getattr(self, f.name)


@dataclass(frozen=True)
class UpdateRecord:
    """What one update saw and did.

    Attributes:
        trajectory: the experience, with the reward of the environment.
        out:        [T+1, P, B] outputs at the parameters that acted, with their graph inside a window.
        batch:      the objective's targets [T, P, B, ...].
        memory:     what the components carry on, "slot/name" -> [P, ...].
        hyper:      the numbers of the update, from the hyperparameter slot.
        alive:      [P] bool: parameters and rewards were finite.
        metrics:    name -> [P], averaged over the gradient steps; NaN of lifetimes that did not learn.
    """

    trajectory: Trajectory
    out: AgentOutput
    batch: Batch
    memory: Tree
    hyper: Hyper
    alive: Tensor
    metrics: Metrics


#: Makes an architecture from observation space, action space, extra heads and whether a value is needed.
AgentFactory = Callable[[gymnasium.Space, gymnasium.Space, Heads, bool], Agent]


class Algorithm:
    """PPO as a function: one update of P agents from one trajectory.

    Args:
        agent: makes the agents' architecture (see `ModuleAgent` for any `nn.Module`); None: as configured.

    Raises:
        UserError: minibatches for an objective that reads whole rollouts, a target for a divergence that nobody says.
    """

    def __init__(self, config: PPOConfig, slots: Slots, agent: AgentFactory | None = None) -> None:
        self.config, self.slots, self.agent_factory = config, slots, agent
        if slots.objective.whole_rollouts and config.n_minibatches > 1:
            name = slots.objective.name
            raise UserError(f"n_minibatches is {config.n_minibatches}: {name!r} reads whole rollouts; expected 1.")
        if config.target_kl is not None and not slots.objective.reports_kl:
            name = slots.objective.name
            raise UserError(f"target_kl is {config.target_kl}, but {name!r} reports no approx_kl: expected none.")

    def make_agent(self, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
        """The agent that the configuration names, with the heads that the components need."""
        heads: dict[str, HeadShape] = {}
        for slot, component in self.slots.items():
            for name, size in component.heads(action_space).items():
                if heads.setdefault(name, size) != size:
                    raise UserError(f"Head {name!r} of the {slot} slot has {size} outputs elsewhere {heads[name]}.")
        value = self.slots.objective.needs_value
        conditions = self.slots.hyperparameters.conditions
        if self.agent_factory is None:
            agent = make_agent(self.config.agent, observation_space, action_space, heads, value, conditions)
        elif conditions:
            raise UserError(f"Agents must be told {', '.join(conditions)}: expected a configured architecture.")
        else:
            agent = self.agent_factory(observation_space, action_space, heads, value)
        agent.watched = self.slots.optimizer.reads_activity
        return agent

    def fit(self, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
        """The agent, after the components have taken the size that it asks for.

        Raises:
            UserError: a component that was made for other agents.
        """
        agent = self.make_agent(observation_space, action_space)
        for _, component in self.slots.items():
            component.fit(observation_space, action_space, agent.layers)
        self.slots.optimizer.fit_layout(agent.layout)
        return agent

    def initial_memory(self, theta: Tensor) -> Tree:
        """What P fresh lifetimes of parameters `theta [P, D]` carry: "slot/name" -> [P, ...], and "target/theta", the
        parameters of the target network if there is one."""
        memory = {f"{s}/{k}": v for s, c in self.slots.items() for k, v in c.initial_memory(len(theta)).items()}
        if self.slots.objective.target_rate is not None:
            memory["target/theta"] = theta.clone()
        return memory

    def update(
        self,
        inner: Inner,
        trajectory: Trajectory,
        context: Context,
        hyper: Hyper,
        generator: torch.Generator,
        streams: Streams | None = None,
        active: Tensor | None = None,
    ) -> UpdateRecord:
        """Move every lifetime by one update.

        Args:
            inner:      the population and how it moves.
            trajectory: [T, P, B] experience at the present parameters.
            context:    age, horizon and memory ("slot/name" -> [P, ...]) of each lifetime.
            hyper:      configured numbers, before the hyperparameter slot.
            generator:  draws the minibatches, and noise for a rule that asks.
            streams:    which stream each lifetime's noise is drawn from; None: its own.
            active:     [P] bool, which lifetimes learn; the others stay as they are. None: all.
        """
        c, slots = self.config, self.slots
        collected = trajectory
        with torch.set_grad_enabled(inner.graph):
            trajectory, hyper, memory, alive = self._ask(inner, collected, context, hyper)
        inner.tell(hyper)
        whole, healthy = c.n_minibatches == 1, bool(alive.all())
        with torch.set_grad_enabled(whole or inner.graph):
            out = _revive(inner.agent(trajectory.obs), alive, 1)
        next_value, next_heads = self._following(inner, trajectory, out, alive)
        own, linked = _of("objective", context), inner.graph and slots.objective.differentiates_inputs
        seen = out if linked else out.detach()  # stop: targets are constants of the inner gradient
        with torch.set_grad_enabled(inner.graph):
            seen, memory["target"] = self._beside_target(inner, trajectory, seen, context, alive)
            batch, memory["objective"] = slots.objective.prepare(trajectory, seen, next_value, hyper, own)
            own = _of("auxiliary", context)
            batch = batch | slots.auxiliary.prepare(trajectory, seen, next_heads, hyper, own)
        if linked:
            inner.branch()
        batch = {k: shield(v, 1) for k, v in batch.items()}
        rows = {"action": trajectory.action, "log_prob": trajectory.log_prob} | batch
        moving = active
        sums: list[Metrics] = []
        first = out.map(lambda x: x[:-1]) if whole and not linked else None
        for k, (part_out, part) in enumerate(self._parts(inner, trajectory, rows, first, generator)):
            part_out = part_out if healthy else _revive(part_out, alive, 1 if whole else 0)
            loss, metrics = slots.objective.loss(part_out, part, hyper)
            if not isinstance(slots.auxiliary, NoAuxiliary):
                loss = loss + per_lifetime(hyper.aux_coef) * slots.auxiliary.loss(part_out, part, hyper)
            if c.target_kl is not None:
                below = metrics["approx_kl"] <= c.target_kl
                moving = below if moving is None else moving & below
                if not bool(moving.any()):
                    break
            inner.step(loss, hyper, moving, self._step_context(inner, part_out, context, k, generator, streams))
            sums.append(metrics)
        flat = {f"{slot}/{k}": v for slot, tree in memory.items() for k, v in tree.items()}
        if active is not None:
            flat = {k: select_rows(active, v, context.memory[k]) for k, v in flat.items()}
        metrics = _average(sums)
        if active is not None:
            metrics = {k: torch.where(active, v, math.nan) for k, v in metrics.items()}
        return UpdateRecord(collected, out, batch, flat, hyper, alive, metrics)

    def _step_context(
        self,
        inner: Inner,
        out: AgentOutput,
        context: Context,
        k: int,
        generator: torch.Generator,
        streams: Streams | None,
    ) -> StepContext:
        """What the update rule may know of the update's k-th gradient step."""
        c, rule = self.config, self.slots.optimizer
        activity = inner.population.activity(out) if rule.reads_activity else None
        like = inner.population.theta
        drawn = noise(torch.Tensor.normal_, like, generator, streams) if rule.draws else None
        return StepContext(None, context.elapsed, k // c.n_minibatches / max(c.n_epochs - 1, 1), activity, drawn)

    def _ask(
        self, inner: Inner, trajectory: Trajectory, context: Context, hyper: Hyper
    ) -> tuple[Trajectory, Hyper, dict[str, Tree], Tensor]:
        """Reward and numbers of this update, and which lifetimes are still finite."""
        memory: dict[str, Tree] = {}
        slots = self.slots
        hyper, memory["hyperparameters"] = slots.hyperparameters(hyper, trajectory, _of("hyperparameters", context))
        learned = {k: v for k, v in vars(hyper).items() if isinstance(v, Tensor)}
        hyper = hyper.replace(**{k: shield(v, int(v.dim() == 3)) for k, v in learned.items()})
        reward, memory["reward"] = slots.reward(trajectory, _of("reward", context))
        alive = finite(inner.theta) & finite(trajectory.reward, 1)
        if not bool(alive.all()):
            reward = torch.where(alive[:, None], reward, torch.zeros_like(reward))
        return dataclasses.replace(trajectory, reward=shield(reward, 1)), hyper, memory, alive

    def _following(
        self, inner: Inner, trajectory: Trajectory, out: AgentOutput, alive: Tensor
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Value [T, P, B] and heads [T, P, B, size] of the state each step led to, as far as a slot reads them."""
        value = out.value if self.slots.objective.needs_value else None
        # stop: an auxiliary loss knows its targets as constants
        heads = {} if isinstance(self.slots.auxiliary, NoAuxiliary) else {k: v.detach() for k, v in out.heads.items()}
        if trajectory.final_obs is None or (value is None and not heads):
            return None if value is None else value[1:], {k: v[1:] for k, v in heads.items()}
        with torch.set_grad_enabled(inner.graph):
            final = _revive(inner.agent(trajectory.final_obs), alive, 1)
        next_heads = {k: trajectory.following(v, final.heads[k].detach()) for k, v in heads.items()}  # stop: same
        return None if value is None or final.value is None else trajectory.following(value, final.value), next_heads

    def _beside_target(
        self, inner: Inner, trajectory: Trajectory, out: AgentOutput, context: Context, alive: Tensor
    ) -> tuple[AgentOutput, Tree]:
        """The output with that of the target network beside it, and the target's parameters after this update: an
        average of those with which updates began."""
        rate = self.slots.objective.target_rate
        if rate is None:
            return out, {}
        theta = context.memory["target/theta"]
        target = _revive(inner.population.bind(theta)(trajectory.obs), alive, 1)
        return dataclasses.replace(out, target=target), {"theta": torch.lerp(theta, inner.theta, rate)}

    def _parts(
        self, inner: Inner, trajectory: Trajectory, rows: Batch, first: AgentOutput | None, generator: torch.Generator
    ) -> Iterator[tuple[AgentOutput, Batch]]:
        """Outputs and rows of each gradient step: everything at once, or minibatches drawn afresh each epoch.

        All lifetimes share the permutation; their data are independent, and so are their minibatches.
        """
        c = self.config
        if c.n_minibatches == 1:
            for epoch in range(c.n_epochs):
                yield (first if first and epoch == 0 else inner.agent(trajectory.obs[:-1])), rows
            return
        obs = flatten_time(trajectory.obs[:-1])
        flat = {k: flatten_time(v) for k, v in rows.items()}
        # Drawn whether or not all epochs are run: what follows must not depend on when a divergence stops an update.
        orders = [torch.randperm(obs.shape[1], generator=generator, device=obs.device) for _ in range(c.n_epochs)]
        for order in orders:
            for index in order.tensor_split(c.n_minibatches):
                yield inner.agent(obs.index_select(1, index)), {k: v.index_select(1, index) for k, v in flat.items()}


def _of(slot: str, context: Context) -> Context:
    """The context with the memory of one slot."""
    own = {k.removeprefix(f"{slot}/"): v for k, v in context.memory.items() if k.startswith(f"{slot}/")}
    return dataclasses.replace(context, memory=own)


def _revive(out: AgentOutput, alive: Tensor, axis: int) -> AgentOutput:
    """Zeros in place of what a broken lifetime says, so that no component ever computes with NaN.

    Args:
        axis: the lifetime axis of the output's tensors.
    """
    if bool(alive.all()):
        return out
    keep = lambda x: alive.view([-1 if i == axis else 1 for i in range(x.dim())])  # noqa: E731
    return out.map(lambda x: torch.where(keep(x), x, torch.zeros_like(x)))


def _average(metrics: list[Metrics]) -> Metrics:
    if not metrics:
        return {}
    return {k: torch.stack([m[k] for m in metrics]).mean(0) for k in metrics[0]}
