"""One lifetime: an agent learns, and the parts of its algorithm are learned from the same stream of experience.

Xu, van Hasselt, Silver, "Meta-Gradient Reinforcement Learning", 2018, arXiv:1805.09801. There is no task distribution
and no restart; the outer loop looks back through the last few updates, judges what came out of them on the next batch,
and moves the meta-parameters while the agent goes on. Each of P seeds has meta-parameters of its own, which never meet
those of the others. By default a window is one update, and the batch that judges it is the one that the next update
learns from, so that no experience is spent on judging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import gymnasium
import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn

from learned_rl.component import Component
from learned_rl.defaults import EnvironmentReward
from learned_rl.lifetimes import under
from learned_rl.ppo import PPOConfig
from learned_rl.registry import components
from learned_rl.tasks.base import TaskFamily, unknown
from learned_rl.training import PPO
from learned_rl.types import Tree, UserError, stream_seed
from meta_optimizers.estimator import EstimatorConfig
from meta_optimizers.estimators import estimator_config, make_estimator
from meta_optimizers.learning import TUNED, Learning, OuterLossConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.outer_loop import OuterConfig, OuterLoop
from meta_optimizers.truncated import TruncatedConfig

#: Critics that suit networks, where an epoch costs as much as an update of A2C, and tables.
NETWORK = OuterCriticConfig(source="auto", learning_rate=1e-3, epochs=2)
TABLE = OuterCriticConfig(source="auto", learning_rate=0.05)


@dataclass(frozen=True)
class SelfTuningConfig(OuterConfig):
    """Settings of learning online."""

    estimator: EstimatorConfig = field(default_factory=lambda: TruncatedConfig(window=1, outer_data="fresh_reuse"))
    """how the direction of the meta-parameters is estimated; --estimator NAME chooses another one"""
    loss: OuterLossConfig = field(default_factory=lambda: OuterLossConfig(policy_entropy=0.0))
    """how agents are judged: the frozen numbers that no learned one can move"""
    critic: OuterCriticConfig = field(default_factory=lambda: NETWORK)
    """how the outer loss values states"""

    @classmethod
    def suited(
        cls, observation_space: gymnasium.Space, estimator: str | None = None, learning_rate: float = 1e-3
    ) -> Self:
        """The settings that suit an environment, with the estimator of that name.

        Windows are one update long, and what judges them is learned from next.

        Args:
            learning_rate: of the outer optimizer; `Component.outer_rate` of what is learned.

        Raises:
            UserError: no such estimator.
        """
        tabular = isinstance(observation_space, Discrete)
        base = cls(learning_rate=learning_rate, critic=TABLE if tabular else NETWORK)
        if estimator is None:
            return base
        config = estimator_config(estimator)
        known = {f.name for f in fields(config)}
        suited = {"window": 1, "bootstrap": 1, "every": 1, "outer_data": "fresh_reuse"}
        return replace(base, estimator=replace(config, **{k: v for k, v in suited.items() if k in known}))


class SelfTuning(PPO):
    """PPO with parts that are learned in the same lifetime as the agent.

    Everything else is PPO's, whose arguments these are: with nothing to learn it is PPO.

    Args:
        env, config, plugged: as of `PPO`. A part given by its registered name, or by what makes it, begins with other
                weights for each seed; one that is given itself, or by its file, with the weights that it has.
        learned: the slots whose parts are learned; None: those whose parts are made for it (`Component.online`).
        outer:   settings of the outer loop; None takes what suits the environment and the learned parts.

    Raises:
        UserError: as `PPO`; a slot whose part has no parameters; an estimator that compares lifetimes.
    """

    def __init__(
        self,
        env: str | TaskFamily,
        config: PPOConfig | None = None,
        *,
        learned: Sequence[str] | None = None,
        outer: SelfTuningConfig | None = None,
        seeds: int = 1,
        seed: int = 0,
        **plugged: Any,
    ) -> None:
        super().__init__(env, config, seeds=seeds, seed=seed, **plugged)
        parts = dict(self.algorithm.slots.items())
        for slot in learned or ():
            if slot not in parts:
                raise unknown("slot", slot, parts)
            if not list(parts[slot].parameters()):
                raise UserError(f"The {slot} slot holds {parts[slot].name!r}, which has no parameters to learn.")
        self.learned = [s for s, c in parts.items() if (c.online if learned is None else s in learned)]
        self.outer: OuterLoop | None = None
        if self.learned:
            rate = min(parts[slot].outer_rate for slot in self.learned)
            outer = outer or SelfTuningConfig.suited(self.family.observation_space, learning_rate=rate)
            fresh = {slot: _nobodys(plugged.get(slot)) for slot in parts}
            self._begin(outer, fresh, seed)

    def _begin(self, outer: SelfTuningConfig, fresh: dict[str, bool], seed: int) -> None:
        """The outer loop around the agents; for each slot, whether the seeds begin with other weights."""
        slots = self.algorithm.slots
        numbers = slots.hyperparameters.tuned if "hyperparameters" in self.learned else ()
        if blind := [k for k in numbers if k in slots.objective.insensitive]:
            raise UserError(
                f"{blind[0]} cannot be learned with {slots.objective.name!r}, which has no derivative by it: expected "
                "an objective that has one, such as 'ppo_soft_clip'."
            )
        critic = outer.critic
        if critic.source == "auto":
            critic = replace(critic, source="own" if self._biased(critic) else "agent")
        self.problem = Learning(self.lifetimes, self.learned, outer.loss, critic, restarts=False)
        eta = {
            f"{slot}.{k}": nn.Parameter(v)
            for slot, component in self.problem.learned.items()
            for k, v in initial(component, len(self.lifetimes), seed, fresh[slot]).items()
        }
        estimator = make_estimator(outer.estimator, seed)
        self.outer = OuterLoop(self.problem, eta, estimator, outer, stacked=True)
        estimator.check(self.outer.present, len(self.lifetimes))

    def _biased(self, critic: OuterCriticConfig) -> bool:
        """Whether the agent's value is of something else than what the outer loss values."""
        slots = self.algorithm.slots
        if "objective" in self.learned or not slots.objective.needs_value:
            return True
        rewarded = not isinstance(slots.reward, EnvironmentReward)
        return rewarded or "gamma" in slots.hyperparameters.tuned or critic.gamma != self.config.hyper.gamma

    def _advance(self) -> dict[str, float]:
        """Go on by a window of updates."""
        if self.outer is None:
            return super()._advance()
        metrics = self.outer.step()
        for ended in self.problem.take_episodes():
            self._remember(ended)
        return _tagged(metrics) | _spread(self.outer.seen)

    def component(self, slot: str, seed: int) -> Component:
        """The part in a slot as one of the seeds (counted from 0) has learned it.

        Raises:
            UserError: a slot whose part is not learned, or no such seed.
        """
        if self.outer is None or slot not in self.learned:
            raise UserError(f"The {slot} slot is not learned: expected one of {', '.join(self.learned) or 'none'}.")
        if not 0 <= seed < len(self.lifetimes):
            raise UserError(f"seed is {seed}: expected one from 0 to {len(self.lifetimes) - 1}.")
        part = self.problem.learned[slot]
        own = type(part)(part.config)
        values = {k.removeprefix(f"{slot}."): v[seed] for k, v in self.outer.eta.items() if k.startswith(f"{slot}.")}
        own.load_state_dict(own.state_dict() | {k: v.detach().cpu() for k, v in values.items()})  # stop: a copy
        return own

    def _inner_state(self) -> Tree:
        if self.outer is None:
            return super()._inner_state()
        return {f"outer/{k}": v for k, v in self.outer.state_dict().items()}  # the lifetimes among it

    def _load_inner_state(self, state: Tree) -> None:
        if self.outer is None:
            super()._load_inner_state(state)
        else:
            self.outer.load_state_dict(under("outer", state))


def _nobodys(plug: Any) -> bool:
    """Whether nobody chose the weights: the part was named or made, and is neither a component nor its file."""
    return plug in components() if isinstance(plug, str) else callable(plug) and not isinstance(plug, Component)


def initial(component: Component, seeds: int, seed: int, fresh: bool) -> dict[str, Tensor]:
    """Meta-parameters, name -> [P, ...], with which the seeds begin: fresh ones for each, or the component's own."""
    own = [component] * seeds
    if fresh:
        with torch.random.fork_rng(devices=[]):
            own = []
            for p in range(seeds):
                torch.manual_seed(stream_seed("component", component.slot, seed, p))
                own.append(type(component)(component.config))
    like = dict(component.named_parameters())
    each = [dict(c.named_parameters()) for c in own]
    # stop: initial values
    return {k: torch.stack([c[k].detach().to(v) for c in each]) for k, v in like.items()}


def _tagged(metrics: dict[str, float]) -> dict[str, float]:
    """What the outer loop says, by the names under which it is logged; the agents' own metrics by theirs."""
    agent = {k.removeprefix("agent/"): v for k, v in metrics.items() if k.startswith("agent/")}
    plain = {k: v for k, v in metrics.items() if "/" not in k and k != "broken"}
    return agent | {"broken": metrics["broken"]} | {f"meta/{k}": v for k, v in plain.items()}


def _spread(seen: dict[str, Tensor]) -> dict[str, float]:
    """Mean of each tuned number over the seeds, and the quartiles between which the middle half of them are."""
    said: dict[str, float] = {}
    for name, x in seen.items():
        if name.startswith(f"{TUNED}/"):
            low, high = torch.nanquantile(x.double(), torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
            said |= {name: x.nanmean().item(), f"{name}_low": low, f"{name}_high": high}
    return said
