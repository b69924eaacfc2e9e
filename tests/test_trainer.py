"""The outer loop: how it follows estimates, what it saves, and that every estimator meta-trains something."""

from __future__ import annotations

import copy
import gc
import math
import shlex
from dataclasses import replace

import pytest
import torch
from example_components import RunningReward
from safetensors.torch import load, save
from torch import nn
from torch.testing import assert_close

from experiments.oracles.quadratic import Quadratic
from experiments.runs import read_metrics
from learned_rl.component import Hyper, Hyperparameters, NoConfig
from learned_rl.lifetimes import Lifetimes, under
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.registry import make_family
from learned_rl.tasks.bandits import BanditFamily
from learned_rl.types import UserError
from meta_optimizers.black_box import BlackBoxConfig
from meta_optimizers.bootstrapped import BootstrappedConfig
from meta_optimizers.estimator import Estimate
from meta_optimizers.estimators import ESTIMATORS, estimator_config, make_estimator
from meta_optimizers.evolution import AntitheticConfig
from meta_optimizers.forward_mode import ForwardConfig
from meta_optimizers.outer_loop import OuterConfig, OuterLoop
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from objectives.lpg import LPG

WHOLE = ("es", "cma")  # their lifetimes begin and end together
GRADIENT = ("truncated", "rematerialised", "first_order", "bmg", "forward")


class Flipped:
    """An estimator that says the opposite."""

    def __init__(self, estimator):
        self._estimator = estimator

    def __getattr__(self, name):
        return getattr(self._estimator, name)

    def __call__(self, problem, eta):
        e = self._estimator(problem, eta)
        turn = lambda tree: tree and {k: -v for k, v in tree.items()}  # noqa: E731
        return Estimate(turn(e.grads), e.broken, e.metrics, e.seen, turn(e.move))


class Says:
    """An estimator that says what it is told."""

    stacked = False

    def __init__(self, *estimates):
        self.estimates = list(estimates)

    def __call__(self, problem, eta):
        assert not any(v.requires_grad for v in eta.tensors)
        said = self.estimates.pop(0)
        return said if isinstance(said, Estimate) else Estimate(said, torch.zeros(4, dtype=torch.bool))

    def begin(self, which, elsewhere=False):
        pass

    def state_dict(self):
        return {}


def parameters(eta=None):
    return {k: nn.Parameter(v.clone()) for k, v in (eta or Quadratic.eta()).values.items()}


def grads(*numbers):
    return {"log_rate": torch.tensor(numbers[0]).double(), "shift": torch.tensor([numbers[1]]).double()}


def flat(eta):
    return torch.cat([p.detach().reshape(-1) for p in eta.values()])


def outer(*estimates, **config):
    """A loop that is told what to follow; meta-parameters before and after every step, and what was logged."""
    loop = OuterLoop(Quadratic(), parameters(), Says(*estimates), OuterConfig(**config))
    etas, logs = [flat(loop.eta)], []
    for _ in estimates:
        logs.append(loop.step())
        etas.append(flat(loop.eta))
    return loop, torch.stack(etas), logs


# --- how estimates are followed --------------------------------------------------------------------------------------

SAID = [(3.0, -4.0), (0.1, 0.2), (-1.0, 2.0)]


@pytest.mark.parametrize("bound", [math.inf, 1.0])
def test_sgd_by_hand(bound):
    _, etas, logs = outer(
        *(grads(*g) for g in SAID), optimizer="sgd", learning_rate=0.2, half_life=2, max_grad_norm=bound
    )
    for k, said in enumerate(SAID):
        g = torch.tensor(said).double()
        clipped = g * min(1.0, bound / float(g.norm()))
        expected = -0.2 * 0.5 ** (k / 2) * clipped
        assert_close(etas[k + 1] - etas[k], expected, rtol=1e-5, atol=1e-9)
        assert logs[k]["grad_norm"] == pytest.approx(float(g.norm()))
        assert logs[k]["update_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)
        assert logs[k]["skipped"] == logs[k]["broken"] == 0


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_adam_by_hand(beta1):
    _, etas, _ = outer(*(grads(*g) for g in SAID), learning_rate=0.1, beta1=beta1, max_grad_norm=math.inf, half_life=3)
    first, second = torch.zeros(2).double(), torch.zeros(2).double()
    for k, said in enumerate(SAID):
        g = torch.tensor(said).double()
        first, second = beta1 * first + (1 - beta1) * g, 0.999 * second + 0.001 * g * g
        root = (second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
        step = -0.1 * 0.5 ** (k / 3) * first / (1 - beta1 ** (k + 1)) / root
        assert_close(etas[k + 1] - etas[k], step, rtol=1e-9, atol=1e-12)


def test_the_cosine_compares_a_gradient_with_the_one_before():
    _, _, logs = outer(*(grads(*g) for g in [(1, 0), (0, 2), (0, -3), (-1, -1)]), learning_rate=1e-3)
    assert "cosine" not in logs[0]
    assert [x["cosine"] for x in logs[1:]] == pytest.approx([0.0, -1.0, math.sqrt(0.5)], abs=1e-6)


@pytest.mark.parametrize("said", [grads(float("nan"), 1.0), grads(1.0, float("inf")), None])
def test_what_is_not_finite_is_skipped(said):
    broken = Estimate(said, torch.tensor([True, False, False, True]))
    loop, etas, logs = outer(grads(1, 2), broken, grads(1, 2), learning_rate=0.1)
    _, undisturbed, _ = outer(grads(1, 2), grads(1, 2), learning_rate=0.1)
    assert torch.equal(etas[1], etas[2]) and torch.equal(etas[[0, 1, 3]], undisturbed)
    assert logs[1]["skipped"] == 1 and math.isnan(logs[1]["grad_norm"]) and logs[1]["broken"] == 2
    assert logs[2]["skipped"] == 0 and logs[2]["cosine"] == pytest.approx(1.0) and loop.steps == 3


def test_a_move_bypasses_the_optimizer():
    move = Estimate(None, torch.zeros(4, dtype=torch.bool), move=grads(30.0, -40.0))
    loop, etas, logs = outer(move, max_grad_norm=0.1, learning_rate=1e-6)
    assert_close(etas[1] - etas[0], torch.tensor([30.0, -40.0]).double())
    assert logs[0]["update_norm"] == pytest.approx(50.0)
    moments = under("optimizer", loop.state_dict())
    assert set(moments) == {"first", "second", "count"} and not any(v.any() for v in moments.values())
    _, etas, logs = outer(replace(move, move=grads(float("nan"), 1.0)))
    assert torch.equal(etas[0], etas[1]) and logs[0]["skipped"] == 1


# --- quadratics ------------------------------------------------------------------------------------------------------


def on_quadratics(name, flip=False):
    """Meta-loss, in closed form, before and after some steps of the outer loop, with lifetimes of 12 updates."""
    config, lifetimes, horizon = estimator_config(name), 64, 12
    changes = {"forward": {"every": 3}, "bmg": {"window": 3, "bootstrap": 2, "kl": 0.0, "parameters": 1.0}}
    windows = {"window": horizon if name in WHOLE else 3} | ({"sigma": 0.1} if name not in GRADIENT else {})
    estimator = make_estimator(replace(config, **changes.get(name, windows)), 0)
    problem = Quadratic(lifetimes, horizon=horizon, streams=estimator.streams(lifetimes))
    eta = parameters(Quadratic.eta(shift=1.0))
    loop = OuterLoop(problem, eta, Flipped(estimator) if flip else estimator, OuterConfig(learning_rate=0.03))

    def meta_loss():
        shrink = (1 - eta["log_rate"].detach().exp() * problem.curvature) ** horizon
        end = problem.centre + eta["shift"].detach()
        return 0.5 * (end + shrink * (problem.start - end)).square().sum(1).mean().item()

    before = meta_loss()
    for _ in range(20):
        assert loop.step()["skipped"] == 0
    return meta_loss() / before


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_descends_the_meta_loss_of_quadratics(name):
    assert on_quadratics(name) < 0.8
    assert on_quadratics(name, flip=True) > 1.1


# --- save and resume -------------------------------------------------------------------------------------------------


def settings(name, **changes):
    """Tiny windows under which the estimator carries what it can from call to call."""
    c = estimator_config(name)
    if isinstance(c, ForwardConfig):
        return replace(c, every=2, **changes)
    if isinstance(c, BootstrappedConfig):
        c = replace(c, window=2, bootstrap=2, **changes)
    else:
        c = replace(c, window=3 if name in WHOLE else 2, **changes)
    return replace(c, sigma=0.1) if isinstance(c, AntitheticConfig | BlackBoxConfig) else c


def tiny(name, seed=1, horizon=6, optimizer="adam", family="bandit/bernoulli-5", **changes):
    torch.manual_seed(0)
    agent = PPOConfig(2, 4, n_epochs=1, n_minibatches=1, optimizer="adam", hyper=Hyper(learning_rate=0.1))
    component = (
        RunningReward() if name in ("forward", "cma") else LPG(predictions=3, width=4, core="gru", scale_free=True)
    )
    c = MetaTrainConfig(
        lifetimes=4, horizon=horizon, agent=agent, estimator=settings(name, **changes), optimizer=optimizer
    )
    return MetaTrainer(make_family(family), component, c, seed=seed)


REUSE = {"outer_data": "fresh_reuse"}
CARRIES = [(n, {}, "adam") for n in ESTIMATORS] + [("pes", {}, "sgd"), ("truncated", REUSE, "sgd")]
CARRIES += [(n, REUSE, "adam") for n in ("rematerialised", "first_order", "bmg")]


@pytest.mark.parametrize("name, changes, optimizer", CARRIES)
def test_a_saved_trainer_goes_on_to_the_same_bits(name, changes, optimizer):
    """Saved in the middle of lifetimes; restarts before and after."""
    one = tiny(name, optimizer=optimizer, family="grid/small", **changes)
    for _ in range(3):
        one.step()
    state = load(save({k: v.contiguous() for k, v in one.state_dict().items()}))
    other = tiny(name, optimizer=optimizer, family="grid/small", **changes)
    other.load_state_dict(copy.deepcopy(state))
    before = one.problem.restarts
    for _ in range(4):
        ours, theirs = one.step(), other.step()
        assert {k: str(v) for k, v in ours.items()} == {k: str(v) for k, v in theirs.items()}
    ours, theirs = one.state_dict(), other.state_dict()
    assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert 0 < before < one.problem.restarts
    assert not torch.equal(ours["eta/" + next(iter(one.eta))], state["eta/" + next(iter(one.eta))])
    assert state["problem/lifetimes/age"].any(), "in the middle of lifetimes"


def live_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENT)
def test_memory_is_flat_over_meta_steps(name):
    """Without Python's cycle collector: a window's graph must go when the window goes."""
    trainer, counts = tiny(name, horizon=1000), {}
    for step in range(1, 61):
        trainer.step()
        if step in (5, 60):
            if step == 5:
                gc.collect()
                gc.disable()
            counts[step] = live_tensors()
    gc.enable()
    assert counts[5] == counts[60]


# --- every estimator meta-trains something ---------------------------------------------------------------------------


class LearnedRate(Hyperparameters):
    """A learned step size: one number, and one on how it changes with age."""

    name, Config = "learned_rate", NoConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.log_rate, self.slope = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, base, trajectory, context):
        rate = (self.log_rate + self.slope * context.progress[:, None].to(self.slope)).exp()
        return base.replace(learning_rate=base.learning_rate * rate), {}


FAMILY, LIFE = BanditFamily("bernoulli-5"), 8
SLOW_AGENT = PPOConfig(
    8, 5, n_epochs=1, n_minibatches=1, optimizer="sgd", hyper=Hyper(learning_rate=0.5, max_grad_norm=10.0)
)


def score(component):
    """Mean reward of agents on the validation side over a lifetime."""
    algorithm = Algorithm(SLOW_AGENT, Slots.fill(SLOW_AGENT, hyperparameters=component))
    lives, rewards = Lifetimes(FAMILY, algorithm, 64, LIFE, seed=7, split="validation"), []
    for _ in range(LIFE):
        record, _ = lives.advance(lives.plain())
        rewards.append(record.trajectory.reward.mean())
    return torch.stack(rewards).mean().item()


def meta_trained(name, flip):
    """How much better agents are after a few meta-steps."""
    estimator = settings(name)
    if name in WHOLE or name in ("pes", "nres"):
        estimator = replace(estimator, window=LIFE if name in WHOLE else 4, sigma=0.5)
    c = MetaTrainConfig(
        lifetimes=32, horizon=LIFE, learning_rate=0.15, agent=SLOW_AGENT, estimator=estimator, max_grad_norm=math.inf
    )
    trainer = MetaTrainer(FAMILY, LearnedRate(), c, seed=3)
    if flip:
        trainer.estimator = Flipped(trainer.estimator)
    before = score(trainer.component)
    for _ in range(10):
        assert trainer.step()["skipped"] == 0
    return score(trainer.component) - before


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_meta_trains_a_step_size(name):
    assert meta_trained(name, flip=False) > 0.01
    assert meta_trained(name, flip=True) < -0.005, "against the estimates agents become worse"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_eta_that_is_too_large_is_refused_before_anything_is_built():
    with pytest.raises(UserError, match=r"eta has \d+ numbers: expected at most 64 for estimator 'forward'"):
        MetaTrainer(FAMILY, LPG(predictions=3, width=4), MetaTrainConfig(estimator=ForwardConfig()))
    with pytest.raises(UserError, match="too many for a full covariance: expected at most 2000"):
        MetaTrainer(
            FAMILY, LPG(predictions=3, width=32), MetaTrainConfig(lifetimes=8, horizon=100, estimator=BlackBoxConfig())
        )
    with pytest.raises(UserError, match="6 lifetimes for 'es', 4 a member: expected a multiple of 8"):
        c = MetaTrainConfig(lifetimes=6, horizon=100, estimator=replace(estimator_config("es"), tasks=4))
        MetaTrainer(FAMILY, LPG(predictions=3, width=4), c)


# --- from the command line -------------------------------------------------------------------------------------------

TINY = shlex.split(
    "meta-train lpg-gridworld --recipe.family grid/small --recipe.train.lifetimes 4 --recipe.train.horizon 4 "
    "--recipe.train.agent.n-envs 2 --recipe.train.agent.n-steps 5 --recipe.meta-steps 2 --recipe.validate-every 2 "
    "--recipe.validation-tasks 2 --out run"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "forward"])
def test_each_estimator_by_name_from_the_command_line(say, tmp_path, name):
    diagonal = ["--recipe.train.estimator.separable"] if name == "cma" else []  # the full one is slow
    code, out, err = say(*TINY, "--estimator", name, "--recipe.train.estimator.window", "2", *diagonal)
    assert code == 0 and (tmp_path / "run" / "component.safetensors").exists(), out + err
    steps, updates = read_metrics(tmp_path / "run")["meta/update_norm"]
    assert len(steps) == 2 and min(updates) > 0


def test_mistakes_in_the_estimator_are_one_sentence_and_leave_no_folder(refused, tmp_path):
    sentence = refused(*TINY, "--estimator", "rematerialized")
    assert "'rematerialized'" in sentence and "nearest" in sentence and "'rematerialised'" in sentence
    sentence = refused(*TINY, "--estimator", "forward")
    assert "'forward'" in sentence and "expected at most 64" in sentence and "'truncated'" in sentence
    assert not list(tmp_path.iterdir())
