"""MGRL: which numbers agents are told, that they are the ones they learn with, and the meta-gradient in closed form."""

import dataclasses
import math

import experience
import pytest
import torch
from gymnasium.spaces import Discrete
from torch.testing import assert_close

from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.agents import EMBEDDING, AgentConfig
from learned_rl.component import Hyper
from learned_rl.inner_loop import GraphInner
from learned_rl.ppo import Algorithm, Slots
from learned_rl.types import UserError
from learned_rl.update_rules import SGD
from objectives.mgrl import MGRL, MGRLConfig

SMALL = PPOConfig(n_envs=2, n_steps=8, n_epochs=1, n_minibatches=1, agent=AgentConfig(hidden=(8,)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, ("gamma", "gae_lambda")),
        ({"embedding": False}, ()),
        ({"numbers": ("lambda", "ent_coef")}, ("gae_lambda", "ent_coef")),
        ({"numbers": ("gamma", "learning_rate")}, ("gamma", "learning_rate")),
        ({"numbers": ("gamma", "learning_rate"), "per_layer": True}, ("gamma",)),
        ({"per_state": ("gamma",)}, ("gae_lambda",)),
        ({"per_state": ("gamma", "lambda")}, ()),
    ],
)
def test_agents_are_told_the_numbers_that_there_are_one_of(settings, told):
    component = MGRL(MGRLConfig(**settings))
    assert component.conditions == told and component.tuned == component.config.numbers


def test_the_paper_s_numbers_are_the_default():
    assert MGRLConfig().numbers == ("gamma", "gae_lambda") and MGRLConfig().embedding


def test_agents_know_the_numbers_with_which_they_learn():
    """The configured ones at first, then whatever they have become; with 16 more inputs than otherwise."""
    component = MGRL()
    agent = PPO("CartPole-v1", SMALL, hyperparameters=component, seeds=2)
    population, other = agent.lifetimes.population, PPO("CartPole-v1", SMALL, hyperparameters=MGRL(), seeds=2)
    plain = PPO("CartPole-v1", SMALL, hyperparameters=MGRL(MGRLConfig(embedding=False)), seeds=2).lifetimes.population
    sizes, told = (population.agent.shapes["trunk0.weight"], plain.agent.shapes["trunk0.weight"]), "condition"
    assert sizes[0][0] == sizes[1][0] + EMBEDDING and told not in plain.agent.shapes
    agent.learn(16), other.learn(16)
    expected = torch.tensor([[0.99, 0.95]] * 2)
    assert torch.equal(population.weights(population.theta)[told], expected)
    with torch.no_grad():
        component.eta["gamma"].fill_(-1.0)
    agent.learn(32), other.learn(32)
    expected[:, 0] = torch.sigmoid(torch.logit(expected[:, 0]) - 1)
    assert_close(population.weights(population.theta)[told], expected)
    assert not torch.allclose(*(x.lifetimes.population.theta[:, :-2] for x in (agent, other)))


def test_a_table_cannot_be_told():
    with pytest.raises(UserError, match="A tabular agent cannot be told gamma, gae_lambda"):
        PPO("chain", SMALL, hyperparameters=MGRL())
    numbers = MGRL(MGRLConfig(embedding=False, per_state=("gamma",)))
    agent = PPO("chain", SMALL, hyperparameters=numbers, seeds=2).learn(16)
    assert numbers.config.states == agent.family.observation_space.n == len(numbers.eta["gamma"])


def test_a_file_brings_back_the_same_component(tmp_path):
    component = MGRL(MGRLConfig(("gamma", "vtrace_alpha"), {"gamma": (0.9, 1.0)}, embedding=False))
    with torch.no_grad():
        component.eta["gamma"].fill_(0.7)
    artifacts.save(component, tmp_path / "mgrl.safetensors")
    loaded = artifacts.load(tmp_path / "mgrl.safetensors")
    assert type(loaded) is MGRL and loaded.config == component.config and loaded.conditions == ()
    assert loaded.eta["gamma"].item() == component.eta["gamma"].item()


# --- the meta-gradient --------------------------------------------------------------------------------------------


def slopes_of_the_return(data, value, next_value, gamma, gae_lambda):
    """d advantage / d gamma and d advantage / d lambda, [T, P, B], by their own recursions."""
    goes_on = (~data.terminated).double(), (~data.done).double()
    advantage = by_gamma = by_lambda = torch.zeros_like(data.reward[0])
    rows = []
    for t in reversed(range(len(data.reward))):
        trace = gamma * gae_lambda * goes_on[1][t]
        by_gamma = next_value[t] * goes_on[0][t] + gae_lambda * goes_on[1][t] * advantage + trace * by_gamma
        by_lambda = gamma * goes_on[1][t] * advantage + trace * by_lambda
        advantage = data.reward[t] + gamma * next_value[t] * goes_on[0][t] - value[t] + trace * advantage
        rows.append((by_gamma, by_lambda))
    return tuple(torch.stack(x) for x in zip(*rows[::-1], strict=True))


def test_the_meta_gradient_is_that_of_the_paper():
    """df/d eta = alpha (dg / d eta) (d log pi / d theta + 2 vf_coef dv / d theta), by way of one step."""
    agents, data = experience.population("tabular", value=True), experience.trajectory(experience.SPACES["tabular"], 0)
    hyper = Hyper(
        learning_rate=0.3, gamma=0.9, gae_lambda=0.8, vf_coef=0.7, clip_range=math.inf, max_grad_norm=math.inf
    )
    T, _, B = data.reward.shape
    config = PPOConfig(n_envs=B, n_steps=T, n_epochs=1, n_minibatches=1, normalize_advantage=False, hyper=hyper)
    data = dataclasses.replace(data, log_prob=agents(data.obs[:-1]).policy.log_prob(data.action).detach())
    component = MGRL(MGRLConfig(embedding=False)).double()
    component.fit(experience.SPACES["tabular"], Discrete(experience.ACTIONS), ("table",))
    algorithm = Algorithm(config, Slots.fill(config, hyperparameters=component, optimizer=SGD()))
    inner = GraphInner(agents, algorithm.slots.optimizer, {})
    algorithm.update(inner, data, experience.context(), hyper, torch.Generator())
    judge = torch.randn(inner.theta.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad((judge * inner.theta).sum(), [component.eta[k] for k in component.tuned])

    out, final = agents(data.obs[:-1]), agents(data.final_obs).value
    value, next_value = out.value.detach(), data.following(agents(data.obs).value, final).detach()
    numbers, width = (0.9, 0.8), (0.9 * 0.1, 0.8 * 0.2)  # and the sigmoid's derivative
    for slope, by, sigmoid in zip(found, slopes_of_the_return(data, value, next_value, *numbers), width, strict=True):
        weighed = by * (out.policy.log_prob(data.action) + 2 * 0.7 * out.value)
        (f,) = torch.autograd.grad(weighed.mean((0, 2)).sum(), agents.theta, retain_graph=True)
        assert_close(slope, (0.3 * sigmoid * judge * f).sum().view(1), rtol=1e-10, atol=1e-14)
