"""IMPALA: the actor-critic on-policy, its definition off-policy, and its slopes in gamma, lambda and alpha."""

import dataclasses
import math

import experience
import pytest
import torch
from probes import ProbeFamily
from torch.testing import assert_close

from learned_rl import PPO
from learned_rl.architecture import AgentOutput
from learned_rl.component import Hyper, lifetime_mean
from learned_rl.defaults import PPOClip, PPOClipConfig
from learned_rl.distributions import Categorical
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.returns import vtrace
from learned_rl.types import UserError
from learned_rl.update_rules import SGD
from objectives.dice import LoadedDiCE
from objectives.dpo import DPO
from objectives.impala import Impala, ImpalaConfig
from objectives.lpo import LPO

HYPER = Hyper(gamma=0.9, gae_lambda=0.8, vtrace_alpha=0.6, ent_coef=0.1)
A2C = PPOClip(PPOClipConfig(normalize_advantage=False))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rollout(on_policy=False, seed=1):
    """Agents, their experience with ends of episodes, outputs [T+1, P, B] with a graph, and V of what followed."""
    agents = experience.population("mlp", value=True)
    data = experience.trajectory(experience.SPACES["mlp"], seed)
    out = agents(data.obs)
    if on_policy:
        acted = out.policy.map(lambda x: x[:-1]).log_prob(data.action).detach()
        data = dataclasses.replace(data, log_prob=acted)
    return agents, data, out, data.next_value(out.value, lambda obs: agents(obs).value).detach()


def loss_of(objective, hyper=HYPER, **how):
    """The loss [P] at the parameters that acted or would have, its metrics, and the agents."""
    agents, data, out, next_value = rollout(**how)
    batch, _ = objective.prepare(data, out.detach(), next_value, hyper, experience.context())
    rows = {"action": data.action, "log_prob": data.log_prob} | batch
    return *objective.loss(out.map(lambda x: x[:-1]), rows, hyper), agents


def slope(value, agents, **settings):
    return torch.autograd.grad(value.sum(), agents.theta, **settings)[0]


# --- what it minimises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.8, 1.0])
def test_on_policy_its_gradient_is_the_actor_critics(gae_lambda, alpha):
    hyper = HYPER.replace(gae_lambda=gae_lambda, vtrace_alpha=alpha, vf_coef=0.3)
    found, expected = (loss_of(objective, hyper, on_policy=True) for objective in (Impala(), A2C))
    slopes = [slope(value, agents) for value, _, agents in (found, expected)]
    assert slopes[1].abs().max() > 0.01
    assert_close(*slopes, rtol=1e-11, atol=1e-13)
    assert found[1].keys() == expected[1].keys()
    for name in ("value_loss", "entropy", "approx_kl", "clip_fraction"):
        assert_close(found[1][name], expected[1][name], rtol=1e-11, atol=1e-13)


def by_hand(objective=None):
    """Two steps of one episode: pi is (1/4, 3/4) and (1/2, 1/2), mu of the actions (1/8, 1), so w = 2 and 1/2."""
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64).log().view(2, 1, 1, 2).requires_grad_()
    value = torch.tensor([1.0, 2.0], dtype=torch.float64).view(2, 1, 1).requires_grad_()
    column = lambda *x: torch.tensor(x, dtype=torch.float64).view(2, 1, 1)  # noqa: E731
    batch = {"reward": column(3, 4), "next_value": column(99, 6), "log_prob": column(1 / 8, 1).log()}
    batch |= {k: torch.zeros(2, 1, 1, dtype=torch.bool) for k in ("terminated", "truncated")}
    batch["action"] = torch.tensor([0, 1]).view(2, 1, 1)
    hyper = Hyper(gamma=0.5, gae_lambda=0.5, vtrace_alpha=0.5, pg_coef=2.0, vf_coef=0.25, ent_coef=0.1)
    out = AgentOutput(Categorical(logits), value)
    return *(objective or Impala()).loss(out, batch, hyper), logits, value


def test_numbers_by_hand():
    """rho = c = ((2 + 1) / 2, 1/2) and deltas (3 + 2/2 - 1, 4 + 6/2 - 2) = (3, 5)."""
    targets = [1 + 1.5 * 3 + 0.5 * 0.5 * 1.5 * (0.5 * 5), 2 + 0.5 * 5]
    advantages = [1.5 * (3 + 0.5 * (0.5 * targets[1] + 0.5 * 2) - 1), 0.5 * 5]
    policy = -(advantages[0] * math.log(0.25) + advantages[1] * math.log(0.5)) / 2
    error = ((targets[0] - 1) ** 2 + (targets[1] - 2) ** 2) / 2
    entropy = (math.log(4) - 0.75 * math.log(3) + math.log(2)) / 2
    loss, metrics, logits, value = by_hand()
    assert loss.tolist() == pytest.approx([2 * policy + 0.25 * error - 0.1 * entropy], rel=1e-12)
    ratios = {"approx_kl": (2 - 1 - math.log(2) + 0.5 - 1 - math.log(0.5)) / 2, "clip_fraction": 1.0}
    expected = {"policy_gradient_loss": policy, "value_loss": error, "entropy": entropy} | ratios
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, rel=1e-12)
    assert not any(v.requires_grad for v in metrics.values())
    _, from_value = torch.autograd.grad(loss.sum(), (logits, value))
    assert from_value.flatten().tolist() == pytest.approx([0.25 * (1 - targets[0]), 0.25 * (2 - targets[1])])


def test_thresholds_by_hand():
    """w = 2 is a temporal difference's weight as it is, and (2 + 1/4) / 2 a trace's."""
    targets = [1 + 2 * 3 + 0.5 * 0.5 * 1.125 * (0.5 * 5), 2 + 0.5 * 5]
    error = ((targets[0] - 1) ** 2 + (targets[1] - 2) ** 2) / 2
    _, metrics, *_ = by_hand(Impala(ImpalaConfig(rho_clip=2.0, c_clip=0.25)))
    assert metrics["value_loss"].item() == pytest.approx(error, rel=1e-12)


def test_numbers_of_each_lifetime_and_of_each_step():
    """Tensors of equal numbers are the number; lifetimes with numbers of their own are those alone."""
    names = ("gamma", "gae_lambda", "vtrace_alpha")
    expected, *_ = loss_of(Impala())
    for shape in ((2, 1), (5, 2, 3)):
        same = HYPER.replace(**{k: torch.full(shape, getattr(HYPER, k), dtype=torch.float64) for k in names})
        assert_close(loss_of(Impala(), same)[0], expected, rtol=1e-12, atol=1e-14)
    every = (*names, "pg_coef", "vf_coef", "ent_coef")
    spread = {k: torch.tensor([[1.0], [0.7]], dtype=torch.float64) * getattr(HYPER, k) for k in every}
    apart = loss_of(Impala(), HYPER.replace(**spread))[0]
    for p in range(2):
        alone = loss_of(Impala(), HYPER.replace(**{k: v[p].item() for k, v in spread.items()}))[0]
        assert_close(apart[p], alone[p], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", [PPOClip(), DPO(), LPO(), LoadedDiCE(), Impala()], ids=lambda x: x.name)
def test_the_policys_loss_has_a_weight(objective):
    """One for each lifetime; 1 by default, which changes nothing, bit by bit. What is logged is before it."""
    objective, own = objective.double(), torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    ones = torch.ones_like(own)
    found = [loss_of(objective, HYPER.replace(pg_coef=c)) for c in (0.0, 1.0, ones, own)]
    values, metrics, slopes = [x[0] for x in found], found[1][1], [slope(x[0], x[2]) for x in found]
    assert torch.equal(values[1], loss_of(objective)[0])
    assert torch.equal(values[2], values[1]) and torch.equal(slopes[2], slopes[1])
    plain = metrics["policy_gradient_loss"] + 0.5 * metrics["value_loss"] - 0.1 * metrics["entropy"]
    assert_close(values[1], plain, rtol=1e-12, atol=1e-14)
    assert (slopes[1] - slopes[0]).abs().max() > 0.01
    assert_close(values[3], torch.lerp(values[0], values[1], own.squeeze(1)), rtol=1e-11, atol=1e-13)
    assert_close(slopes[3], torch.lerp(slopes[0], slopes[1], own), rtol=1e-10, atol=1e-12)
    assert_close(found[3][1], metrics, rtol=0, atol=0)


# --- epochs -------------------------------------------------------------------------------------------------------


def test_every_epoch_has_targets_of_its_own():
    """Two steps of SGD, as they are written down: values and ratios of the second are those after the first.

    Only states that a loss is never shown, the last and the truncated ones, keep the value with which they began.
    """
    hyper = HYPER.replace(learning_rate=0.3, max_grad_norm=math.inf)
    config = PPOConfig(n_envs=3, n_steps=5, n_epochs=2, n_minibatches=1, hyper=hyper)
    algorithm = Algorithm(config, Slots.fill(config, objective=Impala(), optimizer=SGD()))
    agents, data, _, next_value = rollout()
    assert bool(data.truncated[:-1].any())
    theta = agents.theta.detach().clone()
    for _ in range(2):
        theta.requires_grad_()
        out = agents.bind(theta)(data.obs[:-1])
        log_prob, value = out.policy.log_prob(data.action), out.value.detach()
        following = next_value.clone()
        following[:-1] = torch.where(data.truncated[:-1], next_value[:-1], value[1:])
        happened = (data.reward, value, following, data.terminated, data.truncated, log_prob - data.log_prob)
        target, advantage = vtrace(*happened, 0.9, 0.8, alpha=0.6)
        loss = -advantage * log_prob + 0.5 * (out.value - target).square() - 0.1 * out.policy.entropy()
        theta = theta.detach() - 0.3 * torch.autograd.grad(lifetime_mean(loss).sum(), theta)[0]
    algorithm.update(PlainInner(agents, SGD(), {}), data, experience.context(), hyper, torch.Generator())
    assert_close(agents.theta.detach(), theta, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("epochs", "matters"), [(1, False), (2, True)])
def test_alpha_matters_once_the_policy_has_moved(epochs, matters):
    alpha = torch.full((2, 1), 0.6, dtype=torch.float64, requires_grad=True)
    hyper = HYPER.replace(learning_rate=0.3, vtrace_alpha=alpha)
    config = PPOConfig(n_envs=3, n_steps=5, n_epochs=epochs, n_minibatches=1, hyper=hyper)
    algorithm = Algorithm(config, Slots.fill(config, objective=Impala(), optimizer=SGD()))
    agents, data, *_ = rollout(on_policy=True)
    inner = GraphInner(agents, SGD(), {})
    algorithm.update(inner, data, experience.context(), hyper, torch.Generator())
    (found,) = torch.autograd.grad((inner.theta * normal(*agents.theta.shape)).sum(), alpha)
    assert bool(((found.abs() > 1e-6) if matters else (found.abs() < 1e-12)).all())


# --- slopes in what is learned ------------------------------------------------------------------------------------


def descended(hyper, objective=None):
    """A random function of the loss's gradient, off-policy, with a graph to the numbers."""
    value, _, agents = loss_of(objective or Impala(), hyper)
    return (slope(value, agents, create_graph=True) * normal(*agents.theta.shape, seed=3)).sum()


@pytest.mark.parametrize("shape", [(2, 1), (5, 2, 3)], ids=["per-lifetime", "per-step"])
@pytest.mark.parametrize("name", ["vtrace_alpha", "gamma", "gae_lambda"])
def test_the_slope_of_the_gradient_against_differences(name, shape):
    x, step = torch.full(shape, 0.6, dtype=torch.float64, requires_grad=True), 1e-5
    (exact,) = torch.autograd.grad(descended(HYPER.replace(**{name: x})), x)
    assert exact.abs().max() > 1e-3
    for i, direction in enumerate(torch.eye(x.numel(), dtype=torch.float64).view(-1, *shape)):
        up, down = (descended(HYPER.replace(**{name: x.detach() + s * step * direction})) for s in (1, -1))
        assert abs((up - down) / (2 * step) - exact.flatten()[i]) < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("name", ["pg_coef", "vf_coef", "ent_coef"])
def test_weights_have_slopes_too(name):
    x = torch.full((2, 1), 0.6, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(descended(HYPER.replace(**{name: x})), x)
    rise = [descended(HYPER.replace(**{name: torch.tensor([[a], [0.6]]).double()})) for a in (0.6, 1.6)]  # it is linear
    assert exact[0].abs() > 1e-3
    assert_close(rise[1] - rise[0], exact[0, 0], rtol=1e-9, atol=1e-12)


def test_normalised_advantages_are_so_by_constants():
    """Mean 0 and spread 1 for each lifetime, while slopes are those of the advantages divided by a constant."""
    _, data, out, next_value = rollout()
    plain, normalising = Impala(), Impala(ImpalaConfig(normalize_advantage=True))
    batch, _ = plain.prepare(data, out.detach(), next_value, HYPER, experience.context())
    log_ratio = out.policy.map(lambda x: x[:-1]).log_prob(data.action) - data.log_prob
    alpha = torch.full((2, 1), 0.6, dtype=torch.float64, requires_grad=True)
    said = [
        x.targets(out.value[:-1], log_ratio, batch, HYPER.replace(vtrace_alpha=alpha)) for x in (plain, normalising)
    ]
    (target, advantage), (same, normalised) = said
    assert torch.equal(target, same)
    assert_close(normalised.mean((0, 2)), torch.zeros(2, dtype=torch.float64))
    assert_close(normalised.std((0, 2)), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    weights = normal(*advantage.shape)
    fixed = advantage / (advantage.detach().std((0, 2), keepdim=True) + 1e-8)
    slopes = [torch.autograd.grad((x * weights).sum(), alpha, retain_graph=True)[0] for x in (normalised, fixed)]
    assert slopes[1].abs().min() > 1e-3
    assert_close(*slopes, rtol=1e-10, atol=1e-12)


# --- in use -------------------------------------------------------------------------------------------------------


def test_a_minibatch_is_refused():
    config = PPOConfig(n_envs=3, n_steps=5, n_minibatches=3)
    with pytest.raises(UserError, match=r"n_minibatches is 3: 'impala' reads whole rollouts; expected 1"):
        Algorithm(config, Slots.fill(config, objective=Impala()))


@pytest.mark.parametrize("name", ["rho_clip", "c_clip"])
def test_a_wrong_threshold_is_named(name):
    with pytest.raises(UserError, match=f"{name} is -0.1"):
        ImpalaConfig(**{name: -0.1})


def test_its_own_settings():
    config = PPOConfig.suited(Impala(), experience.SPACES["mlp"])
    assert (config.n_epochs, config.n_minibatches, config.n_steps, config.optimizer) == (1, 1, 20, "rmsprop")
    assert (config.hyper.gae_lambda, config.hyper.vtrace_alpha, config.hyper.pg_coef) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("as_numbers", [False, True])
def test_it_learns_with_its_own_settings(as_numbers, epochs):
    """Every seed takes the better action in both states, as a table and as a network."""
    family = ProbeFamily("both", as_numbers=as_numbers)
    config = dataclasses.replace(PPOConfig.suited(Impala(), family.observation_space), n_epochs=epochs)
    agent = PPO(family, config, objective=Impala(), seeds=3)
    agent.learn(100 * 160, lambda steps, metrics: None)
    with torch.no_grad():
        out = agent.lifetimes.population(family.show(torch.arange(2).expand(3, -1)))
    assert out.policy.mode().tolist() == [[0, 1]] * 3
