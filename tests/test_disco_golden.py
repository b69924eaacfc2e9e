"""Disco103 against reference numbers of the authors' code, in float32 and in float64.

Tolerances are shares of the largest number of each reference array, and those of an independent implementation of the
same specification in float64, which is how far float32 rounding takes the reference itself.
"""

import dataclasses
import math
import pathlib

import pytest
import torch
from gymnasium.spaces import Box, Discrete

from learned_rl.agents import AgentConfig, Population, make_agent
from learned_rl.architecture import AgentOutput
from learned_rl.component import Context, Hyper
from learned_rl.distributions import Categorical
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.returns import retrace, vtrace
from learned_rl.trajectory import Trajectory
from learned_rl.update_rules import ClippedAdam
from learned_rl.values import CategoricalValue, RunningMoments, signed_hyperbolic, signed_parabolic
from objectives.disco import _Cell, divergence
from objectives.disco_weights import _shapes, pieces, read

WEIGHTS = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "disco_103.npz"
HYPER = Hyper(
    learning_rate=5e-3, gamma=0.997, gae_lambda=0.95, vf_coef=0.2, prediction_coef=1.0, max_grad_norm=math.inf
)
HEADS = {"y": "y", "z": "z", "next_policy": "aux_pi", "q": "q"}  # ours -> theirs
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def near(found, expected, tolerance, name=""):
    found, expected = found.detach().double().flatten(), torch.as_tensor(expected).double().flatten()
    assert found.shape == expected.shape, name
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest number"


@pytest.fixture
def reference(golden):
    def load(name, dtype):
        arrays = golden(f"disco/{name}.npz")
        return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arrays.items()}

    return load


@pytest.fixture
def disco():
    if not WEIGHTS.exists():
        pytest.skip("the published weights are not beside this checkout (../shared/data)")
    return read(WEIGHTS)


def test_the_published_file_is_known(disco):
    assert disco.provenance["published"] == "google-deepmind/disco_rl, disco_103.npz, Apache-2.0"


# --- the networks --------------------------------------------------------------------------------------------------


def said(g, who):
    """Outputs of one lifetime [T+1, 1, B] as leaves, and the leaves under the reference's names."""
    leaves = {k: g[f"{who}_{k}"].unsqueeze(1).requires_grad_() for k in ("logits", *HEADS.values())}
    heads = {ours: leaves[theirs] for ours, theirs in HEADS.items()}
    return AgentOutput(Categorical(leaves["logits"]), None, heads), leaves


def lived(g):
    """Experience and memory of the reference's case."""
    terminated = g["is_terminal"].bool().unsqueeze(1)
    trajectory = Trajectory(
        obs=torch.zeros(len(terminated) + 1, *terminated.shape[1:]),
        action=g["actions"][:-1].long().unsqueeze(1),
        log_prob=torch.zeros_like(terminated, dtype=torch.float32),
        reward=g["rewards"].unsqueeze(1),
        terminated=terminated,
        truncated=torch.zeros_like(terminated),
        logits=g["behaviour_logits"][:-1].unsqueeze(1),
        follows=~g["loss_mask"].bool().unsqueeze(1),
    )
    memory = {"hidden": g["rnn_hidden"][None], "cell": g["rnn_cell"][None]} | moments(g, "{}_ema_{}")
    return trajectory, Context(torch.zeros(1), torch.ones(1), memory)


def moments(g, names):
    fields = {"first": "moment1", "second": "moment2", "decay": "decay_product"}
    kinds = {"advantage": "adv", "error": "td"}
    return {f"{k}_{f}": g[names.format(kinds[k], fields[f])].reshape(1, 1) for k in kinds for f in fields}


@both
def test_targets_states_losses_and_gradients(reference, disco, dtype):
    g, disco = reference("meta_net_case_1", dtype), disco.to(dtype)
    (out, leaves), (slow, _), (trajectory, context) = said(g, "online"), said(g, "target"), lived(g)
    batch, memory = disco.prepare(trajectory, dataclasses.replace(out, target=slow), None, HYPER, context)
    for ours, theirs in {"pi_hat": "pi", "y_hat": "y", "z_hat": "z", "return": "q_target"}.items():
        near(batch[ours], g[f"out_{theirs}"], 7e-5, ours)
    expected = {"hidden": g["new_rnn_hidden"], "cell": g["new_rnn_cell"]} | moments(g, "new_{}_ema_{}")
    assert memory.keys() == expected.keys()
    for name, value in expected.items():
        near(memory[name], value, 7e-5, name)
    rows = {k: v.detach() for k, v in batch.items()} | {"action": trajectory.action}
    now = out.map(lambda x: x[:-1])
    loss, _ = disco.loss(now, rows, HYPER)
    near(loss, g["loss_total"], 3e-5, "loss")
    grads = torch.autograd.grad(loss.sum(), leaves.values())
    for (name, _), grad in zip(leaves.items(), grads, strict=True):
        near(grad, g[f"grad_{name}"], 6e-5, f"gradient by {name}")


@both
def test_terms_of_the_loss(reference, disco, dtype):
    """Each alone, and unmasked."""
    g, disco = reference("meta_net_case_1", dtype), disco.to(dtype)
    out, (trajectory, _) = said(g, "online")[0], lived(g)
    rows = {"action": trajectory.action, "pi_hat": g["out_pi"], "y_hat": g["out_y"], "z_hat": g["out_z"]}
    rows |= {"return": g["out_q_target"], "ended": g["is_terminal"].bool(), "next_logits": g["online_logits"][1:]}
    rows = {k: v if k == "action" else v.unsqueeze(1) for k, v in rows.items()}
    rows["counts"] = torch.ones_like(trajectory.done)
    _, metrics = disco.loss(out.map(lambda x: x[:-1]), rows, HYPER)
    mean = lambda name: g[f"loss_{name}"].mean()  # noqa: E731
    near(metrics["policy_loss"], mean("pi"), 3e-5)
    near(metrics["prediction_loss"], mean("y") + mean("z"), 3e-5)
    near(metrics["next_policy_loss"], mean("aux_pi"), 3e-5)
    near(metrics["value_loss"], mean("value"), 3e-5)


@both
def test_gradients_through_the_networks(reference, disco, dtype):
    g, disco = reference("meta_net_case_1", dtype) | reference("meta_net_grad_case_1", dtype), disco.to(dtype)
    (out, leaves), (slow, _), (trajectory, context) = said(g, "online"), said(g, "target"), lived(g)
    batch, memory = disco.prepare(trajectory, dataclasses.replace(out, target=slow), None, HYPER, context)
    summary = summed(disco, trajectory, dataclasses.replace(out, target=slow), context)
    probe = torch.zeros((), dtype=dtype)
    for j, x in enumerate((batch["pi_hat"], batch["y_hat"], batch["z_hat"], summary, memory["hidden"], memory["cell"])):
        wave = torch.cos(0.7 * torch.arange(x.numel(), dtype=torch.float64) + j).to(dtype)
        probe = probe + (x.flatten() * wave).sum() / math.sqrt(x.numel())
    near(probe, g["probe_value"], 4e-5, "probe")
    weights = dict(disco.named_parameters())
    inputs = [leaves["y"], leaves["z"], *weights.values()]
    found = torch.autograd.grad(probe, inputs, retain_graph=True)
    near(found[0], g["dprobe_d_online_y"], 4e-5, "by y")
    near(found[1], g["dprobe_d_online_z"], 4e-5, "by z")
    others = torch.autograd.grad(probe, [leaves[k] for k in ("logits", "aux_pi", "q")], allow_unused=True)
    assert others == (None, None, None)
    assert_published_gradients(disco, dict(zip(weights.values(), found[2:], strict=True)), g, "dprobe", 4e-5)


def summed(disco, trajectory, out, context):
    """What the first network tells the second one."""
    told = []
    hook = disco.summary.register_forward_hook(lambda module, given, answer: told.append(answer))
    disco.prepare(trajectory, out, None, HYPER, context)
    hook.remove()
    return told[0]


def assert_published_gradients(disco, grads, g, prefix, tolerance, loose=None):
    """Gradients of our parameters against whole published ones, and against norms and projections of the large ones."""
    published = {name: torch.full(shape, math.nan, dtype=torch.float64) for name, shape in _shapes(disco).items()}
    for name, index, view in pieces(disco, lambda p: grads[p]):
        published[name][index] = view.detach().double()
    keys = "dprobe_eta" if prefix == "dprobe" else "meta_grad"
    whole = "dprobe_d_eta::{}" if prefix == "dprobe" else "meta_grad::{}"
    names = [str(n) for n in g[f"{keys}_names"]]
    assert set(names) == set(published)
    compared = 0
    for i, name in enumerate(names):
        bound = next((v for k, v in (loose or {}).items() if name.startswith(k)), tolerance)
        ours, norm = published[name].flatten(), float(g[f"{keys}_norms"][i])
        assert ours.norm().item() == pytest.approx(norm, rel=bound), name
        if (key := whole.format(name)) in g:
            near(ours, g[key], bound, name)
            compared += 1
        else:
            wave = torch.cos(0.7 * torch.arange(len(ours)).double() + 9)  # theirs in float32: by 1e-2 off far out
            along = max(bound, 1e-3) * norm
            assert (ours @ wave).item() == pytest.approx(float(g[f"{keys}_dots"][i]), abs=along), name
    assert compared > 20


# --- whole updates -------------------------------------------------------------------------------------------------

TINY = AgentConfig("action_conditional", hidden=(16,), activation="relu", model=8, head_hidden=(8,))
#: ours -> published, for each layer of the agent.
LAYERS = {
    "torso0": "mlp/~_embedding_pass/torso/~/linear_0",
    "policy": "mlp/~_head_pass/torso_head/~/linear_0",
    "head_y": "mlp/~_head_pass/torso_head_1/~/linear_0",
    "root": "mlp/linear",
    "model": "mlp/action_cond/linear",
}
LAYERS |= {
    f"head_{k}{i}": f"mlp/mlp{s}/~/linear_{i}"
    for k, s in (("z", ""), ("next_policy", "_1"), ("q", "_2"))
    for i in (0, 1)
}


def agents(g, disco, prefix, dtype):
    agent = make_agent(TINY, Box(-9, 9, (6,)), Discrete(3), disco.heads(Discrete(3)), value=False)
    population = Population(agent, 1, dtype)
    population.theta.data.copy_(row(population, g, prefix))
    return population


def row(population, g, prefix):
    names = {"weight": "w", "bias": "b"}
    parts = [name.rpartition(".") for name in population.agent.shapes]
    return torch.cat([torch.as_tensor(g[f"{prefix}{LAYERS[a]}/{names[b]}"]).flatten() for a, _, b in parts])[None]


def rollout(g, prefix, k=None):
    """The reference's rows arrive with the observation that they led to."""
    part = lambda name: g[f"{prefix}_{name}"] if k is None else g[f"{prefix}_{name}"][k]  # noqa: E731
    over = (part("discounts") == 0).unsqueeze(1)
    logits = part("behaviour_logits")[:-1].unsqueeze(1)
    action = part("actions")[:-1].long().unsqueeze(1)
    return Trajectory(
        obs=part("observations").unsqueeze(1),
        action=action,
        log_prob=Categorical(logits).log_prob(action),
        reward=part("rewards")[1:].unsqueeze(1),
        terminated=over[1:],
        truncated=torch.zeros_like(over[1:]),
        logits=logits,
        follows=over[:-1],
    )


def algorithm(disco):
    config = PPOConfig(
        n_envs=2, n_steps=5, n_epochs=1, n_minibatches=1, optimizer="clipped_adam", hyper=HYPER, agent=TINY
    )
    return Algorithm(config, Slots.fill(config, objective=disco))


def update(rule, inner, trajectory, memory):
    return rule.update(inner, trajectory, Context(torch.zeros(1), torch.ones(1), memory), HYPER, torch.Generator())


@both
def test_agent_says_what_the_published_network_says(reference, disco, dtype):
    g = reference("learner_step_case", dtype)
    out = agents(g, disco, "params0::", dtype)(g["rollout_observations"].unsqueeze(1))
    near(out.policy.params[0], g["agent_out0_logits"], 1e-5)
    for ours, theirs in HEADS.items():
        near(out.heads[ours], g[f"agent_out0_{theirs}"], 1e-5, ours)


@both
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_three_learner_steps(reference, disco, dtype, graph):
    g, disco = reference("learner_step_case", dtype), disco.to(dtype)
    population, rule = agents(g, disco, "params0::", dtype), algorithm(disco)
    kind = GraphInner if graph else PlainInner
    inner = kind(population, ClippedAdam(), ClippedAdam().initial_state(population.theta.detach()))
    memory = {k: v.to(dtype) for k, v in rule.initial_memory(population.theta.detach()).items()}
    before = inner.theta.detach().clone()
    for k in (1, 2, 3):
        record = update(rule, inner, rollout(g, "rollout"), memory)
        memory = record.memory
        near((inner.theta - before).norm(), g[f"update_norm{k}"], 2e-4, "length of the step")
        if k == 1:
            near(inner.state["first"] * 10, row(population, g, "grads1::"), 2e-4, "gradient")
        near(inner.theta, row(population, g, f"params{k}::"), 2.2e-4, f"parameters {k}")
        before = inner.theta.detach().clone()
        near(memory["objective/hidden"], g[f"rnn_hidden{k}"], 2e-4)
        near(memory["objective/cell"], g[f"rnn_cell{k}"], 2e-4)
        for name, value in moments(g, "{}_ema" + str(k) + "_{}").items():
            near(memory[f"objective/{name}"], value, 2e-4, name)
    near(memory["target/theta"], row(population, g, "target_params3::"), 2.2e-4, "target network")


# --- a meta-step ---------------------------------------------------------------------------------------------------


class PublishedCritic:
    """The value function of the authors' outer loop, of our pieces: V-trace of rewards that arrive a step late, and
    values in the squeezed space, with running moments of advantages and errors."""

    def __init__(self, g, dtype):
        named = lambda x: torch.as_tensor(g[f"value_params0::value_fn/{x}"])  # noqa: E731
        torso, head = "~_embedding_pass/torso/~/linear_0", "~_head_pass/torso_head/~/linear_0"
        self.shapes = [named(f"{layer}/{k}").shape for layer in (torso, head) for k in "wb"]
        self.names = [f"value_fn/{layer}/{k}" for layer in (torso, head) for k in "wb"]
        self.theta = torch.cat([torch.as_tensor(g[f"value_params0::{n}"]).flatten() for n in self.names])[None]
        self.rule, self.moments = ClippedAdam(), RunningMoments()
        self.state = self.rule.initial_state(self.theta)
        self.seen = {k: {n: v.to(dtype) for n, v in self.moments.initial(1).items()} for k in ("advantage", "error")}

    def said(self, theta, obs):
        parts = theta[0].split([math.prod(shape) for shape in self.shapes])
        w0, b0, w1, b1 = (x.view(shape) for x, shape in zip(parts, self.shapes, strict=True))
        return ((obs @ w0 + b0) @ w1 + b1).squeeze(-1)

    def judge(self, theta, arrived, logits):
        """What the network says, the errors of its values, and advantages; and the moments after them."""
        said = self.said(theta, arrived["observations"])
        value, over = signed_parabolic(said), arrived["discounts"][:-1] == 0
        mu = Categorical(arrived["behaviour_logits"][:-1]).log_prob(arrived["actions"][:-1])
        ratio = Categorical(logits).log_prob(arrived["actions"][:-1]) - mu
        reward, ends = arrived["rewards"][:-1], (over, torch.zeros_like(over))
        target, advantage = vtrace(reward, value[:-1], value[1:], *ends, ratio, 0.99, 0.96)
        error = target.detach() - value[:-1]
        found = {"advantage": advantage.detach(), "error": error.detach()}
        seen = {k: self.moments.update(self.seen[k], x.unsqueeze(1)) for k, x in found.items()}
        (mean, scale), (_, spread) = (self.moments.mean_scale(seen[k]) for k in ("advantage", "error"))
        return said[:-1], found["error"] / spread, (found["advantage"] - mean) / scale, seen

    def learn(self, arrived, logits):
        theta = self.theta.detach().requires_grad_()
        said, error, _, self.seen = self.judge(theta, arrived, logits)
        (grad,) = torch.autograd.grad((0.5 * (said - (said + error).detach()).square()).mean(), theta)
        step, self.state = self.rule.update(grad, self.state, self.theta, 1e-3)
        self.theta = self.theta + step


def arrived(g, prefix, k=None):
    names = ("observations", "actions", "rewards", "discounts", "behaviour_logits")
    rows = {name: g[f"{prefix}_{name}"] if k is None else g[f"{prefix}_{name}"][k] for name in names}
    return rows | {"actions": rows["actions"].long()}


class Watched(ClippedAdam):
    """Remembers the smallest gradient that each parameter ever saw."""

    smallest: torch.Tensor | float = math.inf

    def update(self, grad, *rest):
        self.smallest = grad.detach().abs().clamp(max=self.smallest)
        return super().update(grad, *rest)


@both
def test_a_meta_step(reference, disco, dtype):
    """Outer loss and meta-gradient through two updates, with their critic; 800 of which made Disco on Catch."""
    g, disco = reference("meta_step_case", dtype), disco.to(dtype)
    population, rule, critic = agents(g, disco, "agent_params0::", dtype), algorithm(disco), PublishedCritic(g, dtype)
    adam = Watched()
    inner = GraphInner(population, adam, adam.initial_state(population.theta.detach()))
    memory = {k: v.to(dtype) for k, v in rule.initial_memory(population.theta.detach()).items()}
    terms = []
    for k in range(2):
        logits = inner.agent(g["train_observations"][k].unsqueeze(1)).policy.logits[:-1, 0].detach()
        record = update(rule, inner, rollout(g, "train", k), memory)
        memory = record.memory
        terms.append(disco.target_regularisers(record.batch))
        critic.learn(arrived(g, "train", k), logits)
    # The step along a gradient as small as Adam's eps of 1e-8 is a matter of rounding, and so of the processor.
    clear, theirs = adam.smallest > 1e-7, row(population, g, "agent_params2::")
    assert clear.double().mean() > 0.9
    near(inner.theta[clear], theirs[clear], 1e-5, "agent")
    near(inner.theta, theirs, 5e-4 if dtype == torch.float32 else 2e-5, "agent, where gradients are tiny")
    near(critic.theta, torch.cat([torch.as_tensor(g[f"value_params2::{n}"]).flatten() for n in critic.names]), 2e-5)
    for name, value in moments(g, "value_{}_ema2_{}").items():
        kind, _, part = name.partition("_")
        near(critic.seen[kind][part], value, 1e-4, name)

    valid, trajectory = arrived(g, "valid"), rollout(g, "valid")
    said = inner.agent(trajectory.obs)
    out = said.map(lambda x: x[:-1])
    advantage = critic.judge(critic.theta, valid, out.policy.logits[:, 0].detach())[2]
    pg = -(out.policy.log_prob(trajectory.action)[:, 0] * advantage).mean()
    near(pg, g["log_pg_loss"], 2e-5, "policy gradient")
    kept = disco.agent_regularisers(out, trajectory.action)
    y_entropy = Categorical(said.heads["y"]).entropy().mean()  # of the last observation too
    loss = pg - 1e-2 * out.policy.entropy().mean() - 1e-3 * y_entropy - 1e-3 * kept["z_entropy"].squeeze()
    weights = {"pi_hat_mean": 1e-3, "y_hat_mean": 1e-3, "z_hat_mean": 1e-3, "target_kl": 1e-2}
    loss = loss + sum(w * (terms[0][k] + terms[1][k]).squeeze() / 2 for k, w in weights.items())
    near(loss, g["log_meta_loss"], 2.2e-6, "meta-loss")
    parameters = list(disco.parameters())
    grads = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
    # Adam divides by what is tiny, which magnifies rounding; in float32 bounds are those that come with the reference.
    # Of the largest numbers of the layers that say y_hat and z_hat one depends on a gradient of 1e-8: in float32 it is
    # the processor that decides by how much it is off (6e-3 and 8.5e-3 of y_hat's were seen, all others within 3e-5).
    single = dtype == torch.float32
    bound, loose = (5e-3, {"lstm/linear_2/": 3e-2, "lstm/linear_3/": 3e-2}) if single else (2.5e-3, {})
    assert_published_gradients(disco, grads, g, "meta", bound, {"lstm/linear_3/": 1.7e-2} | loose)
    if single:
        theirs = torch.as_tensor(g["meta_grad::lstm/linear_2/b"]).double()
        ours = grads[disco.y_head.bias].double()
        assert (ours - theirs).abs().sort().values[-2] <= 1e-4 * theirs.abs().max()


# --- small things --------------------------------------------------------------------------------------------------


@both
def test_transforms(reference, dtype):
    g, value = reference("input_transforms", dtype), CategoricalValue()
    near(signed_hyperbolic(g["scalar_in"]), g["sign_hyp_out"], 1e-6)
    near(signed_parabolic(g["scalar_in"].double()), g["signed_parabolic_exact"], 1e-7)
    near(value.mean(g["value_logits_in"]), g["value_logits_to_value_out"], 1.3e-5)
    near(divergence(g["kl_p_logits"], g["kl_q_logits"]), g["kl_out"], 1.1e-5)
    near(value.loss(g["value_logits_in"], g["value_target_in"]), g["value_loss_from_target_out"], 1.1e-5)
    # The reference's two-hot is of numbers that are transformed already.
    near(value.two_hot(signed_parabolic(g["twohot_in"].double())), g["twohot_out"], 1.3e-5)


@both
def test_running_moments(reference, dtype):
    g, moments = reference("input_transforms", dtype), RunningMoments()
    state = {k: v.to(dtype) for k, v in moments.initial(1).items()}
    for k, x in enumerate(g["ema_in"].unsqueeze(2)):
        state = moments.update(state, x)
        mean, scale = moments.mean_scale(state)
        near((x - mean) / scale, g["ema_norm_sub_mean"][k], 1.1e-5)
        near(x / scale, g["ema_norm_no_mean"][k], 1.1e-5)
        for name, key in {"first": "moment1", "second": "moment2", "decay": "decay_product"}.items():
            near(state[name], g[f"ema_{key}"][k], 1.1e-5, name)


@both
def test_retrace(reference, dtype):
    g = reference("input_transforms", dtype)
    over, action = g["ret_env_discount"] == 0, g["ret_actions"].long()
    q = g["ret_target_q"][:-1].gather(-1, action.unsqueeze(-1)).squeeze(-1)
    ends = over, torch.zeros_like(over)
    target = retrace(g["ret_r"], q, g["ret_target_values"][1:], *ends, g["ret_rho"].log(), 0.997, 0.95)
    near(target, g["retrace_out_q_target"], 1.1e-5)
    near(target - g["ret_target_values"][:-1], g["retrace_out_adv"], 1.1e-5)


@both
def test_vtrace(reference, dtype):
    g = reference("input_transforms", dtype)
    over, value = g["ret_env_discount"] == 0, g["ret_target_values"]
    ends = over, torch.zeros_like(over)
    target, advantage = vtrace(g["ret_r"], value[:-1], value[1:], *ends, g["ret_rho"].log(), 0.99, 0.96)
    near(target, g["vtrace_out_value_target"], 1.1e-5)
    near(advantage, g["vtrace_out_adv"], 1.1e-5)


@both
def test_lstm_step(reference, dtype):
    g, cell = reference("input_transforms", dtype), _Cell(4, 3).to(dtype)
    order = torch.cat([torch.arange(3) + 3 * "igfo".index(gate) for gate in "ifog"])
    cell.weight_x.data, cell.weight_h.data = (w.T for w in g["lstm_w"][:, order].split([4, 3]))
    cell.bias.data = g["lstm_b"][order] + torch.tensor([0] * 3 + [1] * 3 + [0] * 6, dtype=dtype)
    hidden, after = cell(g["lstm_x"], g["lstm_h"], g["lstm_c"])
    near(hidden, g["lstm_new_h"], 1e-6)
    near(after, g["lstm_new_c"], 1e-6)


@both
def test_clipped_adam(reference, dtype):
    g, rule = reference("input_transforms", dtype), ClippedAdam()
    state = rule.initial_state(torch.zeros(1, 6, dtype=dtype))
    for grad, expected in zip(g["adam_grads"], g["adam_updates_lr0.01_clip1"], strict=True):
        step, state = rule.update(grad[None], state, torch.zeros(1, 6, dtype=dtype), 1e-2)
        near(step, expected, 1.3e-5)
