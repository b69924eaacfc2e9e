"""Learned losses, rewards, hyperparameters and auxiliary tasks: one file per method, its paper in the docstring."""

from objectives.dice import LoadedDiCE, LoadedDiCEConfig
from objectives.dpo import DPO
from objectives.lpg import LPG, LPGConfig
from objectives.lpo import LPO, LPOConfig
from objectives.schedule import Schedule, ScheduleConfig

__all__ = [
    "DPO",
    "LPG",
    "LPO",
    "LPGConfig",
    "LPOConfig",
    "LoadedDiCE",
    "LoadedDiCEConfig",
    "Schedule",
    "ScheduleConfig",
]
