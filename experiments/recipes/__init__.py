"""Recipes: what to meta-train, on what, with which settings. Each is a Python file that defines `RECIPE`."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from learned_rl.component import Component
from learned_rl.registry import components
from learned_rl.tasks.base import unknown
from learned_rl.types import at_least
from meta_optimizers.estimators import estimator_config
from meta_optimizers.trainer import MetaTrainConfig
from meta_optimizers.truncated import UnrollConfig


@dataclass(frozen=True)
class Recipe:
    """One meta-training experiment."""

    name: str
    """of the recipe"""
    about: str
    """in one sentence"""
    family: str
    """task family, as `name/preset`"""
    component: str
    """registered name of the component to meta-train"""
    settings: dict[str, Any] = field(default_factory=dict)
    """the component's settings that differ from its defaults"""
    train: MetaTrainConfig = field(default_factory=MetaTrainConfig)
    """meta-training"""
    meta_steps: int = 1000
    """updates of the meta-parameters"""
    minutes: float = 30.0
    """stop after this much wall time, even if meta-steps are left; a run that resumes counts all of its time"""
    validate_every: int = 100
    """meta-steps between validations; the best component by validation is the one that is saved"""
    validation_tasks: int = 64
    """tasks of the validation side on which one fresh agent each lives at each validation"""
    checkpoint_every: int = 50
    """meta-steps between checkpoints"""

    def __post_init__(self) -> None:
        names = ("meta_steps", "validate_every", "validation_tasks", "checkpoint_every")
        at_least(1, **{name: getattr(self, name) for name in names})
        at_least(0, minutes=self.minutes)

    def estimated_by(self, name: str) -> Recipe:
        """The same with another estimator, at its defaults, but for settings of the window that both have (what it is
        judged on aside).

        Raises:
            UserError: there is none of that name.
        """
        present, config = self.train.estimator, estimator_config(name)
        if isinstance(present, UnrollConfig) and isinstance(config, UnrollConfig):
            shared = {f.name for f in fields(config)} & {f.name for f in fields(present)} - {"outer_data"}
            config = replace(config, **{k: getattr(present, k) for k in shared})
        return replace(self, train=replace(self.train, estimator=config))

    def make_component(self) -> Component:
        """A fresh component with the recipe's settings.

        Raises:
            UserError: no such component, or settings that it does not know.
        """
        if self.component not in components():
            raise unknown("component", self.component, components())
        return components()[self.component].from_config(self.settings)


@cache
def recipes() -> dict[str, Recipe]:
    """Every recipe of this folder, by name."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return {m.RECIPE.name: m.RECIPE for m in modules}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none.
    """
    if name not in recipes():
        raise unknown("recipe", name, recipes())
    return recipes()[name]
