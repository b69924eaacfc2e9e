"""Made-up learned components, one for each slot that needs an example: what the conformance suite must accept, and,
each spoilt in one way, what it must refuse."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from learned_rl.component import Auxiliary, Hyperparameters, NoConfig, Reward, UpdateRule, lifetime_mean


class RunningReward(Reward):
    """Reward scaled and shifted by learned numbers, and by a running mean that lives as long as the lifetime."""

    name, Config = "running_reward", NoConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def initial_memory(self, lifetimes):
        return {"mean": torch.zeros(lifetimes)}

    def mean(self, reward: Tensor) -> Tensor:
        return lifetime_mean(reward)

    def forward(self, trajectory, context):
        mean = 0.9 * context.memory["mean"] + 0.1 * self.mean(trajectory.reward)
        return self.scale * trajectory.reward + self.shift * mean[:, None], {"mean": mean}


class AgeingGamma(Hyperparameters):
    """A discount that depends on the age."""

    name, Config = "ageing_gamma", NoConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.slope = nn.Parameter(torch.zeros(1))

    def forward(self, base, trajectory, context):
        left = torch.sigmoid(self.slope * (1 + context.progress[:, None].to(self.slope)))
        return base.replace(gamma=base.gamma * left), {}


class RewardHead(Auxiliary):
    """A head that predicts the reward in a learned unit."""

    name, Config, reads = "reward_head", NoConfig, ()

    def __init__(self, config=None):
        super().__init__(config)
        self.unit = nn.Parameter(torch.ones(1))

    def heads(self, action_space):
        return {"reward": 1}

    def prepare(self, trajectory, out, next_heads, hyper, context):
        return {"target": self.unit * trajectory.reward}

    def loss(self, out, batch, hyper):
        return lifetime_mean((out.heads["reward"].squeeze(-1) - batch["target"]).square())


class LearnedStep(UpdateRule):
    """Momentum whose decay is learned."""

    name, Config = "learned_step", NoConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.decay = nn.Parameter(torch.zeros(1))

    def initial_state(self, theta):
        return {"velocity": torch.zeros_like(theta)}

    def update(self, grad, state, theta, learning_rate, context=None):
        velocity = torch.sigmoid(self.decay) * state["velocity"] + grad
        return -learning_rate * velocity, {"velocity": velocity}


EXAMPLES = {kind.name: kind for kind in (RunningReward, AgeingGamma, RewardHead, LearnedStep)}


# --- spoilt -------------------------------------------------------------------------------------------------------


class MixesLifetimes(RunningReward):
    def mean(self, reward):
        return super().mean(reward).mean().expand(reward.shape[1])


class PrefersTheFirstLifetime(RunningReward):
    def mean(self, reward):
        return super().mean(reward) * (torch.arange(reward.shape[1]) == 0)


class PrefersTheFirstCopy(RunningReward):
    def mean(self, reward):
        return reward[..., 0].mean(0)


class IsRandom(RunningReward):
    def mean(self, reward):
        return super().mean(reward) * torch.rand(())


class WritesInPlace(RunningReward):
    def mean(self, reward):
        return super().mean(reward.mul_(2))


class Single(RunningReward):
    def mean(self, reward):
        return super().mean(reward).float().double()


class HasAnIdleWeight(RunningReward):
    def __init__(self, config=None):
        super().__init__(config)
        self.idle = nn.Parameter(torch.zeros(2))


class IsNeverFinite(RunningReward):
    def mean(self, reward):
        return super().mean(reward) / 0


class ForgetsItsMemory(RunningReward):
    def forward(self, trajectory, context):
        return super().forward(trajectory, context)[0], {}


class HidesAWeight(RunningReward):
    """Keeps a number where it is not saved."""

    def __init__(self, config=None):
        super().__init__(config)
        self.hidden = torch.rand(())

    def mean(self, reward):
        return super().mean(reward) * self.hidden


class ReadsOtherAgents(RewardHead):
    def loss(self, out, batch, hyper):
        loss = super().loss(out, batch, hyper)
        return loss + loss.flip(0)


class SumsInsteadOfAveraging(RewardHead):
    def loss(self, out, batch, hyper):
        error = (out.heads["reward"].squeeze(-1) - batch["target"]).square()
        return error.sum(-1) if error.dim() == 2 else error.mean((0, 2))


class ForgetsAHead(RewardHead):
    def heads(self, action_space):
        return {}


class DropsANumber(AgeingGamma):
    def forward(self, base, trajectory, context):
        return dataclasses.replace(super().forward(base, trajectory, context)[0], vf_coef=0.5), {}
