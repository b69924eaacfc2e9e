"""What all adapters share: finding a component, and a policy of which only the scores of its actions are known."""

# mypy: disable-error-code="type-abstract"

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import gymnasium
import torch
from torch import Tensor

from learned_rl import artifacts
from learned_rl.component import Component, Objective, Reward
from learned_rl.distributions import Distribution
from learned_rl.types import UserError

C = TypeVar("C", bound=Component)


def find(given: Component | str | Path, kind: type[C]) -> C:
    """A component, the registered one of a name, or the one in a file.

    Raises:
        UserError: there is none, or it fits another slot.
    """
    found = artifacts.get(given) if isinstance(given, str | Path) else given
    if not isinstance(found, kind):
        what = f"{found.name!r} fits the slot {found.slot!r}" if isinstance(found, Component) else f"{found!r} is none"
        raise UserError(f"A component of the slot {kind.slot!r} is expected here, and {what}.")
    return found


def frozen(component: C) -> C:
    """A copy whose weights no gradient reaches, so that an agent's backward pass leaves the given one as it is."""
    return copy.deepcopy(component).requires_grad_(False)


def headless(given: Objective | str | Path, action_space: gymnasium.Space, library: str) -> Objective:
    """An objective that asks the agents for a policy and a value, and nothing else.

    Raises:
        UserError: it asks for more, or does without a value.
    """
    objective = find(given, Objective)
    for head, size in objective.heads(action_space).items():
        raise UserError(
            f"The objective {objective.name!r} asks agents for the head {head!r} of size {size}, which those of "
            f"{library} lack: expected one of policy and value alone, such as 'ppo_clip'."
        )
    if not objective.needs_value:
        raise UserError(
            f"The objective {objective.name!r} does without a value, which the loop of {library} cannot: expected one "
            "of policy and value, such as 'ppo_clip'."
        )
    return objective


class Scored(Distribution):
    """A policy of which only the actions that were taken are scored.

    So any library's policy serves, whatever its distribution; an objective that asks for more is refused.

    Args:
        scores:  [...] log-probability of the actions taken, in nats.
        spread:  [...] entropy, in nats.
        library: whose policy it is, for errors.
    """

    def __init__(self, scores: Tensor, spread: Tensor, library: str) -> None:
        self.scores, self.spread, self.library = scores, spread, library

    @property
    def params(self) -> tuple[Tensor, ...]:
        return self.scores, self.spread

    def like(self, *params: Tensor) -> Self:
        scores, spread = params
        return type(self)(scores, spread, self.library)

    def log_prob(self, action: Tensor) -> Tensor:
        """[...] of the actions taken; others cannot be scored."""
        return self.scores

    def entropy(self) -> Tensor:
        return self.spread

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        raise self._refused("draws actions")

    def mode(self) -> Tensor:
        raise self._refused("asks for the most likely action")

    def kl(self, other: Distribution) -> Tensor:
        raise self._refused("asks for a divergence between policies")

    def _refused(self, what: str) -> UserError:
        return UserError(
            f"The objective {what}, but of a policy of {self.library} only the actions taken are scored: "
            "expected one that reads log-probabilities and entropy alone, such as 'ppo_clip'."
        )


def all_finite(reward: Tensor, component: Reward, unknown: str) -> Tensor:
    """The reward that a component made.

    Raises:
        UserError: some of it is not finite; what is not known reaches a component as NaN.
    """
    if not bool(reward.isfinite().all()):
        raise UserError(
            f"The reward of {component.name!r} is not finite here: its weights are not, or it reads {unknown}, which "
            "is not known where it is plugged in."
        )
    return reward


def nearest(name: str, choices: Mapping[str, Any]) -> str:
    """The choice that a mistyped name was most likely meant to be."""
    import difflib

    return difflib.get_close_matches(name, sorted(choices), n=1, cutoff=0.0)[0]


def unknown_row(like: Tensor) -> Tensor:
    """What stands for an observation that is not known: NaN, or zeros where those are whole numbers."""
    return torch.full_like(like, float("nan")) if like.is_floating_point() else torch.zeros_like(like)
