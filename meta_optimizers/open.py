"""OPEN: a learned optimizer that knows of plasticity, exploration and non-stationarity.

Goldie, Lu, Jackson, Whiteson, Foerster, "Can Learned Optimization Make Reinforcement Learning Less Difficult?", NeurIPS
2024, arXiv:2407.07082; authors' code (JAX): github.com/AlexGoldie/rl-learned-optimization. For every parameter a GRU of
8 units and two layers of 16 normalised ReLUs with three outputs o,

    u = o_0 exp(1e-3 o_1) + o_2 eps,    eps ~ N(0, 1),    theta' = theta - learning_rate * (u - mean u)

with a learning rate of 1e-3, noise for the policy's parameters only, and the mean over all parameters of the agent;
1211 weights. Beside parameter, gradient and six momenta of it (signs and logarithms, over their root mean square
within the tensor) it reads how much of the lifetime is over, how deep the layer lies, which pass over the data this
is, and how dormant the unit is that the parameter feeds.

The paper trains it by an evolution strategy over whole lifetimes, from weights that are all zero (`start` "zero"; then
only perturbed members move). Random ones are for meta-gradients.

Deviations: the gradient is clipped for the whole agent, not for policy and value apart; convolutions count a channel as
a unit. Agents other than ours have no dormancy unless they are watched (`RuleOptimizer.watch`).

Contract 1: 19 features in the order theta; sign of the momenta; log(|momenta| + 1e-13); sign of g; log(|g| + 1e-13);
progress; depth; epoch; activity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from learned_rl.layout import StepContext
from learned_rl.types import Tree
from meta_optimizers.coordinatewise import (
    DECAYS,
    GRU,
    Coordinatewise,
    CoordinatewiseConfig,
    Dense,
    FeatureNorm,
    blockwise,
    momenta,
    normalised,
)

_SMALLEST = 1e-13


@dataclass(frozen=True)
class OPENConfig(CoordinatewiseConfig):
    hidden: int = 8
    """units of the GRU"""
    width: int = 16
    """units of each of the two layers behind it"""
    dormancy: bool = True
    """read how active units are; off: every unit is like any other"""
    stochastic: bool = True
    """learn how much noise the policy's parameters get"""
    start: Literal["zero", "random"] = "random"
    """weights before meta-training: all zero, for evolution strategies, or random"""


class OPEN(Coordinatewise):
    """A GRU and a perceptron for every parameter. State: `momenta` [P, 6, D], `h` [P, hidden, D]."""

    name: ClassVar[str] = "open"
    Config: ClassVar[Any] = OPENConfig
    suited_rate = 1e-3
    config: OPENConfig

    def __init__(self, config: OPENConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        self.reads_activity, self.draws = c.dormancy, c.stochastic
        self.gru = GRU(7 + 2 * len(DECAYS), c.hidden)
        layers = [Dense(c.hidden, c.width), FeatureNorm(c.width), nn.ReLU()]
        layers += [Dense(c.width, c.width), FeatureNorm(c.width), nn.ReLU()]
        self.head = nn.Sequential(*layers, Dense(c.width, 3 if c.stochastic else 2, zero=c.nominal != "none"))
        if c.start == "zero":
            for weight in self.parameters():
                nn.init.zeros_(weight)

    def fresh(self, theta: Tensor) -> Tree:
        P, D = theta.shape
        return {"momenta": theta.new_zeros(P, len(DECAYS), D), "h": theta.new_zeros(P, self.config.hidden, D)}

    def learned(self, grad: Tensor, state: Tree, theta: Tensor, context: StepContext) -> tuple[Tensor, Tree]:
        after = {"momenta": momenta(grad, state["momenta"])}
        features = self._features(grad, theta, after["momenta"], context)
        said, after["h"] = blockwise(self._network, features, state["h"])
        direction, magnitude, *loudness = said.unbind(1)
        said = direction * (1e-3 * magnitude).exp()
        for scale in loudness:
            if context.noise is not None:
                said = said + scale * self._policy_only(context.noise, context)
        return said - said.mean(1, keepdim=True), after

    def _network(self, features: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """Outputs [P, 3, D] and new states [P, hidden, D], from features [P, 19, D] and states."""
        h = self.gru(features, h)
        return self.head(h), h

    def _features(self, grad: Tensor, theta: Tensor, moving: Tensor, context: StepContext) -> Tensor:
        """[P, 19, D]."""
        g, log = grad.unsqueeze(1), lambda x: (x.abs() + _SMALLEST).log()
        about = torch.cat([theta.unsqueeze(1), moving.sign(), log(moving), g.sign(), log(g)], 1)
        progress = torch.as_tensor(context.progress).to(theta).reshape(-1, 1).expand_as(theta)
        depth = torch.zeros_like(theta) if context.layout is None else context.layout.depth.to(theta).expand_as(theta)
        activity = torch.ones_like(theta) if context.activity is None else context.activity
        known = [progress, depth, torch.full_like(theta, context.epoch), activity]
        return torch.cat([normalised(about, context.layout), torch.stack(known, 1)], 1)

    def _policy_only(self, noise: Tensor, context: StepContext) -> Tensor:
        return noise if context.layout is None else noise.masked_fill(context.layout.critic, 0.0)
