"""DPO: the drift's published values and shape, and that it is a penalty added to the plain policy gradient."""

import math
import sys

import experience
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from learned_rl.component import Hyper
from objectives import dpo
from objectives.dpo import DPO, DPOConfig, drift


def penalty(ratio, advantage, **settings):
    ratio, advantage = (torch.as_tensor(x, dtype=torch.float64) for x in (ratio, advantage))
    return drift(ratio, ratio.log(), advantage, **settings)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 1, 0.010163),
        (2, 2, 0.476812),
        (3, 0.5, 0.075766),
        (0.5, 1, 0),
        (0.5, -1, 0.201457),
        (0.8, -2, 0.067422),
        (1.5, -1, 0),
    ],
)
def test_values(ratio, advantage, expected):
    """Eq. 9 of the paper with alpha = 2 and beta = 0.6, computed by hand to six decimals."""
    assert abs(float(penalty(ratio, advantage)) - expected) < 6e-7


@pytest.mark.parametrize("advantage", [-3.0, -0.1, 0.0, 0.1, 3.0])
def test_no_drift_and_no_slope_where_the_policy_has_not_moved(advantage):
    log_ratio = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = drift(log_ratio.exp(), log_ratio, torch.tensor(advantage, dtype=torch.float64))
    (slope,) = torch.autograd.grad(value, log_ratio)
    assert value.item() == 0 and slope.item() == 0


@given(st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_never_negative_and_only_along_the_advantage(ratio, advantage):
    value = float(penalty(ratio, advantage))
    assert value >= 0
    if (ratio - 1) * advantage <= 0:  # a move against the advantage is not penalised, but for the last digit
        move = max(abs(ratio - 1), abs(math.log(ratio))) * abs(advantage)
        assert value <= 2 * sys.float_info.epsilon * move


def test_the_penalty_grows_with_the_move_and_with_hardness():
    moves = penalty(torch.linspace(1, 4, 50), torch.ones(50))
    assert bool((moves.diff() > 0).all())
    assert penalty(2.0, 2.0, alpha=1.0) > penalty(2.0, 2.0) > penalty(2.0, 2.0, alpha=4.0)
    assert penalty(0.5, -1.0, beta=0.3) > penalty(0.5, -1.0) > penalty(0.5, -1.0, beta=1.2)


def policy_gradient(objective, agents, rollout, advantage):
    """d/d theta of the objective's policy term, and the log-probabilities it is made of."""
    log_prob = agents(rollout.obs[:-1]).policy.log_prob(rollout.action)
    log_ratio = log_prob - rollout.log_prob
    loss = objective.policy_loss(log_ratio.exp(), log_ratio, advantage, Hyper()).mean()
    return torch.autograd.grad(loss, agents.theta, retain_graph=True)[0], log_prob, log_ratio


def plain_gradient(agents, log_prob, weights):
    return torch.autograd.grad(-(log_prob * weights).mean(), agents.theta)[0]


def sample():
    rollout, agents = experience.trajectory(experience.SPACES["mlp"], 1), experience.population("mlp", value=True)
    return rollout, agents, torch.randn(rollout.reward.shape, dtype=torch.float64)


def test_without_drift_it_is_the_importance_weighted_policy_gradient(monkeypatch):
    rollout, agents, advantage = sample()
    drifting, log_prob, log_ratio = policy_gradient(DPO(), agents, rollout, advantage)
    plain = plain_gradient(agents, log_prob, log_ratio.exp().detach() * advantage)
    assert (drifting - plain).abs().max() > 1e-3  # away from r = 1 the drift matters
    monkeypatch.setattr(dpo, "drift", lambda ratio, *rest: torch.zeros_like(ratio))
    assert_close(policy_gradient(DPO(), agents, rollout, advantage)[0], plain, rtol=1e-12, atol=1e-14)


def test_at_the_policy_that_acted_it_is_the_plain_policy_gradient():
    rollout, agents, advantage = sample()
    with torch.no_grad():
        acted = agents(rollout.obs[:-1]).policy.log_prob(rollout.action)
    rollout.log_prob.copy_(acted)
    found, log_prob, _ = policy_gradient(DPO(), agents, rollout, advantage)
    assert_close(found, plain_gradient(agents, log_prob, advantage), rtol=1e-12, atol=1e-14)


def test_settings_reach_the_drift():
    ratio, advantage = torch.tensor([2.0, 0.5]), torch.tensor([2.0, -1.0])
    for settings in ({"alpha": 1.0}, {"beta": 0.3}):
        found = DPO(DPOConfig(**settings)).policy_loss(ratio, ratio.log(), advantage, Hyper())
        assert_close(found, drift(ratio, ratio.log(), advantage, **settings) - ratio * advantage)
        assert not torch.equal(found, DPO().policy_loss(ratio, ratio.log(), advantage, Hyper()))
