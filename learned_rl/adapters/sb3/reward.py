"""Rewards that a component makes, step by step or rollout by rollout, for algorithms of Stable-Baselines3."""

# mypy: disable-error-code="type-abstract"

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Dict
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor

from learned_rl.adapters.common import all_finite, find, frozen, unknown_row
from learned_rl.adapters.sb3.rollouts import experience
from learned_rl.component import Context, Reward
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError, at_least


class RewardVecEnv(VecEnvWrapper):
    """Environments whose reward a component makes, step by step.

    The component sees rollouts of one step, [1, 1, B]: observations as they are at this place among the wrappers, the
    action that the environment is given (of continuous ones the clipped), the environment's reward, and how the step
    ended. Log-probabilities, age and horizon are not known (NaN). `Monitor` lies inside, so that `rollout/ep_rew_mean`
    stays the environment's; every info says its reward as "extrinsic_reward".

    Raises:
        UserError: no such component, one that carries a memory, or spaces that it does not take.
    """

    def __init__(self, venv: VecEnv, reward: Reward | str | Path) -> None:
        super().__init__(venv)
        self.reward = frozen(_fitted(find(reward, Reward), venv.observation_space, venv.action_space))
        if memory := self.reward.initial_memory(1):
            raise UserError(
                f"The reward {self.reward.name!r} carries a memory from update to update ({', '.join(memory)}), and "
                "single steps know no updates: expected one without, or `RewardRolloutBuffer`."
            )
        self._obs: Any = None
        self._actions: Any = None

    def reset(self) -> Any:
        self._obs = self.venv.reset()
        return self._obs

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        obs, reward, done, infos = self.venv.step_wait()
        assert isinstance(obs, np.ndarray)
        cut = np.array([bool(info.get("TimeLimit.truncated")) for info in infos])
        final = np.array(obs)
        for i in np.flatnonzero(done):
            final[i] = infos[i]["terminal_observation"]
        seen = [torch.as_tensor(np.asarray(x))[None, None] for x in (self._obs, obs, final)]
        action, paid, ended = (torch.as_tensor(np.asarray(x))[None, None] for x in (self._actions, reward, done))
        paid, unknown, truncated = paid.float(), torch.full(paid.shape, math.nan), torch.as_tensor(cut)[None, None]
        rows = torch.cat(seen[:2])
        step = Trajectory(rows, action, unknown, paid, ended & ~truncated, ended & truncated, seen[2])
        with torch.no_grad():
            made, _ = self.reward(step, Context(torch.full((1,), math.nan), torch.full((1,), math.nan), {}))
        made = all_finite(made, self.reward, "log-probabilities, age or horizon")
        for info, extrinsic in zip(infos, reward, strict=True):
            info["extrinsic_reward"] = float(extrinsic)
        self._obs = obs
        return obs, made[0, 0].numpy().astype(np.float32), done, infos


class RewardRolloutBuffer(RolloutBuffer):
    """A rollout buffer whose rewards a component makes, from whole rollouts, before advantages are computed.

    `PPO(..., rollout_buffer_class=RewardRolloutBuffer, rollout_buffer_kwargs={"reward": ...})`. The component sees
    [T, 1, B]: actions as they were drawn, and done steps as terminated. Stable-Baselines3 has by then added gamma
    V(last observation) to the reward of a step that a time limit cut off, so a component must add to the environment's
    reward and not scale it (checked). The observation after the last step is not known (NaN; zeros for whole numbers).
    Memory begins anew when a saved model is loaded, since the library saves no buffers.

    Args:
        reward:  a component, a registered name, or a component file.
        horizon: rollouts of the whole training, for components that ask; None: not known (NaN).

    Attributes:
        extrinsic: [T, B] rewards before the component.

    Raises:
        UserError: no such component, or one that does not fit.
    """

    def __init__(self, *args: Any, reward: Reward | str | Path, horizon: int | None = None, **kwargs: Any) -> None:
        at_least(1, horizon=horizon)
        super().__init__(*args, **kwargs)
        self.reward = frozen(_fitted(find(reward, Reward), self.observation_space, self.action_space)).to(self.device)
        self.memory, self.horizon, self.age = self.reward.initial_memory(1), horizon, 0
        self.extrinsic = self.rewards.copy()

    def reset(self) -> None:
        super().reset()
        self._made = False

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        if not self._made:  # whoever asks again for advantages asks about the same rewards
            self.extrinsic = self.rewards.copy()
            self.rewards = self._make(np.asarray(dones, bool))
            self._made, self.age = True, self.age + 1
        super().compute_returns_and_advantage(last_values, dones)

    def _make(self, dones: np.ndarray) -> np.ndarray:
        """[T, B] rewards; the memory moves on."""
        after = unknown_row(torch.as_tensor(self.observations[-1])).numpy()
        rollout = experience(self, after, dones)
        horizon = torch.full((1,), math.nan if self.horizon is None else float(self.horizon), device=self.device)
        context = Context(torch.full_like(horizon, self.age), horizon, self.memory)
        with torch.no_grad():
            made, self.memory = self.reward(rollout, context)
            more, _ = self.reward(dataclasses.replace(rollout, reward=rollout.reward + 1), context)
        all_finite(made, self.reward, "what follows the last step, or a horizon that nobody gave")
        if bool(rollout.terminated.any()) and not torch.allclose(more, made + 1, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"The reward {self.reward.name!r} scales what the environment pays, and with it the value that the "
                "library adds where a time limit ends an episode: expected one that adds to it, or `RewardVecEnv`."
            )
        return made[:, 0].cpu().numpy().astype(np.float32)


def _fitted(reward: Reward, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Reward:
    if isinstance(observation_space, Dict):
        raise UserError(
            f"Observations are {observation_space}: expected Discrete or Box, such as `FlattenObservation`'s."
        )
    with torch.random.fork_rng(devices=[]):  # agents begin as they would without it
        reward.fit(observation_space, action_space, ())
    return reward
