"""Search spaces: coordinates and back, nothing outside, and a space beside a setting that holds its default."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from dataclasses import dataclass, field

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

import learned_rl
import meta_optimizers
import objectives
from experiments.recipes import recipes
from experiments.tuning.agents import AgentSettings
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from learned_rl.spaces import (
    Choice,
    Integers,
    LogNegative,
    LogOneMinus,
    LogUniform,
    PowersOfTwo,
    Uniform,
    get,
    replaced,
    searched,
    spaces,
)
from learned_rl.types import UserError
from meta_optimizers.learning import OuterLossConfig

SPACES = [
    Uniform(-1.0, 3.0),
    LogUniform(1e-4, 1e-1),
    LogOneMinus(1e-3, 1.0),
    LogNegative(1e-4, 1e-2),
    Integers(1, 20),
    Integers(1, 20, log=True),
    PowersOfTwo(1, 64),
    PowersOfTwo(16, 1024),
    Choice("sgd", "adam"),
    Choice(False, True),
    Choice(None, 0.5, 3),
    Choice((32, 32), (64, 64), (128,)),
]
each_space = pytest.mark.parametrize("space", SPACES, ids=repr)


def inside(space, value) -> bool:
    """By the space's definition, not by its methods; less the rounding of the last digits."""
    if isinstance(space, Choice):
        return any(value == option and type(value) is type(option) for option in space.options)
    if isinstance(space, Integers):
        return type(value) is int and space.low <= value <= space.high
    if isinstance(space, PowersOfTwo):
        return type(value) is int and value & (value - 1) == 0 and space.low <= value <= space.high
    coordinate = 1 - value if isinstance(space, LogOneMinus) else -value if isinstance(space, LogNegative) else value
    slack = 1e-12 * max(abs(space.low), abs(space.high))
    return type(value) is float and space.low - slack <= coordinate <= space.high + slack


@dataclass
class Answers:
    """A trial that answers anything it may be asked, and notes under which name."""

    data: st.DataObject
    asked: list[str] = field(default_factory=list)

    def _answer(self, name, strategy):
        self.asked.append(name)
        return self.data.draw(strategy)

    def suggest_float(self, name, low, high, *, log=False):
        assert not log or low > 0
        return self._answer(name, st.floats(low, high))

    def suggest_int(self, name, low, high, *, log=False):
        assert isinstance(low, int) and isinstance(high, int) and not (log and low < 1)
        return self._answer(name, st.integers(low, high))

    def suggest_categorical(self, name, choices):
        assert all(choice is None or isinstance(choice, bool | int | float | str) for choice in choices)
        return self._answer(name, st.sampled_from(choices))


# --- values and coordinates ---------------------------------------------------------------------------------------


@each_space
@given(data=st.data())
def test_what_is_suggested_is_inside_and_comes_back(space, data):
    trial = Answers(data)
    value = space.suggest(trial, "config.x")
    assert inside(space, value) and trial.asked == [space.key("config.x")]
    back = space.decode(space.encode(value))
    assert back == (pytest.approx(value, rel=1e-12, abs=1e-15) if isinstance(value, float) else value)


@each_space
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_drawn_and_perturbed_is_inside(space, seed):
    rng = np.random.default_rng(seed)
    value = space.draw(rng)
    assert inside(space, value)
    for _ in range(3):
        value = space.perturb(value, rng)
        assert inside(space, value)


@each_space
def test_draws_reach_all_of_a_space(space):
    """Evenly in the coordinate that is searched: a quarter of the draws in each quarter of it."""
    rng = np.random.default_rng(0)
    drawn = [space.encode(space.draw(rng)) for _ in range(4000)]
    if isinstance(space, Choice):
        assert min(drawn.count(space.encode(option)) for option in space.options) > 0.9 * 4000 / len(space.options)
        return
    low, high = space.low, space.high
    if isinstance(space, PowersOfTwo):
        low, high = int(math.log2(low)), int(math.log2(high))
    if isinstance(space, Integers | PowersOfTwo):
        assert {*drawn} == {*range(low, high + 1)}
        low, high = low - 0.5, high + 0.5
    scale = math.log if getattr(space, "log", False) else float
    share = [(scale(x) - scale(low)) / (scale(high) - scale(low)) for x in map(float, drawn)]
    if not isinstance(space, Integers | PowersOfTwo):
        assert np.allclose(np.histogram(share, 4, (0, 1))[0] / 4000, 0.25, atol=0.03)
    else:
        assert np.mean(share) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("space", "value", "coordinate", "back"),
    [
        (Uniform(-1.0, 3.0), 2, 2.0, 2.0),
        (Uniform(-1.0, 3.0), -7.0, -1.0, -1.0),
        (Uniform(-1.0, 3.0), math.inf, 3.0, 3.0),
        (LogUniform(1e-4, 0.1), 0.0, 1e-4, 1e-4),
        (LogUniform(1e-4, 0.1), -1.0, 1e-4, 1e-4),
        (LogUniform(1e-4, 0.1), math.inf, 0.1, 0.1),
        (LogOneMinus(1e-3, 0.1), 0.99, 1 - 0.99, 0.99),
        (LogOneMinus(1e-3, 0.1), 0.95, 1 - 0.95, 0.95),
        (LogOneMinus(1e-3, 0.1), 1.0, 1e-3, 0.999),
        (LogOneMinus(1e-3, 0.1), 0.0, 0.1, 0.9),
        (LogOneMinus(1e-3, 1.0), 0.0, 1.0, 0.0),
        (LogNegative(1e-4, 1e-2), -1e-3, 1e-3, -1e-3),
        (LogNegative(1e-4, 1e-2), 5.0, 1e-4, -1e-4),
        (LogNegative(1e-4, 1e-2), -5.0, 1e-2, -1e-2),
        (Integers(2, 20), 1, 2, 2),
        (Integers(2, 20), 7.6, 8, 8),
        (Integers(2, 20, log=True), 100, 20, 20),
        (PowersOfTwo(2, 64), 16, 4, 16),
        (PowersOfTwo(2, 64), 1, 1, 2),
        (PowersOfTwo(2, 64), 1000, 6, 64),
        (PowersOfTwo(2, 64), 23, 5, 32),
        (PowersOfTwo(2, 64), 22, 4, 16),
        (Choice("sgd", "adam"), "adam", "adam", "adam"),
        (Choice((32, 32), (64, 64)), (64, 64), "64x64", (64, 64)),
        (Choice((32, 32), (64, 64)), [32, 32], "32x32", (32, 32)),
        (Choice(None, 0.5), None, None, None),
    ],
)
def test_values_outside_are_taken_to_the_nearest_inside(space, value, coordinate, back):
    assert space.encode(value) == coordinate and type(space.encode(value)) is type(coordinate)
    assert space.decode(space.encode(value)) == back and type(space.decode(space.encode(value))) is type(back)


@pytest.mark.parametrize(
    ("space", "ask"),
    [
        (Uniform(0.0, 2.0), ("float", 0.0, 2.0, False)),
        (LogUniform(1e-4, 0.1), ("float", 1e-4, 0.1, True)),
        (LogOneMinus(1e-3, 0.1), ("float", 1e-3, 0.1, True)),
        (LogNegative(1e-3, 0.1), ("float", 1e-3, 0.1, True)),
        (Integers(1, 20), ("int", 1, 20, False)),
        (Integers(1, 20, log=True), ("int", 1, 20, True)),
        (PowersOfTwo(16, 1024), ("int", 4, 10, False)),
    ],
)
def test_numbers_are_searched_in_the_coordinate_that_is_promised(space, ask):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    space.suggest(trial, "x")
    (found,) = trial.distributions.values()
    kind, low, high, log = ask
    assert type(found).__name__ == f"{kind.capitalize()}Distribution"
    assert (found.low, found.high, found.log) == (low, high, log)


@pytest.mark.parametrize(
    ("space", "value", "near"),
    [
        (LogUniform(1e-4, 1.0), 0.01, {0.008, 0.012}),
        (LogUniform(1e-4, 0.01), 0.01, {0.008, 0.01}),
        (LogOneMinus(1e-3, 0.1), 0.99, {1 - 0.008, 1 - 0.012}),
        (LogNegative(1e-3, 0.1), -0.01, {-0.008, -0.012}),
        (Uniform(-1.0, 3.0), -0.5, {-0.4, -0.6}),
        (Integers(1, 20), 10, {8, 12}),
        (PowersOfTwo(1, 64), 8, {4, 16}),
        (PowersOfTwo(1, 64), 64, {32, 64}),
        (Choice("a", "b", "c"), "b", {"a", "c"}),
        (Choice("a", "b", "c"), "a", {"a", "b"}),
    ],
)
def test_what_is_perturbed_stays_near(space, value, near):
    rng = np.random.default_rng(0)
    found = {space.perturb(value, rng) for _ in range(40)}
    assert sorted(found) == (sorted(near) if isinstance(value, str) else pytest.approx(sorted(near), rel=1e-12))


def test_a_coordinate_that_is_not_the_value_says_so_in_its_name():
    names = [space.key("config.hyper.gamma") for space in (Uniform(0, 1), LogUniform(1, 2), Integers(1, 2), Choice(1))]
    assert names == ["config.hyper.gamma"] * 4
    assert LogOneMinus(0.1, 0.2).key("config.hyper.gamma") == "config.hyper.one_minus_gamma"
    assert LogOneMinus(0.1, 0.2).key("gamma") == "one_minus_gamma"
    assert LogNegative(0.1, 0.2).key("a.weight") == "a.minus_weight"
    assert PowersOfTwo(1, 2).key("n_envs") == "log2_n_envs"


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Uniform(2.0, 1.0), r"Uniform\(2.0, 1.0\): expected low < high\."),
        (lambda: Uniform(1.0, 1.0), "expected low < high"),
        (lambda: Uniform(math.nan, 1.0), "expected low < high"),
        (lambda: LogUniform(0.0, 1.0), r"LogUniform\(0.0, 1.0\): expected 0 < low < high\."),
        (lambda: LogOneMinus(0.1, 0.01), "expected 0 < low < high"),
        (lambda: LogNegative(-1.0, 1.0), "expected 0 < low < high"),
        (lambda: Integers(5, 1), r"Integers\(5, 1.*expected low"),
        (lambda: Integers(0, 5, log=True), r"Integers\(0, 5.*expected"),
        (lambda: PowersOfTwo(3, 8), r"PowersOfTwo\(3, 8\): 3 is no power of two"),
        (lambda: PowersOfTwo(1, 12), "12 is no power of two"),
        (lambda: PowersOfTwo(0, 8), "0 is no power of two"),
        (lambda: PowersOfTwo(8, 2), r"PowersOfTwo\(8, 2\).*expected low"),
        (lambda: Choice(), r"Choice\(\) has no options"),
        (lambda: Choice(1, True), r"Choice\(1, True\)"),
        (lambda: Choice("a", "b").encode("c"), r"'c' is not in the search space Choice\('a', 'b'\)"),
        (lambda: Choice((1, 2)).encode([2, 1]), r"\[2, 1\] is not in the search space"),
    ],
)
def test_mistakes_are_one_sentence(make, said):
    with pytest.raises(UserError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


# --- spaces beside settings -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    rate: float = field(default=0.1, metadata=searched(LogUniform(0.01, 1.0)))
    fixed: int = 3


@dataclass(frozen=True)
class Outer:
    low: int = field(default=1, metadata=searched(Integers(1, 9)))
    high: int = 5
    inner: Inner = field(default_factory=Inner)
    free: dict = field(default_factory=lambda: {"width": 8, "deep": {"er": 1}})

    def __post_init__(self):
        if self.low > self.high:
            raise UserError(f"low is {self.low}: expected at most {self.high}.")


def test_spaces_are_found_by_dotted_path():
    assert spaces(Outer()) == {"low": Integers(1, 9), "inner.rate": LogUniform(0.01, 1.0)}
    assert spaces(Outer(), "a.b.") == {"a.b.low": Integers(1, 9), "a.b.inner.rate": LogUniform(0.01, 1.0)}
    assert spaces(Inner(fixed=7)) == {"rate": LogUniform(0.01, 1.0)}


def test_values_by_dotted_path():
    assert [get(Outer(), path) for path in ("high", "inner.rate", "free.width", "free.deep.er")] == [5, 0.1, 8, 1]


def test_replacing_goes_through_dataclasses_and_dictionaries():
    before = Outer()
    after = replaced(before, {"high": 7, "inner.rate": 0.5, "free.width": 16, "free.deep.er": 2, "free.new": None})
    assert after == Outer(high=7, inner=Inner(rate=0.5), free={"width": 16, "deep": {"er": 2}, "new": None})
    assert before == Outer() and replaced(before, {}) == before
    assert replaced(before, {"inner": Inner(0.2)}).inner == Inner(0.2)


def test_what_is_replaced_is_checked_as_a_whole():
    """One after the other the first value would be refused, whichever comes first."""
    for order in (1, -1):
        values = dict([("low", 8), ("high", 9)][::order])
        assert replaced(Outer(), values) == Outer(8, 9)
    with pytest.raises(UserError, match="low is 8"):
        replaced(Outer(), {"low": 8})
    config = replaced(AgentSettings(), {"config.n_envs": 1, "config.n_steps": 16, "config.n_minibatches": 16}).config
    assert (config.n_envs, config.n_steps, config.n_minibatches) == (1, 16, 16)
    with pytest.raises(UserError, match="n_minibatches is 32"):
        replaced(AgentSettings(), {"config.n_envs": 1, "config.n_steps": 16, "config.n_minibatches": 32})


def test_no_field_is_made_up():
    with pytest.raises(AttributeError, match="Inner has no field 'rte'"):
        replaced(Outer(), {"inner.rte": 0.5})


# --- the project's own ------------------------------------------------------------------------------------------------


def settings_with_spaces():
    """Every dataclass of the packages that has a searched field of its own, with its defaults."""
    for package in (learned_rl, meta_optimizers, objectives):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            for kind in vars(module).values():
                own = isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
                if own and any("space" in f.metadata for f in dataclasses.fields(kind)):
                    yield kind()


PRESETS = [PPOConfig.a2c(), PPOConfig(hyper=Hyper(gamma=1.0, clip_range=math.inf, max_grad_norm=math.inf))]
KNOWN = [*settings_with_spaces(), *PRESETS, *recipes().values()]


@pytest.mark.parametrize("settings", KNOWN, ids=lambda settings: type(settings).__name__)
def test_every_default_of_the_project_has_a_place_in_its_space(settings):
    assert spaces(settings)
    for path, space in spaces(settings).items():
        value = get(settings, path)
        near = space.decode(space.encode(value))
        assert inside(space, near), path
        assert near == value or not inside(space, value), path
        assert type(near) in (type(value), float), path


def test_the_project_searches_what_it_says():
    """A list by hand, so that a space that is lost (by a field that is written anew) is missed."""
    names = {f"{type(s).__name__}.{path}" for s in settings_with_spaces() for path in spaces(s)}
    unsearched = {f"Hyper.{name}" for name in ("clip_range_vf", "aux_coef", "pg_coef", "vtrace_alpha")}
    own = {f"Hyper.{f.name}" for f in dataclasses.fields(Hyper)} - unsearched
    own |= {f"PPOConfig.{n}" for n in ("n_envs", "n_steps", "n_epochs", "n_minibatches", "optimizer", "linear_decay")}
    own |= {f"AgentConfig.{n}" for n in ("hidden", "activation", "shared")}
    own |= {f"OuterLossConfig.{n}" for n in ("policy_entropy", "entropy_half_life")}
    unrolled = ("Unroll", "Window", "Truncated", "Rematerialised", "FirstOrder", "Bootstrapped")
    perturbed = ("Antithetic", "Evolution", "Persistent", "NoiseReuse", "BlackBox")
    own |= {f"{c}Config.window" for c in (*unrolled, "Stacked", *perturbed)} | {f"{c}Config.sigma" for c in perturbed}
    own |= {"BootstrappedConfig.bootstrap", "ForwardConfig.every", "LPOConfig.width"}
    own |= {f"OuterCriticConfig.{n}" for n in ("gamma", "gae_lambda", "learning_rate", "epochs")}
    own |= {f"LPGConfig.{n}" for n in ("predictions", "width", "embedding")}
    outer = ("OuterConfig", "MetaTrainConfig", "SelfTuningConfig")
    own |= {f"{c}.{n}" for c in outer for n in ("learning_rate", "max_grad_norm")}
    own |= {"PPOConfig.normalize_advantage", "LIRPGConfig.scale"}
    assert own == {name for name in names if name.count(".") == 1}


def test_an_infinite_half_life_is_searched_from_the_longest():
    (space,) = [s for path, s in spaces(OuterLossConfig()).items() if path == "entropy_half_life"]
    assert space.encode(OuterLossConfig().entropy_half_life) == 10_000
