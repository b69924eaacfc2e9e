"""LPG, the Learned Policy Gradient: what to predict and what to minimise, read off a rollout backwards in time.

Oh, Hessel, Czarnecki, Xu, van Hasselt, Singh, Silver, "Discovering Reinforcement Learning Algorithms", NeurIPS 2020,
arXiv:2007.08794. With `lifetime=True`, TA-LPG: Jackson, Lu, Kirsch, Lange, Whiteson, Foerster, "Discovering
Temporally-Aware Reinforcement Learning Algorithms", ICLR 2024, arXiv:2402.05828.

The agent has a policy pi and a prediction y(s), a categorical over m entries whose meaning is learned. The network
reads, from the last step to the first,

    x_t = (r_t, d_t, gamma, pi(a_t|s_t), phi(y(s_t)), (1 - d_t) phi(y(s_{t+1})))      [+ n/N, log N with `lifetime`]

and says pi_hat_t and y_hat_t. The agent descends

    L = mean_t log pi(a_t|s_t) pi_hat_t + alpha_y mean_t KL(y(s_t) || y_hat_t)

(alpha_y is `prediction_coef`). The sign of pi_hat is learned; contract version 1 freezes it: the loss is minimised. d_t
is 1 at either kind of episode end, as in the paper.

Deviations: the core may be a GRU and gamma may be left out, as in groove (Jackson et al., 2023, arXiv:2310.02782); the
observation carries no time. No official code was released; sizes 256 and m = 30 are those quoted for the paper, m = 8
those of groove. `scale_free` and `standardize` are ours, for families whose rewards differ in scale. What reaches the
network from theta is a constant of the inner gradient. With `stop_inputs` it is one of the meta-gradient too, as in
groove; a table's policy and prediction share nothing, so that tabular agents then never learn what to predict.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium
import torch
from torch import Tensor, nn

from learned_rl.architecture import AgentOutput
from learned_rl.component import Batch, Context, Hyper, Metrics, Objective, lifetime_mean, per_lifetime
from learned_rl.defaults import normalise
from learned_rl.distributions import softmax
from learned_rl.spaces import PowersOfTwo, searched
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree
from objectives.recurrence import CORES, features_first_linear

EPS = 1e-8  # inside every logarithm of a probability
TINY = 1e-6  # unit of reward until the first one is seen


@dataclass(frozen=True)
class LPGConfig:
    predictions: int = field(default=30, metadata=searched(PowersOfTwo(4, 64)))
    """m: entries of the agent's prediction y"""
    width: int = field(default=256, metadata=searched(PowersOfTwo(16, 256)))
    """H: units of the recurrent core"""
    core: Literal["lstm", "gru"] = "lstm"
    """recurrent core: LSTM as in the paper, GRU as in groove"""
    embedding: int = field(default=16, metadata=searched(PowersOfTwo(4, 64)))
    """hidden units of phi, which embeds y as one number"""
    see_gamma: bool = True
    """whether the network reads the discount"""
    lifetime: bool = False
    """whether the network reads the share of the lifetime that is over and the lifetime's length (TA-LPG)"""
    scale_free: bool = False
    """read rewards in units of the largest seen so far in the lifetime, instead of as they are"""
    standardize: bool = False
    """give pi_hat mean 0 and standard deviation 1 in each rollout of a lifetime, as PPO does with advantages"""
    stop_inputs: bool = False
    """treat what the network reads from the agent as constant of the meta-gradient too, as groove does; the policy of a
    tabular agent then gives the prediction no meta-gradient at all"""


class LPG(Objective):
    """The learned policy gradient as an objective."""

    name, Config, needs_value = "lpg", LPGConfig, False
    regularisers = ("prediction_entropy", "pi_hat_square", "y_hat_square")
    config: LPGConfig

    def __init__(self, config: LPGConfig | None = None, **changes: object) -> None:
        super().__init__(dataclasses.replace(config or LPGConfig(), **changes))  # type: ignore[arg-type]
        c = self.config
        self.differentiates_inputs = not c.stop_inputs
        self.reads = ("prediction_coef", *(("gamma",) if c.see_gamma else ()))
        inputs = 5 + c.see_gamma + 2 * c.lifetime
        self.phi = nn.Sequential(nn.Linear(c.predictions, c.embedding), nn.ReLU(), nn.Linear(c.embedding, 1))
        self.core = CORES[c.core](inputs, c.width)
        self.policy_head = nn.Linear(c.width, 1, bias=not c.standardize)  # standardising would take a bias away again
        self.prediction_head = nn.Linear(c.width, c.predictions)
        for head in (self.policy_head, self.prediction_head):
            nn.init.normal_(head.weight, std=1 / math.sqrt(c.width))
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    def settings(self, tabular: bool) -> dict[str, Any]:
        """The paper's: one gradient step on 20 steps of 64 environments; SGD on tables, Adam on networks."""
        learning_rate = 40.0 if tabular else 1e-3
        return {
            "n_envs": 64,
            "n_steps": 20,
            "n_epochs": 1,
            "n_minibatches": 1,
            "optimizer": "sgd" if tabular else "adam",
            "hyper": Hyper(learning_rate=learning_rate, prediction_coef=0.5),
        }

    def heads(self, action_space: gymnasium.Space) -> dict[str, int]:
        return {"prediction": self.config.predictions}

    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_value: Tensor | None, hyper: Hyper, context: Context
    ) -> tuple[Batch, Tree]:
        if self.config.stop_inputs:
            out = out.detach()  # stop: what the network reads is constant (section 3 of the paper)
        memory: Tree = {}
        if self.config.scale_free:
            largest = torch.maximum(context.memory["largest_reward"], trajectory.reward.abs().amax((0, 2))[:, None])
            memory = {"largest_reward": largest}
            trajectory = dataclasses.replace(trajectory, reward=trajectory.reward / largest.clamp(min=TINY))
        pi = out.policy.map(lambda x: x[:-1]).log_prob(trajectory.action).exp() + EPS
        embedded = self.phi(softmax(out.heads["prediction"])).squeeze(-1)
        pi_hat, y_hat = self.targets(trajectory, pi, embedded[:-1], embedded[1:], hyper, context)
        if self.config.standardize:
            pi_hat = normalise(pi_hat)
        return {"pi_hat": pi_hat, "y_hat": y_hat}, memory

    def initial_memory(self, lifetimes: int) -> Tree:
        return {"largest_reward": torch.zeros(lifetimes, 1)} if self.config.scale_free else {}

    def targets(
        self,
        trajectory: Trajectory,
        pi: Tensor,
        embedded: Tensor,
        next_embedded: Tensor,
        hyper: Hyper,
        context: Context,
    ) -> tuple[Tensor, Tensor]:
        """What the network says about a rollout.

        Args:
            pi:            [T, P, B] probability of the taken action, plus EPS.
            embedded:      [T, P, B] phi(y(s_t)).
            next_embedded: [T, P, B] phi(y(s_{t+1})); not read where the episode ended.

        Returns:
            pi_hat: [T, P, B] and y_hat: [T, P, B, m], a distribution.
        """
        reward, done = trajectory.reward, trajectory.done
        columns = [reward, done.to(reward.dtype), pi, embedded, next_embedded * ~done]
        if self.config.see_gamma:
            columns.insert(2, torch.as_tensor(hyper.gamma, dtype=reward.dtype, device=reward.device).expand_as(reward))
        if self.config.lifetime:
            progress, horizon = (v[:, None].to(reward.dtype) for v in (context.progress, context.horizon))
            columns += [progress.expand_as(reward), horizon.log().expand_as(reward)]
        T, n = len(reward), reward[0].numel()
        inputs = torch.stack([column.reshape(T, n) for column in columns], 1)  # [T, I, n]: features before sequences
        hidden = self.core(inputs, done.reshape(T, n)).relu()
        pi_hat = features_first_linear(self.policy_head.weight, self.policy_head.bias, hidden)[:, 0].view(reward.shape)
        y_hat = (
            features_first_linear(self.prediction_head.weight, self.prediction_head.bias, hidden)
            .softmax(1)
            .movedim(1, -1)
        )
        return pi_hat, y_hat.unflatten(1, reward.shape[1:])

    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
        log_pi = (out.policy.log_prob(batch["action"]).exp() + EPS).log()
        y = softmax(out.heads["prediction"])
        kl = (y * ((y + EPS).log() - (batch["y_hat"] + EPS).log())).sum(-1)
        policy_loss, prediction_loss = lifetime_mean(log_pi * batch["pi_hat"]), lifetime_mean(kl)
        metrics = {"policy_loss": policy_loss, "prediction_loss": prediction_loss}
        loss = policy_loss + per_lifetime(hyper.prediction_coef) * prediction_loss
        return loss, {k: v.detach() for k, v in metrics.items()}  # stop: only to look at

    def agent_regularisers(self, out: AgentOutput, action: Tensor) -> Metrics:
        """Entropy of y (to be raised); section 3.4."""
        y = softmax(out.heads["prediction"])
        return {"prediction_entropy": lifetime_mean(-(y * (y + EPS).log()).sum(-1))}

    def target_regularisers(self, batch: Batch) -> Metrics:
        """Sizes of pi_hat and y_hat (to be kept small); section 3.4."""
        return {
            "pi_hat_square": lifetime_mean(batch["pi_hat"].square()),
            "y_hat_square": lifetime_mean(batch["y_hat"].square().sum(-1)),
        }
