"""MGRL, meta-gradient reinforcement learning: the return itself is learned.

Xu, van Hasselt, Silver, "Meta-Gradient Reinforcement Learning", NeurIPS 2018, arXiv:1805.09801. The discount gamma and
the trace decay lambda define what the agent predicts and maximises,

    g(t) = r_t + gamma [(1 - lambda) v(s_{t+1}) + lambda g(t+1)]

and the agent's update with g moves its parameters to theta'. The next experience judges theta' by a return with fixed
gamma' and lambda' (the outer loss), whose derivative by way of theta' moves gamma and lambda. Targets are constants of
the agent's gradient, but not of the outer one.

Values and policies learned under one discount are out of date as soon as it moves. So the agents' networks are told the
present numbers beside the observation (section 1.4 of the paper), through one linear embedding of 16 units, which the
agent's own gradient trains; the numbers themselves enter as constants.

The paper's setting: IMPALA as the agent, one update a window, Adam as the outer optimizer, the policy's term alone as
the outer loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from objectives.self_tuned import SelfTuned, SelfTunedConfig


@dataclass(frozen=True)
class MGRLConfig(SelfTunedConfig):
    numbers: tuple[str, ...] = ("gamma", "gae_lambda")
    """names of the learned numbers"""
    embedding: bool = True
    """tell the agents' networks the learned numbers; tabular agents have none that could be told"""


class MGRL(SelfTuned):
    """Discount and trace decay, learned, and told to the agents."""

    name, Config = "mgrl", MGRLConfig
    config: MGRLConfig

    def __init__(self, config: MGRLConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        # A number for each state or layer is no input of a network.
        one = (k for k in self.tuned if k not in c.per_state and not (c.per_layer and k == "learning_rate"))
        self.conditions = tuple(one) if c.embedding else ()
