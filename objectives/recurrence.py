"""Recurrent cores that read a rollout backwards in time, as LPG and its successors do.

A core maps inputs `[T, I, n]` to hidden states `[T, H, n]`, from the last step to the first, for n sequences at once.
Where `reset[t]` is true the state that comes from step t + 1 is zeroed before step t is read, so that nothing flows
across an episode's end. Features come before sequences, so that every gate is one contiguous block.

The meta-gradient reaches the weights once and no inner gradient passes through a core, so the whole recursion is one
autograd node with a hand-written derivative. Nobody differentiates that derivative: asking for it is an error.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn


def features_first_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """weight [O, I] and bias [O], if any, on x [T, I, n]: [T, O, n], without the copies that `weight @ x` makes."""
    weights = weight.expand(len(x), -1, -1)
    return torch.bmm(weights, x) if bias is None else torch.baddbmm(bias[None, :, None], weights, x)


class ReverseCore(nn.Module, ABC):
    """A recurrent cell over reversed time.

    Args:
        inputs: I.
        width:  H.
    """

    gates: int

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight_x = nn.Parameter(torch.randn(self.gates * width, inputs) / math.sqrt(inputs))
        blocks = [nn.init.orthogonal_(torch.empty(width, width)) for _ in range(self.gates)]
        self.weight_h = nn.Parameter(torch.cat(blocks))
        self.bias = nn.Parameter(torch.zeros(self.gates * width))

    def forward(self, x: Tensor, reset: Tensor) -> Tensor:
        """Hidden states [T, H, n] from inputs [T, I, n] and `reset [T, n]`, bool."""
        keep = (~reset).to(x.dtype).unsqueeze(1)
        return self._fused(features_first_linear(self.weight_x, self.bias, x), keep)

    @abstractmethod
    def _fused(self, projected: Tensor, keep: Tensor) -> Tensor:
        """[T, H, n] as one autograd node."""


class ReverseGRU(ReverseCore):
    """Gated recurrent unit (Cho et al., 2014), with one bias inside the reset gate.

    r = sig(x_r + W_r h)   z = sig(x_z + W_z h)   n = tanh(x_n + r (W_n h + b))   h' = (1 - z) n + z h
    """

    gates = 3

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        self.bias_n = nn.Parameter(torch.zeros(width))

    def _fused(self, projected: Tensor, keep: Tensor) -> Tensor:
        return _FusedGRU.apply(projected, keep, self.weight_h, self.bias_n)


class _FusedGRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, keep: Tensor, weight: Tensor, bias_n: Tensor) -> Tensor:
        T, n, H = projected.shape[0], projected.shape[2], weight.shape[1]
        h = projected.new_zeros(H, n)
        before, news, hidden = (projected.new_empty(T, H, n) for _ in range(3))
        gates, products = projected.new_empty(T, 2 * H, n), projected.new_empty(T, 3 * H, n)
        for t in reversed(range(T)):
            torch.mul(h, keep[t], out=before[t])
            a = torch.mm(weight, before[t], out=products[t])
            torch.add(projected[t, : 2 * H], a[: 2 * H], out=gates[t]).sigmoid_()
            a[2 * H :] += bias_n.unsqueeze(-1)
            torch.addcmul(projected[t, 2 * H :], gates[t, :H], a[2 * H :], out=news[t]).tanh_()
            torch.lerp(news[t], before[t], gates[t, H:], out=hidden[t])
            h = hidden[t]
        ctx.save_for_backward(keep, weight, before, gates, news, products[:, 2 * H :])
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep, weight, before, gates, news, inner = ctx.saved_tensors
        (grad,) = grads
        T, H, n = before.shape
        carry, d_weight = grad.new_zeros(H, n), torch.zeros_like(weight)
        d_x = grad.new_empty(T, 3 * H, n)  # derivative of the input's pre-activations
        d_a = grad.new_empty(3 * H, n)  # derivative of the state's product at one step
        d_bias = grad.new_zeros(H)
        for t in range(T):
            dh = grad[t] + carry
            r, z, new, h = gates[t, :H], gates[t, H:], news[t], before[t]
            dhz = dh * z
            d_new = torch.addcmul(dh - dhz, dh - dhz, new * new, value=-1, out=d_x[t, 2 * H :])
            torch.mul(d_new * inner[t], torch.addcmul(r, r, r, value=-1), out=d_x[t, :H])
            torch.mul(dhz * (h - new), 1 - z, out=d_x[t, H : 2 * H])
            d_a[: 2 * H] = d_x[t, : 2 * H]
            torch.mul(d_new, r, out=d_a[2 * H :])
            d_weight.addmm_(d_a, h.T)
            d_bias += d_a[2 * H :].sum(1)
            carry = torch.addmm(dhz, weight.T, d_a).mul_(keep[t])
        return d_x, None, d_weight, d_bias


class ReverseLSTM(ReverseCore):
    """Long short-term memory (Hochreiter & Schmidhuber, 1997) with the forget gate's bias at 1 (Gers et al., 2000).

    i, f, o = sig(..)   g = tanh(..)   c' = f c + i g   h' = o tanh(c')
    """

    gates = 4  # in the order i, f, o, g

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        with torch.no_grad():
            self.bias[width : 2 * width] = 1.0

    def _fused(self, projected: Tensor, keep: Tensor) -> Tensor:
        return _FusedLSTM.apply(projected, keep, self.weight_h)


class _FusedLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
        T, n, H = projected.shape[0], projected.shape[2], weight.shape[1]
        h, c = (projected.new_zeros(H, n) for _ in range(2))
        before, cells, tanh_c, hidden = (projected.new_empty(T, H, n) for _ in range(4))
        gates = projected.new_empty(T, 4 * H, n)
        for t in reversed(range(T)):
            torch.mul(h, keep[t], out=before[t])
            torch.addmm(projected[t], weight, before[t], out=gates[t])
            gates[t, : 3 * H].sigmoid_()
            gates[t, 3 * H :].tanh_()
            i, f, o, g = gates[t].split(H)
            torch.mul(c, keep[t], out=cells[t])  # the cell that step t forgets from
            c = torch.addcmul(f * cells[t], i, g)
            torch.tanh(c, out=tanh_c[t])
            torch.mul(o, tanh_c[t], out=hidden[t])
            h = hidden[t]
        ctx.save_for_backward(keep, weight, before, gates, cells, tanh_c)
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep, weight, before, gates, cells, tanh_c = ctx.saved_tensors
        (grad,) = grads
        T, H, n = before.shape
        d_h, d_c, d_weight = grad.new_zeros(H, n), grad.new_zeros(H, n), torch.zeros_like(weight)
        d_a = grad.new_empty(T, 4 * H, n)
        for t in range(T):
            i, f, o, g = gates[t].split(H)
            dh = grad[t] + d_h
            dho = dh * o
            dc = d_c + dho - dho * tanh_c[t] * tanh_c[t]
            torch.mul(dc * g, torch.addcmul(i, i, i, value=-1), out=d_a[t, :H])
            torch.mul(dc * cells[t], torch.addcmul(f, f, f, value=-1), out=d_a[t, H : 2 * H])
            torch.mul(dho * tanh_c[t], 1 - o, out=d_a[t, 2 * H : 3 * H])
            torch.mul(dc * i, 1 - g * g, out=d_a[t, 3 * H :])
            d_weight.addmm_(d_a[t], before[t].T)
            d_c = dc * f * keep[t]
            d_h = torch.mm(weight.T, d_a[t]).mul_(keep[t])
        return d_a, None, d_weight


CORES: dict[Literal["gru", "lstm"], type[ReverseCore]] = {"gru": ReverseGRU, "lstm": ReverseLSTM}
