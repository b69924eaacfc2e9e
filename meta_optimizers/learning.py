"""Agents that learn, as a problem for an estimator: P lifetimes on a task family, judged by the environment's reward.

The outer loss of an agent on fresh experience is, as in Oh et al., 2020, arXiv:2007.08794, section 3.3,

    l = -mean log pi(a|s) A - beta H(pi) + c mean (V(s) - G)^2 + k KL(pi || pi_0) + regularisers of the objective

with A and G from the outer critic, which learns from the same experience and exists only here, and pi_0 the policy with
which the window began. The last two terms are those of Zahavy et al., 2020, arXiv:2002.12928; both are off unless asked
for. The numbers of this loss are those of `OuterLossConfig` and `OuterCriticConfig`, frozen: no learned number enters
it. Where data are judged by another agent than the one that collected them, log pi becomes the ratio of probabilities.
What evolution compares is not this surrogate but what the agents earn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from learned_rl.architecture import AgentOutput
from learned_rl.component import Component, Context, Metrics, finite, lifetime_mean
from learned_rl.inner_loop import GraphInner, Inner, PlainInner
from learned_rl.layout import StepContext
from learned_rl.lifetimes import Episodes, Lifetimes, under
from learned_rl.ppo import Algorithm, Slots, UpdateRecord
from learned_rl.spaces import LogUniform, searched
from learned_rl.streams import join
from learned_rl.streams import part as part_of
from learned_rl.substitute import substituted
from learned_rl.tasks.base import check_choices, unknown
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, UserError, at_least
from meta_optimizers.agent_bandit import AgentBandit
from meta_optimizers.group import Group
from meta_optimizers.outer_critic import OuterCritic, OuterCriticConfig, judged
from meta_optimizers.problem import Eta, Match, Moved, Problem

TUNED = "tuned"  # under which the numbers of an update are logged
_RECORDED = tuple(f.name for f in dataclasses.fields(Trajectory))


@dataclass(frozen=True)
class OuterLossConfig:
    policy_entropy: float = field(default=0.05, metadata=searched(LogUniform(1e-3, 0.3)))
    """weight of the policy's entropy (raised, in nats) at the first meta-step"""
    entropy_half_life: float = field(default=math.inf, metadata=searched(LogUniform(100, 10_000)))
    """meta-steps in which that weight halves: early on it keeps policies from settling, later it blurs them"""
    regularisers: dict[str, float] = field(default_factory=dict)
    """weight of each of the objective's own regularisers; negative raises the quantity"""
    value: float = 0.0
    """weight of the error of the agent's own value"""
    kl: float = 0.0
    """weight of the divergence of the policy from the one with which the window began, in nats: a trust region"""
    fitness: Literal["return", "reward"] = "return"
    """what evolution compares and a score-function term is weighted by: the mean return of the episodes that ended, or,
    where none did, what the running ones have so far; or the mean reward per environment step"""

    def __post_init__(self) -> None:
        check_choices(self)
        at_least(1e-6, entropy_half_life=self.entropy_half_life)
        at_least(0, value=self.value, kl=self.kl)


class Learning(Problem):
    """P lifetimes of one algorithm around components that are learned.

    One whose parameters or rewards are not finite is broken: its parameters are NaN until it begins anew.

    Args:
        lives:    the lifetimes of this process; their algorithm has the components in its slots.
        learned:  the slots whose components are learned; their parameters, "slot.name", are not read: `step` is told
                  them.
        critic:   how the outer loss values states; None: there is no outer loss (evolution needs none).
        bandit:   which step sizes lifetimes try; None: the configured one.
        restarts: whether lifetimes that end begin anew; None of them ever does otherwise, not even a broken one.
        together: whether all of them end at the same moment, so that a broken one waits for the others.
    """

    def __init__(
        self,
        lives: Lifetimes,
        learned: Sequence[str],
        loss: OuterLossConfig,
        critic: OuterCriticConfig | None,
        bandit: AgentBandit | None = None,
        *,
        restarts: bool = True,
        together: bool = False,
        group: Group | None = None,
    ) -> None:
        self.lives, self.algorithm, self.streams = lives, lives.algorithm, lives.streams
        self.config, self.values, self.bandit = loss, critic, bandit
        self.restarting, self.together, self.group, self.lifetimes = restarts, together, group or Group(), len(lives)
        self.learned: dict[str, Component] = {s: c for s, c in self.algorithm.slots.items() if s in learned}
        self._check_reached()
        objective = self.algorithm.slots.objective
        if lives.replay is not None:
            raise UserError(
                f"replay_capacity is {lives.replay.capacity}: while a part is learned, agents learn from each rollout "
                "once; expected 0."
            )
        for name in loss.regularisers:
            if name not in objective.regularisers:
                raise unknown(f"regulariser of {objective.name!r}", name, objective.regularisers)
        if (loss.value or (critic and critic.source == "agent")) and not objective.needs_value:
            raise UserError(f"Agents of {objective.name!r} have no value: expected source 'own' and no value loss.")
        self.critic: OuterCritic | None = None
        if critic and critic.source != "agent":
            self.critic = OuterCritic(
                critic, lives.family, self.streams.index, lives.seed, lives.device, lives.population.theta.dtype
            )
        self.environment_steps = self.restarts = self.broken = 0
        self._ended: list[Episodes] = []
        self._log: dict[str, float] = {}
        self._begin(torch.ones(self.streams.total, dtype=torch.bool))

    def _check_reached(self) -> None:
        """Whether the meta-gradient reaches what is learned, if there is one.

        Raises:
            UserError: a part that acts through the agents' gradient, which the update rule takes as a constant.
        """
        rule, numbers = self.algorithm.slots.optimizer, self.algorithm.slots.hyperparameters
        through = set(self.learned) - {"optimizer"}
        if numbers.tuned == ("learning_rate",):  # the step is multiplied by it
            through -= {"hyperparameters"}
        if self.values is not None and rule.stops_gradient and through:
            raise UserError(
                f"What the slot {min(through)!r} learns acts through the agents' gradient, which the optimizer "
                f"{rule.name!r} takes as a constant: expected stop_gradient off (--set optimizer.stop_gradient=false), "
                "or another optimizer."
            )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """ "slot.name" -> parameter of the learned components."""
        return {f"{s}.{k}": p for s, c in self.learned.items() for k, p in c.named_parameters()}

    # --- what estimators ask -----------------------------------------------------------------------------------

    def present(self) -> Tree:
        lives = self.lives
        # stop: where the next window begins
        state = {"theta": lives.population.theta.detach().clone(), "age": lives.age}
        self._anchor = state["theta"]
        return state | _named("optimizer", lives.optimizer_state) | _named("memory", lives.memory)

    def collect(self, state: Tree) -> Tree:
        trajectory = self.lives.collect(self._inner(state, self.algorithm.slots))
        ended = self.lives.episodes(trajectory)
        self._ended.append(ended)
        self.environment_steps += trajectory.steps * self.lifetimes * self.group.size
        data = {k: v for k in _RECORDED if (v := getattr(trajectory, k)) is not None}
        if self.group.size > 1:  # what is carried of all processes can be joined only if it has the same entries
            data.setdefault("final_obs", data["obs"][1:])
        data["shuffle"] = torch.tensor([self.lives.shuffle()])
        data["cost"] = -self._fitness(trajectory, ended)
        return data | self._valued(trajectory, state)

    def _valued(self, trajectory: Trajectory, state: Tree) -> Tree:
        """What the outer loss knows of experience, beside it: constants [T, P, B, ...]."""
        if self.values is None:
            return {}
        known: Tree = {}
        if self.critic is None:
            agent = self.lives.population.bind(state["theta"].detach())  # stop: values are constants of the loss
            known["advantage"], target = judged(trajectory, lambda obs: agent(obs).value, self.values)  # type: ignore[arg-type,return-value]
        else:
            known["advantage"], target = self.critic.judge(trajectory)
            with torch.enable_grad():
                loss = self.critic.learn(trajectory, target)
            self._log["critic_loss"] = loss.nanmean().item()
        if self.config.value:
            known["target"] = target
        if self.config.kl:
            with torch.no_grad():
                anchor = self.lives.population.bind(self._anchor, policy_only=True)(trajectory.obs[:-1])
            known |= {f"anchor{i}": x for i, x in enumerate(anchor.policy.params)}
        return known

    def take_episodes(self) -> list[Episodes]:
        """Episodes that ended since the last call, of each collection."""
        ended, self._ended = self._ended, []
        return ended

    def step(self, state: Tree, data: Tree, eta: Eta) -> Moved:
        """One update. A lifetime that is not finite, or does not come out of the update finite, leaves it as NaN; one
        that only its judge has no finite number for goes on, with a NaN for its loss."""
        alive = self._alive(state, data)
        moved = self._step(state, data, eta, alive, alive)
        whole = finite(moved.state["theta"])
        judged = whole & moved.loss.isfinite()
        return moved if torch.equal(judged, alive) else self._step(state, data, eta, whole, judged)

    def _step(self, state: Tree, data: Tree, eta: Eta, alive: Tensor, judged: Tensor) -> Moved:
        """A step of those that are alive; `judged` ones among them are judged, and have a meta-gradient."""
        graph = torch.is_grad_enabled()
        slots = self._slots(eta if graph else eta.map(torch.Tensor.detach))  # stop: nobody looks back
        state, data = self._cleared(state, data, alive)
        inner = self._inner(state, slots, graph)
        algorithm = Algorithm(self.algorithm.config, slots, self.algorithm.agent_factory)
        context = Context(state["age"], self.lives.horizon, under("memory", state))
        generator = torch.Generator(self.lives.device).manual_seed(int(data["shuffle"]))
        with torch.enable_grad():  # an inner gradient in either case
            record = algorithm.update(inner, _trajectory(data), context, self.lives.hyper, generator, self.streams)
        out = record.out.map(lambda x: x[:-1])
        loss, parts = self._loss(out, self._cleared(state, data, judged)[1])
        loss = loss if torch.equal(judged, alive) else torch.where(judged | ~alive, loss, torch.nan)
        penalty, terms = self._weighted(slots.objective.target_regularisers(record.batch), loss)
        theta = inner.theta if bool(alive.all()) else torch.where(alive[:, None], inner.theta, torch.nan)
        after = {"theta": theta, "age": state["age"] + 1} | _named("optimizer", inner.state)
        after |= _named("memory", record.memory)
        if not graph:
            after = {k: v.detach() for k, v in after.items()}  # stop: same
        log_prob = out.policy.log_prob(data["action"]).sum((0, 2))
        return Moved(after, loss, penalty, log_prob, alive, parts | terms | _looks(record, slots))

    def judge(self, state: Tree, data: Tree, eta: Eta, importance: bool = False, bare: bool = False) -> Tensor:
        alive = self._alive(state, data)
        loss = self._judged(state, data, alive, importance, bare)
        whole = loss.isfinite()
        return loss if torch.equal(whole, alive) else self._judged(state, data, whole, importance, bare)

    def _judged(self, state: Tree, data: Tree, alive: Tensor, importance: bool, bare: bool) -> Tensor:
        """[P] outer loss of those that are alive, and NaN."""
        state, data = self._cleared(state, data, alive)
        loss = self._loss(self._out(state, data), data, importance, bare)[0]
        return loss if bool(alive.all()) else torch.where(alive, loss, torch.nan)

    def cost(self, data: Tree) -> Tensor:
        return data["cost"]

    def descend(self, state: Tree, loss: Tensor, eta: Eta) -> Tree:
        """One step of the inner update rule with the configured numbers (those of a learned slot are not asked)."""
        theta = state["theta"]
        (grad,) = torch.autograd.grad(loss.sum(), theta)
        inner = self._inner(state, self._slots(eta.map(torch.Tensor.detach)))  # stop: the target is a constant
        # As in an update's last pass; units that nobody watched are like any other, and noise would pull at nothing.
        elapsed = Context(state["age"], self.lives.horizon, {}).elapsed
        known = StepContext(None, elapsed, 1.0, torch.ones_like(grad), torch.zeros_like(grad))
        with torch.no_grad():
            step, rule = inner.move(grad, theta, self.lives.hyper, context=known)
            after = torch.where(loss.isfinite()[:, None], theta + step, torch.nan)  # the others have no target
            return state | {"theta": after} | _named("optimizer", rule)

    def match(self, state: Tree, target: Tree, data: Tree, by: Match) -> Tensor:
        if by == "parameters":
            return super().match(state, target, data, by)
        alive = self._alive(state, data) & finite(target["theta"])
        (state, data), (target, _) = self._cleared(state, data, alive), self._cleared(target, data, alive)
        ours = self._out(state, data)
        with torch.no_grad():
            theirs = self._out(target, data)
        if by == "kl":
            return lifetime_mean(theirs.policy.kl(ours.policy))
        if ours.value is None or theirs.value is None:
            name = self.algorithm.slots.objective.name
            raise UserError(f"Agents of {name!r} have no value: match by 'kl' or 'parameters' instead of 'value'.")
        return lifetime_mean((ours.value - theirs.value).square())

    def commit(self, state: Tree) -> None:
        lives = self.lives
        with torch.no_grad():
            lives.population.theta.copy_(state["theta"])
        lives.age = state["age"]
        lives.optimizer_state, lives.memory = under("optimizer", state), under("memory", state)

    # --- the pieces of a step ----------------------------------------------------------------------------------

    def _alive(self, state: Tree, data: Tree) -> Tensor:
        """[P] bool: parameters and rewards are finite."""
        return finite(state["theta"]) & finite(data["reward"], 1)

    def _cleared(self, state: Tree, data: Tree, alive: Tensor) -> tuple[Tree, Tree]:
        """State and data with zeros for those that are not alive. All lifetimes share eta: what one of them computes
        with NaN makes everyone's meta-gradient NaN, also where it weighs nothing (0 * NaN)."""
        if bool(alive.all()):
            return state, data
        kept = {k: v if k == "age" else _rows(alive, v, 0) for k, v in state.items()}
        return kept, {k: v if (at := self.axis(k)) is None else _rows(alive, v, at) for k, v in data.items()}

    def _slots(self, eta: Eta) -> Slots:
        """The slots with the learned components under these meta-parameters."""
        played = {}
        for slot, component in self.learned.items():
            own = {k.removeprefix(f"{slot}."): v for k, v in eta.values.items() if k.startswith(f"{slot}.")}
            played[slot] = substituted(component, own, eta.stacked)
        return dataclasses.replace(self.algorithm.slots, **played)  # type: ignore[arg-type]

    def _inner(self, state: Tree, slots: Slots, graph: bool = False) -> Inner:
        kind = GraphInner if graph else PlainInner
        return kind(self.lives.population, slots.optimizer, under("optimizer", state), state["theta"])

    def _out(self, state: Tree, data: Tree) -> AgentOutput:
        return self.lives.population.bind(state["theta"])(data["obs"][:-1])

    def _loss(
        self, out: AgentOutput, data: Tree, importance: bool = False, bare: bool = False
    ) -> tuple[Tensor, Metrics]:
        """[P] outer loss, and its parts by name."""
        if "advantage" not in data:
            return torch.zeros_like(data["cost"]), {}
        score = out.policy.log_prob(data["action"])
        score = (score - data["log_prob"]).exp() if importance else score
        policy = -lifetime_mean(score * data["advantage"])
        if bare:
            return policy, {}
        entropy = lifetime_mean(out.policy.entropy())
        weight = self.config.policy_entropy * 0.5 ** (self.meta_step / self.config.entropy_half_life)
        more, terms = self._weighted(self.algorithm.slots.objective.agent_regularisers(out, data["action"]), policy)
        parts: Metrics = {"policy": policy, "entropy": entropy}
        loss = policy - weight * entropy + more
        if self.config.value:
            parts["value"] = lifetime_mean(out.value_error(data["target"]))
            loss = loss + self.config.value * parts["value"]
        if self.config.kl:
            anchor = out.policy.like(*(data[f"anchor{i}"] for i in range(len(out.policy.params))))
            parts["kl"] = lifetime_mean(out.policy.kl(anchor))
            loss = loss + self.config.kl * parts["kl"]
        return loss, {k: v.detach() for k, v in parts.items()} | terms  # stop: a look

    def _weighted(self, terms: Metrics, like: Tensor) -> tuple[Tensor, Metrics]:
        """[P] sum of regularisers with the configured weights, and each of them to look at."""
        total = torch.zeros_like(like)
        for name, value in terms.items():
            total = total + self.config.regularisers.get(name, 0.0) * value  # those not named weigh nothing
        return total, {k: v.detach() for k, v in terms.items()}  # stop: a look

    def _fitness(self, trajectory: Trajectory, ended: Episodes) -> Tensor:
        """[P] what the agents that collected this earn."""
        if self.config.fitness == "reward":
            return trajectory.reward.mean((0, 2))
        running = self.lives.episodes.running[0].mean(1)
        return torch.where(ended.count > 0, ended.returns / ended.count.clamp(min=1), running)

    # --- beginnings and ends -----------------------------------------------------------------------------------

    def renew(self, broken: Tensor) -> Tensor:
        if not self.restarting:
            return torch.zeros_like(broken)
        ended = self.lives.finished()
        which = self._alike(ended if self.together else ended | broken)
        episodes = self.take_episodes()
        returns, count = (sum(getattr(e, k) for e in episodes) for k in ("returns", "count"))
        mean_return = returns / count  # [P]; not a number where no episode ended
        over = self._record(which, mean_return, broken)
        if bool(over.any()):
            self.lives.restart(which, elsewhere=True)
            if self.critic is not None:
                self.critic.restart(which, self.lives.life)
        self._begin(over)
        return which

    def _alike(self, which: Tensor) -> Tensor:
        """Lifetimes that share a random stream begin together, in whichever process they are."""
        index = self.streams.index.to(which.device)
        hit = torch.zeros(self.streams.total, dtype=torch.bool, device=which.device)
        hit[index[which]] = True
        return self.group.sum(hit.int()).bool()[index]

    def _record(self, which: Tensor, mean_return: Tensor, broken: Tensor) -> Tensor:
        """Count, log, and tell the bandit, over all processes; the streams that begin anew, [all streams] bool."""
        index = self.streams.index.to(which.device)
        rows = torch.stack([index.double(), which.double(), broken.double(), mean_return.double()], 1)
        index, which, broken, mean_return = self.group.gather(rows).unbind(1)
        ended, lost = which.bool(), broken.bool()
        self._log["return"] = mean_return.nanmean().item()
        if bool(ended.any()):
            self._log["final_return"] = mean_return[ended].nanmean().item()
        self.restarts += int(ended.sum())
        self.broken += int(lost.sum())
        streams = index.long()
        known = mean_return.isfinite()
        sums, counts = (mean_return.new_zeros(self.streams.total) for _ in range(2))
        sums.index_add_(0, streams[known], mean_return[known])
        final = sums / counts.index_add_(0, streams[known], known[known].to(counts))  # of those on one stream
        over, torn = (torch.zeros(self.streams.total, dtype=torch.bool, device=streams.device) for _ in range(2))
        over[streams[ended]], torn[streams[lost]] = True, True
        if self.bandit is not None:
            self.bandit.record(over, final, torn)
        return over

    def _begin(self, streams: Tensor) -> None:
        if self.bandit is not None:
            self.bandit.assign(streams)
            self._choose()

    def _choose(self) -> None:
        """Let the lifetimes learn with the numbers that the bandit chose."""
        if self.bandit is not None:
            base, theta = self.algorithm.config.hyper, self.lives.population.theta
            self.lives.hyper = self.bandit.hyper(base, theta, self.streams.index)

    def report(self) -> dict[str, float]:
        log, self._log = self._log, {}
        return log

    # --- save and resume ---------------------------------------------------------------------------------------

    def state_dict(self) -> Tree:
        counters = torch.tensor([self.environment_steps, self.restarts, self.broken])
        state: Tree = {"counters": counters}
        for name, piece in self._parts():
            state |= _named(name, piece.state_dict())
        return state

    def load_state_dict(self, state: Tree) -> None:
        self.environment_steps, self.restarts, self.broken = state["counters"].tolist()
        for name, piece in self._parts():
            piece.load_state_dict(under(name, state))
        self._choose()

    def join(self, states: Sequence[Tree]) -> Tree:
        return states[0] | join([_of_lifetimes(state) for state in states])

    def part(self, state: Tree) -> Tree:
        rank, size, lifetimes = self.group.rank, self.group.size, self.lifetimes
        return state | part_of(_of_lifetimes(state), rank * lifetimes, lifetimes, size * lifetimes)

    def axis(self, name: str) -> int | None:
        return {"shuffle": None, "cost": 0}.get(name, 1)  # experience is [T, P, ...]

    def _parts(self) -> list[tuple[str, Lifetimes | OuterCritic | AgentBandit]]:
        parts: list[tuple[str, Lifetimes | OuterCritic | AgentBandit]] = [("lifetimes", self.lives)]
        parts += [("critic", self.critic)] if self.critic is not None else []
        return parts + ([("bandit", self.bandit)] if self.bandit is not None else [])


def _looks(record: UpdateRecord, slots: Slots) -> Metrics:
    """What to look at of an agent update, name -> [P]: its own metrics, and the numbers that the slot set."""
    seen = {f"agent/{k}": v for k, v in record.metrics.items()}
    for name in slots.hyperparameters.tuned:
        if isinstance(x := getattr(record.hyper, name), Tensor):
            x = x.detach()  # stop: to look at
            seen[f"{TUNED}/{name}"] = lifetime_mean(x) if x.dim() == 3 else x.mean(1)
    return seen


def _rows(keep: Tensor, x: Tensor, axis: int) -> Tensor:
    """x with zeros in the lifetimes, which lie along that axis, that are not kept `[P]`."""
    return torch.where(keep.view([-1 if i == axis else 1 for i in range(x.dim())]), x, torch.zeros_like(x))


def _named(prefix: str, tree: Tree) -> Tree:
    return {f"{prefix}/{k}": v for k, v in tree.items()}


def _of_lifetimes(state: Tree) -> Tree:
    """What each process saves for lifetimes of its own; the rest is the same in all."""
    return {k: v for k, v in state.items() if k.startswith(("lifetimes/", "critic/"))}


def _trajectory(data: Tree) -> Trajectory:
    return Trajectory(**{k: data.get(k) for k in _RECORDED})  # type: ignore[arg-type]
