from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    Schedule,
)

from sb3_flow.flow_bc.policies import CnnPolicy, FlowBCPolicy, MlpPolicy, MultiInputPolicy
from sb3_flow.offline.algorithm import OFFLINE_LOG_INTERVAL, OfflineAlgorithm
from sb3_flow.offline.buffers import Batch
from sb3_flow.offline.datasets import Dataset

SelfFlowBC = TypeVar("SelfFlowBC", bound="FlowBC")


class FlowBC(OfflineAlgorithm):
    """
    Behavioral cloning with a flow (FlowBC)

    A flow clones the behaviour of a dataset, whose rewards it does not need, by flow matching, and acts by sampling. It learns
    offline only.

    Paper: https://arxiv.org/abs/2210.02747 (flow matching), https://arxiv.org/abs/2502.02538 (the flow of FQL)
    Reference implementation: https://github.com/seohongpark/fql

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment that the policy is for (if registered in Gym, can be str)
    :param dataset: What to clone, see :func:`sb3_flow.offline.datasets.load_dataset`
    :param dataset_kwargs: Keyword arguments to pass to :meth:`set_dataset`
    :param offline_steps: Number of gradient steps of :meth:`learn`
    :param chunk_size: Number of steps that are cloned, and taken, as one action. ``predict`` then needs the state that it
        returns, and where episodes start, as recurrent policies do: without a state it begins a new chunk.
    :param learning_rate: learning rate for adam optimizer,
        it can be a function of the current progress remaining (from 1 to 0)
    :param batch_size: Minibatch size for each gradient update (of all processes together)
    :param random_crop: Padding of the random crops that images are augmented with, in pixels
        (the authors use 3), no augmentation if 0
    :param random_crop_probability: Share of the batches that are augmented
    :param compile: On CUDA, run each update (and the drawing of its batch, if nothing is done to it at random) as one captured
        graph: the same numbers, but for rounding. The device is then waited for, and losses are recorded, when logs are
        written. What cannot be captured (networks and optimizers of your own, ...) runs as without it, with a warning that
        names it. On a CPU there are no graphs. It makes no difference to what is saved.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. See :class:`.FlowBCPolicy`
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
    in_graph = ("chunk_size", "gamma")
    samples_in_update = False
    can_clone = True
    learns_online = False
    policy: FlowBCPolicy

    def __init__(
        self,
        policy: str | type[FlowBCPolicy],
        env: GymEnv | str,
        dataset: Dataset | list[Dataset] | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        offline_steps: int = 0,
        chunk_size: int = 1,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
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
            learning_rate=learning_rate,
            batch_size=batch_size,
            random_crop=random_crop,
            random_crop_probability=random_crop_probability,
            compile=compile,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            # What is of no use without values, and online
            balanced_sampling=False,
            buffer_size=1,
            learning_starts=0,
            tau=0.0,
            gamma=0.0,
            train_freq=1,
            gradient_steps=1,
            action_noise=None,
            replay_buffer_class=None,
            replay_buffer_kwargs=None,
            optimize_memory_usage=False,
            n_steps=1,
            use_sde=False,
        )
        self.chunk_size = chunk_size

        if _init_setup_model:
            self._setup_model()
            if dataset is not None:
                self.set_dataset(dataset, **self.dataset_kwargs)

    def set_dataset(self, dataset: Dataset | list[Dataset], *args, **kwargs) -> None:
        """
        Load the dataset to clone, in place of the one before.

        :param dataset: See :func:`sb3_flow.offline.datasets.load_dataset`
        :param args: See ``OfflineAlgorithm.set_dataset``
        :param kwargs: See ``OfflineAlgorithm.set_dataset``. Rewards are not needed.
        :raises ValueError: if it does not fit the spaces of the environment, naming the field and the row
        """
        super().set_dataset(dataset, *args, **{"need_rewards": False, **kwargs})

    def _losses(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        :param batch: Transitions
        :return: the loss of the flow, and what is logged of it
        """
        bc_flow_loss = self._bc_flow_losses(batch).mean()
        return bc_flow_loss, dict(bc_flow_loss=bc_flow_loss)

    def learn_offline(
        self: SelfFlowBC,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = OFFLINE_LOG_INTERVAL,
        tb_log_name: str = "FlowBC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfFlowBC:
        return super().learn_offline(gradient_steps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def learn(
        self: SelfFlowBC,
        total_timesteps: int = 0,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "FlowBC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfFlowBC:
        """
        Learn what remains of the ``offline_steps``.

        :param total_timesteps: Must be 0: it does not learn online
        :param callback: callback(s) called at every step
        :param log_interval: None for no logs, which are written every 1000 gradient steps otherwise
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises ValueError: if ``total_timesteps`` is not 0, or there are no ``offline_steps``
        """
        if total_timesteps != 0:
            raise ValueError(
                f"`total_timesteps` must be 0, it is {total_timesteps}: FlowBC learns offline only, see `offline_steps` and "
                "`learn_offline()`"
            )
        if self.offline_steps == 0:
            raise ValueError("`offline_steps` must be positive for `learn()`, it is 0: pass it to the constructor")
        return super().learn(0, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
