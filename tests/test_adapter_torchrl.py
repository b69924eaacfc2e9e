"""Learned parts in TorchRL: the loss against the library's own, gradients in the component's weights against central
differences, and a reward where the library stores rewards."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

pytest.importorskip("torchrl")

from tensordict.nn import TensorDictModule
from torch.distributions import Categorical, Independent, Normal
from torchrl.collectors import Collector
from torchrl.envs import Compose, GymEnv, RewardSum, SerialEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import NormalParamExtractor, OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from learned_rl.adapters.torchrl import ObjectiveLoss, RewardTransform
from learned_rl.component import Hyper, NoConfig, Reward
from learned_rl.defaults import PPOClip, PPOClipConfig
from learned_rl.rule_optimizer import RuleOptimizer
from learned_rl.types import UserError
from objectives.dpo import DPO
from objectives.impala import Impala
from objectives.lirpg import LIRPG, LIRPGConfig
from objectives.lpg import LPG
from objectives.lpo import LPO, LPOConfig

pytestmark = pytest.mark.filterwarnings("ignore")

T, B = 24, 3


def networks(kind, env, dtype=torch.float32):
    """An actor and a critic: actions one-hot, numbered or continuous."""
    torch.manual_seed(0)
    inputs = env.observation_spec["observation"].shape[-1]
    action = env.action_spec.shape[-1] if kind == "continuous" else 2
    trunk = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh())
    if kind == "continuous":
        net = nn.Sequential(trunk, nn.Linear(8, 2 * action), NormalParamExtractor())
        keys, law = ["loc", "scale"], lambda loc, scale: Independent(Normal(loc, scale), 1)
    else:
        net, keys = nn.Sequential(trunk, nn.Linear(8, action)), ["logits"]
        law = OneHotCategorical if kind == "one-hot" else Categorical
    module = TensorDictModule(net.to(dtype), in_keys=["observation"], out_keys=keys)
    spec = env.action_spec_unbatched if hasattr(env, "action_spec_unbatched") else env.action_spec
    actor = ProbabilisticActor(module, in_keys=keys, distribution_class=law, return_log_prob=True, spec=spec)
    judge = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    critic = ValueOperator(judge, in_keys=["observation"])
    return actor, critic


def environment(kind, copies=B):
    name = "Pendulum-v1" if kind == "continuous" else "CartPole-v1"
    make = lambda: GymEnv(name, categorical_action_encoding=kind == "numbered")  # noqa: E731
    return SerialEnv(copies, make) if copies > 1 else make()


def experience(kind, copies=B):
    env = environment(kind, copies)
    env.set_seed(0)
    actor, critic = networks(kind, env)
    torch.manual_seed(1)
    with torch.no_grad():
        rollout = env.rollout(T, actor, break_when_any_done=False)
    # Nobody ends by himself in so few steps: some end for either reason.
    done = torch.rand(rollout.batch_size, generator=torch.Generator().manual_seed(2)).unsqueeze(-1)
    rollout["next", "terminated"] = done < 0.1
    rollout["next", "done"] = done < 0.2
    return rollout, actor, critic


def move(networks, size=0.05):
    """As if some gradient steps had been made."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for network in networks:
            for p in network.parameters():
                p.add_(size * torch.randn(p.shape, generator=g))


HYPER = Hyper(gamma=0.9, gae_lambda=0.8, ent_coef=0.01, vf_coef=0.7, clip_range=0.1)


@pytest.mark.parametrize("copies", [1, B])
@pytest.mark.parametrize("kind", ["one-hot", "numbered", "continuous"])
def test_with_the_default_objective_it_is_the_librarys_loss(kind, copies):
    rollout, actor, critic = experience(kind, copies)
    ours = ObjectiveLoss(actor, critic, "ppo_clip", HYPER)
    ours.prepare(rollout)
    GAE(gamma=0.9, lmbda=0.8, value_network=critic)(rollout)
    assert_close(rollout["targets", "advantage"], rollout["advantage"].squeeze(-1), rtol=1e-4, atol=1e-5)
    assert_close(rollout["targets", "returns"], rollout["value_target"].squeeze(-1), rtol=1e-4, atol=1e-5)
    weights = {"clip_epsilon": 0.1, "entropy_coeff": 0.01, "critic_coeff": 0.7}
    theirs = ClipPPOLoss(actor, critic, loss_critic_type="l2", normalize_advantage=True, **weights)
    move((actor, critic))
    params = [*actor.parameters(), *critic.parameters()]
    assert {id(p) for p in ours.parameters()} == {id(p) for p in params}
    flat = rollout.reshape(-1)
    part = flat[torch.randperm(len(flat))[: len(flat) // 2]]
    said, expected = ours(part), theirs(part)
    total = sum(expected[k] for k in ("loss_objective", "loss_critic", "loss_entropy"))
    assert_close(said["loss_objective"], total, rtol=1e-4, atol=1e-6)
    assert_close(said["entropy"], expected["entropy"], rtol=1e-4, atol=1e-6)
    slopes = [torch.autograd.grad(x, params) for x in (said["loss_objective"], total)]
    for g, h in zip(*slopes, strict=True):
        assert_close(g, h, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max() for g in slopes[0]) > 1e-2


def lpo(width=3):
    torch.manual_seed(4)
    objective = LPO(LPOConfig(base="none", width=width, xi=0.0)).double()
    with torch.no_grad():
        objective.output.weight.add_(0.5)
    return objective


def test_the_loss_is_differentiable_in_the_objectives_weights_and_does_not_train_them():
    rollout, actor, critic = experience("one-hot")
    objective = lpo().float()
    loss = ObjectiveLoss(actor, critic, objective, HYPER)
    part = loss.prepare(rollout).reshape(-1)
    move((actor, critic))
    slopes = torch.autograd.grad(loss(part)["loss_objective"], list(objective.parameters()), retain_graph=True)
    assert all(g.abs().max() > 1e-6 for g in slopes)
    assert not {id(p) for p in objective.parameters()} & {id(p) for p in loss.parameters()}
    assert not any("objective" in name for name in loss.state_dict())
    assert {k for k in loss(part).keys() if k.startswith("loss")} == {"loss_objective"}  # noqa: SIM118
    assert loss.out_keys == ["loss_objective"]


def test_a_meta_gradient_passes_through_an_agents_step():
    """d J(theta - rate grad L_eta(theta)) / d eta, with J another loss, against central differences in float64."""
    rollout, actor, critic = experience("one-hot")
    rollout = rollout.apply(lambda x: x.double() if x.is_floating_point() else x)
    actor, critic, objective = actor.double(), critic.double(), lpo()
    loss = ObjectiveLoss(actor, critic, objective, HYPER)
    part = loss.prepare(rollout).reshape(-1)
    move((actor, critic), 0.1)
    theta = loss.actor_network_params

    def after(create_graph):
        names, params = zip(*theta.items(True, True), strict=True)
        slopes = torch.autograd.grad(loss(part)["loss_objective"], params, create_graph=create_graph)
        fast = theta.data.clone()
        for name, p, g in zip(names, params, slopes, strict=True):
            fast.set(name, p - 0.5 * g)
        with fast.to_module(loss.actor_network):
            log_prob = loss.actor_network.get_dist(part.clone(False)).log_prob(part["action"])
        return -(log_prob * part["targets", "advantage"]).mean()

    slopes = torch.autograd.grad(after(True), list(objective.parameters()))
    for p, slope in zip(objective.parameters(), slopes, strict=True):
        for i in range(p.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * 1e-5
                values.append(after(False).item())
                with torch.no_grad():
                    p.view(-1)[i] -= sign * 1e-5
            assert slope.view(-1)[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)
    assert max(g.abs().max() for g in slopes) > 1e-6


def test_numbers_count_and_may_carry_a_gradient():
    rollout, actor, critic = experience("one-hot")
    loss = ObjectiveLoss(actor, critic, "ppo_clip", HYPER)
    part = loss.prepare(rollout).reshape(-1)
    before = loss(part)
    bonus = torch.full((1, 1), 0.3, requires_grad=True)
    loss.hyper = loss.hyper.replace(ent_coef=bonus)
    said = loss(part)
    (slope,) = torch.autograd.grad(said["loss_objective"], bonus)
    assert_close(slope.squeeze(), -before["entropy"], rtol=1e-4, atol=1e-6)
    assert_close(said["loss_objective"], before["loss_objective"] - 0.29 * before["entropy"], rtol=1e-4, atol=1e-6)


def test_keys_may_be_renamed():
    rollout, actor, critic = experience("one-hot")
    loss = ObjectiveLoss(actor, critic, "dpo", HYPER)
    expected = loss(loss.prepare(rollout.clone()))["loss_objective"]
    other = rollout.clone()
    other.set("done_what", other.pop("action"))
    other.set(("next", "mixed"), other.get(("next", "reward")) * 2)
    loss.set_keys(action="done_what", reward="mixed", targets="aims")
    assert "aims" in loss.in_keys and "done_what" in loss.in_keys
    with pytest.raises(UserError, match="The minibatch has no 'aims': call `prepare`"):
        loss(other)
    loss.prepare(other)
    doubled = rollout.clone()
    doubled.set(("next", "reward"), doubled.get(("next", "reward")) * 2)
    loss.set_keys(action="action", reward="reward", targets="targets")
    twice = loss.prepare(doubled)
    assert_close(other["aims", "advantage"], twice["targets", "advantage"])
    assert loss(twice)["loss_objective"] != expected


def test_objectives_of_whole_rollouts_see_them_in_order():
    rollout, actor, critic = experience("one-hot")
    loss = ObjectiveLoss(actor, critic, Impala(), HYPER)
    loss.prepare(rollout)
    assert_close(rollout["targets", "reward"], rollout["next", "reward"].squeeze(-1))
    said = loss(rollout)["loss_objective"]
    turned = loss(rollout.flip(1))["loss_objective"]
    assert not torch.isclose(said, turned, rtol=1e-3)


@pytest.mark.slow
def test_an_agent_learns_with_a_learned_loss_and_an_update_rule():
    env = environment("one-hot", 4)
    env.set_seed(0)
    actor, critic = networks("one-hot", env)
    loss = ObjectiveLoss(actor, critic, "dpo", Hyper())
    optimizer = RuleOptimizer(loss.parameters(), "adam", lr=5e-3)
    collector = Collector(env, actor, frames_per_batch=512, total_frames=512 * 16)
    lengths = []
    for rollout in collector:
        loss.prepare(rollout)
        for _ in range(4):
            for part in rollout.reshape(-1)[torch.randperm(rollout.numel())].split(128):
                optimizer.zero_grad()
                loss(part)["loss_objective"].backward()
                optimizer.step()
        lengths.append(512 / max(int(rollout["next", "done"].sum()), 1))
    collector.shutdown()
    assert sum(lengths[-3:]) > 2.5 * sum(lengths[:3])


def test_mistakes_with_the_loss_are_explained():
    rollout, actor, critic = experience("one-hot")
    with pytest.raises(UserError, match="'lpg' asks agents for the head 'prediction' of size 30"):
        ObjectiveLoss(actor, critic, LPG())
    with pytest.raises(UserError, match="'lirpg' fits the slot 'reward'"):
        ObjectiveLoss(actor, critic, "lirpg")
    with pytest.raises(UserError, match="The rollout has 3 batch axes"):
        ObjectiveLoss(actor, critic, DPO()).prepare(rollout.unsqueeze(0))
    with pytest.raises(ValueError, match="not an accepted tensordict key"):
        ObjectiveLoss(actor, critic, DPO()).set_keys(acton="x")


# --- reward ----------------------------------------------------------------------------------------------------------


def pays(**kwargs):
    return LIRPG(LIRPGConfig(scale=0.5, hidden=(8,), zero=False, **kwargs))


@pytest.mark.parametrize("copies", [1, B])
@pytest.mark.parametrize("kind", ["one-hot", "numbered", "continuous"])
@pytest.mark.parametrize("out_key", ["reward", "intrinsic_reward"])
def test_a_reward_is_paid_at_every_step(kind, copies, out_key):
    reward, plain = pays(), environment(kind, copies)
    env = TransformedEnv(environment(kind, copies), Compose(RewardSum(), RewardTransform(reward, out_key)))
    rollouts = []
    for e in (plain, env):
        e.set_seed(0)
        torch.manual_seed(1)
        rollouts.append(e.rollout(T, break_when_any_done=False))
    before, paid = rollouts
    action = paid["action"] if kind != "one-hot" else paid["action"].long().argmax(-1)
    bonus = 0.5 * reward.intrinsic(paid["observation"], action).detach().unsqueeze(-1)
    assert_close(paid["observation"], before["observation"])
    assert_close(paid["next", out_key], before["next", "reward"] + bonus, rtol=1e-5, atol=1e-5)
    assert bonus.abs().mean() > 1e-2 and not paid["next", out_key].requires_grad
    if out_key != "reward":
        assert_close(paid["next", "reward"], before["next", "reward"])
    else:  # what is logged before is the environment's
        first = before["next", "reward"][..., 0, :]
        assert_close(paid["next", "episode_reward"][..., 0, :], first)
    check_env_specs(env)


def test_a_reward_on_collected_data_is_differentiable_in_its_weights_and_reaches_the_loss():
    rollout, actor, critic = experience("one-hot")
    reward = pays()
    env = environment("one-hot", 1)
    transform = TransformedEnv(env, RewardTransform(reward, "mixed")).transform
    loss = ObjectiveLoss(actor, critic, PPOClip(PPOClipConfig(False)), HYPER)
    plain = loss(loss.prepare(rollout.clone()))["loss_objective"]
    loss.set_keys(reward="mixed")
    paid = transform(rollout.clone())
    said = loss(loss.prepare(paid))["loss_objective"]
    assert not torch.isclose(said, plain, rtol=1e-4)
    slopes = torch.autograd.grad(said, list(reward.parameters()))
    assert all(g.abs().max() > 0 for g in slopes)
    p, i = reward.net[0].weight, 5
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(reward)
        with torch.no_grad():
            moved.net[0].weight.view(-1)[i] += sign * 1e-2
            again = RewardTransform(moved, "mixed")(rollout.clone())
            values.append(loss(loss.prepare(again))["loss_objective"].item())
    assert slopes[0].view(-1)[i].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.05, abs=1e-4)
    assert p.requires_grad


class Habit(Reward):
    name, Config = "habit", NoConfig

    def initial_memory(self, lifetimes):
        return {"mean": torch.zeros(lifetimes)}

    def forward(self, trajectory, context):
        return trajectory.reward, context.memory


def test_mistakes_with_the_reward_are_explained():
    with pytest.raises(UserError, match="'habit' carries a memory from update to update"):
        RewardTransform(Habit())
    with pytest.raises(UserError, match="This lirpg was made for"):
        reward = pays()
        TransformedEnv(environment("continuous", 1), RewardTransform(reward))
        TransformedEnv(environment("one-hot", 1), RewardTransform(reward))


PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"


def test_the_pages_code_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    said = {}
    (block,) = [b for b in blocks if "torchrl" in b]
    exec(re.sub(r"total_frames=[\d_]+", "total_frames=1024", block), said)
    assert bool(said["loss"](said["rollout"])["loss_objective"].isfinite())
