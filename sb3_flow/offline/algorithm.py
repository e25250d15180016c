"""What the offline algorithms share: datasets, offline and online phases, updates of a flow policy and its critics."""

import contextlib
import io
import pathlib
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    Schedule,
)
from stable_baselines3.common.utils import configure_logger, get_parameters_by_name, polyak_update
from stable_baselines3.common.vec_env import VecFrameStack, unwrap_vec_wrapper
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch.nn import functional as F

from sb3_flow import distributed
from sb3_flow.common.bounds import middle_and_half_range
from sb3_flow.common.checks import FRACTION, NOT_NEGATIVE, check_floats, to_bool, to_int
from sb3_flow.common.cuda_graphs import (
    CAPTURED_SAMPLERS,
    CapturedUpdate,
    Graphs,
    attributes_state,
    clone,
    copy_into,
    find_obstacle,
    global_state,
    has_replaced_methods,
    layout,
)
from sb3_flow.common.distributed_algorithm import DistributedOffPolicyAlgorithm, learns_together
from sb3_flow.common.flow import cfm_loss, check_choice, interpolate
from sb3_flow.common.save_load import CheckedLoad
from sb3_flow.offline.buffers import Batch, OfflineBuffer, concatenate_samples, fill_terminal_observations, transform_rewards
from sb3_flow.offline.chunks import ChunkDictReplayBuffer, ChunkReplayBuffer, ChunkSamples, ChunkSampling
from sb3_flow.offline.datasets import Dataset, check_reward_arguments, dataset_name, load_dataset
from sb3_flow.offline.policies import NETWORKS, BCFlow, EnsembleCritic
from sb3_flow.offline.transitions import Transitions, check_transitions, fit_observations, map_arrays
from sb3_flow.offline.values import Q_AGGREGATIONS, aggregate, td_loss, td_target

SelfOfflineAlgorithm = TypeVar("SelfOfflineAlgorithm", bound="OfflineAlgorithm")

#: What arguments that are floats may be.
FLOATS = dict(learning_rate=NOT_NEGATIVE, tau=FRACTION, gamma=FRACTION, random_crop_probability=FRACTION)
# The authors keep the actions of the dataset just inside of the bounds
ACTION_MARGIN = 1e-5
# Of `dataset_kwargs`: what the rewards of both phases are, the dataset's and those that are collected online
REWARD_ARGUMENTS = {"reward_scale": 1.0, "reward_shift": 0.0}
# Of observations that are arrays, and dictionaries
CHUNK_BUFFERS = (ChunkReplayBuffer, ChunkDictReplayBuffer)
# In gradient steps
OFFLINE_LOG_INTERVAL = 1000


class OfflineAlgorithm(CheckedLoad, DistributedOffPolicyAlgorithm):
    """
    The base of algorithms that learn a flow policy from a dataset: offline (:meth:`learn_offline`), offline and then online
    (``offline_steps``, or :meth:`learn` after :meth:`learn_offline`), or online from nothing (:meth:`learn` without a
    dataset). It is for them to say what the losses of a batch are (``_losses``).

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param dataset: What to learn offline from, see :func:`sb3_flow.offline.datasets.load_dataset`. It stays beside the
        replay buffer when the training goes on online.
    :param dataset_kwargs: Keyword arguments to pass to :meth:`set_dataset`
    :param offline_steps: Number of gradient steps on the dataset that :meth:`learn` starts with
    :param balanced_sampling: Whether to draw half of each batch from the dataset and half from the replay buffer,
        instead of uniformly from both together
    :param learning_rate: learning rate for adam optimizer,
        the same learning rate will be used for all networks
        it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer (of what is collected online), that of all processes together if ``torchrun``
        has started several
    :param learning_starts: how many steps of the model to collect transitions for before learning starts.
        It becomes 0 with a dataset: there is something to learn from, and a policy better than random actions.
    :param batch_size: Minibatch size for each gradient update (of all processes together)
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``)
        Set to ``-1`` means to do as many gradient steps as steps done in the environment
        during the rollout.
    :param action_noise: the action noise type (None by default): the policy is stochastic already
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``).
        If ``None``, it will be automatically selected.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer
        at a cost of more complexity.
    :param n_steps: When n_step > 1, uses n-step return when updating the Q-networks.
    :param use_sde: Generalized State Dependent Exploration has no meaning for a flow policy: must be False
    :param random_crop: Padding of the random crops that images are augmented with, in pixels
        (the authors use 3), no augmentation if 0
    :param random_crop_probability: Share of the batches that are augmented
    :param compile: On CUDA, run each update (and the drawing of its batch, if it is from the dataset only) as one captured
        graph: the same numbers, but for rounding. Offline the device is then waited for, and losses are recorded, when logs
        are written. What cannot be captured (networks and optimizers of your own, ...) runs as without it, with a warning that
        names it. On a CPU there are no graphs. It makes no difference to what is saved.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation.
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :raises ValueError: if an argument is out of its range
    """

    #: Arguments that the captured graph of an update depends on, beside the dataset, the policy and its optimizer. A class has
    #: its own, or its updates are not known to be captured.
    in_graph: ClassVar[tuple[str, ...]] = ()
    #: Whether an update samples the flow
    samples_in_update: ClassVar[bool] = True
    #: Whether a dataset without rewards can be cloned, and whether it can go on online
    can_clone: ClassVar[bool] = False
    learns_online: ClassVar[bool] = True
    #: Number of steps that are learned, and taken, as one action
    chunk_size: int = 1
    policy: Any
    bc_flow: BCFlow
    critic: EnsembleCritic
    critic_target: EnsembleCritic
    q_agg: str
    rho: float
    normalize_q_loss: bool

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str,
        dataset: Dataset | list[Dataset] | None,
        dataset_kwargs: dict[str, Any] | None,
        offline_steps: int,
        balanced_sampling: bool,
        learning_rate: float | Schedule,
        buffer_size: int,
        learning_starts: int,
        batch_size: int,
        tau: float,
        gamma: float,
        train_freq: int | tuple[int, str],
        gradient_steps: int,
        action_noise: ActionNoise | None,
        replay_buffer_class: type[ReplayBuffer] | None,
        replay_buffer_kwargs: dict[str, Any] | None,
        optimize_memory_usage: bool,
        n_steps: int,
        use_sde: bool,
        random_crop: int,
        random_crop_probability: float,
        compile: bool,
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: th.device | str,
    ):
        if use_sde:
            raise ValueError("`use_sde` must be False: generalized State Dependent Exploration is for Gaussian policies")
        if offline_steps > 0 and dataset is None:
            raise ValueError("`offline_steps` needs a `dataset`")
        if dataset_kwargs and dataset is None:
            raise ValueError("`dataset_kwargs` needs a `dataset`")

        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=to_int("stats_window_size", stats_window_size, at_least=1),
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=None if seed is None else to_int("seed", seed),
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )

        self.balanced_sampling = balanced_sampling
        self.offline_steps = offline_steps
        self.random_crop = random_crop
        self.random_crop_probability = random_crop_probability
        self.compile = compile
        self._graphs = Graphs()
        self.dataset_kwargs = dataset_kwargs or {}
        #: Name of the dataset, to load it again. None if it was given as arrays.
        self.dataset: Any = None
        self.offline_buffer: OfflineBuffer | None = None
        self.validation_buffer: OfflineBuffer | None = None
        self._has_dataset = False
        self._has_validation = False
        self._has_default_replay_buffer = replay_buffer_class is None
        self._n_offline_updates = 0
        self._steps_after_offline = 0
        # Chunks that are being executed, see the policy's `predict`
        self._chunks: tuple[np.ndarray, ...] | None = None

    def _check_arguments(self) -> None:
        if self.dataset_kwargs is None:
            self.dataset_kwargs = {}
        if not isinstance(self.dataset_kwargs, Mapping):
            raise ValueError(f"`dataset_kwargs` must be a dictionary, it is {self.dataset_kwargs!r}")
        check_reward_arguments(**self._reward_arguments)
        integers = dict(
            offline_steps=0,
            random_crop=0,
            batch_size=1,
            buffer_size=0,
            learning_starts=0,
            gradient_steps=-1,
            n_steps=1,
            chunk_size=1,
        )
        for name, at_least in integers.items():
            setattr(self, name, to_int(name, getattr(self, name), at_least))
        if isinstance(self.train_freq, (tuple, list)):
            frequency, unit = self.train_freq
            self.train_freq = (to_int("train_freq", frequency, at_least=1), unit)
        else:
            self.train_freq = to_int("train_freq", self.train_freq, at_least=1)
        check_floats(self, FLOATS, schedules=("learning_rate",))
        for name in ("balanced_sampling", "compile"):
            setattr(self, name, to_bool(name, getattr(self, name)))
        if self.chunk_size > 1:
            self._check_chunks()
        if self.env is not None:
            distributed.share("batch_size", self.batch_size)
        assert isinstance(self.action_space, spaces.Box)
        if (
            not np.issubdtype(self.action_space.dtype, np.floating)
            or not (self.action_space.high > self.action_space.low).all()
        ):
            raise ValueError(f"The action space must be real numbers, with low < high, it is {self.action_space}")

    def _check_chunks(self) -> None:
        if self.n_steps > 1:
            raise ValueError(f"`n_steps` must be 1 with a `chunk_size` of {self.chunk_size}, it is {self.n_steps}")
        if self.optimize_memory_usage:
            raise ValueError(f"`optimize_memory_usage` must be False with a `chunk_size` of {self.chunk_size}")
        buffer_class: Any = self.replay_buffer_class
        if not self._has_default_replay_buffer and not issubclass(buffer_class, ChunkSampling):
            raise ValueError(
                f"`replay_buffer_class` must be a ChunkReplayBuffer with a `chunk_size` of {self.chunk_size}, "
                f"it is {buffer_class}"
            )

    def _check_aggregation(self) -> None:
        """Of those that have critics."""
        check_choice("q_agg", self.q_agg, Q_AGGREGATIONS)
        check_floats(self, dict(rho=NOT_NEGATIVE))
        if self.rho > 0 and self.q_agg != "mean":
            raise ValueError(f'`rho` must be 0 with `q_agg="{self.q_agg}"`, it is {self.rho}: it is subtracted from the mean')

    def _setup_model(self) -> None:
        self._check_policy_class()
        self._check_arguments()
        # Another may be given to a model that is loaded
        self.dataset = dataset_name(self.dataset) or self.dataset
        of_buffer = ("n_steps", "chunk_size", "gamma")
        if self._has_default_replay_buffer and self.replay_buffer_class in (NStepReplayBuffer, *CHUNK_BUFFERS):
            # Chosen before the model was saved: these may be others when it is loaded
            self.replay_buffer_class = None
            self.replay_buffer_kwargs = {
                name: value for name, value in self.replay_buffer_kwargs.items() if name not in of_buffer
            }
        of_policy = self.policy_kwargs.get("chunk_size", self.chunk_size)
        if of_policy != self.chunk_size:
            raise ValueError(f"`chunk_size` is {self.chunk_size}, but {of_policy} in the `policy_kwargs`")
        if self.chunk_size > 1:
            for name, value in dict(chunk_size=self.chunk_size, gamma=self.gamma).items():
                if self.replay_buffer_kwargs.get(name, value) != value:
                    raise ValueError(
                        f"`{name}` is {value}, but {self.replay_buffer_kwargs[name]} in the `replay_buffer_kwargs`"
                    )
            if self.replay_buffer_class is None:
                self.replay_buffer_class = CHUNK_BUFFERS[isinstance(self.observation_space, spaces.Dict)]
            self.replay_buffer_kwargs = self.replay_buffer_kwargs | dict(chunk_size=self.chunk_size, gamma=self.gamma)
            self.policy_kwargs = self.policy_kwargs | dict(chunk_size=self.chunk_size)
        super()._setup_model()
        self._create_aliases()
        if self._has_critics:
            # Running mean and running var
            self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
            self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])

    @property
    def _has_critics(self) -> bool:
        return "critic" in self.policy.network_names

    def _create_aliases(self) -> None:
        for name in self.policy.network_names:
            setattr(self, name, getattr(self.policy, name))

    def _networks(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.policy.network_names)

    def set_dataset(
        self,
        dataset: Dataset | list[Dataset],
        validation: Dataset | list[Dataset] | float | None = None,
        clip_actions: bool = False,
        device: th.device | str | None = None,
        **kwargs,
    ) -> None:
        """
        Load the dataset to learn offline from, in place of the one before.

        ``reward_scale`` and ``reward_shift`` hold for the dataset and for what is collected online alike (they act on the
        batches, and the logs of episodes have the rewards of the environment). Those of before hold if they are not given.

        With ``need_rewards=False`` the dataset is only cloned, by FQL (its critics are not trained, and its one-step policy is
        distilled from the flow without a Q term) and FlowBC.

        :param dataset: See :func:`sb3_flow.offline.datasets.load_dataset`
        :param validation: What to hold out, to log its losses (``validation/*``): another dataset, or a fraction, between
            0 and 1, of the episodes of this one
        :param clip_actions: Whether to clip actions that are out of the bounds of the action space, instead of refusing
            the dataset
        :param device: Device that holds the dataset, that of the model if None. Batches are moved to that of the model:
            with "cpu", the dataset may be larger than the memory of a GPU.
        :param kwargs: Keyword arguments to pass to :func:`sb3_flow.offline.datasets.load_dataset`
        :raises ValueError: if it does not fit the spaces of the environment, naming the field and the row
        """
        if not isinstance(clip_actions, (bool, np.bool_)):
            raise ValueError(f"`clip_actions` must be True or False, it is {clip_actions!r}")
        if not kwargs.get("need_rewards", True) and not self.can_clone:
            raise ValueError(f"`need_rewards` must be True: {type(self).__name__} learns values. FlowBC clones without")
        # The task is the same with another dataset
        kwargs = {name: value for name, value in self.dataset_kwargs.items() if name in REWARD_ARGUMENTS} | kwargs
        options = dict(clip_actions=clip_actions, device=device) | kwargs
        buffer, validation_buffer = self._load_buffer(dataset, **options), None
        remembered: Any = validation
        if isinstance(validation, (int, float, np.number)):
            if not 0 < validation < 1:
                raise ValueError(f"`validation` must be a dataset, or a fraction between 0 and 1, it is {validation}")
            buffer, validation_buffer = buffer.split(float(validation))
        elif validation is not None:
            try:
                validation_buffer = self._load_buffer(validation, **options)
            except ValueError as error:
                raise ValueError(f"`validation`: {error}") from error
            remembered = dataset_name(validation)
        for part in (buffer, validation_buffer):
            if self.chunk_size > 1 and part is not None and part.longest_episode < self.chunk_size:
                what = "dataset" if part is buffer else "validation"
                raise ValueError(
                    f"`chunk_size` is {self.chunk_size}, but the longest episode of the {what} has {part.longest_episode} "
                    "transition(s)"
                )
        self.offline_buffer, self.validation_buffer = buffer, validation_buffer
        self._has_dataset, self._has_validation = True, validation is not None
        self.learning_starts = 0
        # Only what can be loaded again is worth remembering
        self.dataset, self.dataset_kwargs = dataset_name(dataset), dict(validation=remembered) | options

    def _load_buffer(
        self, dataset: Dataset | list[Dataset], clip_actions: bool, device: th.device | str | None, **kwargs
    ) -> OfflineBuffer:
        rewards = {name: kwargs.pop(name) for name in REWARD_ARGUMENTS if name in kwargs}
        check_reward_arguments(**rewards)
        transitions = load_dataset(dataset, **kwargs)
        observations, next_observations = (
            fit_observations(obs, self.observation_space) for obs in (transitions.observations, transitions.next_observations)
        )
        transitions = replace(transitions, observations=observations, next_observations=next_observations)
        n_stack = self._n_stack(transitions)
        check_transitions(transitions, self.observation_space, self.action_space, n_stack, clip_actions)
        # In [-1, 1] inside, as SB3 does, and in single precision. Arrays of the user's own are not touched
        assert isinstance(self.action_space, spaces.Box)
        middle, half_range = middle_and_half_range(self.action_space)
        actions = np.empty_like(transitions.actions) if dataset_name(dataset) is None else transitions.actions
        np.subtract(transitions.actions, middle, out=actions)
        actions /= half_range
        np.clip(actions, -1 + ACTION_MARGIN, 1 - ACTION_MARGIN, out=actions)
        transitions = replace(transitions, actions=actions)
        return OfflineBuffer(transitions, self.device, self.n_steps, self.gamma, n_stack, device, self.chunk_size)

    def _load_dataset(self) -> None:
        """After a model was loaded, its dataset is."""
        if self.offline_buffer is None and self.dataset is not None:
            if self._has_validation and self.dataset_kwargs.get("validation") is None:
                warnings.warn(
                    "What was held out for validation was given as arrays, which are not saved, or it was left out when the "
                    "model was loaded: call `set_dataset()` with `validation` to go on logging its losses"
                )
            try:
                self.set_dataset(self.dataset, **self.dataset_kwargs)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error}. The model learned from it: load it with `dataset=` where the dataset is now, "
                    "or with `dataset=None` to go on without it"
                ) from error

    @property
    def _reward_arguments(self) -> dict[str, Any]:
        return {name: self.dataset_kwargs.get(name, default) for name, default in REWARD_ARGUMENTS.items()}

    @property
    def _only_clones(self) -> bool:
        return self.offline_buffer is not None and not self.dataset_kwargs.get("need_rewards", True)

    def _n_stack(self, transitions: Transitions) -> int:
        """Observations are stacked as the environment does it, unless those of the dataset are already."""
        frame_stack = None if self.env is None else unwrap_vec_wrapper(self.env, VecFrameStack)
        observations: Any = transitions.observations
        space = self.observation_space
        while isinstance(observations, dict) and isinstance(space, spaces.Dict):
            key = next(iter(space.spaces))
            observations, space = observations.get(key), space.spaces[key]
        is_stacked = isinstance(observations, np.ndarray) and observations.shape[1:] == space.shape
        return 1 if frame_stack is None or is_stacked else frame_stack.stacked_obs.n_stack

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Sample the dataset and the replay buffer and update all networks.

        :param gradient_steps: Number of updates
        :param batch_size: Minibatch size
        :raises ValueError: if a loss is not finite, before it changes the weights
        """
        # Update optimizer learning rate
        self._update_learning_rate(self.policy.optimizer)
        if self.chunk_size > 1 and self.offline_buffer is None and self._n_online() == 0:
            # There is no whole chunk yet
            return
        if self.compile and gradient_steps > 0 and self._train_in_graph(gradient_steps, batch_size):
            return
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)

        logged = []
        for _ in range(gradient_steps):
            loss, values = self._losses(self._sample(distributed.share("batch_size", batch_size)))
            # The device is waited for once
            logged.append(distributed.mean(th.stack(list(values.values())).detach()).tolist())
            if not np.isfinite(logged[-1]).all():
                raise ValueError(_not_finite(dict(zip(values, logged[-1], strict=True))))
            self._optimization_step(loss)

        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self._record_losses(values, logged)

    @abstractmethod
    def _losses(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        :param batch: Transitions
        :return: the loss of all networks, and what is logged of it
        """

    def _critic_loss(self, batch: Batch) -> tuple[th.Tensor, th.Tensor]:
        """
        :param batch: Transitions
        :return: mean squared TD error over the critics, and their Q-values, (n_critics, batch)
        """
        with th.no_grad():
            next_q_values = self.critic_target(batch.next_observations, self._next_actions(batch))
            target_q_values = td_target(batch, aggregate(next_q_values, self.q_agg, self.rho), self.gamma)
        q_values = self.critic(batch.observations, batch.actions)
        return td_loss(q_values, target_q_values, batch), q_values

    def _next_actions(self, batch: Batch) -> th.Tensor:
        """
        :param batch: Transitions
        :return: what the policy does next: here actions of the flow, which has no target network, (batch, action_dim)
        """
        return self.bc_flow.sample(batch.next_observations, th.randn_like(batch.actions))

    def _q_term(self, q_values: th.Tensor) -> th.Tensor:
        """
        :param q_values: of the actions of a policy, (batch,)
        :return: what is to be minimised for them to be large
        """
        q_loss = -q_values.mean()
        return q_loss / distributed.mean(q_values.detach().abs().mean()) if self.normalize_q_loss else q_loss

    def _bc_flow_losses(self, batch: Batch) -> th.Tensor:
        """
        :param batch: Transitions
        :return: CFM losses of the flow, for the actions of the batch, (batch,)
        """
        noise = th.randn_like(batch.actions)
        timesteps = th.rand(len(noise), device=self.device)
        velocity = self.bc_flow(batch.observations, interpolate(batch.actions, noise, timesteps), timesteps)
        if isinstance(batch, ChunkSamples):
            # Steps that are not valid have no loss, nor a gradient
            valid = batch.valid.repeat_interleave(noise.shape[1] // self.chunk_size, dim=1)
            return cfm_loss(valid * velocity, valid * batch.actions, valid * noise, timesteps)
        return cfm_loss(velocity, batch.actions, noise, timesteps)

    def _record_losses(self, names: Iterable[str], losses: list[list[float]]) -> None:
        for name, value in zip(names, np.mean(losses, axis=0), strict=True):
            self.logger.record(f"train/{name}", float(value))

    def _optimization_step(self, loss: th.Tensor) -> None:
        """:param loss: Of a batch"""
        self._backward(loss)
        if self._has_critics:
            # The target network follows the weights from before the update, as in the authors' code
            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
            # Copy running stats, see SB3's GH issue #996
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
        self.policy.optimizer.step()

    def _backward(self, loss: th.Tensor) -> None:
        """:param loss: Of a batch"""
        self.policy.optimizer.zero_grad()
        loss.backward()
        distributed.average_gradients(self.policy.parameters())

    def _train_in_graph(self, gradient_steps: int, batch_size: int) -> bool:
        """
        :meth:`train` with captured updates, which are queued: nothing is waited for.

        :param gradient_steps: Number of updates
        :param batch_size: Minibatch size
        :return: whether there is a graph for them
        """
        values = []
        for _ in range(gradient_steps):
            samples = self._samples_in_graph()
            if not self._has_graphs(samples, batch_size):
                # (nor has it had any before)
                return False
            update = self._captured_update(None if samples else self._sample(batch_size), batch_size)
            values.append(update())
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self._graphs.unread = update.names, values
        if not self._graphs.is_queue:
            self._wait_for_graphs()
        return True

    def _samples_in_graph(self) -> bool:
        """Whether a batch is drawn from the dataset only, by the device, and nothing that is done to it depends on chance."""
        buffer = self.offline_buffer
        return (
            type(buffer) is OfflineBuffer
            and buffer.storage_device == buffer.device == self.device
            and (self._only_clones or self._n_online() == 0)
            and self.random_crop == 0
            and self._vec_normalize_env is None
        )

    def _has_graphs(self, samples: bool, batch_size: int) -> bool:
        """
        :param samples: Whether the batch is drawn in them
        :param batch_size: Number of transitions
        :return: whether updates are captured. Those that cannot be replayed any more are forgotten.
        """
        graphs, policy = self._graphs, self.policy
        key = (
            [getattr(self, name) for name in self.in_graph],
            self._networks(),
            self._reward_arguments,
            self._only_clones,
            (batch_size, attributes_state(self.offline_buffer)) if samples else None,
            global_state(),
            self._has_replaced_methods(),
        )
        if not graphs.is_current(key, policy, policy.optimizer):
            # (there may only have been an evaluation)
            policy.set_training_mode(True)
            if not graphs.is_current(key, policy, policy.optimizer):
                self._wait_for_graphs()
                graphs.restart(self._find_obstacle(), key, policy, policy.optimizer)
        return graphs.obstacle is None

    def _captured_update(self, batch: Batch | None, batch_size: int) -> CapturedUpdate:
        """
        :param batch: Transitions, None to draw them in the graph
        :param batch_size: Number of transitions
        :return: an update of all networks in a graph
        """
        graphs = self._graphs
        name = None if batch is None else (*(column is None for column in batch), layout(batch))
        if name not in graphs:
            static = clone(batch)

            def losses() -> tuple[th.Tensor, dict[str, th.Tensor]]:
                if static is not None:
                    return self._losses(static)
                assert self.offline_buffer is not None
                return self._losses(self._prepare(self.offline_buffer.sample(batch_size)))

            graphs[name] = static, CapturedUpdate(
                self.policy.optimizer, losses, self._backward, self.device, graphs.guards, self._update_target
            )
        static, update = graphs[name]
        if static is not None:
            copy_into(static, batch)
        return update

    def _update_target(self, is_finite: th.Tensor) -> None:
        """
        Polyak update, as in :meth:`_optimization_step`.

        :param is_finite: One, or zero for none
        """
        if not self._has_critics:
            return
        with th.no_grad():
            targets: list[th.Tensor] = [*self.critic_target.parameters()]
            parameters: list[th.Tensor] = [*self.critic.parameters()]
            changes = [*th._foreach_sub(parameters, targets)]
            th._foreach_mul_(changes, self.tau * is_finite)
            th._foreach_add_(targets, changes)

    def _has_replaced_methods(self) -> bool:
        """Whether an update may be something else than what is known to be captured."""
        return "in_graph" not in vars(type(self)) or has_replaced_methods(self, type(self))

    def _find_obstacle(self) -> str | None:
        if self._has_replaced_methods():
            return f"{type(self).__name__} is an algorithm of its own"
        if self.samples_in_update and self.bc_flow.sampler not in CAPTURED_SAMPLERS:
            return f'the sampler "{self.bc_flow.sampler}" waits for the device'
        if type(self.policy) not in self.policy_aliases.values():
            return f"{type(self.policy).__name__} is a policy of its own"
        if self._networks() != tuple(self.policy.children()):
            return "the networks of the policy were replaced"
        return find_obstacle(self.policy, [type(self.policy), *NETWORKS], self.policy.optimizer)

    def _wait_for_graphs(self) -> None:
        """
        Wait for the updates that are queued, and record their losses.

        :raises ValueError: if one of them was not finite: neither it nor those after it changed the weights
        """
        failure, self._graphs.unread, (names, values) = self._graphs.failure(), ((), []), self._graphs.unread
        if failure is not None:
            raise ValueError(_not_finite(failure))
        if values:
            self._record_losses(names, th.stack(values).tolist())

    def _sample(self, batch_size: int) -> Batch:
        """
        A batch from the dataset, the replay buffer, or both.

        :param batch_size: Number of transitions
        :return: transitions, with augmented images if there are any
        """
        n_online = self._n_online()
        if self.offline_buffer is None:
            n_from_replay = batch_size
        elif n_online == 0 or self._only_clones:
            n_from_replay = 0
        elif self.balanced_sampling:
            # Half of the batch of all processes together
            n_from_replay = (batch_size * distributed.world_size() // 2 + distributed.rank()) // distributed.world_size()
        else:
            # Each process has its part of what was collected, and the whole dataset
            n_online *= distributed.world_size()
            n_from_replay = int(np.random.binomial(batch_size, n_online / (n_online + len(self.offline_buffer))))
            if n_from_replay == 1 and isinstance(self.replay_buffer, HerReplayBuffer):
                # Of a single transition it would relabel none, and ask the environment for the rewards of nothing
                n_from_replay = min(2, batch_size)

        parts: list[Any] = []
        if n_from_replay < batch_size:
            assert self.offline_buffer is not None
            parts.append(self.offline_buffer.sample(batch_size - n_from_replay, env=self._vec_normalize_env))
        if n_from_replay > 0:
            assert self.replay_buffer is not None
            parts.append(self.replay_buffer.sample(n_from_replay, env=self._vec_normalize_env))
        batch = parts[0] if len(parts) == 1 else concatenate_samples(parts[0], parts[1], self.gamma)
        batch = self._prepare(batch)
        if self.random_crop > 0 and th.rand(()) < self.random_crop_probability:
            batch = self._augment(batch)
        return batch

    def _prepare(self, batch: Batch) -> Batch:
        """What is done to all transitions, wherever they come from."""
        return transform_rewards(fill_terminal_observations(batch), self.gamma, **self._reward_arguments)

    def _n_online(self) -> int:
        """Number of transitions in the replay buffer that can be sampled."""
        if self.replay_buffer is None:
            return 0
        if isinstance(self.replay_buffer, HerReplayBuffer):
            # Those of the episodes that are over
            return int((self.replay_buffer.ep_length > 0).sum())
        if isinstance(self.replay_buffer, ChunkSampling):
            return self.replay_buffer.n_chunks * self.replay_buffer.n_envs
        return self.replay_buffer.size() * self.replay_buffer.n_envs

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.chunk_size == 1 or self.num_timesteps < learning_starts:
            self._chunks = None
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self._last_obs is not None and self._last_episode_starts is not None
        chunks = None if self._last_episode_starts.all() else self._chunks
        actions, self._chunks = self.predict(self._last_obs, chunks, self._last_episode_starts)
        # As SB3 does it
        scaled_actions = self.policy.scale_action(actions)
        if action_noise is not None:
            scaled_actions = np.clip(scaled_actions + action_noise(), -1, 1)
        return self.policy.unscale_action(scaled_actions), scaled_actions

    def _store_transition(self, replay_buffer: ReplayBuffer, buffer_action, new_obs, reward, dones, infos) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        # (SB3 does not say so off-policy)
        self._last_episode_starts = dones

    def _augment(self, batch: Batch):
        """Crop the images of each transition at random, its observation and its next observation alike."""
        shift = th.randint(2 * self.random_crop + 1, (2, len(batch.actions)), device=self.device)
        crops = [map_arrays(lambda obs: random_crop(obs, self.random_crop, shift), obs) for obs in batch[::2][:2]]
        return batch._replace(observations=crops[0], next_observations=crops[1])

    @learns_together
    def learn_offline(
        self: SelfOfflineAlgorithm,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = OFFLINE_LOG_INTERVAL,
        tb_log_name: str = "OfflineAlgorithm",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOfflineAlgorithm:
        """
        Learn from the dataset, without a step in the environment. Here ``num_timesteps``, which callbacks and logs
        have on their x axis, counts gradient steps.

        :param gradient_steps: The total number of gradient steps
        :param callback: callback(s) called at every step
        :param log_interval: The number of gradient steps before logging
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises ValueError: if there is no dataset, or no environment, or an argument is out of its range
        """
        gradient_steps = to_int("gradient_steps", gradient_steps, at_least=0)
        self._learn_offline(gradient_steps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        return self

    def _learn_offline(
        self,
        gradient_steps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        tb_log_name: str,
        reset_num_timesteps: bool,
        progress_bar: bool,
    ) -> bool:
        """:return: False if a callback stopped it"""
        self._load_dataset()
        if self.offline_buffer is None:
            raise ValueError("There is no dataset: pass `dataset` to the constructor, or call `set_dataset()`")
        if self.env is None:
            raise ValueError("There is no environment: pass `env` to `load()`, or call `set_env()`")
        if progress_bar:
            parts = callback if isinstance(callback, list) else [] if callback is None else [callback]
            callbacks = [part if isinstance(part, BaseCallback) else ConvertCallback(part) for part in parts]
            callback = CallbackList([*callbacks, _GradientStepProgressBar()])
        total_timesteps, callback = self._setup_learn_offline(gradient_steps, callback, reset_num_timesteps, tb_log_name)
        callback.on_training_start(locals(), globals())
        # What callbacks look for: no episode ends here
        dones = np.zeros(self.n_envs, dtype=bool)
        infos: list[dict[str, Any]] = [{} for _ in range(self.n_envs)]

        # Of a training that was interrupted
        self._wait_for_graphs()
        continue_training = True
        self._graphs.is_queue = True
        try:
            while self.num_timesteps < total_timesteps and continue_training:
                # The learning rate, if it is a schedule, goes over both phases
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps + self._steps_after_offline)
                self.train(gradient_steps=1, batch_size=self.batch_size)
                self.num_timesteps += 1
                self._n_offline_updates += 1
                callback.update_locals(locals())
                continue_training = self._meet(callback.on_step())
                if log_interval is not None and self.num_timesteps % log_interval == 0:
                    self.dump_logs()
        finally:
            self._graphs.is_queue = False

        self._wait_for_graphs()
        callback.on_training_end()
        return continue_training

    def _setup_learn(self, *args, **kwargs) -> tuple[int, BaseCallback]:
        if self.chunk_size > 1 and getattr(self.replay_buffer, "chunk_size", 1) != self.chunk_size:
            raise ValueError(
                f"The replay buffer must be a ChunkReplayBuffer with a `chunk_size` of {self.chunk_size}, "
                f"it is a {type(self.replay_buffer).__name__}"
            )
        for buffer in (self.offline_buffer, self.replay_buffer):
            if getattr(buffer, "n_steps", 1) > 1 or getattr(buffer, "chunk_size", 1) > 1:
                # (those of several steps have one)
                gamma = buffer.gamma  # type: ignore[union-attr]
                if gamma != self.gamma:
                    raise ValueError(f"`gamma` is {self.gamma}, but {gamma} in the returns of {type(buffer).__name__}")
                if gamma == 1 and self._reward_arguments["reward_shift"] != 0:
                    raise ValueError("`reward_shift` with returns of several steps needs a `gamma` of less than 1")
        normalization = self._vec_normalize_env
        if normalization is not None:
            assert self.env is not None
            if normalization.norm_reward and self._reward_arguments != REWARD_ARGUMENTS:
                raise ValueError(
                    "`reward_scale` and `reward_shift` are for the rewards of the environment, but `VecNormalize` divides "
                    "them by their own statistics: make it with `norm_reward=False`"
                )
            if unwrap_vec_wrapper(normalization, VecFrameStack) is not unwrap_vec_wrapper(self.env, VecFrameStack):
                raise ValueError("`VecNormalize` must be around `VecFrameStack`, not inside: what is stored is not normalized")
            if self.offline_buffer is not None:
                self.offline_buffer.fit_normalization(normalization, has_rewards=not self._only_clones)
        return super()._setup_learn(*args, **kwargs)

    def _setup_learn_offline(
        self, gradient_steps: int, callback: MaybeCallback, reset_num_timesteps: bool, tb_log_name: str
    ) -> tuple[int, BaseCallback]:
        """As SB3 does it for ``learn()``, but that the environment is not touched: it is not reset."""
        if reset_num_timesteps:
            self.num_timesteps, self._episode_num, self.ep_info_buffer = 0, 0, None
        has_custom_logger, last_obs = self._custom_logger, self._last_obs
        if not has_custom_logger:
            self.set_logger(configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps))
        if last_obs is None:
            # Without an observation, or with another number of timesteps, SB3 resets the environment
            self._last_obs = np.empty(0)
        try:
            return self._setup_learn(gradient_steps, callback, reset_num_timesteps=False)
        finally:
            self._custom_logger, self._last_obs = has_custom_logger, last_obs

    @learns_together
    def learn(
        self: SelfOfflineAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "OfflineAlgorithm",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOfflineAlgorithm:
        """
        Learn online, after what remains of the ``offline_steps``. The number of timesteps then goes on from there.

        :param total_timesteps: The total number of steps in the environment
        :param callback: callback(s) called at every step
        :param log_interval: The number of episodes before logging (offline, every 1000 gradient steps, or never if None)
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises ValueError: if the replay buffer is too small to learn online, or the dataset has no rewards,
            or an argument is out of its range
        """
        total_timesteps = to_int("total_timesteps", total_timesteps, at_least=0)
        self._load_dataset()
        if total_timesteps > 0 and self._only_clones:
            raise ValueError("With `need_rewards=False` a dataset is only cloned: `learn_offline()` or `learn(0)`, not online")
        if total_timesteps > 1 and self.buffer_size < 2 and self._has_dataset:
            # Enough to learn offline
            raise ValueError(f"`buffer_size` must be larger to learn online, it is {self.buffer_size}")
        if total_timesteps > 0 and self.replay_buffer is not None and self.replay_buffer.buffer_size < self.chunk_size:
            least = self.chunk_size * self.n_envs * distributed.world_size()
            raise ValueError(
                f"`buffer_size` must be at least {least} to learn online, it is {self.buffer_size}: a chunk of "
                f"{self.chunk_size} steps for each environment"
            )
        if self._has_dataset and self.offline_buffer is None:
            warnings.warn(
                "The dataset was given as arrays, which are not saved, or it was left out when the model was loaded: "
                "call `set_dataset()` to go on learning from it"
            )
        assert self.replay_buffer is not None
        if total_timesteps > 0 and self._has_dataset and not self.replay_buffer.handle_timeout_termination:
            warnings.warn(
                "With `handle_timeout_termination=False` an episode that ends by its time limit is over for what is collected "
                "online, but not for the dataset"
            )
        offline_steps = self.offline_steps - self._n_offline_updates
        if offline_steps > 0:
            reset_num_timesteps = reset_num_timesteps and self._n_offline_updates == 0
            self._steps_after_offline = total_timesteps
            try:
                if not self._learn_offline(
                    offline_steps,
                    callback,
                    None if log_interval is None else OFFLINE_LOG_INTERVAL,
                    tb_log_name,
                    reset_num_timesteps,
                    progress_bar,
                ):
                    return self
            finally:
                self._steps_after_offline = 0
            reset_num_timesteps = False
        if total_timesteps == 0:
            return self
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _settings_of_all(self) -> dict[str, Any]:
        return super()._settings_of_all() | dict(
            n_transitions=0 if self.offline_buffer is None else len(self.offline_buffer), only_clones=self._only_clones
        )

    def dump_logs(self) -> None:
        """
        Write log data, with the losses of what is held out for validation. Training does not depend on them.
        """
        self._wait_for_graphs()
        if self.validation_buffer is not None and distributed.rank() == 0:
            training = self.policy.training
            self.policy.set_training_mode(False)
            devices = [self.device] if self.device.type == "cuda" else []
            with th.no_grad(), th.random.fork_rng(devices), distributed.alone():
                batch = self._prepare(self.validation_buffer.sample(self.batch_size, env=self._vec_normalize_env))
                for name, value in self._losses(batch)[1].items():
                    self.logger.record(f"validation/{name}", value.item())
            self.policy.set_training_mode(training)
        super().dump_logs()

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        self._wait_for_graphs()
        # The policy is created from its arguments again
        self.policy_kwargs = self.policy_kwargs | self.policy.changed_sampler
        super().save(path, exclude, include)

    def _excluded_save_params(self) -> list[str]:
        excluded = ["_graphs", "_chunks", *self.policy.network_names, "offline_buffer", "validation_buffer"]
        # Arrays that a loaded model has not been trained on yet
        excluded += ["dataset"] if dataset_name(self.dataset) is None else []
        return [*super()._excluded_save_params(), *excluded]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []


@contextlib.contextmanager
def held_fixed(network: th.nn.Module) -> Iterator[None]:
    """
    A network that gives a gradient to its inputs, but has none itself.

    :param network: Network (some of its parameters may be fixed anyway)
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        # (Ctrl-C, or too little memory, and then the training goes on)
        for parameter in trained:
            parameter.requires_grad_(True)


def _not_finite(losses: dict[str, float]) -> str:
    parts = ", ".join(f"{name.removesuffix('_loss')}: {value}" for name, value in losses.items())
    return f"The loss is not finite ({parts}): training stopped before it reached the weights"


def random_crop(images: th.Tensor, padding: int, shift: th.Tensor) -> th.Tensor:
    """
    Shift images by up to ``padding`` pixels, repeating their borders. What is not an image is returned as it is.

    :param images: (batch, channels, height, width)
    :param padding: Largest shift, in pixels
    :param shift: rows and columns to crop at, in 0..2 * padding, (2, batch)
    :return: like the images
    """
    if images.dim() != 4:
        return images
    batch, _, height, width = images.shape
    padded = F.pad(images.float(), [padding] * 4, mode="replicate").to(images.dtype)
    rows = shift[0].view(batch, 1, 1) + th.arange(height, device=images.device).view(1, height, 1)
    columns = shift[1].view(batch, 1, 1) + th.arange(width, device=images.device).view(1, 1, width)
    index = th.arange(batch, device=images.device).view(batch, 1, 1)
    return padded.permute(0, 2, 3, 1)[index, rows, columns].permute(0, 3, 1, 2)


class _GradientStepProgressBar(ProgressBarCallback):
    """SB3's progress bar, for steps that do not depend on the number of environments."""

    def _on_step(self) -> bool:
        self.pbar.update(1)
        return True
