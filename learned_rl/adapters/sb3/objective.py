"""PPO of Stable-Baselines3 with an objective component as its loss."""

# mypy: disable-error-code="type-abstract"

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Dict, Discrete
from stable_baselines3 import PPO
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from torch import Tensor

from learned_rl.adapters.common import Scored, find, frozen, headless
from learned_rl.adapters.sb3.rollouts import experience
from learned_rl.architecture import AgentOutput
from learned_rl.component import Batch, Context, Hyper, Metrics, Objective
from learned_rl.types import Tree, UserError

LIBRARY = "Stable-Baselines3"


class ObjectivePPO(PPO):
    """PPO whose loss is an objective component; with 'ppo_clip' it is the library's PPO.

    The objective's `prepare` makes targets once an update, from the whole rollout [T, 1, B]; `minibatch_loss`, the one
    method to override, is called at every gradient step. A step that a time limit cut off counts as terminated, with
    gamma V(last observation) in its reward, as the library has it. Targets are made with the rollout buffer's gamma and
    gae_lambda. What `prepare` may ask of the policy are log-probabilities; entropies are NaN there.

    Args:
        objective: a component, a registered name, or a component file; it is copied, and saved with the model.
        hyper:     numbers that the library does not have, such as pg_coef; those that it has are read from the model.
        kwargs:    of `stable_baselines3.PPO`. `normalize_advantage` is the objective's own setting.

    Raises:
        UserError: no such component, one that asks agents for more than policy and value, observations in a dictionary,
            or settings that contradict the objective's.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *args: Any,
        objective: Objective | str | Path = "ppo_clip",
        hyper: Hyper | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective, self.hyper = find(objective, Objective), hyper or Hyper()
        self.carried: Tree = {}
        own = getattr(self.objective.config, "normalize_advantage", None)
        if (given := kwargs.get("normalize_advantage")) not in (None, own):
            raise UserError(
                f"normalize_advantage is {given}, but the objective {self.objective.name!r} has it "
                f"{own}: expected an objective whose own setting is {given}."
            )
        super().__init__(policy, env, *args, **kwargs)

    def _setup_model(self) -> None:
        if isinstance(self.observation_space, Dict):
            raise UserError(f"Observations are {self.observation_space}: expected Discrete or Box.")
        self.objective = frozen(headless(self.objective, self.action_space, LIBRARY))
        self.objective.fit(self.observation_space, self.action_space, ())
        size = self.n_steps * self.n_envs
        if self.objective.whole_rollouts and self.batch_size != size:
            raise UserError(
                f"batch_size is {self.batch_size}, but {self.objective.name!r} reads whole rollouts: expected {size}."
            )
        super()._setup_model()
        self.objective.to(self.device)
        self.carried = self.carried or self.objective.initial_memory(1)

    def minibatch_loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
        """What a gradient step minimises, and what to log.

        Args:
            out:   policy and value [P=1, n] at the present parameters; [T, 1, B] for objectives of whole rollouts.
            batch: rows of what `prepare` made, of "action" and of "log_prob" (of the policy that acted).
            hyper: numbers of this update.

        Returns:
            loss [1], and metrics by name, [1].
        """
        return self.objective.loss(out, batch, hyper)

    def numbers(self) -> Hyper:
        """The numbers of this update, as the library's attributes and schedules have them."""
        left, value_range = self._current_progress_remaining, self.clip_range_vf
        return self.hyper.replace(
            learning_rate=self.lr_schedule(left),
            gamma=self.rollout_buffer.gamma,
            gae_lambda=self.rollout_buffer.gae_lambda,
            clip_range=self.clip_range(left),  # type: ignore[operator]
            clip_range_vf=None if value_range is None else value_range(left),  # type: ignore[operator]
            ent_coef=self.ent_coef,
            vf_coef=self.vf_coef,
            max_grad_norm=self.max_grad_norm,
        )

    def train(self) -> None:
        """Update the policy from the rollout that was just collected."""
        hyper, batch = self.numbers(), self._prepared()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        logged: dict[str, list[float]] = {}
        going = True
        for _ in range(self.n_epochs):
            divergences: list[float] = []
            for out, part in self._minibatches(batch):
                loss, metrics = self.minibatch_loss(out, part, hyper)
                log_ratio = (out.policy.log_prob(part["action"]) - part["log_prob"]).detach()  # stop: a look
                divergences.append((log_ratio.exp() - 1 - log_ratio).mean().item())
                for name, value in (metrics | {"loss": loss}).items():
                    logged.setdefault(name, []).append(value.mean().item())
                if self.target_kl is not None and divergences[-1] > 1.5 * self.target_kl:
                    going = False
                    break
                self.policy.optimizer.zero_grad()
                loss.sum().backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()
            self._n_updates += 1
            logged["approx_kl"] = divergences  # those of the last pass, as the library logs it
            if not going:
                break
        self._log(hyper, logged)

    def _prepared(self) -> Batch:
        """The rows of this update, name -> [T, 1, B, ...], its observations among them."""
        buffer, hyper = self.rollout_buffer, self.numbers()
        assert self._last_obs is not None and self._last_episode_starts is not None
        if buffer.generator_ready:
            raise UserError("This rollout was cut into minibatches already: collect another one before training again.")
        rollout = experience(buffer, np.asarray(self._last_obs), self._last_episode_starts)
        self.policy.set_training_mode(False)
        with torch.no_grad():
            last = self.policy.predict_values(obs_as_tensor(self._last_obs, self.device)).reshape(1, 1, -1)
            value = torch.cat([torch.as_tensor(buffer.values, device=self.device).unsqueeze(1), last])
            scores = torch.cat([rollout.log_prob, torch.full_like(last, math.nan)])
            out = AgentOutput(Scored(scores, torch.full_like(value, math.nan), LIBRARY), value)
            batch, self.carried = self.objective.prepare(rollout, out, value[1:], hyper, self._context())
        obs = torch.as_tensor(buffer.observations, device=self.device).unsqueeze(1)
        return {"action": rollout.action, "log_prob": rollout.log_prob, "obs": obs} | batch

    def _context(self) -> Context:
        size = self.n_steps * self.n_envs
        age, horizon = self.num_timesteps // size - 1, math.ceil(self._total_timesteps / size)
        told = torch.tensor([max(age, 0), max(horizon, 1)], dtype=torch.float32, device=self.device)
        return Context(told[:1], told[1:], self.carried)

    def _minibatches(self, batch: Batch) -> Iterator[tuple[AgentOutput, Batch]]:
        """Outputs and rows of each gradient step of a pass; drawn as the library draws them."""
        if self.objective.whole_rollouts:
            part = batch
            yield self._outputs(part), part
            return
        # Copies of the environment first, then time: the order in which the library numbers the steps of a rollout.
        flat = {k: x.transpose(0, 2).flatten(0, 2).unsqueeze(0) for k, x in batch.items()}
        order = np.random.permutation(flat["action"].shape[1])  # noqa: NPY002 - the generator that the library seeds
        for i in range(0, len(order), self.batch_size):
            index = torch.as_tensor(order[i : i + self.batch_size], device=self.device)
            part = {k: x.index_select(1, index) for k, x in flat.items()}
            yield self._outputs(part), part

    def _outputs(self, part: Batch) -> AgentOutput:
        """What the policy says of rows [P=1, n] or [T, 1, B]."""
        shape = part["log_prob"].shape
        obs, action = (part[k].reshape(shape.numel(), *part[k].shape[len(shape) :]) for k in ("obs", "action"))
        action = action if isinstance(self.action_space, Discrete) else action.float()
        value, log_prob, entropy = self.policy.evaluate_actions(obs, action)
        spread = -log_prob if entropy is None else entropy
        return AgentOutput(Scored(log_prob.view(shape), spread.view(shape), LIBRARY), value.view(shape))

    def _log(self, hyper: Hyper, logged: Mapping[str, list[float]]) -> None:
        """Records everything under the library's names, where it has one."""
        for name, values in logged.items():
            mean = float(values[-1] if name == "loss" else np.mean(values))
            self.logger.record(*(("train/entropy_loss", -mean) if name == "entropy" else (f"train/{name}", mean)))
        buffer = self.rollout_buffer
        self.logger.record(
            "train/explained_variance", explained_variance(buffer.values.ravel(), buffer.returns.ravel())
        )
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", hyper.clip_range)
        if hyper.clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", hyper.clip_range_vf)
