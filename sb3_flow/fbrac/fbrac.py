from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    Schedule,
)

from sb3_flow.common.checks import NOT_NEGATIVE, check_floats, to_bool
from sb3_flow.common.cuda_graphs import in_parallel
from sb3_flow.fbrac.policies import CnnPolicy, FBRACPolicy, MlpPolicy, MultiInputPolicy
from sb3_flow.offline.algorithm import OFFLINE_LOG_INTERVAL, OfflineAlgorithm, held_fixed
from sb3_flow.offline.buffers import Batch
from sb3_flow.offline.datasets import Dataset

SelfFBRAC = TypeVar("SelfFBRAC", bound="FBRAC")


class FBRAC(OfflineAlgorithm):
    """
    Flow Behavior-Regularized Actor-Critic (FBRAC)

    The flow that acts maximises the value of its actions, through all of its steps, and clones the dataset.

    Paper: https://arxiv.org/abs/2502.02538 (eq. 6)
    Reference implementation: https://github.com/ColinQiyangLi/qam

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param dataset: What to learn offline from, see :func:`sb3_flow.offline.datasets.load_dataset`. It stays beside the
        replay buffer when the training goes on online.
    :param dataset_kwargs: Keyword arguments to pass to :meth:`set_dataset`
    :param offline_steps: Number of gradient steps on the dataset that :meth:`learn` starts with
    :param alpha: Weight of the behavioral cloning in the loss of the flow
    :param q_agg: How the critics are put together for their target: "mean" or "min"
    :param rho: How many of their standard deviations are subtracted from the mean of the critics, for ensembles of about ten
        (``policy_kwargs=dict(n_critics=10)``, with 0.5). Must be 0 with "min".
    :param normalize_q_loss: Whether to divide the Q term by the mean absolute Q-value, so that ``alpha`` depends less
        on the task
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
    :param policy_kwargs: additional arguments to be passed to the policy on creation. See :class:`.FBRACPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range, or the dataset does not fit the environment
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    in_graph = ("alpha", "q_agg", "rho", "normalize_q_loss", "gamma", "tau")
    policy: FBRACPolicy

    def __init__(
        self,
        policy: str | type[FBRACPolicy],
        env: GymEnv | str,
        dataset: Dataset | list[Dataset] | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        offline_steps: int = 0,
        alpha: float = 100.0,
        q_agg: str = "mean",
        rho: float = 0.0,
        normalize_q_loss: bool = False,
        balanced_sampling: bool = False,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        use_sde: bool = False,
        random_crop: int = 0,
        random_crop_probability: float = 0.5,
        compile: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            dataset,
            dataset_kwargs,
            offline_steps,
            balanced_sampling,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            replay_buffer_kwargs,
            optimize_memory_usage,
            n_steps,
            use_sde,
            random_crop,
            random_crop_probability,
            compile,
            stats_window_size,
            tensorboard_log,
            policy_kwargs,
            verbose,
            seed,
            device,
        )

        self.alpha = alpha
        self.q_agg = q_agg
        self.rho = rho
        self.normalize_q_loss = normalize_q_loss

        if _init_setup_model:
            self._setup_model()
            if dataset is not None:
                self.set_dataset(dataset, **self.dataset_kwargs)

    def _check_arguments(self) -> None:
        check_floats(self, dict(alpha=NOT_NEGATIVE))
        self.normalize_q_loss = to_bool("normalize_q_loss", self.normalize_q_loss)
        self._check_aggregation()
        super()._check_arguments()

    def _losses(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        The losses of the critics and of the flow.

        :param batch: Transitions
        :return: the loss, and what is logged of it
        """
        (critic_loss, q_values), (bc_flow_loss, q_loss) = in_parallel(
            lambda: self._critic_loss(batch), lambda: (self._bc_flow_losses(batch).mean(), self._q_loss(batch))
        )
        return critic_loss + self.alpha * bc_flow_loss + q_loss, dict(
            critic_loss=critic_loss, bc_flow_loss=bc_flow_loss, q_loss=q_loss, q_mean=q_values.mean()
        )

    def _q_loss(self, batch: Batch) -> th.Tensor:
        """
        :param batch: Transitions
        :return: Q term of the flow, which has a gradient through all of its steps
        """
        actions = self.bc_flow.integrate(batch.observations, th.randn_like(batch.actions))
        with held_fixed(self.critic):
            q_values = self.critic(batch.observations, actions).mean(dim=0)
        return self._q_term(q_values)

    def learn_offline(
        self: SelfFBRAC,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = OFFLINE_LOG_INTERVAL,
        tb_log_name: str = "FBRAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfFBRAC:
        return super().learn_offline(gradient_steps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def learn(
        self: SelfFBRAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "FBRAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfFBRAC:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
