"""Contextual numbers: what the network is told, what it says at first, and its meta-gradient."""

import dataclasses
import math

import experience
import pytest
import torch
from learners import check_differences, check_each_alone
from torch.testing import assert_close

from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.agents import AgentConfig
from learned_rl.component import Context, Hyper, lifetime_mean
from learned_rl.inner_loop import GraphInner
from learned_rl.ppo import Algorithm, Slots
from learned_rl.types import UserError
from learned_rl.update_rules import SGD
from objectives.bijectors import NUMBERS
from objectives.contextual import Contextual, ContextualConfig

P, H = 2, 3


def contextual(*numbers, seed=0, moved=0.0, **settings):
    """In float64, its weights away from the fresh ones by `moved`."""
    torch.manual_seed(seed)
    component = Contextual(ContextualConfig(numbers or ("ent_coef",), **{"memory": H} | settings)).double()
    with torch.no_grad():
        for weight in component.parameters():
            weight.add_(moved * torch.randn_like(weight))
    return component


def rollouts(n, dtype=torch.float64, **settings):
    return [experience.trajectory(experience.SPACES["mlp"], seed, dtype=dtype, **settings) for seed in range(n)]


def lives(component, trajectories, hyper=None):
    """The numbers of one update after another, and the memory in the end."""
    memory, said = component.initial_memory(trajectories[0].reward.shape[1]), []
    memory = {k: v.to(trajectories[0].reward.dtype) for k, v in memory.items()}
    for age, trajectory in enumerate(trajectories):
        context = Context(torch.full((P,), float(age)), torch.full((P,), 10.0), memory)
        numbers, memory = component(hyper or Hyper(ent_coef=0.3), trajectory, context)
        said.append(numbers)
    return said, memory


def told(component, trajectories):
    """[P, H * F] what the network reads at the last of these updates."""
    seen = []
    handle = component.net.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    lives(component, trajectories)
    handle.remove()
    return seen[-1]


# --- what it says at first ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fresh_it_says_exactly_the_configured_numbers(dtype):
    """In every context; as floats, and with one for each lifetime."""
    names = tuple(k for k in NUMBERS if k not in ("vtrace_alpha", "aux_coef"))  # which are at an edge by default
    component = contextual(*names, bounds={"pg_coef": (0.0, 2.0)}).to(dtype)
    floats = Hyper(ent_coef=0.02, clip_range_vf=0.3)
    rows = {k: torch.tensor([[v], [0.9 * v]], dtype=dtype) for k, v in vars(floats).items()}
    for hyper in (floats, Hyper(**rows)):
        for found in lives(component, rollouts(3, dtype), hyper)[0]:
            for name in names:
                expected = torch.as_tensor(getattr(hyper, name), dtype=dtype).expand(P, 1)
                assert torch.equal(getattr(found, name), expected), name


def test_or_the_middle_of_their_intervals():
    component = contextual("ent_coef", "gamma", bounds={"gamma": (0.9, 1.0)}, start="middle")
    for found in lives(component, rollouts(3), Hyper(ent_coef=0.0))[0]:
        assert torch.equal(found.ent_coef, torch.full((P, 1), 0.5, dtype=torch.float64))
        assert torch.equal(found.gamma, torch.full((P, 1), 0.95, dtype=torch.float64))


def test_a_number_that_cannot_be_learned_is_refused():
    with pytest.raises(UserError, match=r"^clip_range is inf, but it is to be learned"):
        lives(contextual("clip_range"), rollouts(1), Hyper(clip_range=math.inf))
    (found,), _ = lives(contextual("clip_range", start="middle"), rollouts(1), Hyper(clip_range=math.inf))
    assert torch.equal(found.clip_range, torch.full((P, 1), 0.5, dtype=torch.float64))


# --- what it is told ----------------------------------------------------------------------------------------------


def test_it_is_told_the_mean_rewards_newest_first():
    """That of this update's rollout too; zeros for what has not been collected."""
    data = rollouts(5)
    means = [lifetime_mean(tr.reward) for tr in data]
    zero = torch.zeros_like(means[0])
    for n, expected in (
        (1, [means[0], zero, zero]),
        (2, [means[1], means[0], zero]),
        (5, [means[4], means[3], means[2]]),
    ):
        found = told(contextual(normalise=False), data[:n])
        assert_close(found, torch.stack(expected, 1), rtol=1e-14, atol=0)


def test_or_means_and_standard_deviations():
    data, component = rollouts(2), contextual(context="moments", normalise=False)
    expected = [x for tr in data[::-1] for x in (lifetime_mean(tr.reward), tr.reward.std((0, 2), correction=0))]
    zero = torch.zeros_like(expected[0])
    assert_close(told(component, data), torch.stack([*expected, zero, zero], 1), rtol=1e-14, atol=0)
    single = rollouts(1, T=1, B=1)
    assert_close(told(component, single)[:, :2], torch.stack([single[0].reward[0, :, 0], zero], 1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["reward", "moments"])
def test_normalised_by_the_lifetime_so_far(kind):
    data = rollouts(6)
    features = torch.stack([lifetime_mean(tr.reward) for tr in data])[..., None]
    if kind == "moments":
        features = torch.cat(
            [features, torch.stack([tr.reward.std((0, 2), correction=0) for tr in data])[..., None]], -1
        )
    for n in range(1, 7):
        known = features[:n]  # [n, P, F]
        std, mean = known.std(0, correction=0), known.mean(0)
        expected = torch.tanh((known - mean) / (std + 1e-8)).flip(0)[:H].transpose(0, 1)
        found = told(contextual(context=kind), data[:n]).unflatten(1, (H, -1))
        assert_close(found[:, :n], expected, rtol=1e-9, atol=1e-12)
        assert not found[:, n:].any()


def test_rewards_that_never_change_are_zeros_when_normalised():
    data = [dataclasses.replace(tr, reward=torch.full_like(tr.reward, 0.1)) for tr in rollouts(5, torch.float32)]
    assert not told(contextual().float(), data).any()


def test_the_context_is_a_constant():
    (data,) = rollouts(1)
    reward = data.reward.clone().requires_grad_()
    (found,), memory = lives(contextual(moved=1.0), [dataclasses.replace(data, reward=reward)])
    assert found.ent_coef.requires_grad and not any(v.requires_grad for v in memory.values())
    assert torch.autograd.grad(found.ent_coef.sum(), reward, allow_unused=True) == (None,)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_lifetime_does_not_spoil_the_gradient_of_the_others(normalise, broken):
    data, component = rollouts(3), contextual(moved=1.0, normalise=normalise)
    data[1].reward[2, 0, 1] = broken
    said, _ = lives(component, data)
    slopes = torch.autograd.grad(sum(x.ent_coef[1, 0] for x in said), list(component.parameters()))
    assert all(bool(x.isfinite().all()) for x in slopes)


def test_a_fresh_lifetime_has_no_memory():
    config = PPOConfig(n_envs=2, n_steps=8, n_epochs=1, n_minibatches=1, agent=AgentConfig(hidden=(8,)))
    agent = PPO("CartPole-v1", config, hyperparameters="contextual", seeds=2).learn(3 * 16)
    lifetimes = agent.lifetimes
    assert bool((lifetimes.memory["hyperparameters/count"] == 3).all())
    lifetimes.restart(torch.tensor([True, False]))
    for name, value in lifetimes.memory.items():
        assert not value[0].any() and (bool(value[1].any()) or name.endswith("squares")), name


# --- what it says -------------------------------------------------------------------------------------------------


def test_numbers_by_hand():
    """A linear network: the newest mean reward moves ent_coef, and that before it gamma."""
    component = contextual("ent_coef", "gamma", bounds={"gamma": (0.9, 1.0)}, normalise=False, hidden=())
    with torch.no_grad():
        component.net[0].weight[0, 0], component.net[0].bias[0] = 2.0, 0.5
        component.net[0].weight[1, 1] = -3.0
    data = rollouts(2)
    (_, found), _ = lives(component, data, Hyper(ent_coef=0.3, gamma=0.92))
    older, newer = (lifetime_mean(tr.reward)[:, None] for tr in data)
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    assert_close(found.ent_coef, torch.sigmoid(logit(0.3) + 2 * newer + 0.5), rtol=1e-12, atol=0)
    assert_close(found.gamma, 0.9 + 0.1 * torch.sigmoid(logit(0.2) - 3 * older), rtol=1e-12, atol=0)


def test_the_network_is_the_replications():
    """One hidden layer of 32, over ten rewards, by default."""
    shapes = {k: tuple(v.shape) for k, v in Contextual().named_parameters()}
    assert shapes == {"net.0.weight": (32, 10), "net.0.bias": (32,), "net.2.weight": (1, 32), "net.2.bias": (1,)}
    assert Contextual().tuned == ("ent_coef",) and ContextualConfig().start == "base"
    two = Contextual(ContextualConfig(("ent_coef", "gamma"), context="moments", memory=4, hidden=(64, 64)))
    assert [tuple(p.shape) for p in two.parameters() if p.dim() == 2] == [(64, 8), (64, 64), (2, 64)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"numbers": ("entropy",)}, "unknown number 'entropy'"),
        ({"memory": 0}, "memory is 0: expected at least 1"),
        ({"hidden": (32, 0)}, r"hidden\[1\] is 0: expected at least 1"),
        ({"context": "rewards"}, "unknown context 'rewards'.*'reward'"),
        ({"start": "mid"}, "unknown start 'mid'.*'middle'"),
        ({"bounds": {"ent_coef": (0.0, 0.0)}}, "expected finite low < high"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        ContextualConfig(**settings)


def test_a_file_brings_back_the_same_component(tmp_path):
    component = contextual("ent_coef", "lambda", moved=0.5, bounds={"ent_coef": (0.0, 0.2)}, hidden=(6, 5))
    artifacts.save(component, tmp_path / "numbers.safetensors")
    loaded = artifacts.load(tmp_path / "numbers.safetensors")
    assert type(loaded) is Contextual and loaded.config == component.config
    expected, found = lives(component, rollouts(3))[0][-1], lives(loaded, rollouts(3))[0][-1]
    assert torch.equal(found.ent_coef, expected.ent_coef) and torch.equal(found.gae_lambda, expected.gae_lambda)


# --- meta-gradients -----------------------------------------------------------------------------------------------

SETTINGS = {"": {}, "raw moments": {"context": "moments", "normalise": False}, "middle": {"start": "middle"}}
cases = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def lived(component, agents):
    """[P] a judgement of agents after an update on fixed experience, the third of their lifetime."""
    hyper = Hyper(learning_rate=0.3, ent_coef=0.1, max_grad_norm=math.inf)
    config = PPOConfig(n_envs=3, n_steps=5, n_epochs=2, n_minibatches=2, hyper=hyper)
    algorithm = Algorithm(config, Slots.fill(config, hyperparameters=component, optimizer=SGD()))
    inner, generator = GraphInner(agents, algorithm.slots.optimizer, {}), torch.Generator().manual_seed(5)
    *earlier, now, outer = rollouts(4)
    memory = {f"hyperparameters/{k}": v for k, v in lives(component, earlier)[1].items()}
    algorithm.update(inner, now, experience.context(age=2.0, memory=memory), hyper, generator)
    out = inner.agent(outer.obs[:-1])
    return lifetime_mean(out.policy.log_prob(outer.action) * outer.reward + out.value)


def setting(settings):
    component = contextual("ent_coef", "gamma", moved=0.3, hidden=(5,), **settings)
    agents = experience.population("mlp", value=True)
    return component, lambda component: lived(component, agents)


@cases
def test_meta_gradient_through_an_update_against_differences(settings):
    check_differences(*setting(settings))


@cases
def test_lifetimes_with_networks_of_their_own(settings):
    component, lived = setting(settings)
    check_each_alone(component, lived, [torch.stack([v, 0.5 - v]) for v in component.parameters()])
