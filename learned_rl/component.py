"""What a learned part is: a module that fits one of the five slots of the algorithm.

| slot | base class | says | hand-made default |
|---|---|---|---|
| objective | `Objective` | what is minimised | PPO's clipped surrogate |
| reward | `Reward` | what is rewarded | the environment's reward |
| hyperparameters | `Hyperparameters` | gamma, lambda, costs, step size | the configured constants |
| auxiliary | `Auxiliary` | what else is predicted | nothing |
| optimizer | `UpdateRule` | how parameters move | Adam |

A component's parameters are the meta-parameters `eta`. It is told about the agents only through tensors with a
lifetime axis `P`, and must treat lifetimes alike and apart, so that one call serves one agent or hundreds.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import gymnasium
import torch
from torch import Tensor, nn

from learned_rl.architecture import AgentOutput, Heads
from learned_rl.layout import Layout, StepContext
from learned_rl.spaces import LogOneMinus, LogUniform, searched
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, UserError, at_least

SLOTS = ("objective", "reward", "hyperparameters", "auxiliary", "optimizer")

if TYPE_CHECKING:
    Scalar = float | Tensor
else:
    Scalar = float  # what a command line or a config file can say


#: Marks a hyperparameter that may be a tensor with a gradient; self-tuning components look for it.
LEARNABLE = {"learnable": True}


@dataclass(frozen=True)
class Hyper:
    """The numbers of one update. Each is a float for all lifetimes or a tensor [P, 1] with one for each; the learning
    rate may also be [P, L], one for each layer of the agents, and what returns are made with (gamma, gae_lambda,
    vtrace_alpha) [T, P, B], one for each step."""

    learning_rate: Scalar = field(default=3e-4, metadata=LEARNABLE | searched(LogUniform(3e-5, 3e-2)))
    """step size of the agent's update rule"""
    gamma: Scalar = field(default=0.99, metadata=LEARNABLE | searched(LogOneMinus(1e-3, 0.1)))
    """discount per environment step"""
    gae_lambda: Scalar = field(default=0.95, metadata=LEARNABLE | searched(LogOneMinus(1e-3, 1.0)))
    """trace decay of the advantage per environment step"""
    vtrace_alpha: Scalar = field(default=1.0, metadata=LEARNABLE)
    """importance weights of V-trace, from plain (0) to clipped at 1 (1)"""
    clip_range: Scalar = field(default=0.2, metadata=LEARNABLE | searched(LogUniform(0.05, 0.5)))
    """how far the probability ratio may move from 1"""
    clip_range_vf: Scalar | None = field(default=None, metadata=LEARNABLE)
    """how far the value may move in one update, in units of return; None: freely"""
    ent_coef: Scalar = field(default=0.0, metadata=LEARNABLE | searched(LogUniform(1e-5, 0.1)))
    """weight of the policy's entropy (nats) in the loss"""
    pg_coef: Scalar = field(default=1.0, metadata=LEARNABLE)
    """weight of the policy's loss"""
    vf_coef: Scalar = field(default=0.5, metadata=LEARNABLE | searched(LogUniform(0.05, 2.0)))
    """weight of the value loss"""
    prediction_coef: Scalar = field(default=0.5, metadata=LEARNABLE | searched(LogUniform(0.05, 2.0)))
    """weight of an objective's own prediction loss (LPG's alpha_y)"""
    aux_coef: Scalar = field(default=1.0, metadata=LEARNABLE)
    """weight of the auxiliary slot's loss"""
    max_grad_norm: Scalar = field(default=0.5, metadata=LEARNABLE | searched(LogUniform(0.01, 10.0)))
    """bound on the norm of one agent's gradient; inf: none"""

    def __post_init__(self) -> None:
        at_most_one = ("gamma", "gae_lambda", "vtrace_alpha")
        weights = ("pg_coef", "vf_coef", "prediction_coef", "aux_coef")  # of entropy one may be below 0
        names = ("learning_rate", *at_most_one, *weights, "clip_range", "clip_range_vf", "max_grad_norm")
        numbers = {k: v for k in names if isinstance(v := getattr(self, k), float | int)}
        at_least(0, **numbers)
        for name in at_most_one:
            if numbers.get(name, 0) > 1:
                raise UserError(f"{name} is {numbers[name]}: expected at most 1.")

    def replace(self, **changes: Scalar | None) -> Hyper:
        """The same numbers but for some."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


NUMBERS = tuple(f.name for f in dataclasses.fields(Hyper))


@dataclass(frozen=True)
class Context:
    """Where each lifetime stands when an update begins.

    Attributes:
        age:     [P] agent updates that are done.
        horizon: [P] agent updates that a lifetime has in all.
        memory:  what the components carry through a lifetime: name -> [P, ...].
    """

    age: Tensor
    horizon: Tensor
    memory: Tree

    @property
    def progress(self) -> Tensor:
        """[P] share of the lifetime that is over, from 0 to 1 (and 1 where it outlasts its horizon)."""
        return (self.age / self.horizon).clamp(max=1.0)

    @property
    def elapsed(self) -> Tensor:
        """[P] the same from 0 in the first update to 1 in the last one (0 where there is but one)."""
        return (self.age / (self.horizon - 1).clamp(min=1)).clamp(max=1.0)


class Component(nn.Module):
    """A learned (or hand-made) part of the algorithm.

    Attributes:
        slot:     which of `SLOTS` it fills.
        name:     under which it is registered and saved.
        contract: version of what it reads and returns; raised whenever saved weights would change their meaning.
        config:   a frozen dataclass of plain values that rebuilds it.
        online:   whether it is made to be learned in the same lifetime as the agent.
        outer_rate: outer learning rate that suits it there.
    """

    slot: ClassVar[str]
    name: ClassVar[str]
    contract: ClassVar[int] = 1
    online: ClassVar[bool] = False
    outer_rate: ClassVar[float] = 1e-3
    Config: ClassVar[Any]
    config: Any

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Rebuild from the plain values of a saved config.

        Raises:
            UserError: a value that this version of the component does not know.
        """
        fields = {f.name: f for f in dataclasses.fields(cls.Config)}
        for key in values:
            if key not in fields:
                raise UserError(f"Component {cls.name!r} has no setting {key!r}; it knows {', '.join(fields)}.")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(cls.Config(**values))

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = self.Config() if config is None else config
        #: what its file says about its training (`learned_rl.artifacts`); empty for a fresh component
        self.provenance: dict[str, Any] = {}

    def fit(self, observation_space: gymnasium.Space, action_space: gymnasium.Space, layers: tuple[str, ...]) -> None:
        """Take the size that these agents ask for, if any of its parameters depends on it; once, in place.

        A component that does so keeps the size in its config (None before), so that the config still rebuilds it.

        Args:
            layers: names of the agents' layers, in order.

        Raises:
            UserError: it was made for other spaces or layers.
        """
        return

    def initial_memory(self, lifetimes: int) -> Tree:
        """What a fresh lifetime carries: name -> [P, ...]; restarts with it."""
        return {}

    def heads(self, action_space: gymnasium.Space) -> Heads:
        """Extra heads that the agents must have: name -> size, or shape. One that begins with the number of actions
        speaks of each action."""
        return {}


@dataclass(frozen=True)
class NoConfig:
    """For components without settings."""


Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]


class Objective(Component):
    """What the agent minimises.

    `prepare` runs once an update, on all of its experience; `loss` runs on every minibatch. A loss must depend on
    `theta` only through `out`; whatever `prepare` makes of theta is a constant of the inner gradient.
    """

    slot = "objective"
    needs_value: ClassVar[bool] = True
    #: whether its loss reads whole rollouts in the order of time, and so cannot be cut into minibatches
    whole_rollouts: ClassVar[bool] = False
    #: whether `approx_kl` is among its metrics: the mean KL in nats of the policy from the one that acted
    reports_kl: ClassVar[bool] = False
    #: names of the terms that `agent_regularisers` and `target_regularisers` return
    regularisers: ClassVar[tuple[str, ...]] = ()
    #: names of the numbers on which its loss depends; of an objective that does not say, any
    reads: tuple[str, ...] = NUMBERS
    #: names of numbers that it reads but by which its gradient has no derivative
    insensitive: tuple[str, ...] = ()
    #: share of the present parameters in those of a target network, at each update; None: there is none. What it says
    #: is `out.target` in `prepare`, which reads it before it moves
    target_rate: float | None = None
    #: whether the outer gradient passes through what `prepare` reads from `out` (else `prepare` detaches it)
    differentiates_inputs: bool = False

    def settings(self, tabular: bool) -> dict[str, Any]:
        """Fields of `PPOConfig` that suit this objective, for a user who names none; the rest keep their defaults."""
        return {}

    @abstractmethod
    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_value: Tensor | None, hyper: Hyper, context: Context
    ) -> tuple[Batch, Tree]:
        """Targets of the update.

        Args:
            trajectory: experience [T, P, B]; its reward is what the reward slot made of it.
            out:        [T+1, P, B] outputs at the parameters that acted.
            next_value: [T, P, B] value of the state each step led to (None if `needs_value` is false).
            hyper:      numbers of this update.
            context:    age, horizon and memory of each lifetime.

        Returns:
            batch:  name -> [T, P, B, ...], from which minibatches are drawn.
            memory: the objective's memory after this update.
        """

    @abstractmethod
    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
        """The loss of each lifetime on a minibatch.

        Args:
            out:   outputs [..., P, b] at the present parameters ([T, P, B] or [P, b]).
            batch: the rows of `prepare`'s batch that belong to `out`, and "action", "log_prob".
            hyper: numbers of this update.

        Returns:
            loss:    [P].
            metrics: name -> [P], detached.
        """

    def agent_regularisers(self, out: AgentOutput, action: Tensor) -> Metrics:
        """Terms [P] that meta-training may add to its loss, by name: on what agents became, `out` [T, P, B], and the
        actions taken."""
        return {}

    def target_regularisers(self, batch: Batch) -> Metrics:
        """Terms [P] on what the objective said (`prepare`d), that meta-training may add to its loss; by name."""
        return {}


class Reward(Component):
    """What is rewarded: a function of the trajectory that replaces its reward, differentiable in `eta`."""

    slot = "reward"

    @abstractmethod
    def forward(self, trajectory: Trajectory, context: Context) -> tuple[Tensor, Tree]:
        """[T, P, B] reward per environment step, and the component's memory after this update."""


class Hyperparameters(Component):
    """The numbers of an update, as a function of where the lifetime stands."""

    slot = "hyperparameters"
    #: names of the numbers that it sets otherwise than configured
    tuned: tuple[str, ...] = ()
    #: names of the numbers that the agents' networks are told
    conditions: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, base: Hyper, trajectory: Trajectory, context: Context) -> tuple[Hyper, Tree]:
        """The numbers to use, from the configured ones, and the component's memory after this update."""


class Auxiliary(Component):
    """What else is predicted: a second loss on heads of its own."""

    slot = "auxiliary"
    #: names of the numbers on which its loss depends; of one that does not say, any
    reads: tuple[str, ...] = NUMBERS

    @abstractmethod
    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_heads: dict[str, Tensor], hyper: Hyper, context: Context
    ) -> Batch:
        """Targets, name -> [T, P, B, ...]; names must not clash with the objective's.

        Args:
            out:        [T+1, P, B] outputs at the parameters that acted.
            next_heads: name -> [T, P, B, *shape], what its heads say of the state each step led to.
        """

    @abstractmethod
    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> Tensor:
        """[P], added to the objective's loss with weight `hyper.aux_coef`."""


class UpdateRule(Component):
    """How parameters move: a pure function of gradient, state and parameters.

    Rows are independent: row p of everything belongs to lifetime p.
    """

    slot = "optimizer"
    #: whether it takes the gradient as a constant, so that no second derivatives of the agents' loss are needed
    stops_gradient: bool = False
    #: whether it reads `StepContext.activity`
    reads_activity: bool = False
    #: whether it reads `StepContext.noise`
    draws: bool = False
    #: learning rate with which it is what its paper describes; None: whatever suits the agents
    suited_rate: ClassVar[float | None] = None

    def trained_numbers(self, tabular: bool) -> dict[str, Any]:
        """Numbers of the update with which it was meta-trained, on tables or on networks, whose step sizes are worlds
        apart; none where it was not."""
        trained = self.provenance.get("agent") or {}
        return trained.get("hyper", {}) if self.provenance.get("tabular", tabular) == tabular else {}

    def trained_rate(self, tabular: bool) -> float | None:
        """Learning rate with which it was meta-trained, or else the one that suits it."""
        rate = self.trained_numbers(tabular).get("learning_rate", self.suited_rate)
        return None if rate is None else float(rate)

    def fit_layout(self, layout: Layout) -> None:
        """Take the size of these rows, if any of its parameters depends on it; once, in place (see `fit`).

        Raises:
            UserError: it was made for other rows.
        """
        return

    @abstractmethod
    def initial_state(self, theta: Tensor) -> Tree:
        """State of fresh rows: name -> [P, ...]."""

    @abstractmethod
    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        """The step to add to theta, and the new state; differentiable, nothing in place.

        Args:
            grad, theta:   [P, D].
            learning_rate: a float, or a tensor that broadcasts against [P, D].
            context:       what is known of the step; None: nothing.
        """


def lifetime_mean(x: Tensor) -> Tensor:
    """Mean of [..., P, b] over all axes but P: `[P]`. The one way in which losses are reduced."""
    return x.mean(-1) if x.dim() == 2 else x.mean((0, 2))


def per_lifetime(x: Scalar) -> Scalar:
    """A number of the update as it multiplies losses [P], instead of [P, 1]."""
    return x.squeeze(-1) if isinstance(x, Tensor) and x.dim() == 2 else x


def finite(x: Tensor, axis: int = 0) -> Tensor:
    """Whether the numbers of each lifetime are finite, [P] bool, from a tensor whose lifetime axis is given.

    By their sums, which is much faster than looking at each: a sum is finite only if all that is in it is. One that
    overflows counts as not finite.
    """
    with torch.no_grad():
        others = [i for i in range(x.dim()) if i != axis]
        return (x.sum(others) if others else x).isfinite()


class Shield(torch.autograd.Function):
    """Identity whose gradient is zero in every lifetime where it is not finite.

    Components share `eta` over lifetimes, so one lifetime that overflowed would turn the sum of meta-gradients into
    NaN even with weight zero (0 * inf). The shield stands where a component's outputs enter a lifetime's own losses.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Forward mode keeps lifetimes apart by itself: what is not finite stays in its row."""
        return tangents[0].view_as(tangents[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        keep = finite(grad, ctx.axis)
        if bool(keep.all()):
            return grad, None
        shape = [-1 if i == ctx.axis else 1 for i in range(grad.dim())]
        return torch.where(keep.view(shape), grad, torch.zeros_like(grad)), None


def shield(x: Tensor, axis: int) -> Tensor:
    """See `Shield`; `axis` is the lifetime axis of x. Costs nothing where x carries no gradient."""
    return Shield.apply(x, axis) if x.requires_grad else x
