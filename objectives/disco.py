"""Disco103: a discovered rule that tells agents what to predict and how to act, as targets of their own outputs.

Oh, Farquhar, Kemaev, Calian, Hessel, Zintgraf, Singh, van Hasselt, Silver, "Discovering state-of-the-art reinforcement
learning algorithms", Nature 2025, doi:10.1038/s41586-025-09761-x; authors' code and weights (JAX, Apache-2.0):
github.com/google-deepmind/disco_rl. Agents say a policy, a prediction y(s) and for each action a prediction z(s, a), a
categorical value q(s, a) and the next state's policy. A network reads a rollout from its end to its beginning, with
what a slower copy of the agents says (`out.target`) and advantages of Retrace beside it, and says targets for policy, y
and z of the action taken. The agent descends

    L = mean_t [ KL(pi_hat_t || pi_t) + KL(y_hat_t || y_t) + KL(z_hat_t || z_t(a_t))
                 + KL(pi_{t+1} || aux_t(a_t)) + c CE(G_t, q_t(a_t)) ]

over the steps that do not begin an episode right after another, with G of Retrace. A second network, an LSTM over the
lifetime whose step is one update, scales what the first one says. The rule's own numbers: gamma 0.997, trace 0.95
(`gae_lambda`), c = 0.2 (`vf_coef`), 1 for the policy (`pg_coef`) and for y and z (`prediction_coef`).

Deviations: an observation that only follows a time limit is an end like any other, as in the authors' environments.

Contract 1: 27 numbers of a step and 9 of an action, in the order of `_Reader`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn
from torch.nn import functional

from learned_rl.agents import AgentConfig
from learned_rl.architecture import AgentOutput, Heads, truncated_normal
from learned_rl.component import Batch, Context, Hyper, Metrics, Objective, lifetime_mean, per_lifetime
from learned_rl.distributions import Categorical, log_softmax, rowwise, softmax
from learned_rl.returns import retrace
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, UserError, at_least
from learned_rl.values import CategoricalValue, RunningMoments
from objectives.recurrence import ReverseLSTM

STATE, ACTION = 27, 9  # numbers that are read of a step, and of each of its actions
MIXED = (16, 2)  # channels of what is made of an action


@dataclass(frozen=True)
class DiscoConfig:
    predictions: int = 600
    """K: entries of the predictions y and z"""
    support: int = 300
    """largest bin of the categorical values, in the squeezed space; there are twice as many and one more"""
    width: int = 256
    """H: units of the LSTM that reads a rollout"""
    lifetime_width: int = 128
    """units of the LSTM that reads the lifetime"""
    embedding: int = 16
    """hidden units of what embeds a prediction as one number, and channels of what is made of actions"""
    target_decay: float = 0.9
    """decay per update of the average of parameters that makes the target network"""
    moments_decay: float = 0.99
    """decay per update of the averages that normalise advantages"""
    next_policy_coef: float = 1.0
    """weight of the prediction of the next state's policy"""

    def __post_init__(self) -> None:
        sizes = ("predictions", "support", "width", "lifetime_width", "embedding")
        at_least(1, **{name: getattr(self, name) for name in sizes})
        for name in ("target_decay", "moments_decay"):
            at_least(0, **{name: getattr(self, name)})
            if getattr(self, name) >= 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected less than 1.")


@dataclass(frozen=True)
class _Seen:
    """What the networks read of a rollout: constants, but for y and z.

    Attributes:
        taken:    [T, P, B, A] bool, the action taken.
        columns:  numbers of a step, by name: [T, P, B], "value" [T+1, P, B].
        policies: [T, P, B, A, 3] of the agents, of those that acted, of the target network.
        values:   [T, P, B, A, 4] of each action, on three scales, and whether it was taken.
        y, z:     [T+1, P, B, K] and [T+1, P, B, A, K], distributions; of the agents and of the target network.
        pi:       [T+1, P, B, A] policy of the agents.
    """

    taken: Tensor
    columns: dict[str, Tensor]
    policies: Tensor
    values: Tensor
    y: tuple[Tensor, Tensor]
    z: tuple[Tensor, Tensor]
    pi: Tensor


class Disco(Objective):
    """The discovered rule as an objective. Memory: the lifetime's LSTM, moments of advantages and of errors of q."""

    name, Config, needs_value, differentiates_inputs = "disco103", DiscoConfig, False, True
    reads = ("gamma", "gae_lambda", "pg_coef", "vf_coef", "prediction_coef")
    insensitive = ("gamma", "gae_lambda")
    regularisers = ("y_entropy", "z_entropy", "pi_hat_mean", "y_hat_mean", "z_hat_mean", "target_kl")
    config: DiscoConfig

    def __init__(self, config: DiscoConfig | None = None, **changes: object) -> None:
        super().__init__(dataclasses.replace(config or DiscoConfig(), **changes))  # type: ignore[arg-type]
        c = self.config
        self.target_rate = 1 - c.target_decay
        self.value, self.moments = CategoricalValue(c.support), RunningMoments(c.moments_decay)
        self.reader = _Reader(c.predictions, c.embedding)
        self.core = ReverseLSTM(STATE, c.width)
        self.scale = nn.Linear(c.lifetime_width, c.width)
        self.summary = nn.Linear(c.width, 1)
        self.y_head, self.z_head = nn.Linear(c.width, c.predictions), nn.Linear(c.width, c.predictions)
        self.mix, self.policy_head = _Mix(c.width + MIXED[1], c.embedding), nn.Linear(c.embedding, 1)
        self.life = _Life(c)
        self._initialise()

    def _initialise(self) -> None:
        """Fresh weights as in the authors' code; the LSTMs' forget gates start at a bias of 1."""
        wide = {self.scale: 1.0} | dict.fromkeys((self.summary, self.y_head, self.z_head, self.policy_head), 0.3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                truncated_normal(module.weight.data, wide.get(module, 1 / math.sqrt(module.in_features)))
                nn.init.zeros_(module.bias)
        for core in (self.core, self.life.cell):
            for weight in (core.weight_x, core.weight_h):
                truncated_normal(weight.data, 1 / math.sqrt(core.weight_x.shape[1] + core.weight_h.shape[1]))

    def settings(self, tabular: bool) -> dict[str, Any]:
        """Those of the published evaluation: 64 trajectories out of the latest 1024 for each step of 1e-2."""
        return {
            "n_envs": 2,
            "n_steps": 29,
            "n_epochs": 1,
            "n_minibatches": 1,
            "optimizer": "clipped_adam",
            "replay_capacity": 1024,
            "replay_batch": 64,
            "hyper": Hyper(
                learning_rate=1e-2,
                gamma=0.997,
                gae_lambda=0.95,
                vf_coef=0.2,
                prediction_coef=1.0,
                max_grad_norm=math.inf,
            ),
            "agent": AgentConfig("action_conditional", hidden=(512, 512), activation="relu"),
        }

    def heads(self, action_space: gymnasium.Space) -> Heads:
        if not isinstance(action_space, Discrete):
            raise UserError(f"{self.name!r} needs discrete actions: the action space is {action_space}.")
        A, K = int(action_space.n), self.config.predictions
        return {"y": K, "z": (A, K), "next_policy": (A, A), "q": (A, self.value.bins)}

    def initial_memory(self, lifetimes: int) -> Tree:
        width = self.config.lifetime_width
        memory = {"hidden": torch.zeros(lifetimes, width), "cell": torch.zeros(lifetimes, width)}
        for name in ("advantage", "error"):
            memory |= {f"{name}_{k}": v for k, v in self.moments.initial(lifetimes).items()}
        return memory

    # --- targets -----------------------------------------------------------------------------------------------

    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_value: Tensor | None, hyper: Hyper, context: Context
    ) -> tuple[Batch, Tree]:
        assert out.target is not None and isinstance(out.policy, Categorical)
        memory = context.memory
        seen, target, moments = self._see(trajectory, out, hyper, memory)
        x, actions = self.reader(seen)
        T, P, B = trajectory.reward.shape
        hidden = self.core(x.flatten(2), trajectory.done.reshape(T, -1)).mT.unflatten(1, (P, B))  # [T, P, B, H]
        scaled = hidden * self.scale(memory["hidden"])[:, None]
        y_hat, z_hat, summary = self.y_head(scaled), self.z_head(scaled), self.summary(scaled)
        mixed = self.mix(actions, scaled)
        state = self.life(seen, summary, y_hat, memory["hidden"], memory["cell"])
        batch = {
            "pi_hat": self.policy_head(mixed).squeeze(-1),
            "y_hat": y_hat,
            "z_hat": z_hat,
            "return": target.detach(),  # stop: values learn a constant, also of a learned reward
            "ended": trajectory.done,
            # stop: what is predicted of the next state is a constant
            "next_logits": out.policy.logits[1:].detach(),
            "target_logits": out.target.policy.params[0][:-1].detach(),  # stop: a reference
            "counts": torch.ones_like(trajectory.done) if trajectory.follows is None else ~trajectory.follows,
        }
        return batch, state | moments

    def _see(self, trajectory: Trajectory, out: AgentOutput, hyper: Hyper, memory: Tree) -> tuple[_Seen, Tensor, Tree]:
        """What the networks read, the returns of the actions taken [T, P, B], and the moments after this update."""
        slow = out.target
        assert slow is not None
        # stop: policies and values reach the networks as constants; only predictions carry a meta-gradient
        now, old = out.policy.map(torch.Tensor.detach), slow.policy.map(torch.Tensor.detach)
        q, q_slow = (self.value.mean(o.heads["q"].detach()) for o in (out, slow))  # stop: same
        taken = functional.one_hot(trajectory.action, q.shape[-1]).bool()
        chosen = lambda x: x[: len(taken)].gather(-1, trajectory.action.unsqueeze(-1)).squeeze(-1)  # noqa: E731
        pi = softmax(now.params[0])
        value, value_slow = (pi * q).sum(-1), (pi * q_slow).sum(-1)
        behaviour = now.map(lambda x: x[:-1]) if trajectory.logits is None else Categorical(trajectory.logits)
        log_ratio = now.map(lambda x: x[:-1]).log_prob(trajectory.action) - behaviour.log_prob(trajectory.action)
        gamma, gae_lambda = _constant(hyper.gamma), _constant(hyper.gae_lambda)
        ends = trajectory.done, torch.zeros_like(trajectory.done)
        target = retrace(trajectory.reward, chosen(q_slow), value_slow[1:], *ends, log_ratio, gamma, gae_lambda)
        advantage, gap = target - value_slow[:-1], q_slow - value_slow.unsqueeze(-1)
        moments, (mean, scale) = self._moments(memory, "advantage", advantage)
        moments |= self._moments(memory, "error", target - chosen(q))[0]
        policies = torch.stack([pi[:-1], softmax(behaviour.params[0]), softmax(old.params[0])[:-1]], -1)
        shift = ((gap - mean.unsqueeze(-1)) / scale.unsqueeze(-1))[:-1]
        seen = _Seen(
            taken=taken,
            columns={
                "reward": _log(trajectory.reward),
                "goes_on": (~trajectory.done).to(q.dtype),
                "value": _log(value),
                "advantage": _log(advantage),
                "normalized": (advantage - mean) / scale,
            },
            policies=policies,
            values=torch.stack([_log(q_slow[:-1]), _log(gap[:-1]), shift, taken.to(q.dtype)], -1),
            y=(softmax(out.heads["y"]), softmax(slow.heads["y"])),
            z=(softmax(out.heads["z"]), softmax(slow.heads["z"])),
            pi=pi,
        )
        return seen, target, moments

    def _moments(self, memory: Tree, name: str, x: Tensor) -> tuple[Tree, tuple[Tensor, Tensor]]:
        state = self.moments.update({k: memory[f"{name}_{k}"] for k in ("first", "second", "decay")}, x)
        return {f"{name}_{k}": v for k, v in state.items()}, self.moments.mean_scale(state)

    # --- the loss ----------------------------------------------------------------------------------------------

    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
        assert isinstance(out.policy, Categorical)
        z, next_policy, q = (_taken(out.heads[k], batch["action"]) for k in ("z", "next_policy", "q"))
        terms = {
            "policy": divergence(batch["pi_hat"], out.policy.logits),
            "y": divergence(batch["y_hat"], out.heads["y"]),
            "z": divergence(batch["z_hat"], z),
            "next_policy": divergence(batch["next_logits"], next_policy) * ~batch["ended"],
            "value": self.value.loss(q, batch["return"]),
        }
        counts = batch["counts"].to(q.dtype)
        share = lifetime_mean(counts) + 1e-8
        means = {k: lifetime_mean(v * counts) / share for k, v in terms.items()}
        of = lambda name: per_lifetime(getattr(hyper, name))  # noqa: E731
        loss = of("pg_coef") * means["policy"] + of("prediction_coef") * (means["y"] + means["z"])
        loss = loss + self.config.next_policy_coef * means["next_policy"] + of("vf_coef") * means["value"]
        metrics = {"policy_loss": means["policy"], "value_loss": means["value"]}
        metrics["entropy"] = lifetime_mean(out.policy.entropy())
        metrics["prediction_loss"] = means["y"] + means["z"]
        metrics["next_policy_loss"] = means["next_policy"]
        metrics["beyond_bins"] = lifetime_mean((~self.value.holds(batch["return"])).to(q.dtype))
        return loss, {k: v.detach() for k, v in metrics.items()}  # stop: only to look at

    def agent_regularisers(self, out: AgentOutput, action: Tensor) -> Metrics:
        """Entropies of y and of z of the actions taken (to be raised)."""
        entropies = {"y_entropy": out.heads["y"], "z_entropy": _taken(out.heads["z"], action)}
        return {k: lifetime_mean(Categorical(v).entropy()) for k, v in entropies.items()}

    def target_regularisers(self, batch: Batch) -> Metrics:
        """Squared means of the targets' logits, and KL of the target network's policy from pi_hat."""
        terms = {f"{k}_mean": lifetime_mean(batch[k].mean(-1)).square() for k in ("pi_hat", "y_hat", "z_hat")}
        return terms | {"target_kl": lifetime_mean(divergence(batch["target_logits"], batch["pi_hat"]))}


class _Mix(nn.Module):
    """A layer of what is said of each action beside its mean over actions: the same for any number of them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * inputs, outputs)

    def forward(self, x: Tensor, common: Tensor | None = None) -> Tensor:
        """[..., A, outputs] from [..., A, inputs] behind numbers `common [..., C]` to all actions, if there are any."""
        own, mean = self.linear.weight.chunk(2, 1)
        C = 0 if common is None else common.shape[-1]
        shared = x.mean(-2) @ mean[:, C:].T + self.linear.bias
        if common is not None:
            shared = shared + common @ (own + mean)[:, :C].T
        return (shared.unsqueeze(-2) + x @ own[:, C:].T).relu()


class _Reader(nn.Module):
    """Makes 27 numbers of each step and two of each action."""

    def __init__(self, predictions: int, embedding: int) -> None:
        super().__init__()
        self.y, self.z = (
            nn.Sequential(nn.Linear(predictions, embedding), nn.ReLU(), nn.Linear(embedding, 1)) for _ in range(2)
        )
        self.mix0, self.mix1 = _Mix(ACTION, MIXED[0]), _Mix(*MIXED)

    def forward(self, seen: _Seen) -> tuple[Tensor, Tensor]:
        """[T, 27, P, B] and [T, P, B, A, 2]."""
        y, z = ([rowwise(embed, x).squeeze(-1) for x in pair] for embed, pair in ((self.y, seen.y), (self.z, seen.z)))
        said = torch.stack([x[:-1] for x in z], -1)
        actions = torch.cat([seen.policies, said, seen.values], -1)
        embedded = self.mix1(self.mix0(actions))
        chosen = lambda x: torch.where(seen.taken, x, 0).sum(-1)  # noqa: E731
        c, policy = seen.columns, chosen(seen.policies.movedim(-1, 0))
        columns = [policy[0], policy[1], c["reward"], c["goes_on"], *_pair(c["value"]), c["advantage"], c["normalized"]]
        columns += [policy[2], *_pair(y[0]), *_pair(y[1])]
        for x in z:
            columns += [chosen(x[:-1]), *_pair((seen.pi * x).sum(-1)), *_pair(x.amax(-1))]
        columns += [*embedded.mean(-2).unbind(-1), *chosen(embedded.movedim(-1, 0)).unbind(0)]
        return torch.stack(columns, 1), embedded


class _Cell(nn.Module):
    """One step of an LSTM; gates in the order i, f, o, g, as in `ReverseLSTM`."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.weight_x = nn.Parameter(torch.empty(4 * width, inputs))
        self.weight_h = nn.Parameter(torch.empty(4 * width, width))
        self.bias = nn.Parameter(torch.cat([torch.zeros(width), torch.ones(width), torch.zeros(2 * width)]))

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state and cell [P, H] after inputs [P, I]."""
        i, f, o, g = (x @ self.weight_x.T + hidden @ self.weight_h.T + self.bias).chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell


class _Life(nn.Module):
    """What the rule remembers of a lifetime: an LSTM, of which one update is one step."""

    def __init__(self, config: DiscoConfig) -> None:
        super().__init__()
        self.reader = _Reader(config.predictions, config.embedding)
        self.inputs = nn.Linear(STATE + 2, config.embedding)
        self.cell = _Cell(config.embedding, config.lifetime_width)

    def forward(self, seen: _Seen, summary: Tensor, y_hat: Tensor, hidden: Tensor, cell: Tensor) -> Tree:
        """The memory after a rollout, of which the first network said `summary [T, P, B, 1]` and y_hat."""
        said = torch.cat([summary, self.reader.y(softmax(y_hat))], -1)
        x = torch.cat([self.reader(seen)[0].movedim(1, -1), said], -1)
        hidden, cell = self.cell(self.inputs(x).mean((0, 2)), hidden, cell)
        return {"hidden": hidden, "cell": cell}


# --- small things --------------------------------------------------------------------------------------------------


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [...] of logits [..., n], in nats."""
    log_p = log_softmax(p)
    return (log_p.exp() * (log_p - log_softmax(q))).sum(-1)


def _log(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


def _pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, ...] of each step and of the next one, from [T+1, ...]."""
    return x[:-1], x[1:]


def _taken(x: Tensor, action: Tensor) -> Tensor:
    """[..., n] of the action taken, from [..., A, n]."""
    index = action[..., None, None].expand(*action.shape, 1, x.shape[-1])
    return x.gather(-2, index).squeeze(-2)


def _constant(x: float | Tensor) -> float | Tensor:
    return x.detach() if isinstance(x, Tensor) else x  # stop: the rule's numbers make targets
