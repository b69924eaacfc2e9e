"""Recurrent cores that read a rollout backwards in time, as LPG and its successors do.

A core maps inputs `[T, I, n]` to hidden states `[T, H, n]`, from the last step to the first, for n sequences at once.
Where `reset[t]` is true the state that comes from step t + 1 is zeroed before step t is read, so that nothing flows
across an episode's end. Features come before sequences, so that every gate is one contiguous block.

The meta-gradient reaches the weights once and no inner gradient passes through a core, so the whole recursion is one
autograd node with hand-written derivatives, backwards and forwards. Nobody differentiates those: asking for it is an
error. Under `torch.vmap` the node stays one node, with weights for each lifetime.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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


class _Fused(torch.autograd.Function):
    """A whole recursion. Its first output is `hidden`; the others are what the derivatives read, and have none.

    Args:
        projected: [T, G, n] the inputs' share of the G = gates * H pre-activations.
        keep:      [T, 1, n] 0 where the state is reset, else 1.
        weights:   [G, H] of the state, and whatever else the cell has.

    With weights for each lifetime all of these have an axis P more: behind T, and in front of the weights' own.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        (projected, keep, weight, *rest), inner = inputs, output[1:]
        ctx.mark_non_differentiable(*inner)
        ctx.set_materialize_grads(False)  # or zeros would be made for what has no gradient
        ctx.save_for_backward(keep, weight, *inner)
        ctx.save_for_forward(projected, keep, weight, *rest, *inner)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], int]:
        moved = []
        for x, dim, axis in zip(inputs, in_dims, (1, 1, 0, 0), strict=False):
            shared = (*x.shape[:axis], info.batch_size, *x.shape[axis:])
            moved.append(x.unsqueeze(axis).expand(shared) if dim is None else x.movedim(dim, axis))
        return cls.apply(*moved), 1


def _products(weight: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Product, and product added to something, of matrices or of batches of them, as `weight` is."""
    return (torch.mm, torch.addmm) if weight.dim() == 2 else (torch.bmm, torch.baddbmm)


def _filled(derivatives: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in place of what is None."""
    return [torch.zeros_like(x) if d is None else d for d, x in zip(derivatives, like, strict=True)]


class ReverseGRU(ReverseCore):
    """Gated recurrent unit (Cho et al., 2014), with one bias inside the reset gate.

    r = sig(x_r + W_r h)   z = sig(x_z + W_z h)   n = tanh(x_n + r (W_n h + b))   h' = (1 - z) n + z h
    """

    gates = 3

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        self.bias_n = nn.Parameter(torch.zeros(width))

    def _fused(self, projected: Tensor, keep: Tensor) -> Tensor:
        return _FusedGRU.apply(projected, keep, self.weight_h, self.bias_n)[0]


class _FusedGRU(_Fused):
    @staticmethod
    def forward(projected: Tensor, keep: Tensor, weight: Tensor, bias_n: Tensor) -> tuple[Tensor, ...]:
        T, *lead, _, n = projected.shape
        H, (product, _) = weight.shape[-1], _products(weight)
        h = projected.new_zeros(*lead, H, n)
        before, news, hidden = (projected.new_empty(T, *lead, H, n) for _ in range(3))
        gates, products = (projected.new_empty(T, *lead, k * H, n) for k in (2, 3))
        (x_rz, x_n), (a_rz, a_n) = (x.split((2 * H, H), -2) for x in (projected, products))
        r, z = gates.split(H, -2)
        for t in reversed(range(T)):
            torch.mul(h, keep[t], out=before[t])
            product(weight, before[t], out=products[t])
            torch.add(x_rz[t], a_rz[t], out=gates[t]).sigmoid_()
            inner = a_n[t].add_(bias_n.unsqueeze(-1))
            torch.addcmul(x_n[t], r[t], inner, out=news[t]).tanh_()
            h = torch.lerp(news[t], before[t], z[t], out=hidden[t])
        return hidden, before, gates, news, a_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep, weight, before, gates, news, inner = ctx.saved_tensors
        (grad,), (_, product_added) = _filled(grads[:1], [before]), _products(weight)
        T, *lead, H, n = before.shape
        carry, d_weight = grad.new_zeros(*lead, H, n), torch.zeros_like(weight)
        d_x = grad.new_empty(T, *lead, 3 * H, n)  # derivative of the input's pre-activations
        d_a = grad.new_empty(*lead, 3 * H, n)  # derivative of the state's product at one step
        d_bias = grad.new_zeros(*lead, H)
        (d_r, d_z, d_n), d_rz = d_x.split(H, -2), d_x[..., : 2 * H, :]
        (r, z), (d_a_rz, d_a_n) = gates.split(H, -2), d_a.split((2 * H, H), -2)
        for t in range(T):
            dh, new, h = grad[t] + carry, news[t], before[t]
            dhz = dh * z[t]
            d_new = torch.addcmul(dh - dhz, dh - dhz, new * new, value=-1, out=d_n[t])
            torch.mul(d_new * inner[t], torch.addcmul(r[t], r[t], r[t], value=-1), out=d_r[t])
            torch.mul(dhz * (h - new), 1 - z[t], out=d_z[t])
            d_a_rz.copy_(d_rz[t])
            torch.mul(d_new, r[t], out=d_a_n)
            product_added(d_weight, d_a, h.mT, out=d_weight)
            d_bias += d_a_n.sum(-1)
            carry = product_added(dhz, weight.mT, d_a).mul_(keep[t])
        return d_x, None, d_weight, d_bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, before, gates, news, inner = ctx.saved_tensors
        _, keep, weight, _ = inputs
        d_x, _, d_weight, d_bias = _filled(tangents, inputs)
        H, d_h, rows = weight.shape[-1], torch.zeros_like(before[0]), []
        for t in reversed(range(len(before))):
            d_before, (r, z), new = d_h * keep[t], gates[t].split(H, -2), news[t]
            d_a_r, d_a_z, d_a_n = (d_weight @ before[t] + weight @ d_before).split(H, -2)
            d_x_r, d_x_z, d_x_n = d_x[t].split(H, -2)
            d_r, d_z = r * (1 - r) * (d_x_r + d_a_r), z * (1 - z) * (d_x_z + d_a_z)
            d_new = (1 - new * new) * (d_x_n + d_r * inner[t] + r * (d_a_n + d_bias.unsqueeze(-1)))
            d_h = d_new + d_z * (before[t] - new) + z * (d_before - d_new)
            rows.append(d_h)
        return torch.stack(rows[::-1]), None, None, None, None


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
        return _FusedLSTM.apply(projected, keep, self.weight_h)[0]


class _FusedLSTM(_Fused):
    @staticmethod
    def forward(projected: Tensor, keep: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        T, *lead, _, n = projected.shape
        H, (_, product_added) = weight.shape[-1], _products(weight)
        h, c = (projected.new_zeros(*lead, H, n) for _ in range(2))
        before, cells, tanh_c, hidden = (projected.new_empty(T, *lead, H, n) for _ in range(4))
        gates = projected.new_empty(T, *lead, 4 * H, n)
        (i, f, o, g), sigmoids = gates.split(H, -2), gates[..., : 3 * H, :]
        for t in reversed(range(T)):
            torch.mul(h, keep[t], out=before[t])
            product_added(projected[t], weight, before[t], out=gates[t])
            sigmoids[t].sigmoid_()
            g[t].tanh_()
            torch.mul(c, keep[t], out=cells[t])  # the cell that step t forgets from
            c = torch.addcmul(f[t] * cells[t], i[t], g[t])
            torch.tanh(c, out=tanh_c[t])
            h = torch.mul(o[t], tanh_c[t], out=hidden[t])
        return hidden, before, gates, cells, tanh_c

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep, weight, before, gates, cells, tanh_c = ctx.saved_tensors
        (grad,), H, (product, product_added) = _filled(grads[:1], [before]), weight.shape[-1], _products(weight)
        d_h, d_c = (grad.new_zeros(before.shape[1:]) for _ in range(2))
        d_a, d_weight = torch.empty_like(gates), torch.zeros_like(weight)
        (i, f, o, g), (d_i, d_f, d_o, d_g) = gates.split(H, -2), d_a.split(H, -2)
        for t in range(len(before)):
            dh = grad[t] + d_h
            dho = dh * o[t]
            dc = d_c + dho - dho * tanh_c[t] * tanh_c[t]
            torch.mul(dc * g[t], torch.addcmul(i[t], i[t], i[t], value=-1), out=d_i[t])
            torch.mul(dc * cells[t], torch.addcmul(f[t], f[t], f[t], value=-1), out=d_f[t])
            torch.mul(dho * tanh_c[t], 1 - o[t], out=d_o[t])
            torch.mul(dc * i[t], 1 - g[t] * g[t], out=d_g[t])
            product_added(d_weight, d_a[t], before[t].mT, out=d_weight)
            d_c = dc * f[t] * keep[t]
            d_h = product(weight.mT, d_a[t]).mul_(keep[t])
        return d_a, None, d_weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, before, gates, cells, tanh_c = ctx.saved_tensors
        _, keep, weight = inputs
        d_x, _, d_weight = _filled(tangents, inputs)
        d_h, d_c, rows = torch.zeros_like(before[0]), torch.zeros_like(before[0]), []
        for t in reversed(range(len(before))):
            i, f, o, g = gates[t].split(weight.shape[-1], -2)
            d_a = d_x[t] + d_weight @ before[t] + weight @ (d_h * keep[t])
            d_i, d_f, d_o, d_g = d_a.split(weight.shape[-1], -2)
            d_c = f * (d_c * keep[t] + (1 - f) * d_f * cells[t]) + i * ((1 - i) * d_i * g + (1 - g * g) * d_g)
            d_h = o * ((1 - o) * d_o * tanh_c[t] + (1 - tanh_c[t] * tanh_c[t]) * d_c)
            rows.append(d_h)
        return torch.stack(rows[::-1]), None, None, None, None


CORES: dict[Literal["gru", "lstm"], type[ReverseCore]] = {"gru": ReverseGRU, "lstm": ReverseLSTM}
