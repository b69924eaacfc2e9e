"""`PPO` as its users meet it: settings and their ranges, plugged parts, agents of their own, what it reports."""

import dataclasses
import math

import gymnasium
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from probes import GAMMA, ProbeFamily

from learned_rl import PPO, PPOConfig
from learned_rl.agents import AgentConfig, ModuleAgent
from learned_rl.architecture import PolicyHead
from learned_rl.component import Context, Hyper
from learned_rl.defaults import Constants, ConstantsConfig
from learned_rl.tasks.bandits import BanditFamily
from learned_rl.types import UserError
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from meta_optimizers.truncated import TruncatedConfig
from objectives.lpg import LPG
from objectives.lpo import LPO

TABLE, NUMBERS = Discrete(5), Box(-1.0, 1.0, (3,))
TINY = PPOConfig(n_envs=4, n_steps=5, n_epochs=1, n_minibatches=1)

# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["learning_rate", "gamma", "gae_lambda", "clip_range", "clip_range_vf", "max_grad_norm"]
)
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_numbers_below_their_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}: expected at least 0"):
        Hyper(**{name: value})
    with pytest.raises(UserError, match=name):
        Hyper().replace(**{name: value})


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
def test_numbers_above_one_are_refused(name):
    with pytest.raises(UserError, match=f"{name} is 1.01: expected at most 1"):
        Hyper(**{name: 1.01})


def test_numbers_within_their_range_are_taken():
    Hyper(learning_rate=0, gamma=1.0, gae_lambda=0.0, clip_range=math.inf, max_grad_norm=math.inf, ent_coef=-0.1)
    assert Hyper(gamma=torch.tensor([[0.5]])).gamma.item() == 0.5  # one for each lifetime


@pytest.mark.parametrize("config", [PPOConfig(), PPOConfig.a2c(agent=AgentConfig(hidden=(3, 4)), target_kl=0.1)])
def test_settings_survive_as_plain_values(config):
    plain = dataclasses.asdict(config)
    plain["hyper"] = {k: "inf" if v == math.inf else v for k, v in plain["hyper"].items()}
    plain["agent"]["hidden"] = list(plain["agent"]["hidden"])
    assert PPOConfig.from_plain(plain) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_envz": 3}, "n_envz"),
        ({"hyper": {"gama": 0.9}}, "gama"),
        ({"hyper": {"gamma": "much"}}, "much"),
        ({"agent": {"kind": "mlp"}}, "hidden"),
        ({"agent": {"hidden": [4], "height": 2}}, "height"),
    ],
)
def test_plain_values_that_do_not_fit_are_a_user_error(change, named):
    with pytest.raises(UserError, match=f"do not fit this version: .*{named}"):
        PPOConfig.from_plain(dataclasses.asdict(PPOConfig()) | change)


def test_plain_values_must_be_complete():
    with pytest.raises(UserError, match="do not fit this version: 'hyper'"):
        PPOConfig.from_plain({"n_envs": 3})


def test_settings_suit_the_objective_and_the_observations():
    assert PPOConfig.suited(None, NUMBERS) == PPOConfig()
    assert PPOConfig.suited(None, TABLE) == PPOConfig(hyper=Hyper(learning_rate=0.05))
    objective = LPG(predictions=3, width=4)
    table, network = (PPOConfig.suited(objective, space) for space in (TABLE, NUMBERS))
    assert (table.optimizer, table.hyper.learning_rate) == ("sgd", 40.0)
    assert (network.optimizer, network.hyper.learning_rate) == ("adam", 1e-3)
    trained = PPOConfig(n_envs=7, hyper=Hyper(learning_rate=3.0))
    objective.provenance = {"agent": dataclasses.asdict(trained)}
    assert PPOConfig.suited(objective, TABLE) == trained and PPOConfig.suited(objective, NUMBERS) == network
    objective.provenance["tabular"] = False  # it was meta-trained with networks: tables need other steps
    assert PPOConfig.suited(objective, TABLE) == table and PPOConfig.suited(objective, NUMBERS) == trained
    drift = LPO()  # any PPO will do
    drift.provenance = objective.provenance
    assert PPOConfig.suited(drift, NUMBERS) == PPOConfig()


def test_a_lifetime_that_outlasts_its_horizon_stands_at_its_end():
    context = Context(torch.tensor([0.0, 5.0, 10.0, 25.0]), torch.full((4,), 10.0), {})
    assert context.progress.tolist() == [0.0, 0.5, 1.0, 1.0]
    ppo = PPO(ProbeFamily("constant"), dataclasses.replace(TINY, linear_decay=True))
    ppo.learn(40, schedule=20)  # two updates, a schedule of one
    late = Context(ppo.lifetimes.age, ppo.lifetimes.horizon, {})
    trajectory = ppo.lifetimes.collect(ppo.lifetimes.plain())
    assert Constants(ConstantsConfig(linear_decay=True))(Hyper(), trajectory, late)[0].learning_rate.tolist() == [[0.0]]


# --- plugged parts ------------------------------------------------------------------------------------------------


def test_a_plugged_component_stays_as_it_was_and_can_still_be_trained():
    torch.manual_seed(0)
    objective = LPG(predictions=3, width=4)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    agent = dataclasses.replace(TINY, optimizer="sgd")
    PPO(BanditFamily("bernoulli-5"), agent, objective=objective, seeds=2).learn(60)
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in objective.parameters())
    config = MetaTrainConfig(lifetimes=2, horizon=9, agent=agent, estimator=TruncatedConfig(window=2))
    trainer = MetaTrainer(BanditFamily("bernoulli-5"), objective, config)
    assert trainer.step()["skipped"] == 0
    assert not torch.equal(objective.core.weight_x, before["core.weight_x"])


class Net(torch.nn.Module):
    """One hidden layer for everything."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.body = torch.nn.Linear(inputs, 16)
        self.out = torch.nn.ModuleDict({k: torch.nn.Linear(16, n) for k, n in outputs.items()})

    def forward(self, obs):
        hidden = torch.tanh(self.body(obs))
        return {k: layer(hidden) for k, layer in self.out.items()}


class Factory:
    """Makes a `ModuleAgent` around `Net` and remembers what it was asked for."""

    def __call__(self, observation_space, action_space, heads, value):
        self.heads, self.value = heads, value
        policy = PolicyHead(action_space)
        outputs = {"policy": policy.size, **heads} | ({"value": 1} if value else {})
        return ModuleAgent(Net(observation_space.shape[0], outputs), policy, 1, heads, value)


def test_any_module_is_an_agent():
    """It learns the probe in which both what is seen and what is done matter, for two seeds apart."""
    family, factory = ProbeFamily("both", as_numbers=True), Factory()
    config = PPOConfig(n_envs=8, n_steps=16, n_minibatches=2, hyper=Hyper(learning_rate=0.03, gamma=GAMMA))
    ppo = PPO(family, config, agent=factory, seeds=2).learn(40 * 8 * 16)
    assert (factory.heads, factory.value) == ({}, True)
    population = ppo.lifetimes.population
    assert isinstance(population.agent, ModuleAgent) and not torch.equal(*population.theta)
    with torch.no_grad():
        out = population(family.show(torch.arange(2).expand(2, -1)))
    assert (out.value - 1).abs().max() < 0.05
    assert (out.policy.logits.softmax(-1)[:, [0, 1], [0, 1]] > 0.9).all()
    assert (ppo.evaluate(episodes=5, greedy=True) == 1).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"env": gymnasium.make("CartPole-v1")}, r"^env is <.*CartPole-v1>+: expected a gymnasium id, a family"),
        ({"config": {"n_envs": 2}}, r"^config is \{'n_envs': 2\}: expected a PPOConfig\.$"),
        ({"objective": 3}, r"^objective is 3: expected a Component, its name, its file, or what makes one\.$"),
        ({"reward": lambda: 3}, r"^reward is 3: expected a Component"),
    ],
)
def test_what_is_no_part_of_training_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        PPO(**{"env": "catch/5x5"} | given)


def test_evaluations_have_luck_of_their_own():
    """One for each seed, and each point of a learning curve; the same again for the same."""

    def told(seed, steps=0, drawn=None):
        ppo = PPO("catch/5x5", seed=seed)
        ppo.lifetimes.population.theta.data.zero_()  # all alike
        ppo.steps = steps
        return ppo.evaluate(episodes=64, seed=drawn).item()

    assert len({told(0), told(1), told(0, steps=64), told(1, steps=64)}) == 4
    assert told(3) == told(3) and told(0, drawn=5) == told(1, steps=64, drawn=5)
    with pytest.raises(UserError, match="episodes is 0"):
        PPO("catch/5x5").evaluate(episodes=0)


def test_any_module_takes_the_heads_that_a_component_needs():
    factory = Factory()
    ppo = PPO(ProbeFamily("both", as_numbers=True), TINY, objective=LPG(predictions=3, width=4), agent=factory)
    assert (factory.heads, factory.value) == ({"prediction": 3}, False)
    before = ppo.lifetimes.population.theta.detach().clone()
    ppo.learn(20)
    assert not torch.equal(ppo.lifetimes.population.theta, before)


# --- what it reports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_steps", "rollouts"), [(5, 5), (7, 4), (25, 1), (30, 1)])
def test_reported_returns_are_those_of_the_last_hundred_episodes(n_steps, rollouts):
    """Episodes of one step: the mean reward of as few of the latest rollouts as hold a hundred of them."""
    ppo = PPO(ProbeFamily("acted"), dataclasses.replace(TINY, n_steps=n_steps), seeds=2)
    rewards, logged, collect = [], [], ppo.lifetimes.collect

    def spy(inner, steps=None):
        trajectory = collect(inner, steps)
        rewards.append(trajectory.reward)
        return trajectory

    ppo.lifetimes.collect = spy
    ppo.learn(12 * 4 * n_steps, log=lambda steps, metrics: logged.append((metrics["return"], metrics["length"])))
    assert len(logged) == 12
    for update, (mean_return, length) in enumerate(logged, start=1):
        expected = torch.cat(rewards[max(0, update - rollouts) : update]).mean().item()
        assert mean_return == pytest.approx(expected, abs=1e-6) and length == 1
    assert len({mean_return for mean_return, _ in logged}) > 6


def test_before_the_first_episode_there_is_no_return():
    logged = []
    config = dataclasses.replace(TINY, n_steps=3)  # episodes of four steps
    PPO(ProbeFamily("terminated"), config).learn(24, log=lambda steps, metrics: logged.append(metrics))
    assert math.isnan(logged[0]["return"]) and math.isnan(logged[0]["length"])
    assert (logged[1]["return"], logged[1]["length"]) == (4.0, 4.0)
