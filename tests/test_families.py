"""Chains, catch and bandits; and what every built-in family without a grid has to honour, those of other files too."""

from __future__ import annotations

import math

import pytest
import torch

from learned_rl.tasks.alternating import AlternatingFamily
from learned_rl.tasks.bandits import BanditFamily
from learned_rl.tasks.base import TaskFamily, TaskVectorEnv
from learned_rl.tasks.catch import CatchFamily
from learned_rl.tasks.chains import RANDOM_BITS, ChainFamily
from learned_rl.tasks.control import ControlFamily
from learned_rl.tasks.discounting import DiscountingFamily
from learned_rl.tasks.random_walk import RandomWalkFamily
from learned_rl.tasks.two_colours import TwoColoursFamily
from learned_rl.types import UserError

FAMILIES = (
    ChainFamily,
    CatchFamily,
    BanditFamily,
    ControlFamily,
    TwoColoursFamily,
    DiscountingFamily,
    AlternatingFamily,
    RandomWalkFamily,
)
EVERY = [pytest.param(family, preset, id=f"{family.name}/{preset}") for family in FAMILIES for preset in family.presets]
EPISODIC = [each for each in EVERY if not each.values[0].continuing]
RANDOM = [each for each in EVERY if each.values[0] is not DiscountingFamily]
P, B = 3, 4


def make(family: TaskFamily, seed: int = 5, copies: int = B) -> TaskVectorEnv:
    env = family.make(family.sample_split("train", P), copies, seed)
    assert isinstance(env, TaskVectorEnv)
    return env


def random_actions(env: TaskVectorEnv, steps: int, seed: int = 0) -> list[torch.Tensor]:
    env.action_space.seed(seed)
    return [torch.as_tensor(env.action_space.sample()) for _ in range(steps)]


def record(env: TaskVectorEnv, actions: list[torch.Tensor]) -> list[torch.Tensor]:
    """Everything that the steps returned, one stacked tensor a field."""
    steps = [env.step(action) for action in actions]
    fields = [(*step[:4], step[4]["final_obs"]) for step in steps]
    return [torch.stack(field) for field in zip(*fields, strict=True)]


# --- what every family honours -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "preset"), EVERY)
def test_shapes_dtypes_and_spaces(cls, preset):
    family = cls(preset)
    env = make(family)
    obs, _ = env.reset()
    obs_dtype = torch.int64 if family.observation_space.shape == () else torch.float32
    for action in random_actions(env, 60):
        assert obs.shape == (P * B, *family.observation_space.shape) and obs.dtype == obs_dtype
        assert env.observation_space.contains(obs.numpy())
        obs, reward, terminated, truncated, info = env.step(action)
        assert reward.shape == terminated.shape == truncated.shape == (P * B,)
        assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
        assert not (terminated & truncated).any()
        assert env.observation_space.contains(info["final_obs"].numpy())


@pytest.mark.parametrize(("cls", "preset"), EPISODIC)
def test_episodes_end_within_the_bound_and_restart_in_the_same_step(cls, preset):
    family = cls(preset)
    env = make(family)
    env.reset()
    ended = False
    for action in random_actions(env, family.max_episode_steps + 1):
        before = env.elapsed.clone()
        obs, _, terminated, truncated, info = env.step(action)
        done = terminated | truncated
        assert torch.equal(env.elapsed, torch.where(done, 0, before + 1))
        assert torch.equal(obs[~done], info["final_obs"][~done])
        assert (before + 1)[truncated].eq(family.max_episode_steps).all()
        ended = ended or bool(done.any())
    assert ended and int(env.elapsed.max()) < family.max_episode_steps


@pytest.mark.parametrize(("cls", "preset"), RANDOM)
def test_the_seed_decides_everything(cls, preset):
    def run(seed):
        env = make(cls(preset), seed)
        first, _ = env.reset()
        return [first, *record(env, random_actions(env, 30))]

    assert all(torch.equal(a, b) for a, b in zip(run(5), run(5), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(run(5), run(6), strict=True))


@pytest.mark.parametrize(("cls", "preset"), EVERY)
def test_a_restored_environment_has_the_same_future(cls, preset):
    family = cls(preset)
    env = make(family)
    env.reset()
    actions = random_actions(env, 80)
    record(env, actions[:37])
    saved, present = env.state_dict(), env._observe()
    future = record(env, actions[37:])

    other = family.make(family.sample_split("test", P), B, seed=99)
    other.reset()
    record(other, actions[:5])
    other.load_state_dict(saved)
    assert torch.equal(other._observe(), present)
    assert all(torch.equal(a, b) for a, b in zip(future, record(other, actions[37:]), strict=True))
    env.load_state_dict(saved)  # the saved state has not moved with the environment
    assert all(torch.equal(a, b) for a, b in zip(future, record(env, actions[37:]), strict=True))


@pytest.mark.parametrize(("cls", "preset"), EVERY)
def test_new_tasks_leave_the_other_lifetimes_alone(cls, preset):
    family = cls(preset)
    env = make(family)
    env.reset()
    record(env, random_actions(env, 3))
    before, present = env.state_dict(), env._observe()
    undisturbed = family.make(family.sample_split("test", P), B, seed=99)
    undisturbed.load_state_dict(before)
    fresh = family.sample_split("validation", 1)
    obs = env.set_tasks(torch.tensor([1]), fresh)
    after = env.state_dict()

    changed = torch.arange(P * B) // B == 1
    for key in before.keys() - {"generator", "restart_generator"}:
        assert torch.equal(before[key][~changed], after[key][~changed]), key
    assert torch.equal(before["generator"], after["generator"])
    for key, value in fresh.items():
        assert torch.equal(env.task[key][changed], value.expand(B, *value.shape[1:])), key
    assert env.elapsed[changed].eq(0).all()
    assert torch.equal(obs, env._observe()) and torch.equal(obs[~changed], present[~changed])
    actions = random_actions(env, 100, seed=1)
    ours, theirs = record(env, actions), record(undisturbed, actions)
    assert all(torch.equal(a[:, ~changed], b[:, ~changed]) for a, b in zip(ours, theirs, strict=True))
    assert not all(torch.equal(a[:, changed], b[:, changed]) for a, b in zip(ours, theirs, strict=True))


def test_restarts_draw_on_and_a_restored_environment_draws_the_same():
    """Restarts on one and the same task begin differently, after a save too."""
    family = ControlFamily("cartpole")
    env, task = make(family), family.sample_split("validation", 1)
    starts = [env.set_tasks(torch.tensor([1]), task)[B : 2 * B]]
    saved = env.state_dict()
    starts.append(env.set_tasks(torch.tensor([1]), task)[B : 2 * B])
    env.load_state_dict(saved)
    again = env.set_tasks(torch.tensor([1]), task)[B : 2 * B]
    assert not (starts[0] == starts[1]).any() and torch.equal(starts[1], again)
    first, other = env.reset(seed=8)[0], make(family)
    other.reset(seed=8)
    restarted = env.set_tasks(torch.tensor([1]), task)
    assert torch.equal(restarted, other.set_tasks(torch.tensor([1]), task))
    assert not (first == restarted)[B : 2 * B].any()


@pytest.mark.parametrize(("cls", "preset"), EVERY)
def test_returned_observations_do_not_change_later(cls, preset):
    env = make(cls(preset))
    obs, _ = env.reset()
    kept = obs.clone()
    record(env, random_actions(env, 5))
    assert torch.equal(obs, kept)


@pytest.mark.parametrize("cls", FAMILIES)
def test_an_unknown_preset_is_a_user_error(cls):
    close = cls.presets[0][:-1] + "?"
    with pytest.raises(UserError, match="nearest") as error:
        cls(close)
    assert f"'{close}'" in str(error.value) and cls.presets[0] in str(error.value)


@pytest.mark.parametrize(("cls", "preset"), [(ChainFamily, "short"), (BanditFamily, "gaussian-5")])
def test_splits_do_not_share_tasks(cls, preset):
    family = cls(preset)
    (train,), (test,) = family.sample_split("train", 64).values(), family.sample_split("test", 64).values()
    assert not torch.equal(train, test)
    (again,) = family.sample_split("train", 64).values()
    assert torch.equal(train, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("cls", "preset"), EVERY)
def test_everything_stays_on_the_device(cls, preset):
    family = cls(preset)
    env = family.make(family.sample_split("train", P), B, 0, "cuda")
    env.reset()
    for action in random_actions(env, 20):
        obs, reward, terminated, truncated, info = env.step(action.cuda())
        assert all(t.is_cuda for t in (obs, reward, terminated, truncated, info["final_obs"]))
    env.load_state_dict(env.state_dict())


# --- chains --------------------------------------------------------------------------------------------------------


def chain_returns(preset: str, correct: bool, episodes: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Return and length `[episodes]` of one episode for each task, the first action being correct or not."""
    family = ChainFamily(preset)
    tasks = family.sample_split("test", episodes)
    env = family.make(tasks, 1, 0)
    obs, _ = env.reset()
    context = obs[:, 1].long() if preset == "distractor" else obs
    action = context if correct else 1 - context
    total, length = torch.zeros(episodes), torch.zeros(episodes, dtype=torch.int64)
    running = torch.ones(episodes, dtype=torch.bool)
    for _ in range(family.max_episode_steps):
        _, reward, terminated, truncated, _ = env.step(action)
        total, length = total + reward * running, length + running
        assert not truncated.any()
        running &= ~terminated
        action = torch.randint(2, (episodes,))  # whatever comes later has no effect
    assert not running.any() and torch.equal(length, tasks["length"])
    return total, length


@pytest.mark.parametrize("preset", ["short", "long", "distractor"])
def test_the_first_action_decides_the_return(preset):
    assert chain_returns(preset, correct=True)[0].eq(1).all()
    assert chain_returns(preset, correct=False)[0].eq(-1).all()
    family = ChainFamily(preset)
    assert family.optimal_return(family.sample_split("test", 7)).eq(torch.ones(7)).all()


def test_noise_is_a_fair_coin_on_every_step_before_the_last():
    good, length = chain_returns("short-noisy", correct=True)
    coins = int((length - 1).sum())
    noise = (good - 1).sum()  # a sum of `coins` fair +-1
    assert 0 < abs(float(noise)) < 4 * math.sqrt(coins)
    assert ((good - length) % 2 == 0).all()  # n rewards of +-1 add up to n modulo 2


@pytest.mark.parametrize(("preset", "longest"), [("short", 30), ("long-noisy", 50)])
def test_chain_lengths_cover_their_range(preset, longest):
    length = ChainFamily(preset).sample_split("train", 2000)["length"]
    assert (int(length.min()), int(length.max())) == (5, longest) and len(length.unique()) == longest - 4


def test_chain_states_are_start_or_chain_and_step():
    family = ChainFamily("short")
    tasks = {"length": torch.tensor([30, 30, 5, 5])}
    env = family.make(tasks, 1, 0)
    start, _ = env.reset()
    assert (start < 2).all()
    first = torch.where(torch.tensor([True, False, True, False]), start, 1 - start)
    for t in range(1, 31):
        _, _, terminated, _, info = env.step(first)
        position = torch.tensor([min(t, 29)] * 2)
        assert info["final_obs"][:2].tolist() == (1 + position + torch.tensor([29, 0])).tolist()
        assert terminated[:2].tolist() == [t == 30] * 2
        if t == 5:
            assert terminated[2:].all() and info["final_obs"][2:].tolist() == [1 + 29 + 4, 1 + 4]
    assert family.observation_space.n == 2 + 2 * 29


def test_distractors_say_nothing_and_relevant_bits_say_everything():
    family = ChainFamily("distractor")
    env = family.make({"length": torch.full((500,), 6)}, 1, 0)
    obs, _ = env.reset()
    assert obs[:, 0].eq(0).all() and {0.0, 1.0} == set(obs[:, 1].tolist())
    noise = [obs[:, 2:]]
    action = torch.zeros(500, dtype=torch.int64)
    good = obs[:, 1] == 0
    for _ in range(5):
        obs, *_ = env.step(action)
        assert obs[:, 0].eq(1).all() and torch.equal(obs[:, 1].bool(), good)
        noise.append(obs[:, 2:])
    coins = torch.stack(noise)
    assert coins.shape[-1] == RANDOM_BITS and set(coins.unique().tolist()) == {0.0, 1.0}
    assert abs(float(coins.mean()) - 0.5) < 4 * 0.5 / math.sqrt(coins.numel())
    agree = (coins[1:] == coins[:-1]).float().mean()
    assert abs(float(agree) - 0.5) < 4 * 0.5 / math.sqrt(coins[1:].numel())


# --- catch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [*CatchFamily.presets, "4x7"])
def test_following_the_ball_always_catches_it(preset):
    family = CatchFamily(preset)
    env = make(family, copies=50)
    obs, _ = env.reset()
    for step in range(1, 3 * (family.rows - 1) + 1):
        ball = obs[:, 0, :-1].flatten(1).argmax(-1) % family.columns
        paddle = obs[:, 0, -1].argmax(-1)
        obs, reward, terminated, truncated, info = env.step((ball - paddle).sign() + 1)
        last = step % (family.rows - 1) == 0
        assert terminated.eq(last).all() and not truncated.any() and reward.eq(float(last)).all()
        assert info["final_obs"].sum((1, 2, 3)).eq(1 if last else 2).all()  # ball and paddle coincide at the end
    assert family.optimal_return({"paddle": torch.zeros(3)}).tolist() == [1, 1, 1]


def test_a_standing_paddle_catches_one_ball_in_five():
    env = make(CatchFamily("10x5"), copies=1000)
    obs, _ = env.reset()
    assert obs[:, 0, -1, 2].eq(1).all() and obs[:, 0, 0].sum(0).gt(0).all()  # all columns occur
    stay = torch.ones(env.num_envs, dtype=torch.int64)
    rewards = torch.stack([env.step(stay)[1] for _ in range(9)])
    assert rewards[:-1].eq(0).all() and set(rewards[-1].tolist()) == {-1.0, 1.0}
    caught = float((rewards[-1] > 0).float().mean())
    assert abs(caught - 0.2) < 4 * math.sqrt(0.2 * 0.8 / env.num_envs)


def test_the_paddle_stays_on_the_board():
    env = make(CatchFamily("8x8"))
    env.reset()
    for _ in range(6):
        obs, *_ = env.step(torch.full((env.num_envs,), 2))
    assert obs[:, 0, -1, 7].eq(1).all()


@pytest.mark.parametrize("preset", ["2x5", "3x0", "1x1"])
def test_an_unwinnable_board_is_a_user_error(preset):
    with pytest.raises(UserError, match="cannot be won"):
        CatchFamily(preset)


# --- bandits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["bernoulli-5", "gaussian-10"])
def test_pulling_the_best_arm_pays_its_mean(preset):
    family = BanditFamily(preset)
    tasks = family.sample_split("test", P)
    copies = 4000
    env = family.make(tasks, copies, 0)
    env.reset()
    _, reward, terminated, _, _ = env.step(tasks["mean"].argmax(-1).repeat_interleave(copies))
    assert terminated.all()
    mean = reward.view(P, copies).mean(-1)
    best = family.optimal_return(tasks)
    noise = torch.ones(P) if family.gaussian else (best * (1 - best)).sqrt()
    assert ((mean - best).abs() < 4 * noise / math.sqrt(copies)).all()
    spread = reward.view(P, copies).std(-1)
    assert ((spread - noise).abs() < 4 / math.sqrt(copies)).all()


@pytest.mark.parametrize(("preset", "mean", "std"), [("bernoulli-50", 0.5, 12**-0.5), ("gaussian-10", 0.0, 1.0)])
def test_arm_means_have_their_distribution(preset, mean, std):
    draws = BanditFamily(preset).sample_split("train", 400)["mean"]
    assert draws.shape == (400, int(preset.split("-")[1]))
    assert abs(float(draws.mean()) - mean) < 4 * std / math.sqrt(draws.numel())
    assert abs(float(draws.std()) - std) < 4 * std / math.sqrt(draws.numel())
