"""Self-tuned numbers: where they start, to whom they belong, what they move, and their meta-gradients."""

import dataclasses
import math

import experience
import pytest
import torch
from gymnasium.spaces import Discrete
from learners import check_differences, check_each_alone
from torch.testing import assert_close

from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper, lifetime_mean
from learned_rl.inner_loop import GraphInner
from learned_rl.ppo import Algorithm, Slots
from learned_rl.types import UserError
from learned_rl.update_rules import SGD
from objectives.bijectors import NUMBERS
from objectives.self_tuned import SelfTuned, SelfTunedConfig

ACTIONS = Discrete(experience.ACTIONS)
LAYERS = ("trunk0", "value_trunk0", "policy", "value")  # of `experience.population("mlp", value=True)`
RETURNS = ("gamma", "gae_lambda", "vtrace_alpha")


def tuned(*numbers, kind="mlp", **settings):
    """In float64, fitted to agents of `experience`."""
    component = SelfTuned(SelfTunedConfig(numbers or ("gamma",), **settings))
    component.fit(experience.SPACES[kind], ACTIONS, LAYERS if kind == "mlp" else ("table",))
    return component.double()


def moved(component, spread=0.3, seed=0):
    """The same away from where it starts."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for eta in component.parameters():
            eta.add_(spread * torch.randn(eta.shape, generator=g, dtype=eta.dtype))
    return component


def asked(component, hyper=None, kind="mlp", seed=0, context=None, **settings):
    """The numbers that it says."""
    data = experience.trajectory(experience.SPACES[kind], seed, **settings)
    numbers, memory = component(hyper or Hyper(clip_range_vf=0.2), data, context or experience.context())
    assert memory == {}
    return numbers


# --- where they start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fresh_it_says_exactly_the_configured_numbers(dtype):
    """As floats, and with one for each lifetime."""
    component = SelfTuned(SelfTunedConfig(NUMBERS)).to(dtype)
    floats = Hyper(learning_rate=3e-3, gamma=0.97, vtrace_alpha=0.7, clip_range_vf=0.3, ent_coef=0.02, pg_coef=1.1)
    rows = {k: torch.tensor([[v], [0.9 * v]], dtype=dtype) for k, v in vars(floats).items()}
    for hyper in (floats, Hyper(**rows)):
        found = asked(component, hyper, dtype=dtype)
        for name in NUMBERS:
            expected = torch.as_tensor(getattr(hyper, name), dtype=dtype).expand(2, 1)
            assert torch.equal(getattr(found, name), expected), name


def test_what_is_not_learned_stays_as_it_is():
    hyper = Hyper(clip_range_vf=None, max_grad_norm=math.inf)
    found = asked(moved(tuned("gamma")), hyper)
    assert isinstance(found.gamma, torch.Tensor)
    assert found.replace(gamma=hyper.gamma) == hyper


def test_fresh_it_trains_as_constants_do_bit_by_bit():
    """Beside the same numbers in tensors; away from the start it trains otherwise."""
    names = ("learning_rate", "gamma", "gae_lambda", "clip_range", "ent_coef", "vf_coef", "max_grad_norm")
    hyper = Hyper(learning_rate=3e-3, clip_range=0.1, ent_coef=0.01)
    tensors = hyper.replace(**{k: torch.full((2, 1), getattr(hyper, k)) for k in names})
    config = PPOConfig(n_envs=2, n_steps=16, n_epochs=2, n_minibatches=2, hyper=hyper, agent=AgentConfig(hidden=(8,)))

    def trained(component, hyper=hyper):
        settings = dataclasses.replace(config, hyper=hyper)
        agent = PPO("CartPole-v1", settings, hyperparameters=component, seeds=2, seed=3)
        return agent.learn(4 * 32).lifetimes.population.theta

    expected = trained(None, tensors)
    assert torch.equal(trained(SelfTuned(SelfTunedConfig(names))), expected)
    assert torch.equal(trained(SelfTuned(SelfTunedConfig(names, per_layer=True))), expected)
    for name in names:
        assert not torch.equal(trained(moved(SelfTuned(SelfTunedConfig((name,))))), expected), name


def test_a_number_that_cannot_be_learned_is_refused_before_the_first_update():
    with pytest.raises(UserError, match=r"^max_grad_norm is inf, but it is to be learned.*such as 0\.5"):
        asked(tuned("gamma", "max_grad_norm"), Hyper(max_grad_norm=math.inf))
    with pytest.raises(UserError, match=r"clip_range is inf.*such as 0\.2"):
        PPO("CartPole-v1", PPOConfig.a2c(), hyperparameters=SelfTuned(SelfTunedConfig(("clip_range",)))).learn(1)


# --- where they go ------------------------------------------------------------------------------------------------


def test_numbers_by_hand():
    component = tuned("gamma", "step_size", "vf_coef", bounds={"vf_coef": (0.0, 2.0)})
    with torch.no_grad():
        component.eta["gamma"].fill_(1.0)
        component.eta["learning_rate"].fill_(math.log(3))
        component.eta["vf_coef"].fill_(-1.0)
    found = asked(component, Hyper(learning_rate=0.01, gamma=0.9, vf_coef=0.5))
    odds = 9 * math.e  # of gamma; those of vf_coef / 2 are (1 / 3) / e
    expected = {"gamma": odds / (1 + odds), "learning_rate": 0.03, "vf_coef": 2 / (1 + 3 * math.e)}
    for name, value in expected.items():
        rows = torch.full((2, 1), value, dtype=torch.float64)
        assert_close(getattr(found, name), rows, rtol=1e-14, atol=0)


def test_the_learning_rate_may_decay_whether_it_is_learned_or_not():
    context = experience.context(age=3.0, horizon=4.0)
    for numbers, factor in ((("gamma",), 1.0), (("learning_rate",), 2.0), (("learning_rate", "gamma"), 2.0)):
        component = tuned(*numbers, linear_decay=True)
        with torch.no_grad():
            component.eta[numbers[0]].fill_(math.log(2))
        found = asked(component, Hyper(learning_rate=0.01), context=context)
        rate = torch.full((2, 1), 0.01 * factor / 4, dtype=torch.float64)
        assert_close(found.learning_rate, rate, rtol=1e-14, atol=0)


def test_numbers_for_each_layer():
    component = tuned("learning_rate", "gamma", per_layer=True)
    with torch.no_grad():
        component.eta["learning_rate"].copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    base = torch.tensor([[0.1], [0.2]], dtype=torch.float64)
    found = asked(component, Hyper(learning_rate=base))
    assert_close(found.learning_rate, base * torch.tensor([1, math.e, 1 / math.e, math.e**2], dtype=torch.float64))
    assert found.gamma.shape == (2, 1)


def test_the_rate_of_a_layer_moves_that_layer():
    """By as much more as the rate is larger, and no other."""
    component, agents = tuned("learning_rate", per_layer=True), experience.population("mlp", value=True)
    assert agents.agent.layers == LAYERS

    def step():
        config = PPOConfig(n_envs=3, n_steps=5, n_epochs=1, n_minibatches=1)
        algorithm = Algorithm(config, Slots.fill(config, hyperparameters=component, optimizer=SGD()))
        inner = GraphInner(agents, algorithm.slots.optimizer, {})
        data = experience.trajectory(experience.SPACES["mlp"], 0)
        algorithm.update(inner, data, experience.context(), config.hyper, torch.Generator())
        return inner.theta.detach() - agents.theta.detach()

    before = step()
    with torch.no_grad():
        component.eta["learning_rate"][1] = math.log(5)
    after, own = step(), agents.layer == LAYERS.index("value_trunk0")
    assert_close(after[:, own], 5 * before[:, own], rtol=1e-10, atol=1e-16)
    assert torch.equal(after[:, ~own], before[:, ~own]) and bool((before != 0).any(0)[~own].any())


@pytest.mark.parametrize("truncate", [True, False])
def test_numbers_for_each_state(truncate):
    """gamma and gae_lambda of the state that a step led to, vtrace_alpha of the one in which it was taken."""
    component = moved(tuned(*RETURNS, kind="tabular", per_state=RETURNS), 1.0)
    hyper = Hyper(gamma=0.9, gae_lambda=torch.tensor([[0.8], [0.7]], dtype=torch.float64), vtrace_alpha=0.6)
    found = asked(component, hyper, kind="tabular", truncate=truncate)
    data = experience.trajectory(experience.SPACES["tabular"], 0, truncate=truncate)
    T, P, B = data.reward.shape
    assert bool(data.truncated.any()) == truncate
    for name in RETURNS:
        assert getattr(found, name).shape == (T, P, B)
    for t, p, b in torch.cartesian_prod(torch.arange(T), torch.arange(P), torch.arange(B)).tolist():
        state = data.final_obs[t, p, b] if data.truncated[t, p, b] else data.obs[t + 1, p, b]
        for name, at in (("gamma", state), ("gae_lambda", state), ("vtrace_alpha", data.obs[t, p, b])):
            base = torch.as_tensor(getattr(hyper, name), dtype=torch.float64).expand(P, 1)[p]
            expected = torch.sigmoid(torch.logit(base) + component.eta[name][at])
            assert getattr(found, name)[t, p, b].item() == pytest.approx(expected.item(), rel=1e-12)


# --- their size ---------------------------------------------------------------------------------------------------


SIZED = [
    ("mlp", SelfTunedConfig(("gamma", "learning_rate"), per_layer=True), {"gamma": 1, "learning_rate": 4}),
    ("tabular", SelfTunedConfig(("gamma", "gae_lambda"), per_state=("lambda",)), {"gamma": 1, "gae_lambda": 4}),
]
sized = pytest.mark.parametrize(("kind", "config", "sizes"), SIZED, ids=["layers", "states"])


@sized
def test_the_config_rebuilds_what_was_fitted(kind, config, sizes, tmp_path):
    component = SelfTuned(config)
    component.fit(experience.SPACES[kind], ACTIONS, LAYERS)
    assert {k: len(v) for k, v in component.eta.items()} == sizes
    moved(component)
    artifacts.save(component, tmp_path / "numbers.safetensors")
    loaded = artifacts.load(tmp_path / "numbers.safetensors")
    assert loaded.config == component.config and loaded.tuned == component.tuned
    names = [name for name, _ in component.named_parameters()]
    assert [name for name, _ in loaded.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), component.parameters(), strict=True))


@sized
def test_fitting_again(kind, config, sizes):
    """Does nothing for agents of the same size, and is refused for others."""
    component = SelfTuned(config)
    component.fit(experience.SPACES[kind], ACTIONS, LAYERS)
    before = moved(component), dict(component.named_parameters()), component.config
    values = {k: v.clone() for k, v in component.state_dict().items()}
    component.fit(experience.SPACES[kind], ACTIONS, LAYERS)
    assert all(v is before[1][k] for k, v in component.named_parameters()) and component.config == before[2]
    assert all(torch.equal(v, values[k]) for k, v in component.state_dict().items())
    other = {"mlp": (experience.SPACES["mlp"], LAYERS[:3]), "tabular": (Discrete(9), LAYERS)}[kind]
    with pytest.raises(UserError, match=r"'self_tuned' was made for 4 (layers|states), but these agents have (3|9)"):
        component.fit(other[0], ACTIONS, other[1])


@sized
def test_before_it_has_met_agents_it_says_so(kind, config, sizes):
    with pytest.raises(UserError, match=r"learns (gamma|gae_lambda|learning_rate) but has met no agents: `fit` it"):
        asked(SelfTuned(config), kind=kind)


def test_states_need_a_table():
    with pytest.raises(UserError, match="per_state is gamma: expected Discrete observations, not Box"):
        tuned("gamma", per_state=("gamma",))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"numbers": ()}, "numbers is empty: expected at least one of .*gamma"),
        ({"numbers": ("gama",)}, "unknown number 'gama'.*'gamma'"),
        ({"numbers": ("lambda", "gae_lambda")}, "gae_lambda is there twice"),
        (
            {"bounds": {"vf_coef": (0, 1)}},
            "unknown learned number in bounds 'vf_coef': the nearest of gamma is 'gamma'",
        ),
        ({"bounds": {"gamma": (0.5, 1.5)}}, r"gamma is 1\.5: expected at most 1"),
        ({"bounds": {"gamma": (0.9, 0.5)}}, r"interval \(0\.9, 0\.5\).*expected finite low < high"),
        ({"bounds": {"gamma": (0.9,)}}, r"bounds of gamma are \(0\.9,\): expected two numbers"),
        ({"bounds": {"gamma": "ab"}}, "bounds of gamma are 'ab': expected two numbers"),
        ({"per_layer": True}, "per_layer is on, but numbers is gamma: expected learning_rate in it"),
        ({"per_state": ("gae_lambda",)}, "unknown learned number in per_state 'gae_lambda'.*'gamma'"),
        ({"per_state": ("ent_coef",)}, "unknown number for each state 'ent_coef'.*gamma, vtrace_alpha"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        SelfTunedConfig(**settings)


def test_settings_are_canonical():
    config = SelfTunedConfig(("lambda", "entropy_cost"), {"entropy_cost": [0, 0.5]}, per_state=("lambda",))
    assert config.numbers == ("gae_lambda", "ent_coef") and config.per_state == ("gae_lambda",)
    assert config.bounds == {"ent_coef": (0.0, 0.5)} and dataclasses.replace(config) == config
    assert SelfTuned(config).tuned == ("gae_lambda", "ent_coef")


# --- meta-gradients -----------------------------------------------------------------------------------------------

CLIPS = ("clip_range", "clip_range_vf")
UNREAD = ("vtrace_alpha", "prediction_coef", "aux_coef")  # by PPO's loss
READ = tuple(k for k in NUMBERS if k not in (*CLIPS, *UNREAD))
CASES = [
    ("mlp", SelfTunedConfig(READ)),
    ("mlp", SelfTunedConfig(READ, {"gamma": (0.5, 1.0), "learning_rate": (0.0, 1.0)}, linear_decay=True)),
    ("mlp", SelfTunedConfig(("learning_rate", "gamma"), per_layer=True)),
    ("tabular", SelfTunedConfig(("gamma", "lambda", "ent_coef"), per_state=("gamma", "lambda"))),
]
cases = pytest.mark.parametrize(("kind", "config"), CASES, ids=["all", "bounds", "layers", "states"])


def lived(component, agents, kind):
    """[P] a judgement of agents after one update of two epochs on fixed experience."""
    hyper = Hyper(learning_rate=0.3, ent_coef=0.01, clip_range_vf=0.2, max_grad_norm=0.1)
    config = PPOConfig(n_envs=3, n_steps=5, n_epochs=2, n_minibatches=2, hyper=hyper)
    algorithm = Algorithm(config, Slots.fill(config, hyperparameters=component, optimizer=SGD()))
    inner, generator = GraphInner(agents, algorithm.slots.optimizer, {}), torch.Generator().manual_seed(5)
    data = experience.trajectory(experience.SPACES[kind], seed=0)
    algorithm.update(inner, data, experience.context(age=3.0), hyper, generator)
    out, outer = inner.agent(experience.observations(experience.SPACES[kind], 5, 2, 3, generator=generator)), data
    return lifetime_mean(out.policy.log_prob(outer.action) * outer.reward + out.value)


def setting(kind, config):
    """A component away from where it starts, and what agents live with it."""
    component = SelfTuned(config)
    component.fit(experience.SPACES[kind], ACTIONS, LAYERS if kind == "mlp" else ("table",))
    agents = experience.population(kind, value=True)
    return moved(component.double()), lambda component: lived(component, agents, kind)


@cases
def test_meta_gradient_through_an_update_against_differences(kind, config):
    check_differences(*setting(kind, config))


def test_what_clips_has_no_meta_gradient():
    """It only says which samples count, and the gradient of none of them depends on it."""
    component, lived = setting("mlp", SelfTunedConfig((*CLIPS, "gamma")))
    slopes = torch.autograd.grad(lived(component).sum(), list(component.parameters()), allow_unused=True)
    assert [slope is not None and bool(slope.any()) for slope in slopes] == [False, False, True]


@cases
def test_lifetimes_with_numbers_of_their_own(kind, config):
    component, lived = setting(kind, config)
    g = torch.Generator().manual_seed(1)
    apart = [v + 0.2 * torch.randn(2, *v.shape, generator=g, dtype=v.dtype) for v in component.parameters()]
    check_each_alone(component, lived, apart)
