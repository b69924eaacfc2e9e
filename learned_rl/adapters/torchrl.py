"""Learned parts in TorchRL (https://github.com/pytorch/rl): `pip install learned-rl[torchrl]`.

`ObjectiveLoss` is an objective as a `LossModule`, `RewardTransform` a reward as a `Transform`. An update rule needs
neither: `RuleOptimizer` is a torch optimizer (call its `watch` on actor and critic). Both are differentiable in the
component's weights, so that meta-gradients may pass through them.
"""

# mypy: disable-error-code="type-abstract"

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams, composite_lp_aggregate
from torch import Tensor
from torchrl.data import Categorical, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs.transforms import Transform
from torchrl.objectives import LossModule

from learned_rl.adapters.common import Scored, all_finite, find, headless
from learned_rl.architecture import AgentOutput
from learned_rl.component import Batch, Context, Hyper, Objective, Reward
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError

LIBRARY = "TorchRL"


def space_of(spec: TensorSpec, batch: int = 0) -> gymnasium.Space:
    """The space of one action or observation.

    Args:
        batch: number of batch axes of the spec.

    Raises:
        UserError: a composite spec, or one that is neither discrete nor real.
    """
    if isinstance(spec, OneHot | Categorical):
        return gymnasium.spaces.Discrete(int(spec.space.n))
    if isinstance(spec, Composite) or not spec.dtype.is_floating_point:
        raise UserError(f"The spec is {type(spec).__name__}: expected OneHot, Categorical, or one of real numbers.")
    return gymnasium.spaces.Box(-np.inf, np.inf, tuple(spec.shape[batch:]), np.float32)


def _numbered(action: Tensor, lead: int) -> Tensor:
    """Actions as components know them: one-hot ones become numbers; `lead` axes are the batch's."""
    if action.is_floating_point():
        return action
    return action.long().argmax(-1) if action.dim() > lead else action


# --- objective -------------------------------------------------------------------------------------------------------


class ObjectiveLoss(LossModule):
    """An objective as the loss of an actor and a critic.

    `prepare` writes the update's targets into a rollout, once; the loss reads them from minibatches of it:

        rollout = loss.prepare(rollout)
        for part in ...: loss(part)["loss_objective"].backward()

    Its parameters are those of the two networks: the component's weights are none of them, or the agent's optimizer
    would make its loss small by moving what defines it. The component is not copied; the loss has a gradient in
    its weights, and in every number of `hyper` that is a tensor [1, 1].

    Args:
        actor_network:  a probabilistic actor.
        critic_network: writes the value, [..., 1].
        objective:      a component, a registered name, or a component file.
        hyper:          numbers of the update; may be replaced at any time.

    Keys (`set_keys`): observation, action, sample_log_prob, value, reward, done, terminated, and targets, the nested
    entry that `prepare` writes.

    Raises:
        UserError: no such component, or one that asks agents for more than policy and value.
    """

    @dataclass
    class _AcceptedKeys:
        observation: NestedKey = "observation"
        action: NestedKey = "action"
        sample_log_prob: NestedKey | None = None
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        targets: NestedKey = "targets"

        def __post_init__(self) -> None:
            if self.sample_log_prob is None:  # what actors write depends on a setting of the library
                aggregate = composite_lp_aggregate(nowarn=True)
                self.sample_log_prob = "sample_log_prob" if aggregate else "action_log_prob"

    default_keys = _AcceptedKeys
    out_keys = ["loss_objective"]  # noqa: RUF012 - the library's name and type

    actor_network: TensorDictModule
    critic_network: TensorDictModule
    actor_network_params: TensorDictParams
    critic_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams
    objective: Objective

    def __init__(
        self,
        actor_network: TensorDictModule,
        critic_network: TensorDictModule,
        objective: Objective | str | Path = "ppo_clip",
        hyper: Hyper | None = None,
    ) -> None:
        super().__init__()
        spec = getattr(actor_network, "spec", None)
        action = spec["action"] if isinstance(spec, Composite) and "action" in spec.keys() else None  # noqa: SIM118
        space = gymnasium.spaces.Discrete(2) if action is None else space_of(action)
        # Past `nn.Module`, which would count the component's weights among the agent's.
        self.__dict__["objective"] = headless(objective, space, LIBRARY)
        self.hyper = hyper or Hyper()
        self.memory = self.objective.initial_memory(1)
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)
        self.convert_to_functional(critic_network, "critic_network", create_target_params=False)

    @property
    def in_keys(self) -> list[NestedKey]:
        k = self.tensor_keys
        return [k.observation, k.action, k.sample_log_prob, k.targets]

    @in_keys.setter
    def in_keys(self, values: Any) -> None:
        raise UserError("The keys of an ObjectiveLoss follow from `set_keys`.")

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """There is no value estimator: the objective makes its own targets."""

    def prepare(self, rollout: TensorDictBase, age: float = 0.0, horizon: float = math.inf) -> TensorDictBase:
        """Writes the update's targets into a rollout, in place, and returns it.

        Args:
            rollout: [T] or [B, T], as collectors have it; all episodes may end in it.
            age, horizon: updates that are done, and of the whole training, for objectives that ask.

        Raises:
            UserError: more than two batch axes.
        """
        if not 1 <= rollout.dim() <= 2:
            raise UserError(f"The rollout has {rollout.dim()} batch axes: expected [T], or [B, T].")
        k, following = self.tensor_keys, rollout.get("next")
        obs, final = (self._rows(td.get(k.observation), rollout.dim()) for td in (rollout, following))
        with torch.no_grad(), self.critic_network_params.to_module(self.critic_network):
            value, next_value = (
                self._rows(self.critic_network(td.clone(False)).get(k.value).squeeze(-1), rollout.dim())
                for td in (rollout, following)
            )
        reward, done, terminated = (
            self._rows(following.get(key).squeeze(-1), rollout.dim()) for key in (k.reward, k.done, k.terminated)
        )
        action = self._rows(_numbered(rollout.get(k.action), rollout.dim()), rollout.dim())
        log_prob = self._rows(rollout.get(k.sample_log_prob), rollout.dim())
        trajectory = Trajectory(
            torch.cat([obs, final[-1:]]), action, log_prob, reward, terminated, done & ~terminated, final
        )
        value = torch.cat([value, next_value[-1:]])
        scores = torch.cat([log_prob, torch.full_like(log_prob[-1:], math.nan)])
        out = AgentOutput(Scored(scores, torch.full_like(scores, math.nan), LIBRARY), value)
        told = value.new_tensor([age, horizon])
        context = Context(told[:1], told[1:], self.memory)
        targets, self.memory = self.objective.prepare(trajectory, out, next_value, self.hyper, context)
        back = {name: x.squeeze(1) if rollout.dim() == 2 else x[:, 0, 0] for name, x in targets.items()}
        back = {name: x.transpose(0, 1) if rollout.dim() == 2 else x for name, x in back.items()}
        rollout.set(k.targets, TensorDict(back, batch_size=rollout.batch_size))
        return rollout

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss, "loss_objective" [], and metrics by name, [], from a minibatch [...] of a prepared rollout.

        Objectives of whole rollouts want them whole: [T] or [B, T].

        Raises:
            UserError: the minibatch has no targets.
        """
        k = self.tensor_keys
        targets = tensordict.get(k.targets, None)
        if targets is None:
            raise UserError(f"The minibatch has no {k.targets!r}: call `prepare` on each rollout first.")
        seen = tensordict.clone(False)
        with self.actor_network_params.to_module(self.actor_network):
            policy = self.actor_network.get_dist(seen)
        log_prob = policy.log_prob(tensordict.get(k.action))
        try:
            entropy = policy.entropy()
        except NotImplementedError:
            entropy = -log_prob  # a sample of it
        with self.critic_network_params.to_module(self.critic_network):
            value = self.critic_network(seen).get(k.value).squeeze(-1)
        dim = tensordict.dim()
        action, old = _numbered(tensordict.get(k.action), dim), tensordict.get(k.sample_log_prob)
        rows = {name: self._part(x, dim) for name, x in targets.items()}
        rows |= {"action": self._part(action, dim), "log_prob": self._part(old, dim)}
        scored = Scored(self._part(log_prob, dim), self._part(entropy, dim), LIBRARY)
        return self._losses(AgentOutput(scored, self._part(value, dim)), rows)

    def _losses(self, out: AgentOutput, rows: Batch) -> TensorDictBase:
        loss, metrics = self.objective.loss(out, rows, self.hyper)
        said = {name: x.mean() for name, x in metrics.items()} | {"loss_objective": loss.sum()}
        return TensorDict(said, batch_size=[])

    def _part(self, x: Tensor, dim: int) -> Tensor:
        """Rows [P=1, n]; in the order of time, [T, 1, B], for objectives of whole rollouts."""
        return self._rows(x, dim) if self.objective.whole_rollouts else x.flatten(0, dim - 1).unsqueeze(0)

    @staticmethod
    def _rows(x: Tensor, dim: int) -> Tensor:
        """[T, ...] or [B, T, ...] as [T, P=1, B, ...]."""
        return x.transpose(0, 1).unsqueeze(1) if dim == 2 else x[:, None, None]


# --- reward ----------------------------------------------------------------------------------------------------------


class RewardTransform(Transform):
    """A reward component on the steps of an environment, or of collected data.

    In an environment (`TransformedEnv`) each step is paid as it is taken, without a gradient; on data, as a module or a
    replay buffer's transform, the reward has a gradient in the component's weights. The component sees [1, 1, n]:
    log-probabilities, age and horizon are not known (NaN). Put `RewardSum` before it to log the environment's returns.

    Args:
        reward:      a component, a registered name, or a component file; not copied.
        out_key:     where the reward is written in "next": "reward" replaces the environment's; any other name leaves
                     it, and a loss is told to read it by `set_keys(reward=...)`.
        observation: key of the observation.
        action:      key of the action.

    Raises:
        UserError: no such component, or one that carries a memory from update to update.
    """

    def __init__(
        self,
        reward: Reward | str | Path,
        out_key: str = "reward",
        observation: NestedKey = "observation",
        action: NestedKey = "action",
    ) -> None:
        super().__init__(in_keys=["reward"], out_keys=[out_key])
        self.reward = find(reward, Reward)
        self.out_key, self.observation, self.action = out_key, observation, action
        if memory := self.reward.initial_memory(1):
            raise UserError(
                f"The reward {self.reward.name!r} carries a memory from update to update ({', '.join(memory)}), and "
                "single steps know no updates: expected one without."
            )

    def set_container(self, container: Any) -> None:
        """Takes the sizes of the environment it is put into."""
        super().set_container(container)
        if (env := self.parent) is not None:
            batch = len(env.batch_size)
            observation = space_of(env.observation_spec[self.observation], batch)
            action = env.full_action_spec[self.action]
            self.reward.fit(observation, space_of(action, batch), ())

    def transform_output_spec(self, output_spec: Composite) -> Composite:
        spec = output_spec["full_reward_spec"]
        like = spec["reward"]
        spec[self.out_key] = Unbounded(shape=like.shape, device=like.device, dtype=like.dtype)
        return output_spec

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        with torch.no_grad():
            return next_tensordict.set(self.out_key, self._paid(tensordict, next_tensordict))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Pays steps [...] of collected data."""
        following = tensordict.get("next")
        following.set(self.out_key, self._paid(tensordict, following))
        return tensordict

    def _paid(self, tensordict: TensorDictBase, following: TensorDictBase) -> Tensor:
        """[..., 1] reward of each step."""
        dim, lead = following.dim(), following.batch_size
        action = _numbered(tensordict.get(self.action), dim)
        known = (tensordict.get(self.observation), following.get(self.observation), action)
        ends = (following.get(key).squeeze(-1) for key in ("reward", "terminated", "done"))
        obs, final, action, reward, terminated, done = (x.reshape(1, 1, -1, *x.shape[dim:]) for x in (*known, *ends))
        unknown = torch.full_like(reward, math.nan)
        steps = Trajectory(
            torch.cat([obs, final]), action, unknown, reward, terminated, done & ~terminated, final_obs=final
        )
        age = unknown.new_full((1,), math.nan)
        made, _ = self.reward(steps, Context(age, age, {}))
        return all_finite(made, self.reward, "log-probabilities, age or horizon").reshape(*lead, 1)
