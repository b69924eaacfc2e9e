"""Disco103 beside its golden numbers: episodes apart, what has a loss, meta-gradients through its target network."""

import dataclasses
import math

import experience
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from learners import check_each_alone, learning_problem
from probes import GAMMA, ProbeFamily
from test_learning import Held, against_differences, flat, made
from test_self_tuning import Stages
from torch.testing import assert_close

from experiments.runs import plain
from learned_rl import PPO, PPOConfig
from learned_rl.agents import AgentConfig, Population
from learned_rl.component import Context, Hyper
from learned_rl.distributions import Categorical
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.ppo import Algorithm, Slots
from learned_rl.returns import retrace
from learned_rl.types import UserError
from meta_optimizers.learning import OuterLossConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.rematerialised import Rematerialised
from meta_optimizers.truncated import TruncatedMetaGradient
from objectives.disco import Disco, divergence

T, P, B, A = 6, 2, 3, experience.ACTIONS
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SPACE = experience.SPACES["mlp"]
HYPER = Hyper(
    learning_rate=0.1, gamma=0.9, gae_lambda=0.8, vf_coef=0.2, prediction_coef=0.7, pg_coef=1.3, max_grad_norm=math.inf
)
CONFIG = PPOConfig(
    n_envs=B,
    n_steps=T,
    n_epochs=1,
    n_minibatches=1,
    optimizer="clipped_adam",
    hyper=HYPER,
    agent=AgentConfig("action_conditional", hidden=(6,), activation="tanh", model=4, head_hidden=(5,)),
)


def small(kind=Disco, seed=1, **settings):
    """A rule of a few hundred weights, all of them random, with a seed by which none of its units is dead."""
    torch.manual_seed(seed)
    rule = kind(**{"predictions": 4, "support": 3, "width": 5, "lifetime_width": 4, "embedding": 3} | settings).double()
    for weight in rule.parameters():
        weight.data.add_(0.3 * torch.randn(weight.shape, dtype=torch.float64))
    return rule


def agents(rule, lifetimes=P):
    agent = Algorithm(CONFIG, Slots.fill(CONFIG, objective=rule)).make_agent(SPACE, Discrete(A))
    population = Population(agent, lifetimes, torch.float64)
    g = torch.Generator().manual_seed(0)
    population.theta.data.copy_(0.5 * torch.randn(P, population.theta.shape[1], generator=g).double()[:lifetimes])
    return population


def lived(seed=0, P=P, **changes):
    return dataclasses.replace(experience.trajectory(SPACE, seed, T, P, B), **changes)


def context(rule, P=P):
    """In the middle of a lifetime."""
    g = torch.Generator().manual_seed(4)
    memory = {k: v.double() + 0.2 * torch.rand(v.shape, generator=g) for k, v in rule.initial_memory(P).items()}
    memory |= {k: torch.full((P, 1), 0.5, dtype=torch.float64) for k in memory if k.endswith("decay")}
    return experience.context(P, memory=memory)


def prepared(rule, trajectory, population=None):
    """Targets of a rollout, and memory after it; the agents' target network is another agent."""
    population = population or agents(rule)
    out = population(trajectory.obs)
    out = dataclasses.replace(out, target=population.bind(population.theta.detach().flip(1))(trajectory.obs))
    return rule.prepare(trajectory, out.detach(), None, HYPER, context(rule))


def losses(rule, trajectory, **batch):
    """What the agents' gradient is of, [P]."""
    rows = {"action": trajectory.action} | prepared(rule, trajectory)[0] | batch
    return rule.loss(agents(rule)(trajectory.obs).map(lambda x: x[:-1]), rows, HYPER)[0]


# --- episodes -----------------------------------------------------------------------------------------------------

NEVER = torch.zeros(T, P, B, dtype=torch.bool)


def ends(*steps):
    done = NEVER.clone()
    done[list(steps)] = True
    return done


def heard(rule, trajectory):
    """What the network that reads rollouts was given, [T, 27, n], and what it said."""
    seen = []
    hook = rule.core.register_forward_hook(lambda module, given, said: seen.append((*given, said)))
    prepared(rule, trajectory)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ["terminated", "truncated"])
def test_the_network_hears_nothing_of_the_next_episode(kind):
    """With what it is given after the end changed, it says the same before, and without the end it does not."""
    rule = small()
    over = lived(terminated=NEVER, truncated=NEVER, final_obs=None)
    over = dataclasses.replace(over, **{kind: ends(2)})
    x, reset, said = heard(rule, over)
    assert reset.view(T, P, B).equal(over.done)
    changed = x.detach().clone()
    changed[3:] += 1.0
    found = rule.core(changed, reset)
    assert torch.equal(found[:3], said[:3]) and not torch.equal(found[3:], said[3:])
    assert not torch.isclose(rule.core(x, torch.zeros_like(reset))[:3], said[:3]).any()


def test_returns_stop_at_an_end_of_either_kind():
    """A reward after it does not count before it, and a time limit bootstraps from nothing, as in the authors'."""
    rule = small()
    plain = {"terminated": NEVER, "truncated": NEVER, "follows": NEVER, "final_obs": None}
    base = lived(**plain)
    later = base.reward.clone()
    later[4] += 5.0
    found = {}
    for kind in ("terminated", "truncated", None):
        done = {} if kind is None else {kind: ends(2)}
        found[kind] = [prepared(rule, lived(**plain | done | {"reward": r}))[0]["return"] for r in (base.reward, later)]
    for kind in ("terminated", "truncated"):
        assert torch.equal(found[kind][0][:3], found[kind][1][:3]) and not torch.equal(*(x[3:] for x in found[kind]))
        assert_close(found[kind][0][2], base.reward[2], **EXACT)
    assert torch.equal(found["terminated"][0], found["truncated"][0])
    assert not torch.equal(found[None][0][:3], found[None][1][:3])


def test_returns_are_corrected_for_the_policy_that_acted():
    """Retrace of what the target network says of the actions, by the agents' policy over the recorded one."""
    rule, tr = small(), lived()
    population = agents(rule)
    out, slow = population(tr.obs), population.bind(population.theta.detach().flip(1))(tr.obs)
    pi, q = out.policy.logits.softmax(-1), rule.value.mean(slow.heads["q"])
    taken = tr.action.unsqueeze(-1)
    ratio = (out.policy.logits[:-1].log_softmax(-1) - tr.logits.log_softmax(-1)).gather(-1, taken).squeeze(-1)
    ends = tr.done, NEVER
    expected = retrace(
        tr.reward,
        q[:-1].gather(-1, taken).squeeze(-1),
        (pi * q).sum(-1)[1:],
        *ends,
        ratio,
        HYPER.gamma,
        HYPER.gae_lambda,
    )
    assert_close(prepared(rule, tr)[0]["return"], expected.detach(), **EXACT)
    ours = out.policy.logits[:-1].detach()  # where none was recorded they acted themselves
    unknown, own = (prepared(rule, dataclasses.replace(tr, logits=x))[0] for x in (None, ours))
    assert all(torch.equal(unknown[k], own[k]) for k in own) and not torch.isclose(own["return"], expected).all()


def test_terminated_and_truncated_steps_mean_the_same_in_everything():
    rule = small()
    one = lived(terminated=ends(1, 4), truncated=NEVER)
    two = dataclasses.replace(one, terminated=ends(4), truncated=ends(1))
    (a, memory), (b, other) = (prepared(rule, x) for x in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(memory[k], other[k]) for k in memory)
    assert torch.equal(losses(rule, one), losses(rule, two))


def test_steps_that_follow_an_end_carry_no_loss():
    """Whatever the agents say there, and whatever is wanted of them; the mean is over the other steps."""
    rule, tr = small(), lived()
    assert tr.follows.any(2).any(0).all()
    assert torch.equal(prepared(rule, tr)[0]["counts"], ~tr.follows)
    population, batch = agents(rule), {"action": tr.action} | prepared(rule, tr)[0]
    out = population(tr.obs).map(lambda x: x[:-1].detach().requires_grad_())
    loss, _ = rule.loss(out, batch, HYPER)
    parts = [out.policy.logits, *out.heads.values()]
    for slope in torch.autograd.grad(loss.sum(), parts):
        size = slope.flatten(3).abs().amax(-1)
        assert not size[tr.follows].any() and size.any()
    moved = out.map(lambda x: torch.where(tr.follows.view(T, P, B, *[1] * (x.dim() - 3)), 9.0, x))
    assert_close(rule.loss(moved, batch, HYPER)[0], loss, **EXACT)


def test_where_beginnings_were_not_recorded_every_step_counts():
    rule, tr = small(), lived()
    everything = prepared(rule, dataclasses.replace(tr, follows=None))[0]
    assert everything["counts"].all()
    assert_close(losses(rule, tr, counts=everything["counts"]), losses(rule, dataclasses.replace(tr, follows=NEVER)))
    assert not torch.isclose(losses(rule, tr), losses(rule, tr, counts=everything["counts"])).any()


def test_a_rollout_of_steps_that_follow_an_end_has_no_loss():
    rule, tr = small(), lived()
    loss = losses(rule, tr, counts=torch.stack([tr.follows[:, 0] & False, ~tr.follows[:, 1]], 1))
    assert loss[0] == 0 and loss[1] > 0


# --- the loss -----------------------------------------------------------------------------------------------------


def test_the_loss_by_its_formula():
    """Term by term with torch's own divergences, step by step."""
    rule, tr = small(next_policy_coef=1.7), lived()
    out = agents(rule)(tr.obs).map(lambda x: x[:-1])
    batch = {"action": tr.action} | prepared(rule, tr)[0]
    loss, metrics = rule.loss(out, batch, HYPER)

    def kl(p, q):
        return torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (p, q)))

    for p in range(P):
        total, values, n = 0.0, 0.0, 0
        for t in range(T):
            for b in range(B):
                if tr.follows[t, p, b]:
                    continue
                at, a = (t, p, b), int(tr.action[t, p, b])
                step = 1.3 * kl(batch["pi_hat"][at], out.policy.logits[at])
                step += 0.7 * (
                    kl(batch["y_hat"][at], out.heads["y"][at]) + kl(batch["z_hat"][at], out.heads["z"][at][a])
                )
                if not tr.done[at]:
                    step += 1.7 * kl(batch["next_logits"][at], out.heads["next_policy"][at][a])
                value = -(rule.value.two_hot(batch["return"][at]) * out.heads["q"][at][a].log_softmax(-1)).sum()
                total, values, n = total + step + 0.2 * value, values + value, n + 1
        assert_close(loss[p], total / n, rtol=1e-7, atol=0)  # 1e-8 is added to the share of steps
        assert_close(metrics["value_loss"][p], (values / n).detach(), rtol=1e-7, atol=0)


def test_returns_that_no_bin_holds_are_told():
    """h(14.8) is just below 3, the largest bin, and h(15) above."""
    rule, tr = small(), lived()
    returns = torch.full((T, P, B), 14.8, dtype=torch.float64)
    returns[0, 1] = 15.0
    rows = {"action": tr.action} | prepared(rule, tr)[0] | {"return": returns}
    told = rule.loss(agents(rule)(tr.obs).map(lambda x: x[:-1]), rows, HYPER)[1]["beyond_bins"]
    assert_close(told, torch.eye(P, dtype=torch.float64)[1] / T)


def test_the_divergence_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    for n in (3, 40):  # another kernel for long ones
        p, q = torch.randn(2, 5, n, generator=g, dtype=torch.float64)
        assert_close(divergence(p, q), Categorical(p).kl(Categorical(q)), **EXACT)


def test_regularisers_by_hand():
    rule, tr = small(), lived()
    out = agents(rule)(tr.obs).map(lambda x: x[:-1])
    batch = prepared(rule, tr)[0]
    found = rule.agent_regularisers(out, tr.action) | rule.target_regularisers(batch)
    assert set(found) == set(rule.regularisers)
    z = torch.stack([
        torch.stack([torch.stack([out.heads["z"][t, p, b, tr.action[t, p, b]] for b in range(B)]) for p in range(P)])
        for t in range(T)
    ])  # fmt: skip
    entropy = lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean((0, 2))  # noqa: E731
    assert_close(found["y_entropy"], entropy(out.heads["y"]), **EXACT)
    assert_close(found["z_entropy"], entropy(z), **EXACT)
    assert_close(found["z_hat_mean"], batch["z_hat"].mean((0, 2, 3)).square(), rtol=1e-6, atol=1e-12)
    squares = batch["pi_hat"].mean(-1).mean((0, 2)).square()
    assert_close(found["pi_hat_mean"], squares, rtol=1e-6, atol=1e-12)
    target = Categorical(batch["target_logits"]).kl(Categorical(batch["pi_hat"]))
    assert_close(found["target_kl"], target.mean((0, 2)), **EXACT)


def test_any_number_of_actions_will_do():
    """The same weights for two, three and five; with actions in another order it wants the same of them."""
    rule = small()
    g = torch.Generator().manual_seed(0)
    for actions in (2, 5):
        agent = Algorithm(CONFIG, Slots.fill(CONFIG, objective=rule)).make_agent(SPACE, Discrete(actions))
        population = Population(agent, P, torch.float64)
        population.theta.data.normal_(0, 0.5, generator=g)
        batch, _ = prepared(rule, experience.trajectory(SPACE, 0, T, P, B, actions), population)
        assert batch["pi_hat"].shape == (T, P, B, actions) and batch["z_hat"].shape == (T, P, B, 4)
    tr, order = lived(), torch.tensor([2, 0, 1])  # new place -> old
    population = agents(rule)
    out = population(tr.obs)
    out = dataclasses.replace(out, target=population.bind(population.theta.detach().flip(1))(tr.obs))

    def moved(out):
        heads = {k: v if k == "y" else v[..., order, :] for k, v in out.heads.items()}
        heads["next_policy"] = heads["next_policy"][..., order]
        return dataclasses.replace(out, policy=Categorical(out.policy.logits[..., order]), heads=heads)

    other = dataclasses.replace(moved(out), target=moved(out.target))
    turned = dataclasses.replace(tr, action=order.argsort()[tr.action], logits=tr.logits[..., order])
    a, b = (rule.prepare(x, o, None, HYPER, context(rule))[0] for x, o in ((tr, out), (turned, other)))
    assert_close(a["pi_hat"][..., order], b["pi_hat"], **EXACT)
    assert_close(a["z_hat"], b["z_hat"], **EXACT)
    assert_close(a["return"], b["return"], **EXACT)


# --- meta-gradients -----------------------------------------------------------------------------------------------


def updated(rule, updates=3, inner_type=GraphInner, optimizer="sgd", cut=False, start=None, lifetimes=P):
    """The population after some updates of one rollout each; `cut` takes the target network for a constant."""
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    slots = Slots.fill(config, objective=rule)
    population, algorithm = agents(rule, lifetimes), Algorithm(config, slots)
    inner = inner_type(population, slots.optimizer, slots.optimizer.initial_state(population.theta.detach()))
    memory = {k: v.double() for k, v in algorithm.initial_memory(population.theta.detach()).items()}
    for k in range(updates):
        if cut:
            memory["target/theta"] = memory["target/theta"].detach()
        at = Context(torch.full((lifetimes,), float(k)), torch.full((lifetimes,), 10.0), memory)
        data = lived(k)
        data = dataclasses.replace(data, **{f: v[:, :lifetimes] for f, v in vars(data).items()})
        memory = algorithm.update(inner, data, at, config.hyper, torch.Generator().manual_seed(k)).memory
    return inner.theta, memory


def judged(theta):
    """[P] a random number of the agents."""
    noise = torch.randn(P, theta.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (theta * noise[: len(theta)]).sum(1)


class HeldDisco(Held, Disco):
    """What it takes for constant is what it was the first time: policies and action values, its own and the target
    network's. Predictions stay as they are, through which the meta-gradient goes on."""

    def prepare(self, trajectory, out, next_value, hyper, context):
        if self.replayed:
            mine, slow = self.recorded[self.position]
            self.position += 1
            out = held(out, *mine)
            out = dataclasses.replace(out, target=held(out.target, *slow))
        elif self.recorded is not None:
            self.recorded.append(
                [(o.policy.map(torch.Tensor.detach), o.heads["q"].detach()) for o in (out, out.target)]
            )
        return Disco.prepare(self, trajectory, out, next_value, hyper, context)


def held(out, policy, q):
    return dataclasses.replace(out, policy=policy, heads=out.heads | {"q": q})


def learning(rule, optimizer="sgd", lifetimes=P):
    """A problem whose agents have random weights, on episodes of four steps in double precision."""
    config = dataclasses.replace(CONFIG, n_envs=2, optimizer=optimizer)
    terms = {"y_entropy": -0.1, "z_entropy": -0.1, "pi_hat_mean": 0.1, "z_hat_mean": 0.2, "target_kl": 0.3}
    loss = OuterLossConfig(fitness="reward", regularisers=terms)
    problem, eta = learning_problem(
        Stages(dtype=torch.float64),
        rule,
        config,
        lifetimes,
        12,
        loss=loss,
        critic=OuterCriticConfig(epochs=1),
        staggered=False,
    )
    theta = problem.lives.population.theta
    theta.data.add_(0.5 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(2), dtype=theta.dtype))
    return problem, eta


def test_the_meta_gradient_is_that_of_differences():
    """Through three updates, of which the third reads a target network that the first one moved."""
    window = against_differences(made(TruncatedMetaGradient), *learning(small(HeldDisco)))
    assert all(float(v.abs().max()) > 1e-9 for v in window.grads.values()), "a meta-parameter without gradient"


@pytest.mark.parametrize("optimizer", ["sgd", "clipped_adam"])
def test_recomputed_windows_have_the_same_meta_gradient(optimizer):
    found = []
    for kind in (TruncatedMetaGradient, Rematerialised):
        problem, eta = learning(small(), optimizer)
        found.append(flat(made(kind)(problem, eta).grads, eta))
    assert_close(*found, rtol=1e-9, atol=1e-12)
    assert found[0].norm() > 1e-3


def test_the_meta_gradient_passes_through_the_target_network():
    """The parameters after an update are in the target network that the next update but one reads."""
    for updates, through in ((2, False), (3, True)):
        found = []
        for cut in (False, True):
            rule = small()
            theta, _ = updated(rule, updates, cut=cut)
            grads = torch.autograd.grad(
                judged(theta).sum(), list(rule.parameters()), materialize_grads=True, allow_unused=True
            )
            found.append(torch.cat([g.flatten() for g in grads]))
        assert torch.equal(*found) != through
    assert (found[0] - found[1]).norm() > 1e-6 * found[0].norm()


def test_what_is_kept_of_a_lifetime_has_a_meta_gradient_too():
    """The second network is heard from the second update on."""
    rule = small()
    theta, memory = updated(rule, 1)
    weight = rule.life.cell.weight_x
    assert torch.autograd.grad(judged(theta).sum(), weight, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(memory["objective/hidden"].sum(), weight)[0].any()
    theta, _ = updated(rule, 2)
    assert torch.autograd.grad(judged(theta).sum(), weight)[0].any()


def test_lifetimes_with_rules_of_their_own_are_each_as_alone():
    """Through the target network, in values and meta-gradients."""
    rule = small()
    g = torch.Generator().manual_seed(6)
    stacked = [
        torch.stack([v + 0.1 * torch.randn(v.shape, generator=g).double() for _ in range(P)]) for v in rule.parameters()
    ]
    check_each_alone(rule, lambda r: judged(updated(r, optimizer="clipped_adam")[0]), stacked)


def test_lifetimes_side_by_side_are_each_as_alone():
    rule = small()
    together, memory = updated(rule, inner_type=PlainInner)
    alone, own = updated(rule, inner_type=PlainInner, lifetimes=1)
    assert_close(together[:1], alone, **EXACT)
    assert memory.keys() == own.keys() and all(torch.allclose(memory[k][:1], own[k], rtol=1e-9) for k in own)


def test_a_window_lives_as_plain_training_does():
    (a, memory), (b, other) = (
        updated(small(), inner_type=kind, optimizer="clipped_adam") for kind in (GraphInner, PlainInner)
    )
    assert_close(a.detach(), b.detach(), **EXACT)
    assert_close({k: v.detach() for k, v in memory.items()}, {k: v.detach() for k, v in other.items()}, **EXACT)


# --- in use -------------------------------------------------------------------------------------------------------


def test_continuous_actions_are_refused():
    with pytest.raises(UserError, match="'disco103' needs discrete actions: the action space is Box"):
        small().heads(Box(-1.0, 1.0, (2,)))
    with pytest.raises(UserError, match="'disco103' needs discrete actions"):
        PPO("control/pendulum", CONFIG, objective=small().float())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"predictions": 0}, "predictions is 0: expected at least 1"),
        ({"lifetime_width": 0}, "lifetime_width is 0: expected at least 1"),
        ({"target_decay": 1.0}, "target_decay is 1.0: expected less than 1"),
        ({"moments_decay": -0.1}, "moments_decay is -0.1: expected at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        Disco(**settings)


def test_it_brings_its_published_settings():
    config = PPOConfig.suited(small(), SPACE)
    assert (config.n_envs, config.n_steps, config.replay_capacity, config.replay_batch) == (2, 29, 1024, 64)
    assert (config.optimizer, config.n_epochs, config.n_minibatches) == ("clipped_adam", 1, 1)
    assert config.agent.kind == "action_conditional" and config.agent.hidden == (512, 512)
    assert config.hyper.max_grad_norm == math.inf and config.hyper.learning_rate == 1e-2
    assert PPOConfig.suited(small(), Discrete(4)) == config
    assert small(target_decay=0.75).target_rate == 0.25


def test_settings_of_its_meta_training_hold_on_tables_too():
    """Its networks see both."""
    rule, agents = small(), dataclasses.replace(PPOConfig.suited(small(), SPACE), n_envs=16, replay_capacity=0)
    rule.provenance = {"agent": plain(agents), "tabular": False}
    assert PPOConfig.suited(rule, SPACE) == PPOConfig.suited(rule, Discrete(4)) == agents


def in_brief(**changes):
    agent = AgentConfig("action_conditional", hidden=(8,), activation="relu", model=4, head_hidden=(4,))
    small_ones = {"n_steps": 5, "replay_capacity": 8, "replay_batch": 4, "agent": agent}
    return dataclasses.replace(PPOConfig.suited(small(), SPACE), **small_ones | changes)


@pytest.mark.parametrize("env", ["catch/5x5", "grid/small", "control/cartpole"])
def test_seeds_learn_by_it(env):
    ppo, logged = PPO(env, in_brief(), objective=small().float(), seeds=2), []
    before = ppo.lifetimes.population.theta.detach().clone()
    ppo.learn(30, log=lambda steps, metrics: logged.append(metrics))
    assert len(logged) == 3  # of which the first one only collects
    theta = ppo.lifetimes.population.theta
    assert theta.isfinite().all() and (theta != before).any(1).all()
    # Two updates of at most one learning rate for each number.
    assert 0 < (theta - before).abs().max() <= 2 * 1e-2 * (1 + 1e-5)
    names = {"policy_loss", "value_loss", "entropy", "prediction_loss", "next_policy_loss"}
    assert not names & set(logged[0])
    assert all(names <= set(m) and all(math.isfinite(m[k]) for k in names) for m in logged[1:])
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in ppo.lifetimes.memory.values())


def test_any_architecture_with_its_heads_will_do():
    for kind, env in (("tabular", "grid/small"), ("mlp", "catch/5x5")):
        ppo = PPO(env, in_brief(agent=AgentConfig(kind, hidden=(8,))), objective=small().float()).learn(30)
        assert ppo.lifetimes.population.theta.isfinite().all() and ppo.lifetimes.optimizer_state["count"].item() == 2


def test_an_agent_that_diverges_disturbs_no_other():
    """Numbers that overflow on their way are no index into bins."""
    ends = []
    for broken in (False, True):
        ppo = PPO("catch/5x5", in_brief(replay_capacity=0, n_envs=4), objective=small().float(), seeds=3)
        if broken:
            ppo.lifetimes.population.theta.data[1] *= 1e30
        ends.append(ppo.learn(60).lifetimes.population.theta.detach().clone())
    assert torch.equal(ends[0][[0, 2]], ends[1][[0, 2]]) and ends[0][[0, 2]].isfinite().all()


def test_a_probe_whose_values_are_known_is_valued():
    """Whatever a random rule wants of predictions, Retrace wants the values: of the second to the last of four steps,
    since none is learned of the first one, which follows an end."""
    agent = AgentConfig("action_conditional", hidden=(16,), model=8, head_hidden=(16,))
    config = in_brief(agent=agent, n_steps=8, replay_capacity=0)
    config = dataclasses.replace(config, hyper=config.hyper.replace(vf_coef=1.0, gamma=GAMMA))
    rule, probe = small().float(), ProbeFamily("terminated", as_numbers=True)
    ppo = PPO(probe, config, objective=rule).learn(16 * 200)
    states = torch.eye(4)[1:].view(1, 3, 4)
    value = rule.value.mean(ppo.lifetimes.population(states).heads["q"]).flatten()
    assert value.tolist() == pytest.approx([probe.probe.values[k] for k in (1, 2, 3)], abs=0.1)
