"""Any gymnasium id behind the interface of the built-in families."""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from learned_rl import PPO, PPOConfig
from learned_rl.agents import AgentConfig, ConvAgent
from learned_rl.registry import make_family
from learned_rl.tasks.gym import DEFAULT_TIME_LIMIT, GymFamily, GymVectorEnv
from learned_rl.types import UserError

P, B = 2, 3


class Counter(gymnasium.Env):
    """Counts its steps from a start that its seed decides; terminates at `end`; for what classic control lacks."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, end: int = 1000) -> None:
        self.observation_space, self.action_space, self.end = observation_space, action_space, end

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        assert self.action_space.contains(action)
        reward = float(np.sum(action))
        return self._obs(), reward, self.steps >= self.end, False, {"steps": self.steps}

    def _obs(self):
        if isinstance(self.observation_space, spaces.Discrete):
            return self.observation_space.start + self.steps % int(self.observation_space.n)
        value = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        value[..., 0] = self.steps
        return value


@pytest.fixture
def register():
    """Registers environments for one test."""
    ids = []

    def add(name: str, observes: spaces.Space, acts: spaces.Space, end: int = 1000, limit=None, kind=Counter) -> str:
        kwargs = {"observation_space": observes, "action_space": acts, "end": end}
        gymnasium.register(name, entry_point=kind, kwargs=kwargs, max_episode_steps=limit)
        ids.append(name)
        return name

    yield add
    for name in ids:
        del gymnasium.registry[name]


def make(family: GymFamily, seed: int = 3, lifetimes: int = P) -> GymVectorEnv:
    return family.make(family.sample_split("train", lifetimes), B, seed)


def record(env: GymVectorEnv, steps: int, seed: int = 0) -> list[torch.Tensor]:
    env.action_space.seed(seed)
    rows = [env.step(torch.as_tensor(env.action_space.sample())) for _ in range(steps)]
    return [torch.stack(field) for field in zip(*[(*row[:4], row[4]["final_obs"]) for row in rows], strict=True)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("env_id", GymFamily.presets)
def test_shapes_dtypes_and_spaces(env_id):
    family = GymFamily(env_id)
    assert family.max_episode_steps == gymnasium.spec(env_id).max_episode_steps
    env = make(family)
    first, _ = env.reset()
    obs, reward, terminated, truncated, final_obs = record(env, 40)
    assert first.dtype == obs.dtype == final_obs.dtype == reward.dtype == torch.float32
    assert obs.shape == final_obs.shape == (40, P * B, *family.observation_space.shape)
    assert terminated.dtype == truncated.dtype == torch.bool and reward.shape == terminated.shape == (40, P * B)
    assert all(env.observation_space.contains(row.numpy()) for row in (first, *obs, *final_obs))


def test_transitions_are_the_single_environments():
    """The same seeds and actions as bare `gymnasium.make` environments, reset by hand."""
    env = make(GymFamily("CartPole-v1"))
    singles = [gymnasium.make("CartPole-v1") for _ in range(P * B)]
    present = env._observe()
    for i, single in enumerate(singles):
        entropy = (3, 0, int(env.task["seed"][i]), i)
        first, _ = single.reset(seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        assert present[i].tolist() == first.tolist()
    env.action_space.seed(0)
    ended = 0
    for _ in range(60):
        action = env.action_space.sample()
        obs, reward, terminated, truncated, info = env.step(torch.as_tensor(action))
        for i, single in enumerate(singles):
            o, r, te, tr, _ = single.step(action[i])
            assert info["final_obs"][i].tolist() == o.tolist()
            assert (float(reward[i]), bool(terminated[i]), bool(truncated[i])) == (r, te, tr)
            if te or tr:
                o, _ = single.reset()
                ended += 1
            assert obs[i].tolist() == o.tolist()
    assert ended > 5


def test_truncation_returns_the_observation_before_the_reset(register):
    name = register("Test/Count-v0", spaces.Box(-1, 1000, (2,)), spaces.Discrete(2), limit=4)
    env = make(GymFamily(name))
    env.set_tasks(torch.tensor([0]), {"seed": torch.tensor([5])})
    for step in range(1, 13):
        obs, _, terminated, truncated, info = env.step(torch.zeros(P * B, dtype=torch.int64))
        assert not terminated.any() and truncated.eq(step % 4 == 0).all()
        assert obs[:, 0].eq(step % 4).all()
        assert info["final_obs"][:, 0].eq((step - 1) % 4 + 1).all()


def test_only_the_copies_that_end_have_another_final_observation(register):
    name = register("Test/Count-v0", spaces.Box(-1, 1000, (2,)), spaces.Discrete(2), limit=4)
    env = make(GymFamily(name))
    zero = torch.zeros(P * B, dtype=torch.int64)
    env.step(zero)
    env.set_tasks(torch.tensor([1]), {"seed": torch.tensor([5])})  # lifetime 1 is one step behind from here on
    for _ in range(2):
        env.step(zero)
    obs, _, _, truncated, info = env.step(zero)
    assert truncated.tolist() == [True] * B + [False] * B
    assert obs[:, 0].tolist() == [0] * B + [3] * B and info["final_obs"][:, 0].tolist() == [4] * B + [3] * B


def test_a_terminal_step_at_the_time_limit_is_not_truncated(register):
    name = register("Test/Count-v0", spaces.Box(-1, 1000, (2,)), spaces.Discrete(2), limit=4, end=4)
    _, _, terminated, truncated, _ = record(make(GymFamily(name)), 4)
    assert terminated[-1].all() and not truncated.any()


def test_spaces_that_count_from_elsewhere_are_shifted(register):
    name = register("Test/Shift-v0", spaces.Discrete(5, start=10), spaces.Discrete(2, start=3), end=3)
    family = GymFamily(name)
    assert family.observation_space == spaces.Discrete(5) and family.action_space == spaces.Discrete(2)
    assert family.max_episode_steps == DEFAULT_TIME_LIMIT
    env = make(family)
    obs, reward, terminated, _, info = env.step(torch.tensor([0, 1] * 3))
    assert obs.dtype == torch.int64 and obs.tolist() == [1] * 6 and reward.tolist() == [3, 4] * 3
    env.step(torch.zeros(6, dtype=torch.int64))
    obs, _, terminated, _, info = env.step(torch.zeros(6, dtype=torch.int64))
    assert terminated.all() and obs.tolist() == [0] * 6 and info["final_obs"].tolist() == [3] * 6


class Picture(Counter):
    """Byte `[i, j, k]` of an observation is `steps + weights . (i, j, k)`: every pixel has a value of its own."""

    WEIGHTS = (37, 9, 2)

    def _obs(self):
        place = np.indices(self.observation_space.shape)
        return (np.tensordot(self.WEIGHTS, place, 1) + self.steps).astype(np.uint8)


@pytest.mark.parametrize(("shape", "layout"), [((4, 5, 3), (2, 0, 1)), ((2, 3, 5), (0, 1, 2)), ((4, 4, 4), (2, 0, 1))])
def test_images_are_shares_of_brightness_with_channels_first(register, shape, layout):
    """Channels last are moved; where the first axis is shorter than the last, they come first already."""
    name = register("Test/Image-v0", spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(2), limit=3, kind=Picture)
    family = GymFamily(name)
    moved = tuple(shape[i] for i in layout)
    assert family.observation_space == spaces.Box(0, 1, moved, np.float32)
    env = make(family)
    obs, _, _, _, final_obs = record(env, 7)
    place = np.tensordot(Picture.WEIGHTS, np.indices(shape), 1).transpose(layout)
    for found, steps in ((obs, [1, 2, 0, 1, 2, 0, 1]), (final_obs, [1, 2, 3, 1, 2, 3, 1])):
        assert found.shape == (7, P * B, *moved) and found.dtype == torch.float32
        for row, count in zip(found, steps, strict=True):
            assert np.array_equal(row.numpy(), np.broadcast_to(np.float32(place + count) / np.float32(255), row.shape))
    assert all(env.observation_space.contains(row.numpy()) for row in obs)


def test_a_flat_box_of_bytes_is_no_image(register):
    name = register("Test/Ram-v0", spaces.Box(0, 255, (4,), np.uint8), spaces.Box(-1, 1, (2,)))
    family = GymFamily(name)
    assert family.observation_space == spaces.Box(0, 255, (4,), np.float32)
    obs, *_ = record(make(family), 7)
    assert obs.dtype == torch.float32 and obs[..., 0].unique().tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_ppo_takes_images(register):
    """The convolution reads what the family makes of an image."""
    name = register("Test/Image-v0", spaces.Box(0, 255, (5, 6, 3), np.uint8), spaces.Discrete(2), limit=4, kind=Picture)
    ppo = PPO(f"gym/{name}", PPOConfig(n_envs=2, n_steps=4, n_minibatches=1, agent=AgentConfig(hidden=(8,)))).learn(16)
    agent = ppo.lifetimes.population.agent
    assert isinstance(agent, ConvAgent) and agent.planes == (3, 5, 6)
    assert ppo.lifetimes.population.theta.isfinite().all()


def test_returned_observations_do_not_change_later():
    env = make(GymFamily("Pendulum-v1"))
    obs, _ = env.reset()
    kept = obs.clone()
    stepped, *_ = env.step(torch.zeros(P * B, 1))
    kept_stepped = stepped.clone()
    record(env, 3)
    assert torch.equal(obs, kept) and torch.equal(stepped, kept_stepped)


def test_the_seed_decides_everything():
    family = GymFamily("CartPole-v1")
    assert same(record(make(family), 50), record(make(family), 50))
    assert not same(record(make(family, seed=4), 50), record(make(family), 50))
    env = make(family)
    record(env, 20)
    obs, _ = env.reset(seed=3)
    assert torch.equal(obs, make(family)._observe())
    assert len(obs.unique(dim=0)) == P * B
    assert not torch.equal(env.reset()[0], obs)


def test_new_tasks_leave_the_other_lifetimes_alone():
    family = GymFamily("CartPole-v1")
    env, undisturbed = make(family), make(family)
    record(env, 4), record(undisturbed, 4)
    before = env._observe()
    obs = env.set_tasks(torch.tensor([1]), {"seed": torch.tensor([77])})
    assert torch.equal(obs[:B], before[:B]) and not (obs[B:] == before[B:]).all(-1).any()
    assert env.task["seed"][B:].eq(77).all() and torch.equal(env.task["seed"][:B], undisturbed.task["seed"][:B])
    ours, theirs = record(env, 60), record(undisturbed, 60)
    assert same([field[:, :B] for field in ours], [field[:, :B] for field in theirs])


def test_a_lifetime_does_not_depend_on_its_neighbours():
    """Neither on how many there are, nor on their tasks."""
    family = GymFamily("CartPole-v1")
    tasks = family.sample_split("train", P)
    alone = family.make({"seed": tasks["seed"][:1]}, B, seed=3)
    assert torch.equal(alone.reset()[0], make(family).reset()[0][:B])
    other = family.make({"seed": tasks["seed"] + torch.tensor([5, 0])}, B, seed=3)
    ours, theirs = record(make(family), 60), record(other, 60)
    assert same([x[:, B:] for x in ours], [x[:, B:] for x in theirs])
    assert not same([x[:, :B] for x in ours], [x[:, :B] for x in theirs])


def test_lifetimes_on_one_task_have_randomness_of_their_own():
    """And so have the copies of one lifetime."""
    env = GymFamily("CartPole-v1").make({"seed": torch.tensor([4, 4])}, B, seed=3)
    assert len(env._observe().unique(dim=0)) == 2 * B


def test_loading_warns_and_begins_new_episodes():
    family = GymFamily("CartPole-v1")
    env = make(family)
    first = env._observe()
    record(env, 5)
    state = env.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other, again = make(family, seed=8), make(family, seed=9)
    with pytest.warns(UserWarning, match="new episodes"):
        begun = other.load_state_dict(state)
    with pytest.warns(UserWarning, match="new episodes"):
        assert torch.equal(again.load_state_dict(state), begun)
    assert torch.equal(other._observe(), begun)
    assert torch.equal(other.task["seed"], env.task["seed"])
    assert not (other._observe() == first).all(-1).any()
    assert same(record(other, 30), record(again, 30))


def test_a_resumed_ppo_goes_on_from_fresh_episodes():
    """What the agents see next, and the running returns, belong to the new episodes and not to the broken-off ones."""
    config = PPOConfig(n_envs=2, n_steps=5, n_minibatches=1, agent=AgentConfig(hidden=(4,)))
    one, two = (PPO("gym/CartPole-v1", config, seeds=2, seed=s) for s in (0, 1))
    one.learn(20)
    assert one.lifetimes.episodes.running.any()
    with pytest.warns(UserWarning, match="new episodes"):
        two.load_state_dict(one.state_dict())
    fresh = two.lifetimes.env._observe().unflatten(0, (2, 2))
    assert torch.equal(two.lifetimes.obs, fresh)
    assert not (fresh == one.lifetimes.obs).all(-1).any() and (fresh.abs() <= 0.05).all()  # where CartPole begins
    assert not two.lifetimes.episodes.running.any()
    trajectory = two.lifetimes.collect(two.lifetimes.plain())
    assert torch.equal(trajectory.obs[0], fresh)


def test_random_agents_score_as_they_should():
    env = make(GymFamily("CartPole-v1"), lifetimes=20)
    _, reward, terminated, _, _ = record(env, 200)
    mean_length = float(reward.sum() / terminated.sum())
    assert 19 < mean_length < 26  # about 22 steps; the standard error here is about 0.5


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_a_wrong_keyword_is_a_user_error():
    with pytest.raises(UserError, match="no_such_option"):
        GymFamily("CartPole-v1", no_such_option=1)


@pytest.mark.parametrize(("wrong", "near"), [("CartPole-v11", "CartPole-v1"), ("Pendulom-v1", "Pendulum-v1")])
def test_an_unknown_id_is_a_user_error(wrong, near):
    with pytest.raises(UserError, match=f"'{wrong}'.*'{near}'"):
        GymFamily(wrong)


def test_a_missing_module_is_a_user_error():
    with pytest.raises(UserError, match="no_such_module"):
        GymFamily("no_such_module:Thing-v0")
    with pytest.raises(UserError, match="no_such_module"):
        make_family("no_such_module:Thing-v0")


def test_composite_observations_are_a_user_error(register):
    name = register("Test/Dict-v0", spaces.Dict({"a": spaces.Discrete(2)}), spaces.Discrete(2))
    with pytest.raises(UserError, match="FlattenObservation"):
        GymFamily(name)


def test_composite_actions_are_a_user_error(register):
    name = register("Test/Multi-v0", spaces.Discrete(2), spaces.MultiDiscrete([2, 2]))
    with pytest.raises(UserError, match="MultiDiscrete"):
        GymFamily(name)


def test_missing_minatar_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "minatar.gym", None)
    with pytest.raises(UserError, match=r"learned-rl\[minatar\]"):
        GymFamily("MinAtar/Breakout-v1")


# --- MinAtar -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("game", "channels", "actions"),
    [("Asterix", 4, 5), ("Breakout", 4, 3), ("Freeway", 7, 3), ("Seaquest", 10, 6), ("SpaceInvaders", 6, 4)],
)
def test_minatar_planes_have_channels_first(game, channels, actions):
    pytest.importorskip("minatar", reason="the optional extra minatar is not installed")
    family = GymFamily(f"MinAtar/{game}-v1", max_episode_steps=30)
    assert family.observation_space == spaces.Box(0, 1, (channels, 10, 10), np.float32)
    assert family.action_space.n == actions and family.max_episode_steps == 30
    env = make(family)
    obs, _, terminated, truncated, final_obs = record(env, 60)
    assert set(obs.unique().tolist()) == {0.0, 1.0} and (terminated | truncated).any()
    assert all(env.observation_space.contains(row.numpy()) for row in (*obs, *final_obs))
    raw = np.stack([single.unwrapped.game.state() for single in env.env.envs])
    assert np.array_equal(obs[-1].numpy(), raw.transpose(0, 3, 1, 2).astype(np.float32))
    assert same(record(make(family), 60), record(make(family), 60))
