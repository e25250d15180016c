"""Behavioral cloning of the actor of an on-policy flow policy, before it learns from rewards."""

import io
import pathlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sb3_flow.common.flow import cfm_loss, interpolate, timestep_range
from sb3_flow.common.optimizers import make_optimizer
from sb3_flow.flow_bc.flow_bc import FlowBC
from sb3_flow.flow_bc.policies import FlowBCPolicy
from sb3_flow.offline.buffers import Batch, OfflineBuffer
from sb3_flow.on_policy.policies import FlowActorCriticPolicy

#: Observations that are taken into the statistics at once
N_OBSERVATIONS = 1000


class ActorPolicy(FlowBCPolicy):
    """
    The actor of an on-policy policy as one that is cloned: its own networks are trained, their average acts.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param policy: The on-policy policy
    :param ema_decay: Decay, for one gradient step, of the exponential moving average
    """

    # (not the flow of the parent)
    bc_flow: FlowActorCriticPolicy  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        policy: FlowActorCriticPolicy,
        ema_decay: float,
    ):
        self._create = policy, ema_decay
        super().__init__(observation_space, action_space, lr_schedule, n_flow_steps=policy.n_flow_steps)

    def _build(self, lr_schedule: Schedule) -> None:
        self.bc_flow, ema_decay = self._create
        actor, of_policy = self.bc_flow._actor(), self.bc_flow.optimizer_kwargs
        self.average = AveragedModel(actor, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.average.requires_grad_(False)
        self.optimizer = make_optimizer(self.bc_flow.optimizer_class, actor.parameters(), lr=lr_schedule(1), **of_policy)

    def update_average(self) -> None:
        self.average.update_parameters(self.bc_flow._actor())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The actor is its average in the body."""
        trained = {name: value.clone() for name, value in self.bc_flow.state_dict().items()}
        self.bc_flow.load_actor(self.average.module.state_dict())
        try:
            yield
        finally:
            self.bc_flow.load_state_dict(trained)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        with self.averaged():
            return self.bc_flow._predict(observation, deterministic)

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        return self.bc_flow.scale_action(action)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        return self.bc_flow.unscale_action(scaled_action)


class ActorCloning(FlowBC):
    """
    :class:`~sb3_flow.flow_bc.FlowBC` of the actor of an on-policy algorithm, in terms of its raw actions. What callbacks save
    is the model of the algorithm.

    :param model: The algorithm
    :param ema_decay: See :class:`ActorPolicy`
    :param kwargs: See ``FlowBC``
    """

    # (not a policy that can be chosen)
    policy: ActorPolicy  # type: ignore[assignment]

    def __init__(self, model: Any, ema_decay: float, **kwargs: Any):
        self._model = model
        policy_kwargs = dict(policy=model.policy, ema_decay=ema_decay)
        super().__init__(ActorPolicy, model.env, policy_kwargs=policy_kwargs, **kwargs)

    def _load_buffer(self, *args, **kwargs) -> OfflineBuffer:
        buffer = super()._load_buffer(*args, **kwargs)
        # (n, action_dim), in [-1, 1]: what raw actions are squashed to
        policy = self.policy.bc_flow
        buffer.actions = (buffer.actions.atanh() if policy.squash_type == "tanh" else buffer.actions) / policy.action_scale
        return buffer

    def _setup_learn(self, *args, **kwargs) -> tuple[int, BaseCallback]:
        prepared = super()._setup_learn(*args, **kwargs)
        buffer = self.offline_buffer
        assert buffer is not None
        self.policy.bc_flow.fit_normalization(
            buffer.observations_of(rows, self._vec_normalize_env) for rows in buffer.sampled_rows.split(N_OBSERVATIONS)
        )
        self.policy.update_average()
        return prepared

    def _bc_flow_losses(self, batch: Batch) -> th.Tensor:
        """
        :param batch: Transitions, with raw actions
        :return: CFM losses of the flow, of what its network predicts, (batch,)
        """
        policy = self.policy.bc_flow
        earliest, latest = timestep_range(policy.prediction_type)
        noise = th.randn_like(batch.actions)
        timesteps = earliest + (latest - earliest) * th.rand(len(noise), device=self.device)
        output = policy.flow_output(batch.observations, interpolate(batch.actions, noise, timesteps), timesteps)
        return cfm_loss(output, batch.actions, noise, timesteps, policy.prediction_type, policy.prediction_type)

    def _optimization_step(self, loss: th.Tensor) -> None:
        super()._optimization_step(loss)
        self.policy.update_average()
        self._model._n_pretrain_updates += 1

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model of the algorithm, with the average of its actor.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        with self.policy.averaged():
            self._model.save(path, exclude, include)
