"""Loaded DiCE: the actor-critic's gradient, and right higher derivatives, against a process solved exactly."""

import dataclasses

import experience
import pytest
import torch
from probes import ProbeFamily
from torch.testing import assert_close

from experiments.oracles.dice_mdp import RandomMDP
from learned_rl import PPO
from learned_rl.component import Hyper
from learned_rl.defaults import PPOClip, PPOClipConfig
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.returns import gae
from learned_rl.types import UserError
from objectives.dice import LoadedDiCE, LoadedDiCEConfig, box, dice, earlier, loaded_dice

P, HYPER = 2, Hyper(gamma=0.9, gae_lambda=0.8, ent_coef=0.1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivatives(value, theta, order):
    """Derivatives of a scalar by theta, flattened, from the first to `order`: [D], [D, D], ..."""
    found = [value]
    for _ in range(order):
        rows = [torch.autograd.grad(x, theta, retain_graph=True, create_graph=True)[0] for x in found[-1].flatten()]
        found.append(torch.stack([r.flatten() for r in rows]).view(*found[-1].shape, -1))
    return found[1:]


# --- the functions ------------------------------------------------------------------------------------------------


def experience_of_a_few(T=4):
    """Log-probabilities [T, 1, 2] that depend on three numbers, with an end of an episode within."""
    theta = normal(3).requires_grad_()
    log_prob = -(normal(T, 1, 2, 3, seed=1) @ theta).exp()
    done = torch.zeros(T, 1, 2, dtype=torch.bool)
    done[1, 0, 0] = True
    return theta, log_prob, done


def test_box_is_one_with_the_derivatives_of_exp():
    x = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    value = box(x)
    for _ in range(4):
        assert value.item() == 1
        (value,) = torch.autograd.grad(value, x, create_graph=True)


def test_earlier_decisions_fade_and_end_with_the_episode():
    log_prob = torch.tensor([1.0, 10.0, 100.0, 1000.0]).double().view(4, 1, 1)
    done = torch.tensor([False, True, False, False]).view(4, 1, 1)
    assert earlier(log_prob, torch.zeros_like(done)).flatten().tolist() == [0, 1, 11, 111]
    assert earlier(log_prob, torch.zeros_like(done), 0.5).flatten().tolist() == [0, 0.5, 5.25, 52.625]
    assert earlier(log_prob, done, 0.5).flatten().tolist() == [0, 0.5, 0, 50]
    assert not earlier(log_prob, done, 0.0).any()


@pytest.mark.parametrize("dice_lambda", [0.0, 0.6, 1.0])
def test_it_is_the_formula_of_the_paper(dice_lambda):
    """Step by step, box(w) - box(w - log pi), to the third derivative."""
    theta, log_prob, done = experience_of_a_few()
    advantage, total = normal(*log_prob.shape, seed=2), 0.0
    for b in range(2):
        w = torch.zeros(())
        for t in range(len(log_prob)):
            w = dice_lambda * w + log_prob[t, 0, b]
            total = total + advantage[t, 0, b] * (box(w) - box(w - log_prob[t, 0, b]))
            w = torch.zeros(()) if done[t, 0, b] else w
    found = loaded_dice(log_prob, advantage, done, dice_lambda).sum()
    for x, y in zip(derivatives(found, theta, 3), derivatives(total, theta, 3), strict=True):
        assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_without_a_baseline_it_is_dice():
    """lambda = 1 and advantages that are the rest of the episode's rewards: all derivatives, whatever the rewards."""
    theta, log_prob, done = experience_of_a_few()
    reward, zero = normal(*log_prob.shape, seed=2), torch.zeros(log_prob.shape, dtype=torch.float64)
    rest = gae(reward, zero, zero, done, torch.zeros_like(done), 1.0, 1.0)
    plain = dice(log_prob, reward, done)
    assert_close(plain, reward, rtol=0, atol=0)
    loaded = loaded_dice(log_prob, rest, done).sum()
    for x, y in zip(derivatives(loaded, theta, 3), derivatives(plain.sum(), theta, 3), strict=True):
        assert_close(x, y, rtol=1e-10, atol=1e-12)


# --- the objective ------------------------------------------------------------------------------------------------


def loss(objective, theta=None, seed=1):
    """[P] on a rollout with ends of episodes, at the parameters that acted."""
    agents = experience.population("mlp", value=True)
    rollout = experience.trajectory(experience.SPACES["mlp"], seed)
    theta = agents.theta.detach().requires_grad_() if theta is None else theta
    out = agents.bind(theta)(rollout.obs)
    acted = out.policy.map(lambda x: x[:-1]).log_prob(rollout.action).detach()
    rollout = dataclasses.replace(rollout, log_prob=acted)
    next_value = rollout.next_value(out.value, lambda obs: agents(obs).value).detach()
    batch, _ = objective.prepare(rollout, out.detach(), next_value, HYPER, experience.context())
    rows = {"action": rollout.action, "log_prob": rollout.log_prob} | batch
    return objective.loss(out.map(lambda x: x[:-1]), rows, HYPER)[0], theta, rows


@pytest.mark.parametrize("dice_lambda", [0.0, 0.5, 1.0])
def test_its_gradient_is_the_actor_critics(dice_lambda):
    found = []
    for objective in (LoadedDiCE(LoadedDiCEConfig(dice_lambda)), PPOClip(PPOClipConfig(normalize_advantage=False))):
        value, theta, _ = loss(objective)
        found.append(torch.autograd.grad(value.sum(), theta)[0])
    assert_close(*found, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dice_lambda", [0.0, 0.5, 1.0])
def test_its_second_derivative_is_the_functions(dice_lambda):
    """Of the policy's part of the loss, along a random direction."""
    objective, found = LoadedDiCE(LoadedDiCEConfig(dice_lambda)), []
    value, theta, rows = loss(objective)
    agents, rollout = experience.population("mlp", value=True), experience.trajectory(experience.SPACES["mlp"], 1)
    out = agents.bind(theta)(rollout.obs[:-1])
    log_prob = out.policy.log_prob(rollout.action)
    expected = -loaded_dice(log_prob, rows["advantage"], rollout.done, dice_lambda).mean((0, 2))
    expected = expected + HYPER.vf_coef * (out.value - rows["returns"]).square().mean((0, 2))
    expected = expected - HYPER.ent_coef * out.policy.entropy().mean((0, 2))
    for x in (value, expected):
        (slope,) = torch.autograd.grad(x.sum(), theta, create_graph=True)
        found.append(torch.autograd.grad((slope * normal(*theta.shape, seed=3)).sum(), theta)[0])
    assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_minibatch_is_refused():
    config = PPOConfig(n_envs=3, n_steps=5, n_minibatches=3)
    with pytest.raises(UserError, match=r"n_minibatches is 3: 'loaded_dice' reads whole rollouts; expected 1"):
        Algorithm(config, Slots.fill(config, objective=LoadedDiCE()))


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_wrong_lambda_is_named(value):
    with pytest.raises(UserError, match=f"dice_lambda is {value}: expected at"):
        LoadedDiCEConfig(dice_lambda=value)


@pytest.mark.parametrize("as_numbers", [False, True])
def test_it_learns_with_its_own_settings(as_numbers):
    """Every seed takes the better action in both states, as a table and as a network."""
    family = ProbeFamily("both", as_numbers=as_numbers)
    agent = PPO(family, objective=LoadedDiCE(), seeds=3)
    agent.learn(100 * 160, lambda steps, metrics: None)
    with torch.no_grad():
        assert (
            agent.lifetimes.population(family.show(torch.arange(2).expand(3, -1))).policy.mode().tolist()
            == [[0, 1]] * 3
        )


# --- the oracle ---------------------------------------------------------------------------------------------------

LOGITS = normal(5, 4, seed=1)


def test_the_process_is_solved_exactly():
    """A long horizon is the matrix inverse; second derivatives agree with finite differences of the first."""
    long = RandomMDP(horizon=1000)
    policy = LOGITS.softmax(-1)
    along = torch.einsum("sa,sat->st", policy, long.transition)
    value = torch.linalg.solve(torch.eye(5).double() - 0.95 * along, (policy * long.reward).sum(-1))
    assert_close(long.values(LOGITS)[0], value, rtol=1e-10, atol=1e-12)
    short, move = RandomMDP(), 1e-5 * normal(5, 4, seed=2)
    gradient, hessian = short.derivatives(LOGITS)
    up, down = (short.derivatives(LOGITS + sign * move)[0] for sign in (1, -1))
    assert_close((up - down) / 2, hessian @ move.flatten(), rtol=1e-6, atol=1e-12)
    rise = (short.expected(LOGITS + move) - short.expected(LOGITS - move)) / 2
    assert_close(rise, gradient @ move.flatten(), rtol=1e-6, atol=1e-14)


def test_its_samples_have_the_expected_return():
    mdp = RandomMDP()
    state, action = mdp.sample(LOGITS, (4, 500), torch.Generator().manual_seed(0))
    discount = mdp.gamma ** torch.arange(mdp.horizon)[:, None, None]
    returns = (discount * mdp.reward[state[:-1], action]).sum(0).flatten()
    assert abs(returns.mean() - mdp.expected(LOGITS)) < 4 * returns.std() / 2000**0.5


def estimates(surrogate, lifetimes, copies, gae_lambda=1.0, seed=0):
    """Gradient [P, 20] and Hessian [P, 20, 20] of the discounted return, from `copies` episodes for each lifetime.

    The baseline is the exact value; with `gae_lambda` 0 so is the rest of the return.
    """
    mdp = RandomMDP()
    state, action = mdp.sample(LOGITS, (lifetimes, copies), torch.Generator().manual_seed(seed))
    going = torch.zeros(action.shape, dtype=torch.bool)
    value = mdp.values(LOGITS).gather(1, state.flatten(1)).view(state.shape)
    reward = mdp.reward[state[:-1], action]
    advantage = gae(reward, value[:-1], value[1:], going, going, mdp.gamma, gae_lambda)
    discount = mdp.gamma ** torch.arange(mdp.horizon, dtype=torch.float64)[:, None, None]
    theta = LOGITS.expand(lifetimes, 5, 4).clone().requires_grad_()
    log_prob = mdp.log_prob(theta, state[:-1], action)
    total = surrogate(log_prob, discount * advantage, going).sum(0).mean(1).sum()
    gradient = torch.autograd.grad(total, theta, create_graph=True)[0].flatten(1)
    rows = [torch.autograd.grad(g.sum(), theta, retain_graph=True)[0].flatten(1) for g in gradient.unbind(1)]
    return gradient.detach(), torch.stack(rows, 1)


def loaded(dice_lambda):
    return lambda log_prob, advantage, done: loaded_dice(log_prob, advantage, done, dice_lambda)


def plain(log_prob, advantage, done):
    """What the actor-critic differentiates."""
    return advantage * log_prob


def correlation(found, true):
    """Mean over lifetimes of the correlation between the entries of an estimate and the truth."""
    pairs = [torch.corrcoef(torch.stack([x.flatten(), true.flatten()]))[0, 1] for x in found]
    return torch.stack(pairs).mean().item()


@pytest.mark.parametrize(("dice_lambda", "few", "many"), [(1.0, 0.5, 0.9), (0.9, 0.75, 0.95), (0.0, 0.9, 0.94)])
def test_estimates_come_closer_to_the_truth_with_the_batch(dice_lambda, few, many):
    """Batches of 64 and 512; the less earlier actions count, the sooner, and the less close in the end."""
    true = RandomMDP().derivatives(LOGITS)
    small, large = (estimates(loaded(dice_lambda), 4, copies) for copies in (64, 512))
    gradient, hessian = ([correlation(batch[i], true[i]) for batch in (small, large)] for i in (0, 1))
    assert 0.97 < gradient[0] < gradient[1] and gradient[1] > 0.99
    assert few < hessian[0] < hessian[1] and hessian[1] > many


@pytest.mark.slow
@pytest.mark.parametrize(("dice_lambda", "least"), [(1.0, 0.98), (0.9, 0.99), (0.0, 0.95)])
def test_a_large_batch_is_close_to_the_truth(dice_lambda, least):
    true = RandomMDP().derivatives(LOGITS)
    gradient, hessian = estimates(loaded(dice_lambda), 2, 4096)
    assert correlation(gradient, true[0]) > 0.999 and correlation(hessian, true[1]) > least


def test_what_the_actor_critic_differentiates_knows_the_gradient_alone():
    true = RandomMDP().derivatives(LOGITS)
    gradient, hessian = estimates(plain, 2, 4096)
    assert correlation(gradient, true[0]) > 0.999 and abs(correlation(hessian, true[1])) < 0.15


def excess(found, true):
    """Squared distance of the mean over lifetimes from the truth over what chance makes of it: about 1 if unbiased."""
    return float((found.mean(0) - true).square().sum() / (found.var(0).sum() / len(found)))


@pytest.mark.parametrize("gae_lambda", [0.0, 1.0])
def test_what_earlier_actions_add_is_bias_taken_and_variance_given(gae_lambda):
    """With the exact advantage's own noise (gae_lambda 0) and with sampled returns."""
    true = RandomMDP().derivatives(LOGITS)
    full, half, none = (estimates(loaded(x), 200, 16, gae_lambda) for x in (1.0, 0.9, 0.0))
    assert_close(full[0], none[0], rtol=1e-9, atol=1e-12)  # the gradient does not depend on it
    assert excess(full[0], true[0]) < 3 and excess(full[1], true[1]) < 1.5
    assert excess(none[1], true[1]) > 50
    spread = [x[1].var(0).sum() for x in (full, half, none)]
    assert spread[0] > 3 * spread[1] > 9 * spread[2]
