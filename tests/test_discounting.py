"""The discounting chain: what is paid when, for every first action and every preset."""

from __future__ import annotations

import pytest
import torch

from experiments.oracles import discounting_chain as oracle
from learned_rl.tasks.discounting import BEST_PAYMENT, DELAYS, PAYMENT, STEPS, DiscountingFamily

CHAINS = len(DELAYS)


def episode(preset: str, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations [101, N, 2] and rewards [100, N] of one episode; later actions are drawn at random."""
    family = DiscountingFamily(preset)
    env = family.make(family.sample_split("test", len(first)), 1, 0)
    seen, rewards, action = [env.reset()[0]], [], first
    for t in range(1, STEPS + 1):
        obs, reward, terminated, truncated, info = env.step(action)
        assert terminated.eq(t == STEPS).all() and not truncated.any()
        seen.append(info["final_obs"])
        rewards.append(reward)
        action = torch.randint(CHAINS, first.shape)  # has no effect
    assert torch.equal(obs, seen[0])
    return torch.stack(seen), torch.stack(rewards)


@pytest.mark.parametrize("preset", DiscountingFamily.presets)
def test_each_chain_pays_once_after_its_delay(preset):
    seen, rewards = episode(preset, torch.arange(CHAINS))
    expected = torch.zeros(STEPS, CHAINS)
    for chain, delay in enumerate(DELAYS):
        expected[delay - 1, chain] = BEST_PAYMENT if delay == int(preset) else PAYMENT
    assert torch.equal(rewards, expected)
    assert seen[0].tolist() == [[-1, 0]] * CHAINS
    later = torch.arange(CHAINS).expand(STEPS, CHAINS)
    assert torch.equal(seen[1:, :, 0], later.float())
    torch.testing.assert_close(seen[:, :, 1], (torch.arange(STEPS + 1) / STEPS)[:, None].expand(-1, CHAINS))


def test_the_best_return_is_1_1_and_random_actions_collect_1_02():
    family = DiscountingFamily()
    assert DELAYS[family.best] == 30 and family.best == 3
    returns = episode("30", torch.arange(CHAINS))[1].sum(0)
    best = family.optimal_return(family.sample_split("train", 2))
    assert torch.equal(best, returns.max().expand(2)) and float(best[0]) == pytest.approx(1.1)
    assert float(returns.mean()) == pytest.approx(1.02)


def test_it_is_the_chain_of_the_oracle():
    assert (DELAYS, STEPS) == (oracle.DELAY, oracle.STEPS)
    payments = episode("30", torch.arange(CHAINS))[1].sum(0)
    torch.testing.assert_close(payments, torch.tensor(oracle.PAYMENT))
    seen = episode("30", torch.arange(CHAINS))[0][1:-1].transpose(0, 1).flatten(0, 1)  # chain by chain, t = 1..99
    torch.testing.assert_close(seen, oracle.DiscountingChain().seen[1:].float())
