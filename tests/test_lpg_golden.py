"""LPG against the reference numbers of an independent implementation (float64)."""

import torch
from gymnasium.spaces import Discrete
from torch.testing import assert_close

from learned_rl.agents import AgentConfig, Population, make_agent
from learned_rl.component import Context, Hyper
from learned_rl.inner_loop import GraphInner
from learned_rl.trajectory import Trajectory
from learned_rl.update_rules import SGD
from objectives.lpg import EPS, LPG

S, A, M, H = 7, 4, 8, 12
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def _views(net, of):
    """name in the reference -> the part of our tensors with its role (`of` a parameter: its value, or gradient)."""
    core, cell = net.core, "LPGGRU_0/GRUCell_0/"
    views = {f"{cell}hn/bias": of(core.bias_n)}
    for i, gate in enumerate("rzn"):
        columns = slice(i * H, (i + 1) * H)
        views[f"{cell}i{gate}/kernel"] = of(core.weight_x)[columns].T
        views[f"{cell}i{gate}/bias"] = of(core.bias)[columns]
        views[f"{cell}h{gate}/kernel"] = of(core.weight_h)[columns].T
    linear = {"MLP_0/Dense_0": net.phi[0], "MLP_0/Dense_1": net.phi[2]}
    linear |= {"Dense_0": net.policy_head, "Dense_1": net.prediction_head}
    for name, layer in linear.items():
        views[f"{name}/kernel"], views[f"{name}/bias"] = of(layer.weight).T, of(layer.bias)
    return views


def _experience(g, k):
    """Rollout k, [T, 1, B]. The reference draws next observations apart from observations, so they come apart."""
    rows = {n: g[f"{n}{k}"].T[:, None] for n in ("obs", "next_obs", "act", "reward", "done")}
    done = rows["done"] > 0
    zeros = torch.zeros_like(rows["reward"])
    return Trajectory(rows["obs"], rows["act"], zeros, rows["reward"], done, torch.zeros_like(done)), rows["next_obs"]


def test_forward_inner_steps_and_meta_gradient(golden):
    g = golden("lpg_inner_meta.npz")
    net = LPG(predictions=M, width=H, core="gru", embedding=5, see_gamma=False).double()
    for name, view in _views(net, lambda p: p.data).items():
        view.copy_(g[f"eta/{name}"])
    agent = make_agent(AgentConfig(), Discrete(S), Discrete(A), net.heads(Discrete(A)), value=False)
    population = Population(agent, 1, torch.float64)
    population.theta.data.copy_(torch.cat([g["theta_logits"], g["theta_y"]], 1).reshape(1, -1))
    inner = GraphInner(population, SGD(), {})
    hyper = Hyper(learning_rate=float(g["lr"]), prediction_coef=float(g["kl"]), max_grad_norm=float("inf"))
    context = Context(torch.zeros(1), torch.ones(1), {})
    for k in range(2):
        tr, next_obs = _experience(g, k)
        out = inner.agent(tr.obs)
        frozen = out.detach()
        embed = lambda y: net.phi(y.softmax(-1)).squeeze(-1)  # noqa: E731
        pi_hat, y_hat = net.targets(
            tr,
            frozen.policy.log_prob(tr.action).exp() + EPS,
            embed(frozen.heads["prediction"]),
            embed(inner.agent(next_obs).detach().heads["prediction"]),
            hyper,
            context,
        )
        loss, _ = net.loss(out, {"action": tr.action, "pi_hat": pi_hat, "y_hat": y_hat}, hyper)
        if k == 0:
            assert_close(pi_hat[:, 0].T, g["pi_hat0"], **EXACT)
            assert_close(y_hat[:, 0].transpose(0, 1), g["y_hat0"], **EXACT)
            assert_close(loss[0], g["loss0"], **EXACT)
        inner.step(loss, hyper)
        logits, y = inner.theta.view(S, A + M).split([A, M], 1)
        assert_close(logits, g[f"theta_logits_after{k}"], **EXACT)
        assert_close(y, g[f"theta_y_after{k}"], **EXACT)
    log_prob = inner.agent(g["eval_obs"][:, None]).policy.log_prob(g["eval_act"][:, None])
    meta_loss = -(log_prob * g["eval_adv"][:, None]).mean()
    assert_close(meta_loss, g["meta_loss"], **EXACT)
    meta_loss.backward()
    for name, view in _views(net, lambda p: p.grad).items():
        assert_close(view, g[f"meta_grad/{name}"], **EXACT)
