"""Learned losses, rewards, hyperparameters and auxiliary tasks: one file per method, its paper in the docstring."""

from objectives.dpo import DPO
from objectives.lpg import LPG, LPGConfig
from objectives.schedule import Schedule, ScheduleConfig

__all__ = ["DPO", "LPG", "LPGConfig", "Schedule", "ScheduleConfig"]
