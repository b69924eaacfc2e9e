"""The truncated meta-gradient: differentiate through a window of K agent updates, judge the agents that come out.

Xu, van Hasselt, Silver, "Meta-Gradient Reinforcement Learning", 2018, arXiv:1805.09801, for the idea; Oh et al., 2020,
arXiv:2007.08794, section 3.3, for this form: a fresh rollout of the updated agent gives

    L(eta) = -mean log pi_k(a|s) A - beta_policy H(pi_k) + sum of the objective's own regularisers

with A from the outer critic, at k = K or averaged over k = 1..K, and averaged over lifetimes. The window begins at
constants: what eta did in earlier windows is cut off (truncation bias), and the sampled actions are data (no
score-function term).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from learned_rl.agents import AgentOutput
from learned_rl.component import Metrics, Objective, lifetime_mean
from learned_rl.lifetimes import Episodes, Lifetimes
from learned_rl.ppo import UpdateRecord
from learned_rl.spaces import Integers, LogUniform, searched
from learned_rl.tasks.base import unknown
from learned_rl.trajectory import Trajectory
from learned_rl.types import at_least
from meta_optimizers.outer_critic import OuterCritic


@dataclass(frozen=True)
class TruncatedConfig:
    window: int = field(default=5, metadata=searched(Integers(1, 20, log=True)))
    """K: agent updates that are differentiated through"""
    outer_terms: Literal["last", "every"] = "every"
    """which agents of the window are judged: the one that comes out of it, or the ones after every update; the latter
    costs no extra experience, since each update's data is fresh data of the update before"""
    policy_entropy: float = field(default=0.05, metadata=searched(LogUniform(1e-3, 0.3)))
    """weight of the policy's entropy (raised, in nats) at the first meta-step"""
    entropy_half_life: float = field(default=math.inf, metadata=searched(LogUniform(100, 10_000)))
    """meta-steps in which that weight halves: early on it keeps policies from settling, later it blurs them"""
    regularisers: dict[str, float] = field(default_factory=dict)
    """weight of each of the objective's own regularisers in the meta-loss; negative raises the quantity"""

    def __post_init__(self) -> None:
        at_least(1, window=self.window)
        at_least(1e-6, entropy_half_life=self.entropy_half_life)


@dataclass(frozen=True)
class Estimate:
    """A gradient of the meta-loss and what was seen on the way.

    Attributes:
        grads:    one tensor per meta-parameter, or None where no lifetime was finite.
        broken:   [P] bool: lifetimes that were not finite and took no part.
        metrics:  name -> number.
        episodes: those that ended within the window's training rollouts.
    """

    grads: list[Tensor] | None
    broken: Tensor
    metrics: dict[str, float]
    episodes: list[Episodes]


class TruncatedMetaGradient:
    """Estimates the gradient over one window and leaves the lifetimes at its end."""

    def __init__(self, config: TruncatedConfig, objective: Objective) -> None:
        self.config = config
        for name in config.regularisers:
            if name not in objective.regularisers:
                raise unknown(f"regulariser of {objective.name!r}", name, objective.regularisers)

    def __call__(self, lifetimes: Lifetimes, critic: OuterCritic, eta: Sequence[nn.Parameter], step: int) -> Estimate:
        """One window; `step` is the number of meta-steps before it."""
        inner = lifetimes.window()
        records: list[UpdateRecord] = []
        episodes: list[Episodes] = []
        advantages: list[Tensor] = []  # of each update's data, before the critic has learned from them
        for _ in range(self.config.window):
            record, ended = lifetimes.advance(inner)
            records.append(record)
            episodes.append(ended)
            advantage, target = critic.judge(record.trajectory)
            advantages.append(advantage)
            critic.learn(record.trajectory, target)
        outer = lifetimes.collect(inner)
        lifetimes.episodes(outer)
        advantage, target = critic.judge(outer)
        advantages.append(advantage)
        critic_loss = critic.learn(outer, target)
        weight = self.config.policy_entropy * 0.5 ** (step / self.config.entropy_half_life)
        meta_loss, parts = self._meta_loss(lifetimes, inner.agent(outer.obs), outer, records, advantages, weight)
        with torch.no_grad():
            alive = meta_loss.isfinite() & inner.theta.isfinite().all(1)
            for record in records:
                alive &= record.alive
        grads, metrics = None, {"loss": float("nan")}
        if bool(alive.any()):
            loss = torch.where(alive, meta_loss, torch.zeros_like(meta_loss)).sum() / alive.sum()
            grads = list(torch.autograd.grad(loss, list(eta), allow_unused=True, materialize_grads=True))
            metrics = {"loss": loss.item()} | {k: v[alive].mean().item() for k, v in parts.items()}
        lifetimes.commit(inner)
        metrics["critic_loss"] = critic_loss.nanmean().item()
        return Estimate(grads, ~alive, metrics, episodes)

    def _meta_loss(
        self,
        lifetimes: Lifetimes,
        out: AgentOutput,
        outer: Trajectory,
        records: list[UpdateRecord],
        advantages: list[Tensor],
        entropy_weight: float,
    ) -> tuple[Tensor, Metrics]:
        """[P] meta-loss, and its parts by name."""
        # The agents that came out of each update, and what each of them then experienced.
        after = [r.out.map(lambda x: x[:-1]) for r in records[1:]] + [out.map(lambda x: x[:-1])]
        actions = [r.trajectory.action for r in records[1:]] + [outer.action]
        judged = slice(None) if self.config.outer_terms == "every" else slice(-1, None)
        terms = zip(after[judged], actions[judged], advantages[1:][judged], strict=True)
        scores = [lifetime_mean(o.policy.log_prob(action) * advantage) for o, action, advantage in terms]
        policy = -torch.stack(scores).mean(0)
        entropy = torch.stack([lifetime_mean(o.policy.entropy()) for o in after]).mean(0)
        loss = policy - entropy_weight * entropy
        parts: Metrics = {"policy": policy, "entropy": entropy}
        objective = lifetimes.algorithm.slots.objective
        regularisers = [objective.meta_regularisers(o, r.batch) for o, r in zip(after, records, strict=True)]
        for name in regularisers[0]:
            parts[name] = torch.stack([t[name] for t in regularisers]).mean(0)
            loss = loss + self.config.regularisers.get(name, 0.0) * parts[name]  # those not named weigh nothing
        return loss, {k: v.detach() for k, v in parts.items()}  # stop: only to look at
