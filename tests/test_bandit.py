"""The bandit over agent settings, and what the truncated meta-gradient is asked for by name."""

import pytest
import torch
from torch.testing import assert_close

from learned_rl.component import Hyper
from learned_rl.tasks.bandits import BanditFamily
from learned_rl.types import UserError, stream
from meta_optimizers.agent_bandit import MEMORY, AgentBandit, AgentBanditConfig
from meta_optimizers.learning import OuterLossConfig
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from objectives.lpg import LPG
from tests.example_components import RunningReward

LIFETIMES = 8
EVERY = torch.ones(LIFETIMES, dtype=torch.bool)
NONE = torch.zeros(LIFETIMES, dtype=torch.bool)


def bandit(rates=(0.1, 1.0), coefs=(), **changes):
    config = AgentBanditConfig(learning_rates=rates, prediction_coefs=coefs, **changes)
    return AgentBandit(config, Hyper(prediction_coef=0.7), LIFETIMES, stream("test bandit"))


def test_untried_arms_are_spread_before_any_is_drawn_twice():
    b = bandit(rates=(1.0, 2.0, 3.0, 4.0), coefs=(0.1, 0.2))
    b.assign(EVERY)
    assert b.count.tolist() == [1] * 8 and sorted(b.arm.tolist()) == list(range(8))
    b.assign(EVERY & (torch.arange(LIFETIMES) < 3))
    assert b.count.sum() == 11  # a lifetime counts when it begins, whatever becomes of it


def test_the_probabilities_are_those_of_the_paper():
    b = bandit(temperature=0.5, exploration=0.3)
    b.count, b.arm = torch.tensor([4.0, 9.0]), torch.tensor([0, 1] * 4)
    b.record(EVERY, torch.arange(8.0), NONE)
    score = torch.tensor([3.0 + 0.3 / 2, 4.0 + 0.3 / 3])
    assert_close(b.probabilities(), (score / 0.5).softmax(0))


def test_only_the_latest_returns_count():
    b = bandit()
    b.count, b.arm = torch.ones(2), torch.zeros(LIFETIMES, dtype=torch.int64)
    for value in (100.0, 1.0, 2.0):
        b.record(EVERY, torch.full((LIFETIMES,), value), NONE)
    assert b.recent[0].tolist() == [1.0] * (MEMORY - LIFETIMES) + [2.0] * LIFETIMES


def test_a_tried_arm_without_a_return_stands_at_the_mean_of_the_others():
    b = bandit(rates=(1.0, 2.0, 3.0))
    b.count, b.arm = torch.full((3,), 4.0), torch.tensor([0, 1] * 4)
    b.record(EVERY, torch.tensor([0.0, 0.2] * 4), NONE)
    b.record(EVERY, torch.full((LIFETIMES,), torch.nan), NONE)  # no episode ended: nothing is known
    assert_close(b.probabilities(), (torch.tensor([0.0, 0.2, 0.1]) / 0.1).softmax(0))


def test_a_broken_lifetime_counts_as_the_worst_return_on_record():
    b = bandit()
    b.assign(EVERY)
    b.arm = torch.tensor([0, 1] * 4)
    b.record(EVERY, torch.full((LIFETIMES,), torch.nan), EVERY)
    assert b.recent[:, -4:].eq(0).all()  # nothing better is known
    b.record(EVERY, torch.tensor([-3.0, 5.0] * 4), NONE)
    broken = torch.arange(LIFETIMES) == 1
    b.record(broken, torch.full((LIFETIMES,), 99.0), broken)  # its last return, if any, is not believed
    assert b.recent[1, -1] == -3


@pytest.mark.parametrize("last_return", [torch.nan, 50.0], ids=["without-return", "with-a-high-return"])
def test_an_arm_that_breaks_its_lifetimes_does_not_take_over(last_return):
    b, g, drawn = bandit(), torch.Generator().manual_seed(0), []
    for _ in range(60):
        b.assign(EVERY)
        drawn.append(b.arm.clone())
        broken = b.arm == 1
        returns = torch.where(broken, last_return, 0.5 + torch.rand(LIFETIMES, generator=g))
        b.record(EVERY, returns, broken)
    share = torch.stack(drawn).float().mean(1)
    assert share[0] > 0 and share[-30:].mean() < 0.1
    assert b.count.sum() == 60 * LIFETIMES


def test_numbers_follow_the_arms():
    b = bandit(rates=(0.1, 1.0), coefs=(0.3, 0.6))
    b.arm = torch.tensor([0, 1, 2, 3] * 2)
    hyper = b.hyper(Hyper(), torch.zeros(1, dtype=torch.float64), torch.arange(8))
    expected = torch.tensor([[0.1, 0.3], [0.1, 0.6], [1.0, 0.3], [1.0, 0.6]] * 2, dtype=torch.float64)
    assert_close(torch.cat([hyper.learning_rate, hyper.prediction_coef], 1), expected, rtol=1e-6, atol=0)
    assert hyper.aux_coef == Hyper().aux_coef  # the auxiliary slot's weight is another number
    only = bandit(rates=())
    base = Hyper(learning_rate=3.0)
    assert only.hyper(base, torch.zeros(1), torch.arange(8)) is base


def test_its_state_continues_the_same_draws():
    one, two = bandit(), bandit()
    one.assign(EVERY)
    one.record(EVERY, torch.arange(8.0), NONE)
    saved = one.state_dict()
    one.assign(EVERY)
    two.load_state_dict(saved)
    two.assign(EVERY)
    assert torch.equal(one.arm, two.arm) and torch.equal(one.count, two.count)
    assert saved["count"].sum() == 8  # a copy


# --- names --------------------------------------------------------------------------------------------------------


def test_an_unknown_regulariser_is_refused():
    objective = LPG(predictions=3, width=4)

    def train(component, **weights):
        config = MetaTrainConfig(lifetimes=2, loss=OuterLossConfig(regularisers=weights))
        MetaTrainer(BanditFamily("bernoulli-5"), component, config)

    with pytest.raises(UserError, match=r"regulariser of 'lpg' 'pi_hat_squares': .* is 'pi_hat_square'"):
        train(objective, y_hat_square=1.0, pi_hat_squares=0.1)
    with pytest.raises(UserError, match="regulariser of 'ppo_clip' 'entropy': there is none"):
        train(RunningReward(), entropy=0.1)
    train(objective, **dict.fromkeys(objective.regularisers, 0.1))
