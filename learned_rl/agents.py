"""Agents, and `Population`: P agents of one architecture as one module with one parameter.

`Population.theta [P, D]` holds every weight of every agent, a row each. So a restart or a copy of a lifetime is an
index, an update rule is a handful of operations on one tensor however many layers there are, `higher` follows one
fast weight, and an evolution strategy perturbs a population by adding a matrix. An architecture (`Agent`) is stateless:
it names the shapes of one agent's weights and computes outputs from batches of weights `[P, ...]` with batched
matrix products. A component may ask for extra heads; they appear in `AgentOutput.heads`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import conv2d, embedding

from learned_rl.action_conditional import ActionConditionalAgent
from learned_rl.activations import ACTIVATIONS, Activation
from learned_rl.architecture import CONDITION, Agent, AgentOutput, Heads, PolicyHead, Weights, linear
from learned_rl.layout import Layout, Part, dormancy
from learned_rl.spaces import Choice, searched
from learned_rl.types import UserError, at_least
from learned_rl.values import CategoricalValue

if TYPE_CHECKING:
    from learned_rl.component import Hyper

EMBEDDING = 16  # units of the embedding of numbers that a network is told


class TabularAgent(Agent):
    """One row of numbers per state: logits, then the extra heads, then the value; all zero at first."""

    def __init__(self, states: int, policy: PolicyHead, heads: Heads, value: int) -> None:
        super().__init__(policy, heads, value, obs_dim=0)
        self.states = states
        self.columns = [policy.size, *self.head_sizes.values(), *([int(value)] if value else [])]
        self.shapes = {"table": (states, sum(self.columns))}
        if policy.continuous:
            self.shapes["log_std"] = (policy.size,)

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def forward(self, w: Weights, obs: Tensor, policy_only: bool) -> AgentOutput:
        P = obs.shape[0]
        offset = torch.arange(P, device=obs.device)[:, None] * self.states
        numbers, *rest = embedding(obs + offset, w["table"].reshape(P * self.states, -1)).split(self.columns, -1)
        value = rest.pop() if self.value else None
        return self._output(w, numbers, value, dict(zip(self.heads, rest, strict=True)))


def _orthogonal(rows: int, columns: int, gain: float, generator: torch.Generator) -> Tensor:
    """Orthogonal initialisation (Saxe et al., 2014), the usual one of PPO."""
    q, r = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))
    q = q * r.diagonal().sign()
    return gain * (q if rows >= columns else q.T).contiguous()


class MLPAgent(Agent):
    """Separate perceptrons for the policy (with the extra heads) and for the value.

    Args:
        shape:  of one observation; it is flattened.
        hidden: widths of the hidden layers.
        shared: one trunk for policy and value instead.
        conditions: numbers of the update that the trunks are told beside the features, through one linear embedding
                (Xu et al., 2018, arXiv:1805.09801, section 1.4). They are a weight that no gradient reaches.
    """

    reads = ("hidden", "activation", "shared")

    def __init__(
        self,
        shape: Sequence[int],
        policy: PolicyHead,
        heads: Heads,
        value: int,
        hidden: Sequence[int] = (64, 64),
        activation: Activation = "tanh",
        shared: bool = False,
        conditions: tuple[str, ...] = (),
    ) -> None:
        super().__init__(policy, heads, value, len(shape))
        self.conditions = conditions
        shared = shared or not (policy.size or heads)  # an agent that only values needs one trunk
        self.activation, self.depth, self.shared = ACTIVATIONS[activation], len(hidden), shared
        sizes = [math.prod(shape) + (EMBEDDING if conditions else 0), *hidden]
        self.linear: dict[str, tuple[int, int, float]] = {}  # name -> (in, out, gain)
        if conditions:
            self.linear["embedding"] = (len(conditions), EMBEDDING, 1.0)
        for trunk in ["trunk"] if shared or not value else ["trunk", "value_trunk"]:
            for i in range(self.depth):
                self.linear[f"{trunk}{i}"] = (sizes[i], sizes[i + 1], math.sqrt(2))
        self.linear["policy"] = (sizes[-1], policy.size, 0.01)
        self.linear |= {f"head_{k}": (sizes[-1], size, 0.01) for k, size in self.head_sizes.items()}
        if value:
            self.linear["value"] = (sizes[-1], self.value, 1.0 if self.value == 1 else 0.01)
        self.shapes = {}
        for name, (n_in, n_out, _) in self.linear.items():
            self.shapes |= {f"{name}.weight": (n_in, n_out), f"{name}.bias": (n_out,)}
        if policy.continuous:
            self.shapes["log_std"] = (policy.size,)
        if conditions:
            self.shapes[CONDITION] = (len(conditions),)

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        weights = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        for name, (n_in, n_out, gain) in self.linear.items():
            weights[f"{name}.weight"] = _orthogonal(n_in, n_out, gain, generator)
        return weights

    @property
    def layout(self) -> Layout:
        after = self.depth + len(self._first_layers)  # layers before the last one
        depths = dict.fromkeys((*self._first_layers, "embedding"), 0.0)
        for trunk in ("trunk", "value_trunk"):
            before = 0 if trunk == "value_trunk" else len(self._first_layers)
            depths |= {f"{trunk}{i}": (before + i) / after for i in range(self.depth)}
        parts = []
        for name, shape in self.shapes.items():
            layer = name.rpartition(".")[0]  # none for what is no layer's
            critic = layer.startswith("value")
            axis = 0 if layer in self._first_layers else -1
            parts.append(Part(name, shape, depths.get(layer, 1.0 if layer else 0.0), critic, layer or None, axis))
        return Layout(parts)

    @property
    def _first_layers(self) -> tuple[str, ...]:
        """Names of layers before the perceptron's own, whose weights have their units on the first axis."""
        return ()

    def forward(self, w: Weights, obs: Tensor, policy_only: bool) -> AgentOutput:
        return self._from_features(w, obs.flatten(2), policy_only, {})

    def _from_features(self, w: Weights, features: Tensor, policy_only: bool, units: dict[str, Tensor]) -> AgentOutput:
        if self.conditions:
            told = w[CONDITION].detach().unsqueeze(1)  # stop: it is told, not learned
            embedded = linear(w, "embedding", told).expand(-1, features.shape[1], -1)
            features = torch.cat([features, embedded], -1)
        x = self._trunk(w, "trunk", features, units)
        numbers = linear(w, "policy", x)
        if policy_only:
            return self._output(w, numbers, None, {})
        value = None
        if self.value:
            y = x if self.shared else self._trunk(w, "value_trunk", features, units)
            value = linear(w, "value", y)
        heads = {k: linear(w, f"head_{k}", x) for k in self.heads}
        units |= {"policy": numbers} | {f"head_{k}": v for k, v in heads.items()}
        if value is not None:
            units["value"] = value
        out = self._output(w, numbers, value, heads)
        if not self.watched:
            return out
        return replace(out, units={k: x.detach() for k, x in units.items()})  # stop: a look

    def _trunk(self, w: Weights, trunk: str, x: Tensor, units: dict[str, Tensor]) -> Tensor:
        for i in range(self.depth):
            x = units[f"{trunk}{i}"] = self.activation(linear(w, f"{trunk}{i}", x))
        return x


class ConvAgent(MLPAgent):
    """One 3x3 convolution over image planes `[C, H, W]`, then a shared perceptron.

    The network of MinAtar's reference agents (Young & Tian, 2019, arXiv:1903.03176): 16 channels, then 128 units.
    """

    reads = ("channels", "hidden", "activation")

    def __init__(
        self,
        planes: tuple[int, int, int],
        policy: PolicyHead,
        heads: Heads,
        value: int,
        channels: int = 16,
        hidden: Sequence[int] = (128,),
        activation: Activation = "relu",
        conditions: tuple[str, ...] = (),
    ) -> None:
        c, h, w = planes
        if min(h, w) < 3:
            raise UserError(f"A convolution of 3x3 does not fit planes of {h}x{w}: use the 'mlp' agent.")
        sizes = (channels, h - 2, w - 2)
        super().__init__(sizes, policy, heads, value, hidden, activation, shared=True, conditions=conditions)
        self.planes, self.channels = planes, channels
        self.shapes = {"conv.weight": (channels, c, 3, 3), "conv.bias": (channels,), **self.shapes}

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        weights = super().initial(generator)
        kernel = _orthogonal(self.channels, self.planes[0] * 9, math.sqrt(2), generator)
        weights["conv.weight"] = kernel.reshape(self.shapes["conv.weight"])
        return weights

    def forward(self, w: Weights, obs: Tensor, policy_only: bool) -> AgentOutput:
        P, n = obs.shape[:2]
        # One grouped convolution over all agents: a group of channels each.
        planes = obs.transpose(0, 1).reshape(n, P * self.planes[0], *self.planes[1:])
        kernel = w["conv.weight"].reshape(P * self.channels, self.planes[0], 3, 3)
        x = self.activation(conv2d(planes, kernel, w["conv.bias"].reshape(-1), groups=P))
        x = x.reshape(n, P, self.channels, -1).transpose(0, 1)
        # stop: a look; a channel is a unit, and what it says anywhere on the image counts
        units = {"conv": x.detach().abs().mean(-1)} if self.watched else {}
        return self._from_features(w, x.flatten(2), policy_only, units)

    @property
    def _first_layers(self) -> tuple[str, ...]:
        return ("conv",)


class ModuleAgent(Agent):
    """Any `nn.Module` as an architecture, through `torch.func`.

    Args:
        module: maps observations `[n, ...]` to a dictionary with "policy" `[n, policy.size]`, "value" `[n]` or
                `[n, value]`, and one entry `[n, *shape]` per extra head. Buffers are shared by all agents and not
                updated.
        initialise: draws fresh parameters in place; default: every submodule's `reset_parameters`.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: PolicyHead,
        obs_dim: int,
        heads: Heads | None = None,
        value: int = True,
        initialise: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__(policy, heads or {}, value, obs_dim)
        self.module = module
        self._initialise = initialise or _reset_parameters
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        if policy.continuous:
            self.shapes["log_std"] = (policy.size,)

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        # Modules draw from torch's global generator: lend it a seed from ours, and leave it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            self._initialise(self.module)
        weights = {name: p.detach().clone() for name, p in self.module.named_parameters()}  # stop: initial values
        return weights | ({"log_std": torch.zeros(self.policy.size)} if self.policy.continuous else {})

    def forward(self, w: Weights, obs: Tensor, policy_only: bool) -> AgentOutput:
        own = {name: w[name] for name in w if name != "log_std"}
        out = torch.vmap(lambda p, x: functional_call(self.module, p, (x,)))(own, obs)
        value = out["value"].reshape(*obs.shape[:2], self.value) if self.value else None
        return self._output(w, out["policy"], value, {k: out[k] for k in self.heads})


def _reset_parameters(module: nn.Module) -> None:
    for m in module.modules():
        if callable(reset := getattr(m, "reset_parameters", None)):
            reset()


@dataclass(frozen=True)
class AgentConfig:
    """Which architecture, and how large."""

    kind: Literal["auto", "tabular", "mlp", "conv", "action_conditional"] = "auto"
    """architecture; auto takes tabular for Discrete observations, conv for planes [C, H, W], else mlp"""
    hidden: tuple[int, ...] = field(
        default=(64, 64),
        metadata=searched(Choice((16,), (32,), (32, 32), (64, 64), (128, 128), (256, 256), (512, 512))),
    )
    """widths of the hidden layers, in units (conv: after the convolution)"""
    activation: Activation = field(default="tanh", metadata=searched(Choice("tanh", "relu")))
    """between layers"""
    channels: int = 16
    """channels of the convolution"""
    shared: bool = field(default=False, metadata=searched(Choice(False, True)))
    """one trunk for policy and value (mlp)"""
    value_support: int = 0
    """largest bin of a categorical value, in a space where returns are squeezed (300 holds up to 58 000), learned by
    cross-entropy; 0: the value is a number, learned by its squared error"""
    gaussian: Literal["squashed", "clipped"] = "squashed"
    """continuous actions: Gaussian squashed by tanh, or clipped at the bounds"""
    model: int = 128
    """units of the model that looks one action ahead (action_conditional)"""
    head_hidden: tuple[int, ...] = (128,)
    """widths of the hidden layers of its heads, in units (action_conditional)"""

    def __post_init__(self) -> None:
        at_least(0, value_support=self.value_support)


KINDS: dict[str, type[Agent]] = {
    "tabular": TabularAgent,
    "mlp": MLPAgent,
    "conv": ConvAgent,
    "action_conditional": ActionConditionalAgent,
}


def agent_kind(config: AgentConfig, observation_space: gymnasium.Space) -> str:
    """The architecture among `KINDS` that `config` names for these observations.

    Raises:
        UserError: it does not take them.
    """
    shape, kind = observation_space.shape, config.kind
    discrete = isinstance(observation_space, Discrete)
    planes = not discrete and shape is not None and len(shape) == 3
    if kind == "auto":
        kind = "tabular" if discrete else "conv" if planes and shape is not None and min(shape[1:]) >= 3 else "mlp"
    fits = {"tabular": discrete, "mlp": not discrete, "conv": planes, "action_conditional": True}
    if shape is None or not fits.get(kind, False):
        raise UserError(
            f"An agent of kind {kind!r} does not take observations of {observation_space}: try kind='auto'."
        )
    return kind


def make_agent(
    config: AgentConfig,
    observation_space: gymnasium.Space,
    action_space: gymnasium.Space | None,
    heads: Heads | None = None,
    value: bool = True,
    conditions: tuple[str, ...] = (),
) -> Agent:
    """The agent that `config` describes for these spaces; without actions (None) it only values.

    Args:
        conditions: names of the numbers of the update that its network is told.

    Raises:
        UserError: the architecture does not take such observations, or the action space is of another kind.
    """
    policy, heads = PolicyHead(action_space, config.gaussian), heads or {}
    numbers = 0 if not value else CategoricalValue(config.value_support).bins if config.value_support else 1
    kind, shape = agent_kind(config, observation_space), observation_space.shape or ()
    settings: dict[str, Any] = {name: getattr(config, name) for name in KINDS[kind].reads}
    states = int(observation_space.n) if isinstance(observation_space, Discrete) else math.prod(shape)
    if kind == "action_conditional":
        if conditions:
            raise UserError(f"An 'action_conditional' agent cannot be told {', '.join(conditions)}: try kind='mlp'.")
        return ActionConditionalAgent(states, len(shape), policy, heads, numbers, **settings)
    if kind == "tabular":
        if conditions:
            raise UserError(
                f"A tabular agent cannot be told {', '.join(conditions)}: expected vectors or images to see, or a part "
                "that tells it nothing (of 'mgrl': embedding=false)."
            )
        return TabularAgent(states, policy, heads, numbers)
    if kind == "conv":
        return ConvAgent((shape[0], shape[1], shape[2]), policy, heads, numbers, conditions=conditions, **settings)
    return MLPAgent(shape, policy, heads, numbers, conditions=conditions, **settings)


class Population(nn.Module):
    """P agents of one architecture.

    Attributes:
        theta: [P, D] parameters, one agent a row.
    """

    def __init__(self, agent: Agent, lifetimes: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.agent = agent
        self.sizes = [math.prod(shape) for shape in agent.shapes.values()]
        self.theta = nn.Parameter(torch.zeros(lifetimes, sum(self.sizes), dtype=dtype))

    @cached_property
    def layer(self) -> Tensor:
        """[D] which of the agent's layers each column of theta belongs to."""
        index = {name: i for i, name in enumerate(self.agent.layers)}
        own = [index.get(name.rpartition(".")[0] or name, 0) for name in self.agent.shapes]
        sizes = torch.tensor(self.sizes, device=self.theta.device)
        return torch.tensor(own, device=self.theta.device).repeat_interleave(sizes)

    @cached_property
    def layout(self) -> Layout:
        """Of a row of theta, on its device."""
        return self.agent.layout.to(self.theta.device)

    def activity(self, out: AgentOutput) -> Tensor:
        """[P, D] how active the unit is that a weight feeds (see `learned_rl.layout.dormancy`), from what the agents
        said of [P, B, ...] or [T, P, B, ...]; 1 where no unit was watched."""
        units = {k: x if x.dim() == 3 else x.transpose(0, 1).flatten(1, 2) for k, x in out.units.items()}
        return self.layout.spread(dormancy(units), self.theta)

    def told(self, theta: Tensor, hyper: Hyper) -> Tensor:
        """Theta `[P, D]` with the numbers of the update in the place of those that its agents were told; the same
        where they are told none."""
        if not (names := self.agent.conditions):
            return theta
        # stop: they are told, not learned
        numbers = [torch.as_tensor(getattr(hyper, k)).detach().to(theta).flatten().expand(len(theta)) for k in names]
        return torch.cat([theta[:, : -len(names)], torch.stack(numbers, 1)], 1)

    def initial(self, generator: torch.Generator) -> Tensor:
        """One fresh row of theta, `[D]`."""
        weights = self.agent.initial(generator)
        return torch.cat([weights[name].flatten() for name in self.agent.shapes]).to(self.theta)

    def weights(self, theta: Tensor) -> dict[str, Tensor]:
        """name -> [P, ...]: views of the rows of theta."""
        pieces = theta.split(self.sizes, 1)
        named = zip(self.agent.shapes.items(), pieces, strict=True)
        return {name: x.unflatten(1, shape) if shape else x.squeeze(1) for (name, shape), x in named}

    def bind(self, theta: Tensor, policy_only: bool = False) -> Callable[[Tensor], AgentOutput]:
        """A function of observations with the weights `theta [P, D]` already taken apart (for acting step by step)."""
        weights = self.weights(theta)

        def call(obs: Tensor) -> AgentOutput:
            if obs.dim() == self.agent.obs_dim + 2:
                return self.agent.forward(weights, obs, policy_only)
            T, P, B = obs.shape[:3]
            flat = obs.transpose(0, 1).reshape(P, T * B, *obs.shape[3:])
            out = self.agent.forward(weights, flat, policy_only)
            return out.map(lambda x: x.unflatten(1, (T, B)).transpose(0, 1))

        return call

    def forward(self, obs: Tensor) -> AgentOutput:
        """Outputs `[T, P, B, ...]` or `[P, B, ...]`, following the observations' leading axes."""
        return self.bind(self.theta)(obs)
