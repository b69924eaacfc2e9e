"""Agents that look one action ahead, as those of Disco103 do.

Oh et al., "Discovering state-of-the-art reinforcement learning algorithms", Nature 2025,
doi:10.1038/s41586-025-09761-x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from learned_rl.activations import ACTIVATIONS, Activation
from learned_rl.architecture import Agent, AgentOutput, Heads, PolicyHead, Weights, linear, truncated_normal
from learned_rl.layout import Layout, Part
from learned_rl.types import UserError


class ActionConditionalAgent(Agent):
    """A perceptron, and a recurrent model that looks one action ahead of it, as Disco103's agents have it.

    Oh et al., "Discovering state-of-the-art reinforcement learning algorithms", Nature 2025. Policy, value and heads of
    one state are linear in the perceptron's last layer, behind which there is no activation. A head whose shape begins
    with the number of actions is the model's: from the state's root every action is one step of an LSTM, and a
    perceptron of its own says the head from where it led. Gates are i, g, f, o, with 1 added to f.

    Args:
        inputs: numbers of an observation, which is flattened; a Discrete one (`obs_dim` 0) is one-hot.
        hidden: widths of the perceptron; the last one is the state.
        model:  units of the LSTM.
        head_hidden: widths of the perceptrons behind it.
    """

    reads = ("hidden", "activation", "model", "head_hidden")

    def __init__(
        self,
        inputs: int,
        obs_dim: int,
        policy: PolicyHead,
        heads: Heads,
        value: int,
        hidden: Sequence[int] = (512, 512),
        activation: Activation = "relu",
        model: int = 128,
        head_hidden: Sequence[int] = (128,),
    ) -> None:
        super().__init__(policy, heads, value, obs_dim)
        if policy.continuous or not policy.size or not hidden:
            raise UserError("An 'action_conditional' agent needs discrete actions and at least one hidden layer.")
        self.inputs, self.actions, self.activation = inputs, policy.size, ACTIVATIONS[activation]
        self.ahead = [name for name, shape in self.heads.items() if len(shape) > 1 and shape[0] == policy.size]
        sizes, state = [inputs, *hidden], hidden[-1]
        self.torso = [f"torso{i}" for i in range(len(hidden))]
        self.linear: dict[str, tuple[int, int]] = {k: (sizes[i], sizes[i + 1]) for i, k in enumerate(self.torso)}
        self.small = {"policy": policy.size}  # heads of one state, which start close to zero
        self.small |= {f"head_{k}": size for k, size in self.head_sizes.items() if k not in self.ahead}
        self.small |= {"value": self.value} if value else {}
        self.linear |= {k: (state, size) for k, size in self.small.items()}
        self.behind: dict[str, list[str]] = {}  # head of the model -> its layers
        if self.ahead:
            self.linear |= {"root": (state, model), "model": (policy.size + model, 4 * model)}
        for name in self.ahead:
            widths = [model, *head_hidden, self.head_sizes[name] // policy.size]
            self.behind[name] = [f"head_{name}{i}" for i in range(len(widths) - 1)]
            self.linear |= {k: (widths[i], widths[i + 1]) for i, k in enumerate(self.behind[name])}
        self.shapes = {}
        for name, (n_in, n_out) in self.linear.items():
            self.shapes |= {f"{name}.weight": (n_in, n_out), f"{name}.bias": (n_out,)}

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        weights = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        for name, (n_in, _) in self.linear.items():
            std = 0.01 if name in self.small else 1 / math.sqrt(n_in)
            truncated_normal(weights[f"{name}.weight"], std, generator)
        return weights

    @property
    def layout(self) -> Layout:
        steps = len(self.torso) + max((2 + len(layers) for layers in self.behind.values()), default=1)
        at = {k: i for i, k in enumerate(self.torso)} | {"root": len(self.torso), "model": len(self.torso) + 1}
        at |= {k: len(self.torso) + 2 + i for layers in self.behind.values() for i, k in enumerate(layers)}
        at |= dict.fromkeys(self.small, steps - 1)
        depth = lambda layer: at[layer] / max(steps - 1, 1)  # noqa: E731
        layers = {name: name.rpartition(".")[0] for name in self.shapes}
        return Layout([Part(k, s, depth(layers[k]), layers[k] == "value", layers[k]) for k, s in self.shapes.items()])

    def forward(self, w: Weights, obs: Tensor, policy_only: bool) -> AgentOutput:
        x = obs.flatten(2) if self.obs_dim else one_hot(obs, self.inputs).to(w["policy.bias"].dtype)
        units: dict[str, Tensor] = {}
        x = self._perceptron(w, self.torso, x, units)
        numbers = units["policy"] = linear(w, "policy", x)
        if policy_only:
            return self._output(w, numbers, None, {})
        said = {k: linear(w, k, x) for k in self.small if k != "policy"}
        value = said.pop("value") if self.value else None
        heads = {k.removeprefix("head_"): v for k, v in said.items()}
        units |= said
        if self.ahead:
            root = units["root"] = linear(w, "root", x)
            led = units["model"] = self._ahead(w, root)
            heads |= {k: self._perceptron(w, self.behind[k], led, units) for k in self.ahead}
        out = self._output(w, numbers, value, heads)
        return replace(out, units=self._seen(units, x.shape[1])) if self.watched else out

    def _seen(self, units: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        """[P, n, H] of each layer; of the model's, what it says of any action counts."""
        apart = {k: u.detach().abs().unflatten(1, (n, -1)).mean(2) for k, u in units.items()}  # stop: a look
        # A gate has no activity of its own: the four of a unit are as active as the unit.
        return {k: u.repeat(1, 1, 4) if k == "model" else u for k, u in apart.items()}

    def _ahead(self, w: Weights, root: Tensor) -> Tensor:
        """[P, n * A, H] where every action leads, from the states' roots [P, n, H]."""
        taken, onward = w["model.weight"].split([self.actions, root.shape[-1]], 1)
        gates = torch.baddbmm(w["model.bias"].unsqueeze(1), root.tanh(), onward).unsqueeze(2) + taken.unsqueeze(1)
        i, g, f, o = gates.chunk(4, -1)
        cell = (f + 1).sigmoid() * root.unsqueeze(2) + i.sigmoid() * g.tanh()
        return (o.sigmoid() * cell.tanh()).flatten(1, 2)

    def _perceptron(self, w: Weights, layers: Sequence[str], x: Tensor, units: dict[str, Tensor]) -> Tensor:
        """Layers with activations between them, and none behind the last."""
        for name in layers:
            x = linear(w, name, x)
            x = units[name] = x if name == layers[-1] else self.activation(x)
        return x
