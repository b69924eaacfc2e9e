"""Update rules, learned or not, as the optimizer of PPO and A2C of Stable-Baselines3."""

# mypy: disable-error-code="type-abstract"

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)

from learned_rl.adapters.common import find, frozen
from learned_rl.component import Hyper, UpdateRule
from learned_rl.rule_optimizer import RuleOptimizer, trained_rate
from learned_rl.types import UserError, at_least


class Watched(ActorCriticPolicy):
    """A policy that tells an update rule which layers it is made of and how active their units are.

    Mix it into a policy of your own, before the class of Stable-Baselines3.
    """

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        super()._build(lr_schedule)
        if isinstance(self.optimizer, RuleOptimizer):
            self.optimizer.watch(self, critic=lambda name: "value_net" in name or name.startswith("vf_"))


class WatchedCnnPolicy(Watched, ActorCriticCnnPolicy):
    """`CnnPolicy`, watched."""


class WatchedMultiInputPolicy(Watched, MultiInputActorCriticPolicy):
    """`MultiInputPolicy`, watched."""


POLICIES: dict[str, type[Watched]] = {
    "MlpPolicy": Watched,
    "CnnPolicy": WatchedCnnPolicy,
    "MultiInputPolicy": WatchedMultiInputPolicy,
}


def learned_optimizer(
    rule: UpdateRule | str | Path,
    policy: str | type[Watched] = "MlpPolicy",
    policy_kwargs: Mapping[str, Any] | None = None,
    *,
    learning_rate: float | Callable[[float], float] | None = None,
    max_grad_norm: float | None = None,
    total_timesteps: int | None = None,
    n_envs: int = 1,
    n_steps: int = 2048,
    batch_size: int = 64,
    n_epochs: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """What to call `PPO(env=..., **learned_optimizer(rule))` with: everything of which the rule depends.

    Args:
        rule:          an update rule, the registered name of one, or a component file; saved with the model.
        policy:        name of a policy, or a class with `Watched` mixed in.
        policy_kwargs: further arguments of the policy.
        learning_rate: what multiplies the rule's steps, or a schedule of it; None: what it was trained with, or what
                       suits it.
        max_grad_norm: bound on the gradient's norm before the rule sees it; None: what it was trained with, or 0.5.
        total_timesteps: environment steps of the whole training, for rules that ask how much of it is over.
        n_envs:        parallel environments of the model.
        n_steps, batch_size, n_epochs: of the model; returned with the rest, since progress is counted by them.
        seed:          of the noise, for rules that draw.

    Returns:
        policy, policy_kwargs, learning_rate, max_grad_norm, n_steps, batch_size, n_epochs, by name.

    Raises:
        UserError: no such rule or policy, or a policy that is not watched.
    """
    if isinstance(policy, str) and policy not in POLICIES:
        raise UserError(f"policy is {policy!r}: expected one of {', '.join(POLICIES)}, or a class that is `Watched`.")
    if isinstance(policy, type) and not issubclass(policy, Watched):
        raise UserError(
            f"The policy {policy.__name__} tells the rule nothing: expected a class with `Watched` mixed in."
        )
    at_least(
        1, total_timesteps=total_timesteps, n_envs=n_envs, n_steps=n_steps, batch_size=batch_size, n_epochs=n_epochs
    )
    for name in ("optimizer_class", "optimizer_kwargs"):
        if policy_kwargs and name in policy_kwargs:
            raise UserError(f"policy_kwargs has {name!r}, which is the rule's place: expected other arguments.")
    found = frozen(find(rule, UpdateRule))
    per_update = n_epochs * math.ceil(n_steps * n_envs / batch_size)
    updates = None if total_timesteps is None else math.ceil(total_timesteps / (n_steps * n_envs))
    trained = found.trained_numbers(tabular=False)
    kwargs = {
        "rule": found,
        "total_steps": None if updates is None else updates * per_update,
        "steps_per_update": per_update,
        "epochs": n_epochs,
        "seed": seed,
    }
    bound = trained.get("max_grad_norm", Hyper().max_grad_norm) if max_grad_norm is None else max_grad_norm
    return {
        "policy": POLICIES[policy] if isinstance(policy, str) else policy,
        "policy_kwargs": {**(policy_kwargs or {}), "optimizer_class": RuleOptimizer, "optimizer_kwargs": kwargs},
        "learning_rate": trained_rate(found) if learning_rate is None else learning_rate,
        "max_grad_norm": float(bound),
        "n_steps": n_steps,
        "batch_size": batch_size,
        "n_epochs": n_epochs,
    }
