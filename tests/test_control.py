"""Classic control: transition by transition against gymnasium, and against the laws of mechanics."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from learned_rl.tasks.control import SYSTEMS, Acrobot, ControlFamily, ControlVectorEnv

IDS = {
    "cartpole": "CartPole-v1",
    "acrobot": "Acrobot-v1",
    "mountain-car": "MountainCar-v0",
    "pendulum": "Pendulum-v1",
}
#: Bounds of random states: beyond the ends of an episode and the clamps, so that every branch is taken.
STATES = {
    "cartpole": [2.6, 3.0, 0.25, 3.0],
    "acrobot": [math.pi, math.pi, 4 * math.pi, 9 * math.pi],
    "mountain-car": [0.9, 0.07],
    "pendulum": [3 * math.pi, 8.0],
}
CENTRES = {"mountain-car": [-0.3, 0.0]}
TRANSITIONS = 600


def double(preset: str, tasks: int = 1, copies: int = TRANSITIONS) -> ControlVectorEnv:
    family = ControlFamily(preset, dtype=torch.float64)
    return family.make(family.sample_split("test", tasks), copies, seed=0)


def random_states(name: str, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    unit = 2 * torch.rand(n, len(STATES[name]), generator=generator, dtype=torch.float64) - 1
    return unit * torch.tensor(STATES[name]) + torch.tensor(CENTRES.get(name, 0.0))


def set_physics(env: Any, name: str, task: dict[str, float]) -> None:
    """Give gymnasium's environment the task's parameters (acrobot: see the test of its power balance)."""
    if name == "cartpole":
        env.gravity, env.masscart, env.masspole = task["gravity"], task["cart_mass"], task["pole_mass"]
        env.length, env.force_mag = task["half_length"], task["force"]
        env.total_mass, env.polemass_length = env.masscart + env.masspole, env.masspole * env.length
    elif name == "mountain-car":
        env.force, env.gravity = task["force"], task["gravity"]
    elif name == "pendulum":
        env.g, env.m, env.l = task["gravity"], task["mass"], task["length"]


@pytest.mark.parametrize("preset", [f"{name}-default" for name in IDS] + ["cartpole", "mountain-car", "pendulum"])
def test_transitions_are_gymnasiums(preset):
    name = preset.removesuffix("-default")
    tasks, copies = (1, TRANSITIONS) if preset != name else (TRANSITIONS, 1)
    env = double(preset, tasks, copies)
    env.reset()
    env.action_space.seed(0)
    action = torch.as_tensor(env.action_space.sample())
    if name == "pendulum":
        action = 2 * action.double()  # beyond the torque limit; gymnasium computes in the action's precision
    start = random_states(name, TRANSITIONS)
    env.state = start.clone()
    _, reward, terminated, truncated, info = env.step(action)
    assert not truncated.any()

    other = gymnasium.make(IDS[name]).unwrapped
    other.reset(seed=0)
    states, rewards = [], []
    for i in range(TRANSITIONS):
        set_physics(other, name, {k: float(v[i]) for k, v in env.task.items()})
        other.state = start[i].numpy().copy()
        if name == "cartpole":
            other.steps_beyond_terminated = None
        obs, other_reward, other_terminated, _, _ = other.step(action[i].numpy())
        states.append(np.array(other.state, dtype=np.float64))
        rewards.append(other_reward)
        assert bool(terminated[i]) == other_terminated
        # gymnasium rounds its observations to float32
        np.testing.assert_allclose(info["final_obs"][i].float().numpy(), obs, rtol=1.2e-7, atol=1e-9)
    restarted = terminated.numpy()  # there `env.state` already is the next episode's
    expected = np.stack(states)
    np.testing.assert_allclose(env.state.numpy()[~restarted], expected[~restarted], rtol=0, atol=1e-10)
    if name != "acrobot":
        full = env.system.advance(start, action, env.constants)[0]
        np.testing.assert_allclose(full.numpy(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(reward.numpy(), np.array(rewards), rtol=0, atol=1e-10)
    assert (0 < restarted.mean() < 1) == (name != "pendulum")


def test_acrobot_reaches_the_same_states_beyond_the_goal_too():
    env = double("acrobot-default")
    start = random_states("acrobot", TRANSITIONS)
    action = torch.arange(TRANSITIONS) % 3
    state, _, terminated = env.system.advance(start, action, env.constants)
    other = gymnasium.make("Acrobot-v1").unwrapped
    other.reset()
    for i in range(TRANSITIONS):
        other.state = start[i].numpy().copy()
        other.step(int(action[i]))
        np.testing.assert_allclose(state[i].numpy(), other.state, rtol=0, atol=1e-10)
    assert terminated.any()


def test_acrobot_obeys_the_power_balance_for_any_masses_and_lengths():
    """dE/dt equals torque times the speed of the actuated joint, E written down from the positions of the masses."""
    env = double("acrobot", TRANSITIONS, 1)
    m1, m2, l1, l2 = (env.task[name] for name in Acrobot.parameters)

    def energy(state: torch.Tensor) -> torch.Tensor:
        q1, q2, w1, w2 = state.unbind(-1)
        elbow = torch.stack((l1 * q1.cos() * w1, l1 * q1.sin() * w1))
        centre_2 = elbow + l2 / 2 * (w1 + w2) * torch.stack(((q1 + q2).cos(), (q1 + q2).sin()))
        kinetic = m1 * (l1 / 2 * w1) ** 2 + m1 * l1**2 * w1**2 + m2 * centre_2.square().sum(0)
        kinetic = kinetic + m2 * l2**2 * (w1 + w2) ** 2
        height_1 = -l1 / 2 * q1.cos()
        height_2 = -l1 * q1.cos() - l2 / 2 * (q1 + q2).cos()
        return kinetic / 2 + 9.8 * (m1 * height_1 + m2 * height_2)

    state = random_states("acrobot", TRANSITIONS).requires_grad_()
    torque = torch.linspace(-1, 1, TRANSITIONS, dtype=torch.float64)
    (slope,) = torch.autograd.grad(energy(state).sum(), state)
    rate = Acrobot().rate(state, torque, env.constants)
    torch.testing.assert_close((slope * rate).sum(-1), torque * state[:, 3], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", IDS)
def test_spaces_and_time_limits_are_gymnasiums(name):
    family, spec = ControlFamily(f"{name}-default"), gymnasium.spec(IDS[name])
    other = gymnasium.make(IDS[name])
    assert family.max_episode_steps == spec.max_episode_steps
    assert family.action_space == other.action_space
    assert family.observation_space.shape == other.observation_space.shape
    np.testing.assert_array_equal(family.observation_space.high, other.observation_space.high)
    np.testing.assert_array_equal(family.observation_space.low, other.observation_space.low)


@pytest.mark.parametrize("name", IDS)
def test_episodes_start_where_gymnasiums_do(name):
    env = double(f"{name}-default", copies=4000)
    env.reset()
    other = gymnasium.make(IDS[name]).unwrapped
    starts = []
    for seed in range(1000):
        other.reset(seed=seed)
        starts.append(np.array(other.state, dtype=np.float64))
    bound = np.abs(np.stack(starts)).max(0)
    ours = env.state.abs().amax(0).numpy()
    np.testing.assert_allclose(ours, bound, rtol=0.01)
    np.testing.assert_allclose(
        env.state.mean(0), np.stack(starts).mean(0), atol=4 * float(bound.max()) / math.sqrt(1000)
    )


@pytest.mark.parametrize("name", IDS)
def test_parameters_are_log_uniform_around_the_defaults(name):
    system = SYSTEMS[name]
    exact = ControlFamily(f"{name}-default").sample_split("train", 3)
    drawn = ControlFamily(name).sample_split("train", 2000)
    assert list(exact) == list(drawn) == list(system.parameters)
    for key, default in system.parameters.items():
        assert exact[key].tolist() == [default] * 3
        factor = (drawn[key] / default).log() / math.log(system.spread)  # uniform in [-1, 1]
        assert 0.99 < float(factor.max()) <= 1 + 1e-12 and -1 - 1e-12 <= float(factor.min()) < -0.99
        assert abs(float(factor.mean())) < 4 / math.sqrt(3 * 2000)


@pytest.mark.parametrize("preset", ["mountain-car-default", "pendulum-default"])
def test_time_limits_truncate(preset):
    family = ControlFamily(preset)
    env = family.make(family.sample_split("train", 2), 2, 0)
    env.reset()
    idle = torch.zeros(4, 1) if preset.startswith("pendulum") else torch.ones(4, dtype=torch.int64)
    for step in range(1, 201):
        obs, _, terminated, truncated, info = env.step(idle)
        assert not terminated.any() and truncated.eq(step == 200).all()
    assert not torch.equal(obs, info["final_obs"])
    assert torch.equal(obs, env._observe()) and env.elapsed.eq(0).all()


def first_episode_returns(preset: str, policy: Any, tasks: int = 400) -> torch.Tensor:
    family = ControlFamily(preset)
    env = family.make(family.sample_split("test", tasks), 1, 0)
    env.reset()
    total, running = torch.zeros(tasks), torch.ones(tasks, dtype=torch.bool)
    for _ in range(family.max_episode_steps):
        _, reward, terminated, truncated, _ = env.step(policy(env))
        total += reward * running
        running &= ~(terminated | truncated)
    assert not running.any()
    return total


def test_every_random_cartpole_can_be_balanced():
    feedback = torch.tensor([0.05, 0.2, 3.0, 0.5])
    returns = first_episode_returns("cartpole", lambda env: (env.state @ feedback > 0).long())
    assert returns.eq(500).all()


def test_every_random_mountain_car_reaches_the_goal_by_pumping():
    returns = first_episode_returns("mountain-car", lambda env: (env.state[:, 1] >= 0).long() * 2)
    assert returns.min() > -200


def test_random_acrobots_reach_the_goal_by_pumping():
    returns = first_episode_returns("acrobot", lambda env: (env.state[:, 2] < 0).long() * 2)
    assert float((returns > -500).float().mean()) > 0.97


def test_random_agents_score_as_they_do_in_gymnasium():
    """Mean return of a random agent on CartPole-v1: about 22 steps, with a standard deviation of about 12."""
    generator = torch.Generator().manual_seed(0)
    ours = first_episode_returns(
        "cartpole-default", lambda env: torch.randint(2, (env.num_envs,), generator=generator), tasks=2000
    )
    other = gymnasium.make("CartPole-v1")
    other.action_space.seed(0)
    theirs = []
    for seed in range(500):
        other.reset(seed=seed)
        done, steps = False, 0
        while not done:
            _, _, terminated, truncated, _ = other.step(other.action_space.sample())
            done, steps = terminated or truncated, steps + 1
        theirs.append(float(steps))
    error = math.sqrt(float(ours.var()) / len(ours) + np.var(theirs) / len(theirs))
    assert abs(float(ours.mean()) - np.mean(theirs)) < 4 * error
    idle = first_episode_returns("pendulum-default", lambda env: torch.zeros(env.num_envs, 1))
    assert -200 * (math.pi**2 + 0.1 * 64 + 0.004) < float(idle.mean()) < -500
