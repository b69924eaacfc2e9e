"""The record of experience: one container for training, meta-training and evaluation.

Time alignment, written once. `reward[t]`, `terminated[t]` and `truncated[t]` follow `action[t]` taken in `obs[t]`.
`obs` has `T + 1` rows; the last one bootstraps. Where an episode ended at step `t`, `obs[t + 1]` is already the first
observation of the next episode, and `final_obs[t]` is the last one of the episode that ended. `terminated` stops
bootstrapping; `truncated` does not: such a step bootstraps from `final_obs[t]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """Experience of `P` lifetimes with `B` copies each over `T` environment steps.

    Attributes:
        obs:        [T+1, P, B, ...] observations.
        action:     [T, P, B] (discrete) or [T, P, B, A] (continuous, before clipping or squashing).
        log_prob:   [T, P, B] log-probability of `action` under the policy that acted, in nats.
        reward:     [T, P, B] extrinsic reward per environment step.
        terminated: [T, P, B] bool.
        truncated:  [T, P, B] bool.
        final_obs:  [T, P, B, ...] last observation of each episode that ended at step t (elsewhere the next
                    observation); None where no step was truncated, since only those are read.
        logits:     [T, P, B, A] of the policy that acted; None for continuous actions.
        follows:    [T, P, B] bool: the step before obs[t], of this rollout or an earlier one, ended an episode; None
                    where it was not recorded.
    """

    obs: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_obs: Tensor | None = None
    logits: Tensor | None = None
    follows: Tensor | None = None

    @property
    def done(self) -> Tensor:
        """[T, P, B] bool: the episode ended at this step, for either reason."""
        return self.terminated | self.truncated

    def following(self, x: Tensor, final: Tensor) -> Tensor:
        """[T, P, B, ...] what is said of the state that each step led to: of its final observation where it was
        truncated.

        Args:
            x:     [T+1, P, B, ...] of obs.
            final: [T, P, B, ...] of final_obs.
        """
        return torch.where(self.truncated.view(*self.truncated.shape, *[1] * (x.dim() - 3)), final, x[1:])

    def next_value(self, value: Tensor, value_of: Callable[[Tensor], Tensor]) -> Tensor:
        """[T, P, B] value of the state that each step led to.

        Args:
            value:    [T+1, P, B] V(obs).
            value_of: V of other observations [T, P, B, ...]; called only where some step was truncated.
        """
        return value[1:] if self.final_obs is None else self.following(value, value_of(self.final_obs))

    @property
    def steps(self) -> int:
        """Environment steps of each lifetime, summed over its copies (`T * B`)."""
        return self.reward.shape[0] * self.reward.shape[2]


def flatten_time(x: Tensor) -> Tensor:
    """[T, P, B, ...] -> [P, T*B, ...], the layout from which minibatches are drawn."""
    return x.transpose(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])
