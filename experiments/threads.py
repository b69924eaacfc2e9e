"""The one place where the number of threads is set.

One intra-op thread. On idle cores a second one saves a quarter to two fifths of LPG's meta-step and costs PPO a
seventh; as soon as anything else runs everything takes two to three times as long (`learned-rl bench threads`,
docs/benchmarks.md). Use cores by processes over lifetimes. Set LEARNED_RL_THREADS to choose otherwise.
"""

from __future__ import annotations

import os

import torch

from learned_rl.types import UserError

VARIABLE = "LEARNED_RL_THREADS"


def set_threads() -> None:
    """Apply the default, or what the environment variable says."""
    text = os.environ.get(VARIABLE, "1")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{VARIABLE} is {text!r}: expected a number of threads, at least 1.")
    torch.set_num_threads(int(text))
