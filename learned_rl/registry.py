"""Finding components and task families by name, through entry points.

A package of anyone's registers in `pyproject.toml`, exactly as this one does:

    [project.entry-points."learned_rl.components"]
    my_objective = "my_package.my_objective:MyObjective"

A family is addressed as `name/preset` (`grid/small`, `gym/CartPole-v1`); an id that gymnasium knows may stand alone.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

import gymnasium

from learned_rl.component import Component
from learned_rl.tasks.base import TaskFamily, unknown


@cache
def components() -> dict[str, type[Component]]:
    """Every registered component, by name."""
    found = {e.name: e.load() for e in entry_points(group="learned_rl.components")}
    return dict(sorted(found.items()))


@cache
def families() -> dict[str, type[TaskFamily]]:
    """Every registered task family, by name."""
    found = {e.name: e.load() for e in entry_points(group="learned_rl.families")}
    return dict(sorted(found.items()))


def make_component(name: str) -> Component:
    """A fresh component with its default settings.

    Raises:
        UserError: no component of that name.
    """
    if name not in components():
        raise unknown("component", name, components())
    return components()[name]()


def make_family(name: str) -> TaskFamily:
    """The family that `name/preset` addresses; a bare gymnasium id, or `MODULE:ID`, means `gym/ID`.

    Raises:
        UserError: no such family, preset or environment.
    """
    family, _, preset = name.partition("/")
    if family in families():
        return families()[family](preset) if preset else families()[family]()  # type: ignore[call-arg]
    if name in gymnasium.registry or family in gymnasium.registry or name.startswith("MinAtar/") or ":" in name:
        return families()["gym"](name)  # type: ignore[call-arg]
    raise unknown("environment or family", name, family_names())


def family_names() -> list[str]:
    """Every `name/preset` that the registered families list, and the ids that gymnasium knows."""
    named = [f"{name}/{preset}" for name, family in families().items() for preset in family.presets]
    return [*named, *gymnasium.registry]
