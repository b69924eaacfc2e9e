"""LPO: the network's inputs, that every drift it can say is one, its neutral settings, and its meta-gradient."""

import dataclasses
import math

import experience
import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

from experiments.show import show
from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper, lifetime_mean
from learned_rl.defaults import PPOClip
from learned_rl.inner_loop import GraphInner
from learned_rl.ppo import Algorithm, Slots
from learned_rl.types import UserError
from learned_rl.update_rules import SGD
from objectives.lpo import LPO, LPOConfig, features

BASES = ["none", "ppo"]


def lpo(seed=0, scale=1.0, **settings):
    """Fresh in float64, its weights times `scale`."""
    torch.manual_seed(seed)
    objective = LPO(LPOConfig(**settings)).double()
    with torch.no_grad():
        for weight in objective.parameters():
            weight.mul_(scale)
    return objective


def neutral(base, dtype=torch.float32):
    return lpo(scale=0.0, base=base, xi=0.0).to(dtype)


def moves(n=10_000, spread=1.0, seed=1, dtype=torch.float64):
    """Log-ratios and advantages [1, n]."""
    log_ratio, advantage = torch.randn(2, 1, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return spread * log_ratio, advantage


def drift(objective, log_ratio, advantage, hyper=None):
    return objective.drift(log_ratio.exp(), log_ratio, advantage, hyper or Hyper())


# --- inputs and weights -------------------------------------------------------------------------------------------


def test_features_by_hand():
    """r = 2 and r = 1/4 with A = -3 and A = 10."""
    log_ratio, advantage = torch.tensor([[2.0, 0.25]], dtype=torch.float64).log(), torch.tensor([[-3.0, 10.0]])
    a, b = math.log(2), math.log(4)
    expected = [
        [a, a * a, -1, 1, -3 * a, -3 * a * a, 3, -3],
        [-b, b * b, 0.75, 0.5625, -10 * b, 10 * b * b, 7.5, 5.625],
    ]
    found = features(log_ratio, advantage)
    assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_features_of_huge_moves_stay_finite():
    log_ratio, advantage = torch.tensor([80.0, -80.0, 10.0, -10.0]), torch.full((4,), 5.0)
    found = features(log_ratio, advantage)
    assert bool(found.isfinite().all())
    assert_close(found[:2], found[2:], rtol=0, atol=0)
    assert_close(found[0, :4], torch.tensor([10.0, 100.0, 1 - math.exp(10), (1 - math.exp(10)) ** 2]))


def test_the_output_by_hand():
    """One unit that reads log r and A log r: o = 3 tanh(2 log r + A log r / 2)."""
    objective = lpo(base="none", width=1, xi=0.01)
    with torch.no_grad():
        objective.hidden.weight.zero_()
        objective.hidden.weight[0, 0], objective.hidden.weight[0, 4] = 2.0, 0.5
        objective.output.weight.fill_(3.0)
    log_ratio, advantage = torch.tensor([[0.3, -0.3, 0.001], [2.0, 2.0, -1.0]], dtype=torch.float64)[:, None]
    expected = torch.tensor([[3 * math.tanh(0.9) - 0.01, 0.0, 0.0]], dtype=torch.float64)
    assert_close(drift(objective, log_ratio, advantage), expected, rtol=1e-14, atol=1e-16)


def test_there_are_1152_weights_and_no_biases():
    shapes = {name: tuple(p.shape) for name, p in LPO().named_parameters()}
    assert shapes == {"hidden.weight": (128, 8), "output.weight": (1, 128)}
    assert sum(p.numel() for p in LPO().parameters()) == 1152
    assert LPOConfig() == LPOConfig(base="ppo", width=128, xi=1e-4, normalize_advantage=True)


def test_initial_weights_have_the_documented_spread():
    objective = lpo(width=20_000)
    assert objective.hidden.weight.std().item() == pytest.approx(8**-0.5, rel=0.02)
    assert objective.output.weight.std().item() == pytest.approx(0.1 * 20_000**-0.5, rel=0.02)


# --- a drift, whatever the weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_never_negative_and_zero_at_and_around_the_policy_that_acted(base, scale):
    for seed in range(5):
        objective = lpo(seed, scale, base=base)
        log_ratio, advantage = moves()
        assert bool((drift(objective, log_ratio, advantage) >= 0).all())
        near = (log_ratio * 1e-4 / (20 * scale**2)).requires_grad_()  # |o| <= |W2| |W1| |x|, and |x| is below 5 |log r|
        value = drift(objective, near, advantage)
        (slope,) = torch.autograd.grad(value.sum(), near)
        assert not value.any() and not slope.any()
    assert bool((drift(objective, log_ratio, advantage) > 0).any())  # but not zero everywhere


@pytest.mark.parametrize("base", BASES)
def test_no_drift_and_no_slope_at_the_policy_that_acted_even_without_a_margin(base):
    log_ratio, (_, advantage) = torch.zeros(1, 100, dtype=torch.float64, requires_grad=True), moves(100)
    value = drift(lpo(scale=3.0, base=base, xi=0.0), log_ratio, advantage)
    (slope,) = torch.autograd.grad(value.sum(), log_ratio)
    assert not value.any() and not slope.any()


def test_at_the_policy_that_acted_it_is_the_plain_policy_gradient():
    """What is minimised is D - r A: at r = 1 its slope in log r is -A."""
    log_ratio, (_, advantage) = torch.zeros(1, 100, dtype=torch.float64, requires_grad=True), moves(100)
    ratio = log_ratio.exp()
    loss = lpo(scale=3.0).policy_loss(ratio, log_ratio, advantage, Hyper())
    (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert_close(slope, -advantage, rtol=0, atol=0)


# --- neutral settings ---------------------------------------------------------------------------------------------


class PlainSurrogate(PPOClip):
    """The importance-weighted policy gradient, written down."""

    def policy_loss(self, ratio, log_ratio, advantage, hyper):
        return -(ratio * advantage)


HAND_MADE = {"none": PlainSurrogate, "ppo": PPOClip}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", BASES)
def test_neutral_weights_are_the_hand_made_loss(base, dtype):
    """Gradients bit by bit, values up to the rounding of D - r A."""
    log_ratio, advantage = (x.to(dtype) for x in moves(spread=0.5))
    log_ratio[0, :100] = 0
    values, slopes = [], []
    for objective in (neutral(base, dtype), HAND_MADE[base]()):
        leaf = log_ratio.clone().requires_grad_()
        values.append(objective.policy_loss(leaf.exp(), leaf, advantage, Hyper(clip_range=0.2)))
        slopes.append(torch.autograd.grad(values[-1].mean(), leaf)[0])
    assert torch.equal(*slopes)
    rounding = torch.finfo(dtype).eps * (log_ratio.exp() + 2) * advantage.abs()
    assert bool(((values[0] - values[1]).abs() <= rounding).all())
    assert base == "ppo" or torch.equal(*values)


@pytest.mark.parametrize("env", ["control/cartpole", "control/pendulum"])
@pytest.mark.parametrize("base", BASES)
def test_neutral_weights_train_as_the_hand_made_algorithm(base, env):
    """Bit by bit, through epochs and minibatches of several updates; other weights train otherwise."""
    hyper = Hyper(learning_rate=3e-2, clip_range=0.1, ent_coef=0.01)
    config = PPOConfig(n_envs=4, n_steps=16, n_epochs=4, n_minibatches=2, hyper=hyper, agent=AgentConfig(hidden=(8,)))

    def trained(objective):
        return PPO(env, config, objective=objective, seeds=2, seed=3).learn(4 * 64).lifetimes.population.theta

    expected = trained(HAND_MADE[base]())
    assert torch.equal(trained(neutral(base)), expected)
    assert not torch.allclose(trained(lpo(base=base).float()), expected)
    assert not torch.allclose(trained(HAND_MADE["none" if base == "ppo" else "ppo"]()), expected)


def test_clipping_follows_the_agents_clip_range():
    """Also one for each lifetime."""
    log_ratio, advantage = torch.tensor([[0.3], [0.3]]).double(), torch.ones(2, 1).double()
    ranges = torch.tensor([[0.1], [0.5]], dtype=torch.float64)
    found = drift(neutral("ppo", torch.float64), log_ratio, advantage, Hyper(clip_range=ranges))
    assert_close(found, torch.tensor([[math.exp(0.3) - 1.1], [0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"base": "pop"}, "'pop'.*'ppo'"), ({"width": 0}, "width is 0.*at least 1"), ({"xi": -1e-4}, "xi is -0.0001")],
)
def test_settings_that_make_no_drift_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        LPOConfig(**settings)


# --- meta-training ------------------------------------------------------------------------------------------------


def lived(objective, agents):
    """A judgement of the agents after two updates of two epochs on fixed experience.

    The value has a network of its own and norms are not clipped, so that the targets do not depend on the drift, and
    differences see what the meta-gradient with its detached targets sees.
    """
    hyper = Hyper(learning_rate=0.3, ent_coef=0.01, max_grad_norm=math.inf)
    config = PPOConfig(n_envs=3, n_steps=5, n_epochs=2, n_minibatches=2, hyper=hyper)
    algorithm = Algorithm(config, Slots.fill(config, objective=objective, optimizer=SGD()))
    inner, generator = GraphInner(agents, algorithm.slots.optimizer, {}), torch.Generator().manual_seed(5)
    for k in range(2):
        data = experience.trajectory(experience.SPACES["mlp"], seed=k)
        algorithm.update(inner, data, experience.context(age=k), hyper, generator)
    outer = experience.trajectory(experience.SPACES["mlp"], seed=99)
    return lifetime_mean(inner.agent(outer.obs[:-1]).policy.log_prob(outer.action) * outer.reward).mean()


@pytest.mark.parametrize("base", BASES)
def test_meta_gradient_against_differences(base):
    objective, agents = lpo(base=base, width=5), experience.population("mlp", value=True)
    eta = list(objective.parameters())
    gradient = parameters_to_vector(torch.autograd.grad(lived(objective, agents), eta))
    assert bool((gradient != 0).all())
    start, step = parameters_to_vector(eta).detach(), 1e-6
    for direction in torch.eye(len(start), dtype=torch.float64):
        sides = []
        for sign in (1, -1):
            vector_to_parameters(start + sign * step * direction, eta)
            sides.append(lived(objective, agents).item())
        difference, exact = (sides[0] - sides[1]) / (2 * step), float(gradient @ direction)
        assert difference == pytest.approx(exact, rel=1e-5, abs=1e-5 * float(gradient.abs().max()))


class Loss(torch.nn.Module):
    """What `torch.func` can call."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, log_ratio, advantage):
        return self.objective.policy_loss(log_ratio.exp(), log_ratio, advantage, Hyper()).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", BASES)
def test_a_population_of_drifts_is_one_call(base, dtype):
    """Three networks over stacked weights: the losses and gradients of three alone."""
    members = [Loss(lpo(seed, scale=3.0, base=base).to(dtype)) for seed in range(3)]
    log_ratio, advantage = (x.to(dtype).view(3, -1) for x in moves(300))
    stacked = {k: torch.stack([m.state_dict()[k] for m in members]) for k in members[0].state_dict()}

    def loss(weights, log_ratio, advantage):
        return functional_call(members[0], weights, (log_ratio, advantage))

    found = vmap(loss)(stacked, log_ratio, advantage)
    slopes = vmap(grad(loss))(stacked, log_ratio, advantage)
    rtol = 1e-4 if dtype == torch.float32 else 1e-11
    for i, member in enumerate(members):
        alone = member(log_ratio[i], advantage[i])
        assert_close(found[i], alone, rtol=rtol, atol=rtol / 100)
        expected = torch.autograd.grad(alone, list(member.parameters()))
        assert_close([v[i] for v in slopes.values()], list(expected), rtol=rtol, atol=rtol / 100)


def test_a_file_brings_back_the_same_drift(tmp_path):
    objective, path = lpo(seed=7, base="none", width=16, xi=1e-6), tmp_path / "lpo.safetensors"
    artifacts.save(objective, path, {"family": "control/cartpole"})
    loaded = artifacts.get(path)
    assert type(loaded) is LPO and loaded.config == dataclasses.replace(LPOConfig(), base="none", width=16, xi=1e-6)
    assert loaded.provenance == {"family": "control/cartpole"}
    assert_close(drift(loaded, *moves()), drift(objective, *moves()), rtol=0, atol=0)


def test_it_has_a_picture(tmp_path, capsys):
    path = tmp_path / "drift.safetensors"
    artifacts.save(LPO(), path)
    assert show(str(path), None) == path.with_suffix(".png") and path.with_suffix(".png").stat().st_size > 5000
    assert "lpo (objective)" in capsys.readouterr().out
