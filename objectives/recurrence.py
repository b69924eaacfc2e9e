"""Recurrent cores that read a rollout backwards in time, as LPG and its successors do.

A core maps inputs `[T, ..., I]` to hidden states `[T, ..., H]`, from the last step to the first. Where `reset[t]` is
true the state that comes from step t + 1 is zeroed before step t is read, so that nothing flows across an episode's
end. Input projections are one matrix product for all steps. In first-order use (the meta-gradient reaches the
weights, nothing differentiates twice) the whole recursion is one autograd node with a hand-written derivative whose
weight gradient is again one product; otherwise it is composed of ordinary operations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


class ReverseCore(nn.Module, ABC):
    """A recurrent cell over reversed time.

    Args:
        inputs: I.
        width:  H.
        gates:  number of pre-activations per unit.
    """

    gates: int

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        scale = 1 / math.sqrt(inputs)
        self.weight_x = nn.Parameter(scale * torch.randn(inputs, self.gates * width))
        blocks = [nn.init.orthogonal_(torch.empty(width, width)) for _ in range(self.gates)]
        self.weight_h = nn.Parameter(torch.cat(blocks, 1))
        self.bias = nn.Parameter(torch.zeros(self.gates * width))

    def forward(self, x: Tensor, reset: Tensor, twice: bool = False) -> Tensor:
        """Hidden states [T, ..., H] from inputs [T, ..., I] and `reset [T, ...]`.

        Args:
            twice: whether someone will differentiate a gradient that passed through the core.
        """
        lead = x.shape[:-1]
        T = lead[0]
        keep = (~reset).to(x.dtype).reshape(T, -1, 1)
        projected = (x.reshape(-1, x.shape[-1]) @ self.weight_x + self.bias).reshape(T, -1, self.gates * self.width)
        hidden = self._composed(projected, keep) if twice else self._fused(projected, keep)
        return hidden.reshape(*lead, self.width)

    @abstractmethod
    def _fused(self, projected: Tensor, keep: Tensor) -> Tensor:
        """[T, n, H] as one autograd node."""

    @abstractmethod
    def _composed(self, projected: Tensor, keep: Tensor) -> Tensor:
        """[T, n, H] out of operations that can be differentiated any number of times."""


class ReverseGRU(ReverseCore):
    """Gated recurrent unit (Cho et al., 2014), with one bias inside the reset gate.

    r = sig(x_r + h W_r)   z = sig(x_z + h W_z)   n = tanh(x_n + r (h W_n + b))   h' = (1 - z) n + z h
    """

    gates = 3

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        self.bias_n = nn.Parameter(torch.zeros(width))

    def _fused(self, projected: Tensor, keep: Tensor) -> Tensor:
        return _FusedGRU.apply(projected, keep, self.weight_h, self.bias_n)

    def _composed(self, projected: Tensor, keep: Tensor) -> Tensor:
        H = self.width
        h = projected.new_zeros(projected.shape[1], H)
        hidden = []
        for x_t, keep_t in zip(reversed(projected.unbind(0)), reversed(keep.unbind(0)), strict=True):
            h = h * keep_t
            a = h @ self.weight_h
            r, z = torch.sigmoid(x_t[:, : 2 * H] + a[:, : 2 * H]).chunk(2, -1)
            n = torch.tanh(x_t[:, 2 * H :] + r * (a[:, 2 * H :] + self.bias_n))
            h = n + z * (h - n)
            hidden.append(h)
        return torch.stack(hidden[::-1])


class _FusedGRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, keep: Tensor, weight: Tensor, bias_n: Tensor) -> Tensor:
        T, n, H = *projected.shape[:2], weight.shape[0]
        h = projected.new_zeros(n, H)
        before, gates, news, inner, hidden = (projected.new_empty(T, n, k * H) for k in (1, 2, 1, 1, 1))
        for t in reversed(range(T)):
            torch.mul(h, keep[t], out=before[t])
            a = before[t] @ weight
            torch.add(projected[t, :, : 2 * H], a[:, : 2 * H], out=gates[t]).sigmoid_()
            torch.add(a[:, 2 * H :], bias_n, out=inner[t])
            torch.addcmul(projected[t, :, 2 * H :], gates[t, :, :H], inner[t], out=news[t]).tanh_()
            torch.lerp(news[t], before[t], gates[t, :, H:], out=hidden[t])
            h = hidden[t]
        ctx.save_for_backward(keep, weight, before, gates, news, inner)
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep, weight, before, gates, news, inner = ctx.saved_tensors
        (grad,) = grads
        T, n, H = before.shape
        carry = grad.new_zeros(n, H)
        d_x = grad.new_empty(T, n, 3 * H)  # derivative of the input's pre-activations
        d_a = grad.new_empty(T, n, 3 * H)  # derivative of the state's product
        for t in range(T):
            dh = grad[t] + carry
            r, z = gates[t, :, :H], gates[t, :, H:]
            d_new = dh * (1 - z) * (1 - news[t] * news[t])
            torch.mul(d_new * inner[t], r * (1 - r), out=d_x[t, :, :H])
            torch.mul(dh * (before[t] - news[t]), z * (1 - z), out=d_x[t, :, H : 2 * H])
            d_x[t, :, 2 * H :] = d_new
            d_a[t, :, : 2 * H] = d_x[t, :, : 2 * H]
            torch.mul(d_new, r, out=d_a[t, :, 2 * H :])
            carry = torch.addmm(dh * z, d_a[t], weight.T).mul_(keep[t])
        d_weight = before.view(T * n, H).T @ d_a.view(T * n, 3 * H)
        return d_x, None, d_weight, d_a[..., 2 * H :].sum((0, 1))


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

    def _composed(self, projected: Tensor, keep: Tensor) -> Tensor:
        H = self.width
        h = c = projected.new_zeros(projected.shape[1], H)
        hidden = []
        for x_t, keep_t in zip(reversed(projected.unbind(0)), reversed(keep.unbind(0)), strict=True):
            a = x_t + (h * keep_t) @ self.weight_h
            i, f, o = torch.sigmoid(a[:, : 3 * H]).chunk(3, -1)
            c = f * (c * keep_t) + i * torch.tanh(a[:, 3 * H :])
            h = o * torch.tanh(c)
            hidden.append(h)
        return torch.stack(hidden[::-1])


class _FusedLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
        T, n, H = *projected.shape[:2], weight.shape[0]
        h, c = (projected.new_zeros(n, H) for _ in range(2))
        before, cells, hidden = (projected.new_empty(T, n, H) for _ in range(3))
        gates, tanh_c = projected.new_empty(T, n, 4 * H), projected.new_empty(T, n, H)
        for t in reversed(range(T)):
            torch.mul(h, keep[t], out=before[t])
            torch.addmm(projected[t], before[t], weight, out=gates[t])
            gates[t, :, : 3 * H].sigmoid_()
            gates[t, :, 3 * H :].tanh_()
            i, f, o, g = gates[t].split(H, -1)
            cells[t] = c * keep[t]  # the cell that step t forgets from
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
        T, n, H = before.shape
        d_h, d_c = (grad.new_zeros(n, H) for _ in range(2))
        d_a = grad.new_empty(T, n, 4 * H)
        for t in range(T):
            i, f, o, g = gates[t].split(H, -1)
            dh = grad[t] + d_h
            dc = torch.addcmul(d_c, dh * o, 1 - tanh_c[t] * tanh_c[t])
            torch.mul(dc * g, i * (1 - i), out=d_a[t, :, :H])
            torch.mul(dc * cells[t], f * (1 - f), out=d_a[t, :, H : 2 * H])
            torch.mul(dh * tanh_c[t], o * (1 - o), out=d_a[t, :, 2 * H : 3 * H])
            torch.mul(dc * i, 1 - g * g, out=d_a[t, :, 3 * H :])
            d_c = dc * f * keep[t]
            d_h = (d_a[t] @ weight.T).mul_(keep[t])
        return d_a, None, before.view(T * n, H).T @ d_a.view(T * n, 4 * H)


CORES: dict[Literal["gru", "lstm"], type[ReverseCore]] = {"gru": ReverseGRU, "lstm": ReverseLSTM}
