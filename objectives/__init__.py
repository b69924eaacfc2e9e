"""Learned losses, rewards, hyperparameters and auxiliary tasks: one file per method, its paper in the docstring."""

from objectives.contextual import Contextual, ContextualConfig
from objectives.dice import LoadedDiCE, LoadedDiCEConfig
from objectives.dpo import DPO
from objectives.impala import Impala, ImpalaConfig
from objectives.lirpg import LIRPG, LIRPGConfig
from objectives.lpg import LPG, LPGConfig
from objectives.lpo import LPO, LPOConfig
from objectives.mgrl import MGRL, MGRLConfig
from objectives.schedule import Schedule, ScheduleConfig
from objectives.self_tuned import SelfTuned, SelfTunedConfig
from objectives.soft_clip import PPOSoftClip
from objectives.stac import STAC, STACConfig
from objectives.stacx import STACX, STACXConfig

__all__ = [
    "DPO",
    "LIRPG",
    "LPG",
    "LPO",
    "MGRL",
    "STAC",
    "STACX",
    "Contextual",
    "ContextualConfig",
    "Impala",
    "ImpalaConfig",
    "LIRPGConfig",
    "LPGConfig",
    "LPOConfig",
    "LoadedDiCE",
    "LoadedDiCEConfig",
    "MGRLConfig",
    "PPOSoftClip",
    "STACConfig",
    "STACXConfig",
    "Schedule",
    "ScheduleConfig",
    "SelfTuned",
    "SelfTunedConfig",
]
