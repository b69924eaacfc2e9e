"""Rollout buffers of Stable-Baselines3 as trajectories."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium.spaces import Discrete
from stable_baselines3.common.buffers import RolloutBuffer

from learned_rl.trajectory import Trajectory


def experience(buffer: RolloutBuffer, last_obs: np.ndarray, dones: np.ndarray) -> Trajectory:
    """What a full rollout buffer holds, [T, P=1, B]; all steps that ended an episode count as terminated.

    Args:
        last_obs: [B, ...] observation after the last step.
        dones:    [B] bool: the last step ended an episode.
    """
    shape = buffer.observation_space.shape or ()
    lead = buffer.rewards.shape
    rows = np.concatenate([buffer.observations.reshape(*lead, *shape), np.asarray(last_obs).reshape(1, -1, *shape)])
    action = buffer.actions[..., 0].astype(np.int64) if isinstance(buffer.action_space, Discrete) else buffer.actions
    ended = np.concatenate([buffer.episode_starts[1:], np.asarray(dones)[None]]).astype(bool)
    told = (rows, action, buffer.log_probs, buffer.rewards, ended, np.zeros_like(ended))
    return Trajectory(*(torch.as_tensor(x.copy(), device=buffer.device).unsqueeze(1) for x in told))
