"""The alternating process: noise from even states, signal from odd ones, ten steps."""

from __future__ import annotations

import math

import pytest
import torch

from learned_rl.tasks.alternating import SIGNAL, AlternatingFamily
from learned_rl.types import UserError


@pytest.mark.parametrize("preset", ["10", "2"])
def test_states_come_in_order_and_pay_noise_and_signal_by_turns(preset):
    family, states, copies = AlternatingFamily(preset), int(preset), 4000
    env = family.make(family.sample_split("train", 1), copies, 0)
    obs, _ = env.reset()
    noises, total = [], torch.zeros(copies)
    nothing = torch.zeros(copies, dtype=torch.int64)
    for t in range(3 * states):
        state, last = t % states, t % states == states - 1
        assert obs.eq(state).all()
        obs, reward, terminated, truncated, info = env.step(nothing)
        assert terminated.eq(last).all() and not truncated.any()
        assert info["final_obs"].eq(state if last else state + 1).all()
        if state % 2:
            assert reward.eq(SIGNAL).all()
        else:
            noises.append(reward)
        total += reward
    noise = torch.stack(noises)
    assert abs(float(noise.mean())) < 4 / math.sqrt(noise.numel())
    assert abs(float(noise.var()) - 1) < 4 * math.sqrt(2 / noise.numel())
    tail = (noise.abs() > 1.959964).double().mean()  # normal, not just of variance 1
    assert abs(float(tail) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / noise.numel())
    assert len(noise.unique()) > 0.99 * noise.numel()  # fresh every time
    mean = family.optimal_return({"states": torch.tensor([states])})
    assert abs(float(total.mean()) / 3 - float(mean)) < 4 * math.sqrt(states / 2 / 3 / copies)


def test_the_return_is_a_tenth_for_every_odd_state():
    family = AlternatingFamily()
    assert family.optimal_return(family.sample_split("train", 2)).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("preset", ["0", "9", "-4", "ten", "10.0"])
def test_other_presets_are_a_users_mistake(preset):
    with pytest.raises(UserError, match="an even number of states") as error:
        AlternatingFamily(preset)
    assert f"'{preset}'" in str(error.value) and "nearest" in str(error.value)
