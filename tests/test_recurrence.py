"""Recurrent cores over reversed time: one fused node equals the composed graph, torch's cells, and episodes apart."""

import pytest
import torch
from torch.testing import assert_close

from objectives.recurrence import CORES

EXACT = {"rtol": 1e-12, "atol": 1e-12}
T, N, X, H = 7, 6, 4, 5
EACH = pytest.mark.parametrize("kind", CORES)


def core_and_data(kind, seed=0):
    torch.manual_seed(seed)
    core = CORES[kind](X, H).double()
    for parameter in core.parameters():  # biases are zero at first: make every term count
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(T, X, N, dtype=torch.float64, requires_grad=True)
    return core, x, torch.rand(T, N) < 0.3


def composed_gru(core, a, product, h, c):
    r, z = torch.sigmoid(a[: 2 * H] + product[: 2 * H]).chunk(2)
    n = torch.tanh(a[2 * H :] + r * (product[2 * H :] + core.bias_n[:, None]))
    return (1 - z) * n + z * h, c


def composed_lstm(core, a, product, h, c):
    i, f, o, g = (a + product).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def composed(core, x, reset):
    """The oracle: hidden states [T, H, n] by the cells' formulas, out of ordinary operations."""
    cell = {"gru": composed_gru, "lstm": composed_lstm}[next(k for k, v in CORES.items() if isinstance(core, v))]
    h = c = x.new_zeros(H, x.shape[-1])
    hidden = []
    for t in reversed(range(len(x))):
        h, c = torch.where(reset[t], 0.0, h), torch.where(reset[t], 0.0, c)
        h, c = cell(core, core.weight_x @ x[t] + core.bias[:, None], core.weight_h @ h, h, c)
        hidden.append(h)
    return torch.stack(hidden[::-1])


@EACH
def test_fused_equals_composed_in_value_and_every_gradient(kind):
    core, x, reset = core_and_data(kind)
    assert reset.any() and not reset.all()
    inputs = [x, *core.parameters()]
    weight = torch.randn(T, H, N, dtype=torch.float64)
    results = []
    for hidden in (core(x, reset), composed(core, x, reset)):
        results.append((hidden, torch.autograd.grad((hidden * weight).sum(), inputs)))
    assert_close(*[r[0] for r in results], **EXACT)
    for name, a, b in zip(["x", *dict(core.named_parameters())], *[r[1] for r in results], strict=True):
        assert_close(a, b, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        assert a.abs().max() > 1e-3


@EACH
def test_derivatives_against_differences(kind):
    """In the inputs and in every weight."""
    core, x, reset = core_and_data(kind)
    names, weights = zip(*core.named_parameters(), strict=True)

    def f(x, *weights):
        return torch.func.functional_call(core, dict(zip(names, weights, strict=True)), (x, reset))

    assert torch.autograd.gradcheck(f, (x, *weights))


@EACH
def test_a_second_derivative_is_an_error(kind):
    core, x, reset = core_and_data(kind)
    (grad,) = torch.autograd.grad(core(x, reset).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@EACH
def test_two_episodes_equal_two_rollouts(kind):
    """An end at step 2: what comes after it reaches neither the states nor the gradients before it."""
    core, x, _ = core_and_data(kind)
    reset = torch.zeros(T, N, dtype=torch.bool)
    reset[2] = True
    whole = core(x, reset)
    none = torch.zeros_like(reset)
    apart = torch.cat([core(x[:3], none[:3]), core(x[3:], none[3:])])
    assert_close(whole, apart, **EXACT)
    (grad,) = torch.autograd.grad(whole[:3].sum(), x)
    assert not grad[3:].any() and grad[:3].any()
    assert not torch.allclose(core(x, none)[:3], whole[:3])


@EACH
def test_nothing_flows_forward_in_time(kind):
    core, x, reset = core_and_data(kind)
    (grad,) = torch.autograd.grad(core(x, torch.zeros_like(reset))[3].sum(), x)
    assert not grad[:3].any() and grad[3:].any(1).all()


def mapped(core, kind):
    """torch's own cell with the same weights."""
    blocks_x, blocks_h, bias = (w.detach().split(H) for w in (core.weight_x, core.weight_h, core.bias))
    if kind == "gru":
        cell, order = torch.nn.GRUCell(X, H).double(), (0, 1, 2)  # r, z, n in both
    else:
        cell, order = torch.nn.LSTMCell(X, H).double(), (0, 1, 3, 2)  # torch: i, f, g, o
    cell.weight_ih.data.copy_(torch.cat([blocks_x[i] for i in order]))
    cell.weight_hh.data.copy_(torch.cat([blocks_h[i] for i in order]))
    cell.bias_ih.data.copy_(torch.cat([bias[i] for i in order]))
    cell.bias_hh.data.zero_()
    if kind == "gru":
        cell.bias_hh.data[2 * H :] = core.bias_n.detach()
    return cell


@EACH
def test_equals_torch_cells(kind):
    core, x, reset = core_and_data(kind)
    cell = mapped(core, kind)
    h = c = torch.zeros(N, H, dtype=torch.float64)
    expected = []
    for t in reversed(range(T)):
        keep = (~reset[t]).double()[:, None]
        if kind == "gru":
            h = cell(x[t].T, h * keep)
        else:
            h, c = cell(x[t].T, (h * keep, c * keep))
        expected.append(h)
    assert_close(core(x, reset), torch.stack(expected[::-1]).transpose(1, 2), **EXACT)


def test_initial_weights():
    """The forget gate is open at first; recurrent blocks are orthogonal."""
    torch.manual_seed(0)
    lstm = CORES["lstm"](X, H)
    assert lstm.bias.tolist() == [0.0] * H + [1.0] * H + [0.0] * 2 * H
    for core in (lstm, CORES["gru"](X, H)):
        for block in core.weight_h.split(H):
            assert_close(block @ block.T, torch.eye(H), rtol=0, atol=1e-5)
