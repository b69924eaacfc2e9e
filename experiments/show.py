"""`learned-rl show FILE` and `learned-rl list`: what there is, and a picture of what was learned.

Pictures are drawn from probes, so they need no environment: an objective is asked what it says about hand-made
rollouts, or how its loss bends as the policy moves.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.figures import COLOURS, save_figure
from experiments.recipes import online_recipes, recipes
from learned_rl import artifacts
from learned_rl.architecture import AgentOutput
from learned_rl.component import Component, Context, Hyper, UpdateRule
from learned_rl.defaults import PPOClip
from learned_rl.distributions import Categorical
from learned_rl.registry import components, families
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError
from learned_rl.update_rules import SGD, Adam
from meta_optimizers.meta_sgd import MetaSGD
from objectives.disco import Disco
from objectives.dpo import DPO
from objectives.lirpg import LIRPG
from objectives.lpg import LPG

T = 20  # steps of a probe rollout


def show(file: str, out: Path | None) -> Path | None:
    """Print what a component is and draw what it does; returns the picture, None if there is none of such a component.

    Raises:
        UserError: no such component, a damaged file, or a picture that cannot be written.
    """
    if out is not None and out.suffix != ".png":
        raise UserError(f"--out is {out}: the picture is a PNG, expected a name such as {out.with_suffix('.png')}.")
    component = artifacts.get(file)
    named = file in components()  # and not a file: what is learned has fresh weights
    fresh = named and any(True for _ in component.parameters())
    usual = Path(f"{file}-untrained.png" if fresh else f"{file}.png" if named else file).with_suffix(".png")
    _describe(component)
    if isinstance(component, LPG):
        figure = _lpg_figure(component)
    elif isinstance(component, Disco):
        figure = _disco_figure(component)
    elif isinstance(component, PPOClip):
        figure = _surrogate_figure(component)
    elif isinstance(component, LIRPG) and hasattr(component, "table"):
        figure = _table_figure(component)
    elif isinstance(component, MetaSGD):
        if not hasattr(component, "log_rate"):
            return None  # it takes the size of its agents first
        figure = _rates_figure(component)
    elif isinstance(component, UpdateRule):
        figure = _optimizer_figure(component)
    else:
        return None
    return save_figure(figure, out or usual)


def _describe(component: Component) -> None:
    table = Table(show_header=False, title=f"{component.name} ({component.slot})")
    paper = (type(component).__doc__ or "").strip().splitlines()[0]
    table.add_row("what", paper)
    table.add_row("parameters", f"{sum(p.numel() for p in component.parameters()):,}")
    table.add_row("contract", str(component.contract))
    for name, value in vars(component.config).items():
        table.add_row(f"config: {name}", str(value))
    for name, value in component.provenance.items():
        table.add_row(f"trained: {name}", json.dumps(value) if isinstance(value, dict) else str(value))
    Console().print(table)


# --- LPG: what it says about one rewarded step -----------------------------------------------------------------------


@torch.no_grad()
def _probe(net: LPG, reward: torch.Tensor, pi: torch.Tensor, done: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """pi_hat and y_hat of probe rollouts `[T, B]` of an agent whose predictions are uniform."""
    dtype = net.policy_head.weight.dtype
    zeros = torch.zeros_like(done)
    rollout = Trajectory(zeros, zeros, reward, reward.to(dtype)[:, None], done[:, None], zeros[:, None])
    uniform = torch.full((*reward.shape, net.config.predictions), 1 / net.config.predictions, dtype=dtype)
    embedded = net.phi(uniform).squeeze(-1)[:, None]
    context = Context(torch.full((1,), 50.0), torch.full((1,), 100.0), {})
    pi_hat, y_hat = net.targets(rollout, pi.to(dtype)[:, None], embedded, embedded, Hyper(), context)
    return pi_hat[:, 0], y_hat[:, 0]


def _lpg_figure(net: LPG) -> Figure:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    credit, strength, prediction = figure.subplots(1, 3)
    steps = np.arange(T)
    paid = 12
    reward = torch.zeros(T, 5)
    reward[paid, :3] = torch.tensor([1.0, -1.0, 1.0])
    done = torch.zeros(T, 5, dtype=torch.bool)
    done[6, [2, 4]] = True
    unpaid = [3, 3, 4]  # for each of the first three rollouts the one that differs from it only by the reward
    pi_hat, y_hat = _probe(net, reward, torch.full((T, 5), 0.2), done)
    push = (
        pi_hat[:, unpaid] - pi_hat[:, :3]
    )  # what is minimised is log pi * pi_hat: a negative pi_hat raises the action
    for i, label in enumerate(("reward +1 at step 12", "reward −1 at step 12", "+1, episode ends at step 6")):
        credit.plot(steps, push[:, i], color=COLOURS[i], label=label, marker=".", linestyle="--" if i == 2 else "-")
    credit.axvline(paid, color="0.8", zorder=0)
    _label(credit, "step of the rollout", "push on log π, beyond no reward", "Credit of one reward")
    rewards = torch.linspace(-1, 1, 21)
    grid = torch.zeros(T, 21)
    grid[paid] = rewards
    for i, pi in enumerate((0.1, 0.5, 0.9)):
        said, _ = _probe(net, grid, torch.full((T, 21), pi), torch.zeros(T, 21, dtype=torch.bool))
        strength.plot(rewards, -said[paid], color=COLOURS[i], label=f"π(a|s) = {pi}")
    _label(strength, "reward at the step", "push on log π at that step", "Strength")
    moved = (y_hat[:, :3] - y_hat[:, unpaid]).abs().sum(-1) / 2
    for i, label in enumerate(("reward +1", "reward −1", "+1, episode ends at step 6")):
        prediction.plot(
            steps, moved[:, i], color=COLOURS[i], label=label, marker=".", linestyle="--" if i == 2 else "-"
        )
    prediction.axvline(paid, color="0.8", zorder=0)
    _label(prediction, "step of the rollout", "total variation from no reward", "Shift of the prediction's target")
    return figure


# --- Disco: what it tells agents that know nothing -------------------------------------------------------------------


@torch.no_grad()
def _told(disco: Disco, reward: torch.Tensor, done: torch.Tensor, gap: torch.Tensor) -> dict[str, torch.Tensor]:
    """Targets of probe rollouts `[T, B]`: log pi_hat of the action taken, y_hat and z_hat as distributions.

    Agents are uniform over two actions and predictions, in the middle of a life in which advantages had a scale of 1.

    Args:
        gap: [T, B] Q of the action taken, and minus that of the other one.
    """
    dtype, B = disco.scale.weight.dtype, reward.shape[1]
    q = torch.stack([gap, -gap], -1).to(dtype)[:, None]
    q = torch.cat([q, torch.zeros_like(q[:1])])
    lead, K = q.shape[:3], disco.config.predictions
    said = AgentOutput(
        Categorical(q.new_zeros(*lead, 2)),
        None,
        {
            "y": q.new_zeros(*lead, K),
            "z": q.new_zeros(*lead, 2, K),
            "next_policy": q.new_zeros(*lead, 2, 2),
            "q": (disco.value.two_hot(q) + 1e-12).log(),
        },
    )
    zeros, end = torch.zeros(len(reward), 1, B, dtype=torch.int64), done[:, None]
    rollout = Trajectory(zeros, zeros, zeros.to(dtype), reward.to(dtype)[:, None], end, torch.zeros_like(end))
    memory = {k: v.to(dtype) for k, v in disco.initial_memory(1).items()}
    memory |= {
        f"{k}_{n}": torch.tensor([[x]], dtype=dtype) for k in ("advantage", "error") for n, x in _SETTLED.items()
    }
    context = Context(torch.full((1,), 50.0), torch.full((1,), 100.0), memory)
    hyper = disco.settings(tabular=False)["hyper"]
    batch, _ = disco.prepare(rollout, dataclasses.replace(said, target=said), None, hyper, context)
    distributions = {k: batch[k][:, 0].softmax(-1) for k in ("y_hat", "z_hat")}
    return distributions | {"log_pi": Categorical(batch["pi_hat"]).log_prob(zeros)[:, 0]}


_SETTLED = {"first": 0.0, "second": 1.0, "decay": 0.0}


@torch.no_grad()
def _disco_figure(disco: Disco) -> Figure:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    strength, credit, prediction = figure.subplots(1, 3)
    paid, steps = 12, np.arange(T)
    gaps = torch.linspace(-3, 3, 61)
    grid = torch.zeros(T, 61)
    grid[paid] = gaps
    none, uniform = torch.zeros(T, 61), np.log(0.5)
    said = _told(disco, none, none.bool(), grid)["log_pi"][paid] - uniform
    strength.plot(gaps, said, color=COLOURS[2], label=disco.name)
    for i, objective in enumerate((PPOClip(), DPO())):
        strength.plot(gaps, _reach(objective, gaps), color=COLOURS[i], label=f"{objective.name}, where it lets go")
    strength.set_ylim(-2.0, 2.0)
    _label(strength, "advantage of the action taken (Q − V)", "shift of log π(a|s)", "Target of the policy")

    reward, done = torch.zeros(T, 5), torch.zeros(T, 5, dtype=torch.bool)
    reward[paid, :3] = torch.tensor([1.0, -1.0, 1.0])
    done[6, [2, 4]] = True
    told, unpaid = _told(disco, reward, done, torch.zeros(T, 5)), [3, 3, 4]
    labels = ("reward +1 at step 12", "reward −1 at step 12", "+1, episode ends at step 6")
    moved = {k: (told[k][:, :3] - told[k][:, unpaid]).abs().sum(-1) / 2 for k in ("y_hat", "z_hat")}
    for i, label in enumerate(labels):
        style = {"color": COLOURS[i], "linestyle": "--" if i == 2 else "-"}
        credit.plot(steps, (told["log_pi"][:, i] - told["log_pi"][:, unpaid[i]]), marker=".", label=label, **style)
        prediction.plot(steps, moved["y_hat"][:, i], marker=".", label=f"y: {label}", **style)
        prediction.plot(steps, moved["z_hat"][:, i], marker="x", label=f"z: {label}", **style)
    for ax in (credit, prediction):
        ax.axvline(paid, color="0.8", zorder=0)
    _label(credit, "step of the rollout", "shift of log π̂, beyond no reward", "Credit of one reward")
    _label(prediction, "step of the rollout", "total variation from no reward", "Shift of the predictions' targets")
    return figure


def _reach(objective: PPOClip, advantages: torch.Tensor) -> torch.Tensor:
    """Log of the probability ratio at which the slope of a surrogate has fallen to a tenth of what it was at 1."""
    log_ratio = torch.linspace(0, 2, 401)[:, None] * advantages.sign()
    ratio = log_ratio.exp().requires_grad_()
    with torch.enable_grad():
        gain = -objective.policy_loss(ratio, ratio.log(), advantages.expand_as(ratio), Hyper())
        (slope,) = torch.autograd.grad(gain.sum(), ratio)
    far = slope.abs() <= 0.1 * advantages.abs()
    first = torch.where(far.any(0), far.float().argmax(0), len(far) - 1)
    return log_ratio.gather(0, first[None])[0]


# --- surrogates: the loss as a function of the ratio -----------------------------------------------------------------


@torch.no_grad()
def _surrogate_figure(objective: PPOClip) -> Figure:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ratio = torch.linspace(0.3, 2.2, 200)
    others = {o.name: o for o in (PPOClip(), DPO(), objective)}
    for ax, sign in zip(figure.subplots(1, 2), (1.0, -1.0), strict=True):
        advantage = torch.full_like(ratio, sign)
        ax.plot(ratio, ratio * sign, color="0.7", label="no clipping", linestyle=":")
        for i, (name, each) in enumerate(others.items()):
            gain = -each.policy_loss(ratio, ratio.log(), advantage, Hyper())
            ax.plot(ratio, gain, color=COLOURS[i], label=name)
        _label(ax, "probability ratio r", "gain of the policy (maximised)", f"Advantage {sign:+.0f}")
    return figure


# --- LIRPG: a table of rewards ---------------------------------------------------------------------------------------


@torch.no_grad()
def _table_figure(reward: LIRPG) -> Figure:
    """What each action in each state is paid beyond the environment's reward."""
    paid = reward.config.scale * torch.tanh(reward.table).T.numpy()
    largest = max(np.abs(paid).max(), 1e-12)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(paid, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    figure.colorbar(image, label="reward per step")
    ax.set(xlabel="state", ylabel="action", title="Learned reward", yticks=range(len(paid)))
    return figure


# --- optimizers: the step as a function of gradients -----------------------------------------------------------------

STEADY = 20  # steps along one gradient after which a rule's memory has settled


@torch.no_grad()
def _optimizer_figure(rule: UpdateRule) -> Figure:
    """Steps for a learning rate of 1, of parameters that see the same gradients, beside Adam and SGD."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    size, memory, turn = figure.subplots(1, 3)
    sizes = torch.logspace(-5, 1, 61)
    courses = {
        "after a switch of sign": torch.cat([torch.full((STEADY,), 0.1), torch.full((STEADY,), -0.1)]),
        "noise around 0.03": 0.03 + 0.1 * torch.randn(2 * STEADY, generator=torch.Generator().manual_seed(0)),
    }
    for i, each in enumerate((Adam(), SGD(), rule)):
        style = {"color": COLOURS[i], "label": each.name}
        first, last = _steps(each, sizes.repeat(STEADY, 1))[[0, -1]]
        size.loglog(sizes, first.abs().clamp(min=1e-12), **style, linestyle=":")
        size.loglog(sizes, last.abs().clamp(min=1e-12), **(style | {"label": f"{each.name}, step {STEADY}"}))
        for ax, gradients in zip((memory, turn), courses.values(), strict=True):
            steps = _steps(each, gradients[:, None])[:, 0]
            ax.plot(steps / steps.abs().max().clamp(min=1e-12), **style)
    _label(size, "gradient", "step for a learning rate of 1", "Size of a step: the first, and a later one")
    for ax, (name, gradients) in zip((memory, turn), courses.items(), strict=True):
        ax.plot(-gradients / gradients.abs().max(), color="0.7", linewidth=0.8, label="minus the gradient")
        _label(ax, "step", "step over its largest", name.capitalize())
    return figure


def _steps(rule: UpdateRule, gradients: torch.Tensor) -> torch.Tensor:
    """[K, D] steps for a learning rate of 1 along gradients [K, D], each parameter in a lifetime of its own, beside one
    with the opposite gradient, since some rules take the mean of all steps away."""
    theta = torch.zeros(gradients.shape[1], 2)
    state, taken = rule.initial_state(theta), []
    for gradient in gradients:
        step, state = rule.update(torch.stack([gradient, -gradient], 1).to(theta), state, theta, 1.0)
        taken.append(step[:, 0])
    return torch.stack(taken)


@torch.no_grad()
def _rates_figure(rule: MetaSGD) -> Figure:
    """The factors of the learning rate, in the order of a row of parameters."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ax = figure.subplots()
    ax.plot(rule.log_rate.exp().numpy(), ".", markersize=3, color=COLOURS[0], label=f"for each {rule.config.per}")
    if rule.config.per == "parameter":
        for end in np.cumsum(rule.config.sizes or ())[:-1]:
            ax.axvline(end, color="0.85", linewidth=0.8, zorder=0)
    ax.set_yscale("log")
    _label(ax, rule.config.per, "factor of the learning rate", "Learned step sizes")
    return figure


def _label(ax: Axes, x: str, y: str, title: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)


# --- the catalogue -----------------------------------------------------------------------------------------------


def print_catalogue() -> None:
    """Recipes, families with their presets, components."""
    console = Console()
    table = Table(title="recipes", show_header=False)
    for recipe in recipes().values():
        table.add_row(recipe.name, f"{recipe.about} ({recipe.component} on {recipe.family})")
    for each in online_recipes().values():
        table.add_row(each.name, f"{each.about} (one lifetime on {each.env})")
    console.print(table)
    table = Table(title="task families (name/preset)", show_header=False)
    for name, family in families().items():
        table.add_row(name, ", ".join(family.presets))
    console.print(table)
    table = Table(title="components", show_header=False)
    for name, component in components().items():
        table.add_row(name, component.slot, (component.__doc__ or "").strip().splitlines()[0])
    console.print(table)
