"""Recipes: what to learn, on what, with which settings.

A Python file of this folder defines `RECIPES`, which `learned-rl meta-train` runs, or `ONLINE`: lifetimes that
`learned-rl train` runs; one for each method that is compared.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import ModuleType
from typing import Any

from experiments.train import Train
from learned_rl import artifacts
from learned_rl.component import Component
from learned_rl.registry import components, make_family
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError, at_least
from meta_optimizers.estimators import estimator_config
from meta_optimizers.self_tuning import SelfTuningConfig
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
    """registered name of the component to meta-train, or a component file to continue from"""
    settings: dict[str, Any] = field(default_factory=dict)
    """the component's settings that differ from its defaults; a file's must agree"""
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
    validation_updates: int | None = None
    """agent updates of these lives; default: as many as the longest lifetimes of meta-training have"""
    checkpoint_every: int = 50
    """meta-steps between checkpoints"""

    def __post_init__(self) -> None:
        names = ("meta_steps", "validate_every", "validation_tasks", "validation_updates", "checkpoint_every")
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
        """A fresh component with the recipe's settings, or the one in its file.

        Raises:
            UserError: no such component or file, settings that it does not know, or others than the file's.
        """
        if self.component in components():
            return components()[self.component].from_config(self.settings)
        component = artifacts.get(self.component)
        asked = type(component).from_config(self.settings).config
        for name in self.settings:
            if (mine := getattr(asked, name)) != (kept := getattr(component.config, name)):
                raise UserError(
                    f"The recipe's settings.{name} is {mine!r}, but {self.component} was made with {kept!r}: expected "
                    f"the same, or {component.name!r} in place of the file for fresh weights."
                )
        return component


@dataclass(frozen=True)
class OnlineRecipe:
    """An agent's one lifetime: where, and with which settings."""

    name: str
    """of the recipe"""
    about: str
    """in one sentence"""
    env: str
    """gymnasium id or task family"""
    train: Train
    """settings; options of the command line win"""

    def estimated_by(self, name: str) -> OnlineRecipe:
        """The recipe with another estimator, at the settings that suit the environment.

        Raises:
            UserError: there is none of that name.
        """
        suited = SelfTuningConfig.suited(make_family(self.env).observation_space, name)
        outer = replace(self.train.outer, estimator=suited.estimator)
        return replace(self, train=replace(self.train, outer=outer))


def _modules() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]


@cache
def recipes() -> dict[str, Recipe]:
    """Every recipe of this folder for meta-training, by name."""
    return {each.name: each for m in _modules() for each in getattr(m, "RECIPES", ())}


@cache
def online_recipes() -> dict[str, OnlineRecipe]:
    """Every recipe of this folder for one lifetime, by name."""
    return {each.name: each for m in _modules() for each in getattr(m, "ONLINE", ())}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none.
    """
    if name not in recipes():
        raise unknown("recipe", name, recipes())
    return recipes()[name]
