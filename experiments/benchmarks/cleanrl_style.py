"""PPO in the style of single-file implementations such as CleanRL's (Huang et al., 2022, arXiv:2111.08819).

Nothing of this project is used but the settings: modules, `torch.optim.Adam`, gymnasium's `SyncVectorEnv`, buffers
written step by step, a loop over shuffled minibatches. It is the peer of a benchmark, not a part of the toolkit.
As in that style, a truncated episode is treated as terminated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

from experiments.benchmarks.contenders import PPOSettings


def _layer(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _network(sizes: Sequence[int], outputs: int, gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [_layer(a, b, math.sqrt(2)), nn.Tanh()]
    return nn.Sequential(*layers, _layer(sizes[-1], outputs, gain))


class ActorCritic(nn.Module):
    """Separate networks for the policy and the value."""

    def __init__(self, inputs: int, actions: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.actor = _network([inputs, *hidden], actions, 0.01)
        self.critic = _network([inputs, *hidden], 1, 1.0)

    def value(self, obs: Tensor) -> Tensor:
        """[n] from observations [n, d]."""
        return self.critic(obs).flatten()

    def policy(self, obs: Tensor) -> Categorical:
        """Of observations [n, d]."""
        return Categorical(logits=self.actor(obs))


def _recorded(env_id: str) -> Callable[[], gymnasium.Env]:
    return lambda: gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make(env_id))


class CleanRLStyle:
    """PPO on a gymnasium environment with a vector observation and discrete actions."""

    def __init__(self, env_id: str, s: PPOSettings, seed: int) -> None:
        torch.manual_seed(seed)
        self.rng, self.s = np.random.default_rng(seed), s
        self.envs = SyncVectorEnv([_recorded(env_id)] * s.n_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        (inputs,) = self.envs.single_observation_space.shape  # type: ignore[misc]
        actions = self.envs.single_action_space.n  # type: ignore[attr-defined]
        self.agent = ActorCritic(inputs, int(actions), s.hidden)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=s.learning_rate, eps=1e-5)
        self.obs = torch.zeros(s.n_steps, s.n_envs, inputs)
        self.actions, self.log_probs, self.rewards, self.dones, self.values = torch.zeros(5, s.n_steps, s.n_envs)
        self.next_obs = torch.as_tensor(self.envs.reset(seed=seed)[0])

    def learn(self, steps: int) -> None:
        """Train for that many environment steps, as whole updates."""
        for _ in range(math.ceil(steps / self.s.per_update)):
            self._collect()
            self._update(self._advantages())

    @torch.no_grad()
    def _collect(self) -> None:
        for t in range(self.s.n_steps):
            policy = self.agent.policy(self.next_obs)
            action = policy.sample()
            self.obs[t], self.actions[t], self.log_probs[t] = self.next_obs, action, policy.log_prob(action)
            self.values[t] = self.agent.value(self.next_obs)
            obs, reward, terminated, truncated, _ = self.envs.step(action.numpy())
            self.rewards[t] = torch.as_tensor(reward)
            self.dones[t] = torch.as_tensor(terminated | truncated)
            self.next_obs = torch.as_tensor(obs)

    @torch.no_grad()
    def _advantages(self) -> Tensor:
        advantage = torch.zeros_like(self.rewards)
        last, value = torch.zeros(self.s.n_envs), self.agent.value(self.next_obs)
        for t in reversed(range(self.s.n_steps)):
            going = 1 - self.dones[t]
            error = self.rewards[t] + self.s.gamma * going * value - self.values[t]
            last = error + self.s.gamma * self.s.gae_lambda * going * last
            advantage[t], value = last, self.values[t]
        return advantage

    def _update(self, advantage: Tensor) -> None:
        s, returns = self.s, (advantage + self.values).flatten()
        obs, actions, log_probs, advantages = (
            self.obs.flatten(0, 1),
            *map(torch.flatten, (self.actions, self.log_probs, advantage)),
        )
        order = np.arange(s.per_update)
        for _ in range(s.n_epochs):
            self.rng.shuffle(order)
            for start in range(0, s.per_update, s.batch_size):
                rows = order[start : start + s.batch_size]
                policy, value = self.agent.policy(obs[rows]), self.agent.value(obs[rows])
                ratio = (policy.log_prob(actions[rows]) - log_probs[rows]).exp()
                a = advantages[rows]
                a = (a - a.mean()) / (a.std() + 1e-8)
                clipped = ratio.clamp(1 - s.clip_range, 1 + s.clip_range)
                policy_loss = -torch.min(ratio * a, clipped * a).mean()
                value_loss = (value - returns[rows]).square().mean()
                loss = policy_loss + s.vf_coef * value_loss - s.ent_coef * policy.entropy().mean()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), s.max_grad_norm)
                self.optimizer.step()
