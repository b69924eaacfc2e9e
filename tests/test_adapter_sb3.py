"""Learned parts in Stable-Baselines3: each is judged by the number that it has to change, since one that does nothing
raises no error either."""

import copy
import math
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("stable_baselines3")

from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from experiments.runs import plain
from learned_rl import PPO as OurPPO  # noqa: N811
from learned_rl import PPOConfig, save
from learned_rl.adapters.sb3 import (
    HyperparameterCallback,
    ObjectivePPO,
    RewardRolloutBuffer,
    RewardVecEnv,
    Watched,
    learned_optimizer,
    write_numbers,
)
from learned_rl.component import Hyper, NoConfig, Reward, UpdateRule
from learned_rl.defaults import Constants, ConstantsConfig, PPOClip, PPOClipConfig
from learned_rl.layout import dormancy
from learned_rl.rule_optimizer import RuleOptimizer
from learned_rl.types import UserError
from learned_rl.update_rules import SGD, Adam
from meta_optimizers.optim4rl import Optim4RL
from objectives.contextual import Contextual
from objectives.dpo import DPO
from objectives.impala import Impala
from objectives.lirpg import LIRPG, LIRPGConfig
from objectives.lpg import LPG
from objectives.lpo import LPO, LPOConfig
from objectives.mgrl import MGRL
from objectives.schedule import Schedule, ScheduleConfig
from objectives.self_tuned import SelfTuned, SelfTunedConfig

SHORT = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}


class Target(gymnasium.Env):
    """A number in, a number out: pays minus the distance, and is cut off after five steps unless it terminates."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs, self.age = self.np_random.uniform(-1, 1, 3).astype(np.float32), 0
        return self.obs, {}

    def step(self, action):
        self.age += 1
        paid = -float(np.abs(action - self.obs[:2]).sum())
        self.obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.obs, paid, bool(self.obs[0] > 0.8), self.age >= 5, {}


def copies(n=2, env=Target, **kwargs):
    def make():
        from stable_baselines3.common.monitor import Monitor

        return Monitor(env(**kwargs) if isinstance(env, type) else gymnasium.make(env, **kwargs))

    return DummyVecEnv([make] * n)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def trained(model, steps=128, **kwargs):
    model.set_random_seed(0)  # the library draws from global generators, which a model made in between would move
    return weights(model.learn(steps, **kwargs))


# --- optimizer -------------------------------------------------------------------------------------------------------


def with_rule(rule, env="CartPole-v1", **kwargs):
    short = {k: SHORT[k] for k in ("n_steps", "batch_size", "n_epochs")}
    return PPO(env=env, seed=0, device="cpu", **learned_optimizer(rule, **short | kwargs))


def test_the_rule_adam_trains_as_the_librarys_adam_does():
    ours = with_rule("adam", learning_rate=3e-3)
    twin = PPO("MlpPolicy", "CartPole-v1", learning_rate=3e-3, **SHORT)
    assert torch.equal(weights(ours), weights(twin)) and isinstance(ours.policy.optimizer, RuleOptimizer)
    before = weights(twin)
    assert_close(trained(ours), trained(twin), rtol=1e-4, atol=1e-6)
    assert (weights(twin) - before).abs().max() > 1e-3


def test_the_learning_rate_multiplies_the_rules_steps():
    still, slow, fast = (with_rule(SGD(), learning_rate=r, max_grad_norm=1e9) for r in (0.0, 1e-7, 2e-7))
    begin = weights(still)
    assert torch.equal(trained(still, 32), begin)
    moved = [trained(m, 32).double() - begin.double() for m in (slow, fast)]
    rule = SGD()
    rule.provenance = {"agent": {"hyper": {"learning_rate": 0.7, "max_grad_norm": 2.0}}}
    trained_so = with_rule(rule)  # and not by the library's defaults, which suit Adam
    assert (trained_so.learning_rate, trained_so.max_grad_norm) == (0.7, 2.0)
    assert moved[0].abs().max() > 0
    assert_close(moved[1].norm() / moved[0].norm(), torch.tensor(2.0).double(), rtol=0.05, atol=0)
    falling = with_rule(SGD(), learning_rate=lambda left: 0.01 * left)
    falling.learn(32 * 4)
    assert falling.policy.optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("rule", ["adam", "momentum", "optim4rl", "l2l", "mlp_optimizer"])
def test_a_saved_model_carries_the_optimizer_and_goes_on_to_the_same_numbers(rule, tmp_path):
    model = with_rule(rule, total_timesteps=10_000)
    model.learn(64)
    model.save(tmp_path / "model")
    again = PPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert isinstance(again.policy, Watched) and isinstance(again.policy.optimizer, RuleOptimizer)
    assert again.policy.optimizer.param_groups[0]["age"] == model.policy.optimizer.param_groups[0]["age"] == 4
    assert again.policy.optimizer.total_steps == model.policy.optimizer.total_steps == 313 * 2
    ends = []
    for m in (model, again, PPO.load(tmp_path / "model", env=model.get_env(), device="cpu")):
        m.rollout_buffer = copy.deepcopy(model.rollout_buffer)
        m.set_logger(configure(format_strings=[]))
        ends.append(m)
    ends[2].policy.optimizer.state.clear()  # as if it had not been carried
    for m in ends:
        np.random.seed(0)  # noqa: NPY002 - what the library draws from
        m.train()
    assert torch.equal(weights(ends[0]), weights(ends[1])) and not torch.equal(weights(ends[0]), weights(ends[2]))


def test_one_file_moves_agents_here_and_there_and_any_other_network(tmp_path):
    """The library's PPO, ours and a supervised torch loop, each saved in the middle and gone on with."""
    torch.manual_seed(0)
    file = tmp_path / "rule.safetensors"
    save(Optim4RL(), file, {"agent": plain(PPOConfig(hyper=Hyper(learning_rate=2e-3))), "tabular": False})

    model = with_rule(str(file))
    assert model.policy.optimizer.param_groups[0]["lr"] == 2e-3
    before = weights(model)
    assert (trained(model, 64) - before).abs().max() > 1e-3

    config = PPOConfig(n_envs=2, n_steps=16, n_epochs=2, n_minibatches=1, hyper=Hyper(learning_rate=2e-3))
    ours, again = (OurPPO("control/cartpole-default", config, optimizer=file, seeds=2) for _ in range(2))
    begin = ours.lifetimes.population.theta.clone()
    again.load_state_dict(copy.deepcopy(ours.learn(64).state_dict()))
    ends = [agent.learn(128).lifetimes.population.theta for agent in (ours, again)]
    assert torch.equal(*ends) and (ends[0] - begin).abs().max() > 1e-3

    module, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizers = [RuleOptimizer(m.parameters(), file) for m in (module, twin)]
    x = torch.randn(8, 3)

    def fit(m, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            (m(x) - x[:, :2]).square().mean().backward()
            optimizer.step()
        return m.weight.detach().clone()

    middle = fit(module, optimizers[0])
    twin.load_state_dict(copy.deepcopy(module.state_dict()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert torch.equal(fit(module, optimizers[0]), fit(twin, optimizers[1])) and (module.weight != middle).any()


class Nosy(UpdateRule):
    """Gradient descent that remembers what it was told."""

    name, Config, reads_activity = "nosy", NoConfig, True

    def __init__(self, config=None):
        super().__init__(config)
        self.told = []

    def initial_state(self, theta):
        return {}

    def update(self, grad, state, theta, learning_rate, context=None):
        self.told.append(context)
        return -learning_rate * grad, state


def test_a_rule_is_told_layers_activity_and_how_much_is_over():
    env = copies(2, "CartPole-v1")
    kwargs = {"n_steps": 16, "batch_size": 16, "n_epochs": 3, "n_envs": 2, "total_timesteps": 128}
    arch = {"net_arch": {"pi": [8, 8], "vf": [8, 8]}}
    model = with_rule(Nosy(), env, policy_kwargs=arch, **kwargs)
    policy = model.policy
    with torch.no_grad():  # a dead unit in the last hidden layer of each trunk
        for trunk, unit in ((policy.mlp_extractor.policy_net, 3), (policy.mlp_extractor.value_net, 5)):
            trunk[2].weight[unit], trunk[2].bias[unit] = 0, 0
    model.learn(128)
    told = policy.optimizer.rule.told
    assert len(told) == 4 * 3 * 2  # updates x passes x minibatches
    assert [c.progress for c in told[::6]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [c.epoch for c in told[:6]] == [0, 0, 0.5, 0.5, 1, 1]

    layout = told[0].layout
    names = [part.name for part in layout.parts]
    of = lambda x, name: x.split(layout.sizes, -1)[names.index(name)]  # noqa: E731
    layers = {"mlp_extractor.policy_net.0": 0, "mlp_extractor.policy_net.2": 0.5, "action_net": 1}
    values = {"mlp_extractor.value_net.0": 0, "mlp_extractor.value_net.2": 0.5, "value_net": 1}
    for name, depth in (layers | values).items():
        assert of(layout.depth, f"{name}.weight").unique().tolist() == [depth]
        assert of(layout.critic, f"{name}.weight").unique().tolist() == [name in values]
    active = of(told[0].activity, "mlp_extractor.policy_net.2.bias")[0]
    assert active[3] == 0 and (active[[0, 1, 2, 4, 5, 6, 7]] > 0).all()
    active = of(told[0].activity, "mlp_extractor.value_net.2.bias")[0]
    assert active[5] == 0 and (active[[0, 1, 2, 3, 4, 6, 7]] > 0).all()


def test_activity_is_what_each_layers_units_say_after_their_nonlinearity():
    model = with_rule(Nosy(), copies(1, "CartPole-v1"), policy_kwargs={"net_arch": {"pi": [4, 4], "vf": [4, 4]}})
    policy, obs = model.policy, torch.randn(50, 4)  # observations as wide as the layers
    policy.evaluate_actions(obs, torch.zeros(50))
    found = dormancy(policy.optimizer._watchers[0].units)
    for trunk in ("policy_net", "value_net"):
        said = obs
        for i, layer in enumerate(getattr(policy.mlp_extractor, trunk)):
            said = layer(said)
            if i % 2:  # after the nonlinearity
                strength = said.detach().abs().mean(0)
                assert_close(found[f"mlp_extractor.{trunk}.{i - 1}"][0], strength / strength.mean(), rtol=1e-5, atol=0)


def test_mistakes_with_the_optimizer_are_explained():
    with pytest.raises(UserError, match="policy_kwargs has 'optimizer_class', which is the rule's place"):
        learned_optimizer("adam", policy_kwargs={"optimizer_class": torch.optim.SGD})
    with pytest.raises(UserError, match="policy is 'MlpPolcy': expected one of MlpPolicy, CnnPolicy, MultiInputPolicy"):
        learned_optimizer("adam", "MlpPolcy")
    with pytest.raises(UserError, match="slot 'optimizer' is expected here, and 'dpo' fits the slot 'objective'"):
        learned_optimizer(DPO())
    with pytest.raises(UserError, match="n_steps is 0: expected at least 1"):
        learned_optimizer("adam", n_steps=0)


# --- reward ----------------------------------------------------------------------------------------------------------


def pays(env, scale=0.5, **kwargs):
    """A reward with random weights for an environment."""
    torch.manual_seed(1)
    reward = LIRPG(LIRPGConfig(scale=scale, hidden=(8,), zero=False, **kwargs))
    reward.fit(env.observation_space, env.action_space, ())
    return reward


@pytest.mark.parametrize("env", [Target, "CartPole-v1"])
def test_a_reward_is_paid_at_every_step_and_the_episodes_return_stays_the_environments(env):
    twin, venv = copies(2, env), copies(2, env)
    reward = pays(venv)
    ours = RewardVecEnv(venv, reward)
    assert twin.seed(3) and ours.seed(3)
    obs = ours.reset()
    assert np.array_equal(obs, twin.reset())
    running, ended = np.zeros(2), 0
    for k in range(30):
        ours.action_space.seed(k)
        action = np.stack([ours.action_space.sample() for _ in range(2)])
        bonus = 0.5 * reward.intrinsic(torch.as_tensor(obs), torch.as_tensor(action)).detach().numpy()
        obs, paid, done, infos = ours.step(action)
        _, extrinsic, _, _ = twin.step(action)
        np.testing.assert_allclose(paid, extrinsic + bonus, rtol=1e-5, atol=1e-6)
        assert [info["extrinsic_reward"] for info in infos] == pytest.approx(extrinsic.tolist())
        assert np.abs(bonus).min() > 1e-4
        running += extrinsic
        for i in np.flatnonzero(done):
            assert infos[i]["episode"]["r"] == pytest.approx(running[i], abs=1e-4)
            running[i], ended = 0, ended + 1
    assert ended > 0


class Looks(Reward):
    """Pays where each step led to, and counts how it ended."""

    name, Config = "looks", NoConfig

    def forward(self, trajectory, context):
        self.seen = trajectory
        return trajectory.final_obs.sum(-1) + 10 * trajectory.terminated + 100 * trajectory.truncated, {}


def test_a_step_tells_how_it_ended_and_where():
    env = RewardVecEnv(copies(2), Looks())
    env.seed(0)
    env.reset()
    kinds = set()
    for _ in range(40):
        obs, paid, done, infos = env.step(np.zeros((2, 2), np.float32))
        for i in range(2):
            cut = infos[i]["TimeLimit.truncated"]
            last = infos[i]["terminal_observation"] if done[i] else obs[i]
            expected = last.sum() + (100 if done[i] and cut else 10 if done[i] else 0)
            assert paid[i] == pytest.approx(expected, rel=1e-5)
            kinds.add((bool(done[i]), bool(done[i] and cut)))
    assert len(kinds) == 3


def ppo(env, **kwargs):
    return PPO("MlpPolicy", env, **SHORT | kwargs)


def test_a_reward_in_the_environment_reaches_the_rollout_and_the_agent():
    plain, paid = ppo(copies()), ppo(RewardVecEnv(copies(), pays(copies())))
    assert not torch.equal(trained(plain), trained(paid))
    assert len(paid.ep_info_buffer) == len(plain.ep_info_buffer) > 0
    zero = LIRPG(LIRPGConfig(hidden=(8,)))  # a fresh one pays nothing
    assert torch.equal(trained(ppo(RewardVecEnv(copies(), zero))), trained(ppo(copies())))


def buffered(reward, env=None, **kwargs):
    return ppo(copies() if env is None else env, rollout_buffer_class=RewardRolloutBuffer, rollout_buffer_kwargs={"reward": reward, **kwargs})  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("env", [Target, "CartPole-v1"])
def test_a_reward_of_rollouts_is_in_the_advantages(env):
    reward = pays(copies(1, env))
    model = buffered(reward, copies(2, env))
    model.learn(64)  # one rollout
    buffer = model.rollout_buffer
    # A library's own buffer, filled with the same and the reward by hand.
    twin = ppo(copies(2, env))
    twin.learn(64)
    action = twin.rollout_buffer.actions  # flattened by now: copies first, then time
    obs = torch.as_tensor(twin.rollout_buffer.observations)
    action = torch.as_tensor(action if env is Target else action[:, 0].astype(np.int64))
    bonus = 0.5 * reward.intrinsic(obs, action).detach().reshape(2, 32).T.numpy()
    np.testing.assert_allclose(buffer.rewards, twin.rollout_buffer.rewards + bonus, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(buffer.extrinsic, twin.rollout_buffer.rewards, rtol=1e-6)
    assert not np.allclose(buffer.advantages, twin.rollout_buffer.advantages, atol=1e-3)
    assert not torch.equal(weights(model), weights(twin))
    assert np.mean([e["r"] for e in model.ep_info_buffer]) == np.mean([e["r"] for e in twin.ep_info_buffer])


def test_a_fresh_reward_of_rollouts_changes_nothing():
    assert torch.equal(trained(buffered("lirpg")), trained(ppo(copies())))


class Habit(Reward):
    """Pays for what the last rollouts did not."""

    name, Config = "habit", NoConfig

    def initial_memory(self, lifetimes):
        return {"mean": torch.zeros(lifetimes)}

    def forward(self, trajectory, context):
        new = context.memory["mean"] + trajectory.reward.mean((0, 2))
        return trajectory.reward + 100 * context.age + context.progress + context.memory["mean"], {"mean": new}


def test_a_reward_of_rollouts_carries_memory_age_and_horizon():
    model = buffered(Habit(), horizon=4)
    buffer, means = model.rollout_buffer, [0.0]

    class Seen(HyperparameterCallback):
        def _on_rollout_end(self):
            means.append(means[-1] + float(buffer.extrinsic.mean()))
            k = len(means) - 2
            expected = buffer.extrinsic + 100 * k + k / 4 + means[-2]
            np.testing.assert_allclose(buffer.rewards, expected, rtol=1e-4)
            advantages = buffer.advantages.copy()
            buffer.compute_returns_and_advantage(self.locals["values"], self.locals["dones"])
            np.testing.assert_allclose(buffer.rewards, expected, rtol=1e-4)  # asked twice, paid once
            assert np.array_equal(buffer.advantages, advantages)

    model.learn(4 * 64, callback=Seen(lambda progress: {}))
    assert len(means) == 5 and len(set(means)) == 5


def test_mistakes_with_rewards_are_explained():
    with pytest.raises(UserError, match=r"'habit' carries a memory .*: expected one without, or `RewardRolloutBuffer`"):
        RewardVecEnv(copies(), Habit())
    with pytest.raises(UserError, match=r"'habit' is not finite here: .*or it reads log-probabilities, age or horizon"):
        quiet = Habit()
        quiet.initial_memory = lambda lifetimes: {}
        quiet.forward = lambda trajectory, context: (trajectory.reward * context.age, {})
        env = RewardVecEnv(copies(), "lirpg")
        env.reward = quiet
        env.reset()
        env.step(np.zeros((2, 2)))
    with pytest.raises(UserError, match="This lirpg was made for observations of shape"):
        RewardVecEnv(copies(1, "CartPole-v1"), pays(copies()))
    with pytest.raises(UserError, match=r"'lirpg' scales what the environment pays.* or `RewardVecEnv`"):
        buffered(pays(copies(), extrinsic=0.5)).learn(64)
    with pytest.raises(UserError, match="slot 'reward' is expected here, and 'dpo' fits the slot 'objective'"):
        RewardVecEnv(copies(), "dpo")


def test_a_reward_that_replaces_the_environments_keeps_the_bootstrap_in_the_wrapper():
    """Of a step that is cut off, the library adds gamma V(last observation) to whatever the wrapper pays."""
    model = ppo(RewardVecEnv(copies(1), pays(copies(), extrinsic=0.0, scale=1e-6)))
    model.learn(32)
    assert np.abs(model.rollout_buffer.rewards).max() > 1e-3  # nothing else is paid


# --- objective -------------------------------------------------------------------------------------------------------

LOGGED = ["policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "loss", "n_updates"]
LOGGED += ["explained_variance", "clip_range", "learning_rate"]


@pytest.mark.parametrize("env", [Target, "CartPole-v1", "FrozenLake-v1"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_range_vf": 0.1, "ent_coef": 0.02, "vf_coef": 0.7, "gamma": 0.9, "gae_lambda": 0.8, "batch_size": 20},
        {"target_kl": 1e-5, "n_epochs": 8, "clip_range": lambda left: 0.1 + 0.2 * left},
        {"normalize_advantage": False, "learning_rate": lambda left: 1e-3 * left},
    ],
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_the_librarys_own_objective_gives_the_librarys_own_numbers(env, settings):
    if env == "FrozenLake-v1":
        pytest.importorskip("gymnasium.envs.toy_text.frozen_lake")
    settings = SHORT | settings
    twin = PPO("MlpPolicy", copies(2, env), **settings)
    objective = PPOClip(PPOClipConfig(settings.get("normalize_advantage", True)))
    ours = ObjectivePPO("MlpPolicy", copies(2, env), objective=objective, **settings)
    for model in (twin, ours):
        model.set_logger(configure(format_strings=[]))
    assert_close(trained(ours, 192), trained(twin, 192), rtol=1e-4, atol=2e-6)
    for name in LOGGED:
        said, expected = (m.logger.name_to_value[f"train/{name}"] for m in (ours, twin))
        assert said == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    assert ours._n_updates == twin._n_updates
    begin = PPO("MlpPolicy", copies(2, env), **settings)
    assert (weights(twin) - weights(begin)).abs().max() > 1e-4


def objective_ppo(objective, env="CartPole-v1", **kwargs):
    return ObjectivePPO("MlpPolicy", env, objective=objective, **SHORT | kwargs)


def test_another_objective_trains_otherwise_and_a_drift_of_zero_is_the_plain_surrogate():
    ends = {name: trained(objective_ppo(name, n_epochs=8, learning_rate=3e-3)) for name in ("ppo_clip", "dpo", "lpo")}
    assert (ends["ppo_clip"] - ends["dpo"]).abs().max() > 1e-3 and (ends["dpo"] - ends["lpo"]).abs().max() > 1e-3
    zero = LPO(LPOConfig(base="none", width=4))
    with torch.no_grad():
        zero.output.weight.zero_()
    wide = {"n_epochs": 8, "learning_rate": 3e-3, "clip_range": 1e9}
    assert_close(trained(objective_ppo(zero, **wide)), trained(objective_ppo("ppo_clip", **wide)), rtol=1e-4, atol=1e-6)


def test_an_objectives_weights_matter_and_are_left_as_they_are():
    first, second = LPO(LPOConfig(width=4)), LPO(LPOConfig(width=4))
    with torch.no_grad():
        second.output.weight.add_(1.0)
    kept = copy.deepcopy(second.state_dict())
    ends = [trained(objective_ppo(o, n_epochs=6, learning_rate=3e-3)) for o in (first, second)]
    assert not torch.equal(*ends)
    assert all(torch.equal(v, kept[k]) for k, v in second.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in second.parameters())


def test_objectives_of_whole_rollouts_see_them_in_order():
    model = objective_ppo(Impala(), copies(2, "CartPole-v1"), batch_size=64, n_epochs=1)
    seen = []

    class Spy(ObjectivePPO):
        def minibatch_loss(self, out, batch, hyper):
            seen.append((out.value.detach(), batch))
            return super().minibatch_loss(out, batch, hyper)

    model.__class__ = Spy
    before = weights(model)
    model.learn(64)
    value, batch = seen[0]
    assert value.shape == batch["reward"].shape == (32, 1, 2) and batch["obs"].shape == (32, 1, 2, 4)
    assert_close(value[:, 0].numpy(), model.rollout_buffer.values, rtol=1e-4, atol=1e-5)  # nothing has moved yet
    assert not torch.equal(weights(model), before)
    with pytest.raises(UserError, match="batch_size is 32, but 'impala' reads whole rollouts: expected 64"):
        objective_ppo(Impala(), copies(2, "CartPole-v1"))


def test_one_method_makes_another_loss():
    class NoBonus(ObjectivePPO):
        def minibatch_loss(self, out, batch, hyper):
            return super().minibatch_loss(out, batch, hyper.replace(ent_coef=0.0))

    kwargs = SHORT | {"ent_coef": 0.5}
    ends = [trained(kind("MlpPolicy", "CartPole-v1", **kwargs)) for kind in (NoBonus, ObjectivePPO)]
    assert torch.equal(ends[0], trained(objective_ppo("ppo_clip", ent_coef=0.0))) and not torch.equal(*ends)


def test_a_saved_model_has_its_objective(tmp_path):
    model = objective_ppo(LPO(LPOConfig(base="none", width=3)))
    model.learn(64)
    model.save(tmp_path / "model")
    again = ObjectivePPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert type(again.objective) is LPO and again.objective.config == model.objective.config
    assert all(torch.equal(v, model.objective.state_dict()[k]) for k, v in again.objective.state_dict().items())
    again.rollout_buffer, again._last_obs = copy.deepcopy(model.rollout_buffer), model._last_obs
    again._last_episode_starts = model._last_episode_starts
    for m in (model, again):
        m.set_logger(configure(format_strings=[]))
        np.random.seed(0)  # noqa: NPY002 - what the library draws from
        m.train()
    assert torch.equal(weights(model), weights(again))


def test_reward_optimizer_and_objective_work_together():
    kwargs = learned_optimizer("adam", learning_rate=1e-3, n_steps=32, batch_size=32, n_epochs=2)
    buffer = {"rollout_buffer_class": RewardRolloutBuffer, "rollout_buffer_kwargs": {"reward": pays(copies())}}
    model = ObjectivePPO(env=copies(), objective="ppo_clip", seed=0, device="cpu", **kwargs, **buffer)
    twin = ppo(copies(), learning_rate=1e-3, **buffer)
    assert_close(trained(model), trained(twin), rtol=1e-3, atol=1e-5)
    assert not torch.equal(weights(twin), trained(ppo(copies(), learning_rate=1e-3)))


def test_mistakes_with_objectives_are_explained():
    with pytest.raises(UserError, match=r"'lpg' asks agents for the head 'prediction' of size 30.* such as 'ppo_clip'"):
        objective_ppo(LPG())
    with pytest.raises(UserError, match="normalize_advantage is False, but the objective 'dpo' has it True"):
        objective_ppo("dpo", normalize_advantage=False)
    with pytest.raises(UserError, match="slot 'objective' is expected here, and 'adam' fits the slot 'optimizer'"):
        objective_ppo(Adam())
    with pytest.raises(UserError, match="the nearest of"):
        objective_ppo("dp")


# --- hyperparameters -------------------------------------------------------------------------------------------------


class Numbers(HyperparameterCallback):
    """Notes the numbers when the rollout has ended, where the library reads them."""

    def _init_callback(self):
        super()._init_callback()
        self.seen = []

    def _on_rollout_end(self):
        m = self.model
        vf = m.clip_range_vf
        self.seen.append(
            {
                "gamma": {m.gamma, m.rollout_buffer.gamma},
                "gae_lambda": {m.gae_lambda, m.rollout_buffer.gae_lambda},
                "learning_rate": {m.lr_schedule(0.3)},
                "clip_range": {m.clip_range(0.3)},
                "clip_range_vf": {None if vf is None else vf(0.3)},
                "ent_coef": {m.ent_coef},
                "vf_coef": {m.vf_coef},
                "max_grad_norm": {m.max_grad_norm},
                "n_epochs": {m.n_epochs},
            }
        )


CHANGED = {
    "gamma": 0.5,
    "gae_lambda": 0.3,
    "learning_rate": 1e-5,
    "clip_range": 1e-4,
    "clip_range_vf": 1e-3,
    "ent_coef": 0.5,
    "vf_coef": 0.01,
    "max_grad_norm": 1e-3,
    "n_epochs": 3,
}


@pytest.mark.parametrize("kind", [PPO, ObjectivePPO])
@pytest.mark.parametrize("name", CHANGED)
def test_each_number_changes_what_the_agent_becomes_as_if_it_had_been_configured(kind, name):
    make = lambda **kwargs: kind("MlpPolicy", copies(), **SHORT | {"vf_coef": 0.4} | kwargs)  # noqa: E731
    callback = Numbers(lambda progress: {name: CHANGED[name]})
    written = trained(make(), callback=callback)
    assert [row[name] for row in callback.seen] == [{CHANGED[name]}] * 2
    assert torch.equal(written, trained(make(**{name: CHANGED[name]})))
    assert not torch.equal(written, trained(make()))


def test_a_component_schedules_every_number():
    values = {k: (v, v * 2) for k, v in CHANGED.items() if k not in ("n_epochs", "gamma")} | {"gamma": (0.5, 0.9)}
    schedule = Schedule(ScheduleConfig(boundaries=(0.5,), numbers=values))
    model, callback = ppo(copies()), Numbers(schedule)
    model.set_logger(configure(format_strings=[]))
    model.learn(4 * 64, callback=callback)
    assert len(callback.seen) == 4
    for name, (early, late) in values.items():
        for row, expected in zip(callback.seen, (early, early, late, late), strict=True):
            (value,) = row[name]
            assert value == pytest.approx(expected, rel=1e-6)
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(2e-5)
    assert model.logger.name_to_value["train/clip_range"] == pytest.approx(2e-4)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(2e-5)


def test_the_schedule_of_a_component_is_the_librarys_own():
    falling = Constants(ConstantsConfig(linear_decay=True))
    ours = ppo(copies(), learning_rate=1e-3)
    callback = Numbers(falling)
    ours.learn(4 * 64, callback=callback)
    assert [row["learning_rate"].pop() for row in callback.seen] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_learned_numbers_begin_at_the_configured_ones_also_after_a_break(tmp_path):
    tuned = SelfTuned(SelfTunedConfig(numbers=("gamma", "learning_rate")))
    fresh = trained(ppo(copies(), gamma=0.8), callback=HyperparameterCallback(tuned))
    assert_close(fresh, trained(ppo(copies(), gamma=0.8)), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        tuned.eta["gamma"].fill_(1.0)
    model, callback = ppo(copies(), gamma=0.8), Numbers(tuned)
    model.learn(128, callback=callback)
    (first,) = callback.seen[0]["gamma"]
    assert first != pytest.approx(0.8, abs=0.01) and callback.seen[1]["gamma"] == {first}
    model.save(tmp_path / "model")
    again, callback = PPO.load(tmp_path / "model", env=copies(), device="cpu"), Numbers(tuned)
    again.learn(64, callback=callback, reset_num_timesteps=False)
    assert callback.seen[0]["gamma"] == {first}  # and not the same step from there once more


def test_numbers_that_only_objectives_have():
    model = objective_ppo("ppo_clip", copies())
    off = trained(model, callback=HyperparameterCallback(lambda progress: {"pg_coef": 0.0}))
    assert model.hyper.pg_coef == 0.0
    assert not torch.equal(off, trained(objective_ppo("ppo_clip", copies())))


def test_a2c_is_served_too_and_other_algorithms_are_refused():
    make = lambda **kwargs: A2C("MlpPolicy", copies(), seed=0, device="cpu", n_steps=8, **kwargs)  # noqa: E731
    written = trained(make(), 64, callback=HyperparameterCallback(lambda progress: {"gamma": 0.5}))
    assert torch.equal(written, trained(make(gamma=0.5), 64)) and not torch.equal(written, trained(make(), 64))
    with pytest.raises(UserError, match="A2C has no 'clip_range': the nearest that it has is"):
        make().learn(8, callback=HyperparameterCallback(lambda progress: {"clip_range": 0.1}))
    with pytest.raises(UserError, match="The algorithm is DQN: expected PPO or A2C"):
        DQN("MlpPolicy", "CartPole-v1", buffer_size=100, device="cpu").learn(4, callback=HyperparameterCallback("schedule"))  # fmt: skip  # noqa: E501


def test_mistakes_with_numbers_are_explained():
    model = ppo(copies())
    for numbers, sentence in (
        ({"gama": 0.9}, "PPO has no 'gama': the nearest that it has is 'gamma'"),
        ({"gamma": 1.5}, "gamma is 1.5: expected at most 1"),
        ({"ent_coef": None}, "ent_coef is None: expected a number"),
        ({"n_epochs": 0}, "n_epochs is 0: expected at least 1"),
        ({"n_epochs": 1.5}, "n_epochs is 1.5: expected a whole number"),
        ({"gamma": math.nan}, "gamma is nan: expected a number"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            write_numbers(model, **numbers)
    with pytest.raises(UserError, match="'contextual' carries a memory of the experience"):
        HyperparameterCallback(Contextual())
    with pytest.raises(UserError, match="'mgrl' tells networks its numbers"):
        HyperparameterCallback(MGRL())
    layers = SelfTuned(SelfTunedConfig(numbers=("learning_rate",), per_layer=True, layers=3))
    with pytest.raises(UserError, match="'self_tuned' says 3 values of learning_rate"):
        model.learn(64, callback=HyperparameterCallback(layers))
    with pytest.raises(UserError, match="PPO has no 'pg_coef'"):
        write_numbers(model, pg_coef=2.0)
    write_numbers(model, clip_range_vf=None)
    assert model.clip_range_vf is None and isinstance(model.clip_range, FloatSchedule)


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"


@pytest.mark.slow
def test_the_pages_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    said = {}
    ours = [b for b in blocks if "torchrl" not in b]
    assert len(ours) >= 4
    for block in ours:
        exec(re.sub(r"20_000", "64", block), said)
    assert type(said["model"]) is PPO and math.isfinite(weights(said["model"]).sum())
