"""LPG's own options: rewards in units of the largest seen, and a standardized push."""

import dataclasses

import experience
import pytest
import torch
from torch.testing import assert_close

from learned_rl.component import Context, Hyper
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from objectives.lpg import LPG

P, M = 2, 4
HYPER = Hyper(learning_rate=0.5, prediction_coef=0.7)
CONFIG = PPOConfig(n_envs=3, n_steps=5, n_epochs=1, n_minibatches=1, optimizer="sgd", hyper=HYPER)


def objective(**options):
    torch.manual_seed(4)
    return LPG(predictions=M, width=5, embedding=8, **options).double()


def live(net, scale, inner_type=PlainInner, updates=3, shift=0.0):
    """Theta after some updates, and the records, with lifetime 0's rewards times `scale`."""
    slots = Slots.fill(CONFIG, objective=net)
    algorithm, agents = Algorithm(CONFIG, slots), experience.population("tabular", {"prediction": M})
    inner, memory = inner_type(agents, slots.optimizer, {}), algorithm.initial_memory(agents.theta.detach())
    factor, records = torch.tensor([scale, 1.0], dtype=torch.float64)[:, None], []
    for k in range(updates):
        data = experience.trajectory(experience.SPACES["tabular"], seed=k)
        data = dataclasses.replace(data, reward=(data.reward + shift * k) * factor)
        context = Context(torch.full((P,), float(k)), torch.full((P,), 9.0), memory)
        records.append(algorithm.update(inner, data, context, HYPER, torch.Generator()))
        memory = records[-1].memory
    return inner.theta, records


@pytest.mark.parametrize("inner_type", [PlainInner, GraphInner])
@pytest.mark.parametrize("scale", [1 / 64, 3.7, 1000.0])
def test_a_unit_of_reward_means_nothing_to_a_scale_free_network(scale, inner_type):
    """All rewards of a lifetime times a constant: the same lifetime, and the same meta-gradient of a window."""
    net = objective(scale_free=True)
    ends, grads = [], []
    for factor in (1.0, scale):
        theta, _ = live(net, factor, inner_type, shift=0.3)
        ends.append(theta)
        if inner_type is GraphInner:
            grads.append(torch.autograd.grad(theta.square().sum(), list(net.parameters())))
    assert_close(*ends, rtol=1e-11, atol=1e-12)
    if grads:
        assert_close(*grads, rtol=1e-9, atol=1e-12)
    plain = [live(objective(), factor, inner_type)[0] for factor in (1.0, scale)]
    assert (plain[0] - plain[1])[0].abs().max() > 1e-4  # without the option it does
    assert_close(plain[0][1], plain[1][1], rtol=0, atol=0)


def test_the_unit_is_the_largest_reward_so_far():
    net, largest = objective(scale_free=True), torch.zeros(P)
    _, records = live(net, 5.0, updates=4)
    grown = 0
    for record in records:
        now = torch.maximum(largest, record.trajectory.reward.abs().amax((0, 2)))
        grown, largest = grown + int((now > largest).sum()), now
        assert_close(record.memory["objective/largest_reward"][:, 0], largest, rtol=0, atol=0)
    assert P < grown < 4 * P  # some rollouts raised it, some did not
    assert net.initial_memory(3)["largest_reward"].tolist() == [[0.0]] * 3
    assert objective().initial_memory(3) == {}


def test_no_reward_at_all_is_no_trouble():
    """Also the first reward ever, however late."""
    theta, records = live(objective(scale_free=True), 0.0)
    assert theta.isfinite().all() and records[-1].batch["pi_hat"].isfinite().all()
    assert records[-1].memory["objective/largest_reward"][0] == 0


@pytest.mark.parametrize("options", [{}, {"scale_free": True}, {"core": "gru", "see_gamma": False}])
def test_a_standardized_push_has_mean_zero_and_unit_spread_in_each_lifetime(options):
    _, records = live(objective(standardize=True, **options), 10.0)
    for record in records:
        push = record.batch["pi_hat"]
        assert_close(push.mean((0, 2)), torch.zeros(P, dtype=torch.float64), rtol=0, atol=1e-12)
        assert_close(push.std((0, 2)), torch.ones(P, dtype=torch.float64), rtol=0, atol=5e-6)  # 1e-8 is added
        assert not torch.allclose(push[:, 0], push[:, 1])
    _, loose = live(objective(**options), 10.0)
    assert ((loose[0].batch["pi_hat"].std((0, 2)) - 1).abs() > 0.01).all()


def test_a_standardized_push_needs_no_bias():
    """It would be taken away again: a weight that cannot learn."""
    assert objective(standardize=True).policy_head.bias is None
    assert not objective().policy_head.bias.any()
