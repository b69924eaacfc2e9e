"""Names: what is registered is found, what is not gets the nearest choice, declarations are what is installed."""

import pathlib
import tomllib

import pytest
from gymnasium.spaces import Discrete

from learned_rl.component import SLOTS, Component
from learned_rl.registry import components, families, family_names, make_component, make_family
from learned_rl.types import UserError

DECLARED = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]


@pytest.mark.parametrize(("group", "found"), [("components", components), ("families", families)])
def test_declared_entry_points_are_the_installed_ones(group, found):
    declared = DECLARED[f"learned_rl.{group}"]
    installed = {name: f"{kind.__module__}:{kind.__name__}" for name, kind in found().items()}
    assert {name: installed.get(name) for name in declared} == declared


@pytest.mark.parametrize("name", sorted(components()))
def test_a_component_is_registered_under_its_own_name(name):
    component = make_component(name)
    assert isinstance(component, Component) and type(component) is components()[name]
    assert component.name == name and component.slot in SLOTS
    assert (type(component).__doc__ or "").strip(), "the catalogue shows the first line of the docstring"


@pytest.mark.parametrize("name", sorted(families()))
def test_a_family_resolves_by_name_and_preset(name):
    kind = families()[name]
    assert kind.name == name and kind.presets
    for preset in kind.presets:
        assert f"{name}/{preset}" in family_names()
    family = make_family(f"{name}/{kind.presets[0]}")
    assert type(family) is kind and family.max_episode_steps >= 1


def test_presets_of_one_family_differ():
    small, large = make_family("grid/small"), make_family("grid/large")
    assert isinstance(small.observation_space, Discrete) and isinstance(large.observation_space, Discrete)
    assert small.observation_space.n < large.observation_space.n


def test_a_bare_gymnasium_id_is_the_gym_family():
    bare, addressed = make_family("CartPole-v1"), make_family("gym/CartPole-v1")
    assert type(bare) is type(addressed) is families()["gym"]
    assert bare.observation_space == addressed.observation_space and bare.observation_space.shape == (4,)
    assert make_family("Acrobot-v1").observation_space.shape == (6,)


@pytest.mark.parametrize(
    ("make", "wrong", "nearest"),
    [
        (make_component, "lpgg", "'lpg'"),
        (make_component, "rms_prop", "'rmsprop'"),
        (make_family, "gird/small", "'grid/small'"),
        (make_family, "CartPole", "'CartPole-v1'"),
        (make_family, "Cartpole-v1", "'CartPole-v1'"),
        (make_family, "grid/smal", "'small'"),
    ],
)
def test_an_unknown_name_gets_the_nearest(make, wrong, nearest):
    with pytest.raises(UserError) as error:
        make(wrong)
    message = str(error.value)
    assert nearest in message and wrong.rpartition("/")[2] in message and "\n" not in message


def test_nothing_is_an_unknown_name_too():
    for make in (make_component, make_family):
        with pytest.raises(UserError):
            make("")
