"""Learned parts in Stable-Baselines3 (https://github.com/DLR-RM/stable-baselines3): `pip install learned-rl[sb3]`.

| slot | what plugs it in | where it acts |
|---|---|---|
| optimizer | `learned_optimizer` | every gradient step of PPO or A2C |
| reward | `RewardVecEnv` | every environment step, of any algorithm |
| reward | `RewardRolloutBuffer` | every rollout of PPO or A2C |
| objective | `ObjectivePPO` | every minibatch |
| hyperparameters | `HyperparameterCallback` | every update of PPO or A2C |

Components act with the weights that they have: nothing here meta-learns. What a component cannot be told is NaN, so
that one that reads it does not go unnoticed.
"""

from learned_rl.adapters.sb3.numbers import HyperparameterCallback, write_numbers
from learned_rl.adapters.sb3.objective import ObjectivePPO
from learned_rl.adapters.sb3.optimizer import Watched, WatchedCnnPolicy, WatchedMultiInputPolicy, learned_optimizer
from learned_rl.adapters.sb3.reward import RewardRolloutBuffer, RewardVecEnv

__all__ = [
    "HyperparameterCallback",
    "ObjectivePPO",
    "RewardRolloutBuffer",
    "RewardVecEnv",
    "Watched",
    "WatchedCnnPolicy",
    "WatchedMultiInputPolicy",
    "learned_optimizer",
    "write_numbers",
]
