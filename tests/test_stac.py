"""STAC: weights start slightly below the configured ones and never exceed them; meta-gradients of all six numbers."""

import math

import experience
import pytest
import torch
from gymnasium.spaces import Discrete
from learners import check_differences, check_each_alone
from torch.testing import assert_close

from learned_rl import PPO, PPOConfig
from learned_rl.component import Hyper, lifetime_mean
from learned_rl.inner_loop import GraphInner
from learned_rl.ppo import Algorithm, Slots
from learned_rl.types import UserError
from learned_rl.update_rules import SGD
from objectives.impala import Impala
from objectives.stac import STAC, STACConfig

WEIGHTS = {"pg_coef": 1.0, "vf_coef": 0.25, "ent_coef": 0.01}
HYPER = Hyper(learning_rate=0.3, gamma=0.995, gae_lambda=1.0, max_grad_norm=math.inf, **WEIGHTS)


def stac(*numbers, dtype=torch.float64, **settings):
    config = STACConfig(numbers, **settings) if numbers else STACConfig(**settings)
    return STAC(config).to(dtype)


def asked(component, hyper=HYPER, dtype=torch.float64):
    data = experience.trajectory(experience.SPACES["mlp"], 0, dtype=dtype)
    return component(hyper, data, experience.context())[0]


def set_to(component, value):
    with torch.no_grad():
        for eta in component.parameters():
            eta.fill_(value)
    return component


def rows(value, dtype=torch.float64):
    return torch.as_tensor(value, dtype=dtype).expand(2, 1)


def test_the_paper_s_numbers_are_the_default():
    assert STAC().tuned == ("gamma", "gae_lambda", "vtrace_alpha", "pg_coef", "vf_coef", "ent_coef")
    assert STAC().conditions == () and STACConfig().start == 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_they_start(dtype):
    """gamma exactly as configured, what is configured at 1 beside it, weights at 95 % of theirs."""
    found = asked(stac(dtype=dtype), dtype=dtype)
    assert torch.equal(found.gamma, rows(0.995, dtype))
    assert torch.equal(found.gae_lambda, rows(0.999, dtype)) and torch.equal(found.vtrace_alpha, rows(0.999, dtype))
    for name, reference in WEIGHTS.items():
        assert torch.equal(getattr(found, name), reference * rows(0.95, dtype)), name


def test_a_weight_is_its_reference_times_a_sigmoid():
    """Also with a reference for each lifetime; the others are what they are in `self_tuned`."""
    references = {k: torch.tensor([[v], [3 * v]], dtype=torch.float64) for k, v in WEIGHTS.items()}
    found = asked(set_to(stac(start=0.9), -1.5), HYPER.replace(**references))
    for name, reference in references.items():
        assert_close(getattr(found, name), reference / (1 + math.exp(1.5) / 9), rtol=1e-14, atol=0)
    assert_close(found.gamma, rows(1 / (1 + math.exp(1.5) * 0.005 / 0.995)), rtol=1e-13, atol=0)


@pytest.mark.parametrize("eta", [-200.0, -3.0, 3.0, 200.0])
def test_a_weight_never_exceeds_its_reference_nor_falls_below_zero(eta):
    found = asked(set_to(stac(dtype=torch.float32), eta), dtype=torch.float32)
    for name, reference in WEIGHTS.items():
        number = getattr(found, name)
        assert bool((number >= 0).all()) and bool((number <= reference).all())
        assert abs(eta) < 100 or torch.equal(number, rows(reference if eta > 0 else 0.0, torch.float32))


def test_bounds_take_the_place_of_the_reference():
    component = stac("pg_coef", "vf_coef", bounds={"pg_coef": (0.0, 4.0)})
    assert torch.equal(asked(component).pg_coef, rows(1.0))
    found = asked(set_to(component, 1.0))
    assert_close(found.pg_coef, rows(4 / (1 + 3 / math.e)))
    assert_close(found.vf_coef, rows(0.25 / (1 + 0.05 / 0.95 / math.e)))


def test_a_weight_of_zero_is_refused():
    with pytest.raises(
        UserError, match=r"^ent_coef is 0\.0, but it is to be learned.*such as 0\.01, or to leave it out"
    ):
        asked(stac(), Hyper())
    asked(stac("gamma", "pg_coef"), Hyper())


@pytest.mark.parametrize("start", [0.0, 1.0, -0.5, math.nan])
def test_a_start_at_an_edge_is_refused(start):
    with pytest.raises(UserError, match=f"start is {start}: expected a share between 0 and 1"):
        STACConfig(start=start)


def test_it_trains_with_impala():
    config = PPOConfig(n_envs=2, n_steps=8, n_epochs=1, n_minibatches=1, hyper=HYPER)
    agent = PPO("CartPole-v1", config, objective="impala", hyperparameters="stac", seeds=2).learn(32)
    assert bool(agent.lifetimes.population.theta.isfinite().all())


# --- meta-gradients -----------------------------------------------------------------------------------------------


def setting(kind):
    """Away from where it starts, with a gamma, lambda and alpha for each state of a table."""
    states = ("gamma", "lambda", "vtrace_alpha") if kind == "tabular" else ()
    component = STAC(STACConfig(per_state=states))
    component.fit(experience.SPACES[kind], Discrete(experience.ACTIONS), ("table",))
    g, component = torch.Generator().manual_seed(0), component.double()
    with torch.no_grad():
        for eta in component.parameters():
            eta.add_(torch.randn(eta.shape, generator=g, dtype=eta.dtype) - 1)
    agents = experience.population(kind, value=True)
    return component, lambda component: lived(component, agents, kind)


def lived(component, agents, kind):
    """[P] a judgement of agents after one update on experience of others, which importance weights correct."""
    hyper = HYPER.replace(gamma=0.95, ent_coef=0.1)
    config = PPOConfig(n_envs=3, n_steps=5, n_epochs=1, n_minibatches=1, hyper=hyper)
    algorithm = Algorithm(config, Slots.fill(config, objective=Impala(), hyperparameters=component, optimizer=SGD()))
    inner = GraphInner(agents, algorithm.slots.optimizer, {})
    algorithm.update(inner, experience.trajectory(experience.SPACES[kind], 0), experience.context(), hyper, None)
    outer = experience.trajectory(experience.SPACES[kind], 99)
    out = inner.agent(outer.obs[:-1])
    return lifetime_mean(out.policy.log_prob(outer.action) * outer.reward + out.value)


@pytest.mark.parametrize("kind", ["mlp", "tabular"])
def test_meta_gradient_through_an_off_policy_update_against_differences(kind):
    check_differences(*setting(kind))


@pytest.mark.parametrize("kind", ["mlp", "tabular"])
def test_lifetimes_with_numbers_of_their_own(kind):
    component, lived = setting(kind)
    check_each_alone(component, lived, [torch.stack([v, v + 0.5]) for v in component.parameters()])
