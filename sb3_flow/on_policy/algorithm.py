"""What the on-policy algorithms share: PPO's rollouts, epochs and value function, for a policy that is a flow."""

import io
import pathlib
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import (
    DictRolloutBufferSamples,
    GymEnv,
    MaybeCallback,
    PyTorchObs,
    RolloutBufferSamples,
    Schedule,
)
from stable_baselines3.common.utils import FloatSchedule, check_for_correct_spaces, explained_variance
from torch.nn import functional as F

from sb3_flow import distributed
from sb3_flow.common.checks import (
    DECAY,
    FINITE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    check_floats,
    to_bool,
    to_float,
    to_int,
    to_net_arch,
)
from sb3_flow.common.distributed_algorithm import DistributedOnPolicyAlgorithm, learns_together
from sb3_flow.common.save_load import CheckedLoad
from sb3_flow.offline.algorithm import OFFLINE_LOG_INTERVAL
from sb3_flow.offline.datasets import Dataset, dataset_name
from sb3_flow.on_policy.policies import FlowActorCriticPolicy

if TYPE_CHECKING:
    from sb3_flow.flow_bc import FlowBC

SelfFlowOnPolicyAlgorithm = TypeVar("SelfFlowOnPolicyAlgorithm", bound="FlowOnPolicyAlgorithm")

#: What arguments that are floats may be, which of them may be None, and which functions of the progress.
FLOATS = dict(
    learning_rate=NOT_NEGATIVE, gamma=FRACTION, gae_lambda=FRACTION, clip_range=NOT_NEGATIVE, clip_range_vf=POSITIVE,
    ent_coef=FINITE, vf_coef=NOT_NEGATIVE, max_grad_norm=POSITIVE, bounds_loss_coef=NOT_NEGATIVE, target_kl=POSITIVE,
    critic_learning_rate=NOT_NEGATIVE,
)  # fmt: skip
OPTIONAL = ("clip_range_vf", "max_grad_norm", "target_kl", "critic_learning_rate")
SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "critic_learning_rate")


class ClipRanges(NamedTuple):
    """Sizes of the trust regions of the policy and, if it has one, of the value function."""

    policy: float | th.Tensor
    value: float | th.Tensor | None


def select(x: th.Tensor, indices: th.Tensor | slice) -> th.Tensor:
    # (on a CPU, it takes a quarter of the time of x[indices])
    return x[indices] if isinstance(indices, slice) else x.index_select(0, indices)


def select_observations(observations: PyTorchObs, indices: th.Tensor | slice) -> PyTorchObs:
    if isinstance(observations, dict):
        return {key: select(obs, indices) for key, obs in observations.items()}
    return select(observations, indices)


class FlowOnPolicyAlgorithm(CheckedLoad, DistributedOnPolicyAlgorithm):
    """
    The base of algorithms that update a flow policy as PPO does, each with a ratio of its own in place of PPO's likelihood
    ratio. It is for them to say what a rollout is to their updates (``_to_rollout``), what the policy that collected it
    makes of it (``_evaluate_old_policy``), and the losses of a minibatch (``_losses``).

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, it can be a function
        of the current progress remaining (from 1 to 0)
    :param n_steps: The number of steps to run for each environment per update
        (i.e. rollout buffer size is n_steps * n_envs where n_envs is number of environment copies running in parallel)
        NOTE: n_steps * n_envs must be greater than 1 (because of the advantage normalization)
    :param batch_size: Minibatch size (of all processes together, if ``torchrun`` has started several)
    :param n_epochs: Number of epoch when optimizing the surrogate loss
    :param gamma: Discount factor
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator
    :param clip_range: Size of the trust region, it can be a function of the current progress
        remaining (from 1 to 0).
    :param clip_range_vf: Clipping parameter for the value function,
        it can be a function of the current progress remaining (from 1 to 0). If None, there is no clipping.
    :param normalize_advantage: Whether to normalize or not the advantage, in each minibatch (True), or "rollout" to normalize
        it over the whole rollout
    :param ent_coef: Entropy coefficient for the loss calculation
    :param vf_coef: Value function coefficient for the loss calculation
    :param max_grad_norm: The maximum value for the gradient clipping. If None, the gradient is not clipped.
    :param bounds_loss_coef: Coefficient of a loss on predicted actions far outside of the bounds of the action space, where
        rewards no longer depend on the action: see ``FlowActorCriticPolicy.bounds_loss``
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it will be automatically selected.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param target_kl: Limit the KL divergence between updates. If None, there is no limit.
    :param critic_learning_rate: The learning rate of the value function, if it is not that of the actor. It can be a function
        of the current progress remaining (from 1 to 0). The gradients of the two are then clipped separately. (A features
        extractor that they share is the actor's.)
    :param critic_warmup: Number of first iterations (a rollout and its epochs) in which only the value function learns, for an
        actor that is good already. They are those since the model was made or, if it was later, pretrained
    :param dataset: What :meth:`learn` clones first, see :meth:`pretrain`
    :param dataset_kwargs: Keyword arguments of ``OfflineAlgorithm.set_dataset``
    :param pretrain_steps: Number of gradient steps on the dataset that :meth:`learn` starts with, see :meth:`pretrain`
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    """

    # (not a policy of SB3's own, which is what the parent has)
    policy: FlowActorCriticPolicy  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[FlowActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule,
        n_steps: int,
        batch_size: int,
        n_epochs: int,
        gamma: float,
        gae_lambda: float,
        clip_range: float | Schedule,
        clip_range_vf: float | Schedule | None,
        normalize_advantage: bool | str,
        ent_coef: float,
        vf_coef: float,
        max_grad_norm: float | None,
        bounds_loss_coef: float,
        rollout_buffer_class: type[RolloutBuffer] | None,
        rollout_buffer_kwargs: dict[str, Any] | None,
        target_kl: float | None,
        critic_learning_rate: float | Schedule | None,
        critic_warmup: int,
        dataset: Dataset | list[Dataset] | None,
        dataset_kwargs: dict[str, Any] | None,
        pretrain_steps: int,
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: th.device | str,
    ):
        for name, value in dict(pretrain_steps=pretrain_steps, dataset_kwargs=dataset_kwargs).items():
            if value and dataset is None:
                raise ValueError(f"`{name}` needs a `dataset`")
        super().__init__(
            # (not the policies that the parent names, and a gradient that is not clipped)
            policy,  # type: ignore[arg-type]
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=to_int("stats_window_size", stats_window_size, at_least=1),
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=None if seed is None else to_int("seed", seed),
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box,),
        )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.bounds_loss_coef = bounds_loss_coef
        self.target_kl = target_kl
        self.critic_learning_rate = critic_learning_rate
        self.critic_warmup = critic_warmup
        #: Name of the dataset, to load it again, or its arrays, which are not saved
        self.dataset: Any = dataset_name(dataset) or dataset
        self.dataset_kwargs = {} if dataset_kwargs is None else dataset_kwargs
        self.pretrain_steps = pretrain_steps
        self._n_pretrain_updates = 0
        self._n_iterations = 0
        # Not checked with the others: rl-zoo3 loads models that will not train with one of zero
        to_float("clip_range", clip_range(1.0) if callable(clip_range) else clip_range, POSITIVE)

    def _check_arguments(self) -> None:
        for name in ("n_steps", "batch_size", "n_epochs"):
            setattr(self, name, to_int(name, getattr(self, name), at_least=1))
        if not isinstance(self.dataset_kwargs, Mapping):
            raise ValueError(f"`dataset_kwargs` must be a dictionary, it is {self.dataset_kwargs!r}")
        for name in ("critic_warmup", "pretrain_steps"):
            setattr(self, name, to_int(name, getattr(self, name), at_least=0))
        if isinstance(self.clip_range_vf, (float, int)):
            # The error of SB3's PPO
            assert not self.clip_range_vf <= 0, "`clip_range_vf` must be positive, pass `None` to deactivate vf clipping"
        check_floats(self, FLOATS, OPTIONAL, SCHEDULES)
        if self.normalize_advantage != "rollout":
            self.normalize_advantage = to_bool("normalize_advantage", self.normalize_advantage, '"rollout"')

        # Sanity check, otherwise it will lead to noisy gradient and NaN
        # because of the advantage normalization
        if self.normalize_advantage is True:
            assert self.batch_size > 1, "`batch_size` must be greater than 1, or `normalize_advantage` be False"

        if self.env is not None:
            distributed.share("batch_size", self.batch_size)
            n_envs = self.env.num_envs * distributed.world_size()
            buffer_size = n_envs * self.n_steps
            # Check that `n_steps * n_envs > 1` to avoid NaN
            # when doing advantage normalization
            assert buffer_size > 1 or (
                not self.normalize_advantage
            ), f"`n_steps * n_envs` must be greater than 1. Currently n_steps={self.n_steps} and n_envs={n_envs}"
            # Check that the rollout buffer size is a multiple of the mini-batch size
            if buffer_size % self.batch_size > 0:
                warnings.warn(
                    f"You have specified a mini-batch size of {self.batch_size},"
                    f" but because the `RolloutBuffer` is of size `n_steps * n_envs = {buffer_size}`,"
                    f" after every {buffer_size // self.batch_size} untruncated mini-batches,"
                    f" there will be a truncated mini-batch of size {buffer_size % self.batch_size}\n"
                    f"We recommend using a `batch_size` that is a factor of `n_steps * n_envs`.\n"
                    f"Info: (n_steps={self.n_steps} and n_envs={n_envs})"
                )

    def _setup_model(self) -> None:
        self._check_policy_class()
        self._check_arguments()
        super()._setup_model()

        # Initialize schedules for policy/value clipping
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        if self.critic_learning_rate is not None:
            self.critic_learning_rate = FloatSchedule(self.critic_learning_rate)
            self.policy.separate_critic()

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
        # The policy is created from its arguments again
        self.policy_kwargs = self.policy_kwargs | self.policy.changed_sampler
        super().save(path, exclude, include)

    def _excluded_save_params(self) -> list[str]:
        # Arrays are not saved
        arrays = ["dataset"] if dataset_name(self.dataset) is None else []
        validation = self.dataset_kwargs.get("validation")
        if validation is not None and not isinstance(validation, float) and dataset_name(validation) is None:
            arrays.append("dataset_kwargs")
        return [*super()._excluded_save_params(), *arrays]

    def set_parameters(self, load_path_or_dict, exact_match: bool = True, device: th.device | str = "auto") -> None:
        """
        Load parameters from a given zip-file or a nested dictionary containing parameters for different modules, see
        ``BaseAlgorithm.set_parameters``.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a nested dictionary
        :param exact_match: If True, the given parameters should include those of each module, and all of them
        :param device: Device on which the code should run.
        :raises ValueError: if they are of another number of optimized groups
        """
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except ValueError as error:
            if "parameter groups" not in str(error):
                raise
            raise ValueError(
                "`critic_learning_rate` must be None, or a number, as it was where the parameters are from: with a number, "
                "actor and critic are two groups of the optimizer"
            ) from error

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go beyond the end: a learning rate that decreases to zero must not become negative
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if self.critic_learning_rate is not None:
            # (a function by now, which mypy does not see)
            learning_rate = self.critic_learning_rate(self._current_progress_remaining)  # type: ignore[operator]
            if len(self.policy.optimizer.param_groups) != 2:
                raise ValueError("`critic_learning_rate` must be None with an optimizer that was replaced")
            self.policy.optimizer.param_groups[1]["lr"] = learning_rate
            self.logger.record("train/critic_learning_rate", learning_rate)

    def _maybe_recommend_cpu(self, mlp_class_name: str = "FlowPolicy") -> None:
        super()._maybe_recommend_cpu(mlp_class_name)

    def train(self) -> None:
        """
        Update policy using the currently gathered rollout buffer.

        :raises ValueError: before any gradient step, if a reward, an observation, a loss or a gradient is not finite
        """
        # Update optimizer learning rate
        self._update_learning_rate(self.policy.optimizer)
        clip_ranges = self._clip_ranges()

        # What the updates compare with, before there is one
        self.policy.set_training_mode(False)
        rollout = self._get_rollout()
        if self.policy.value_normalization is not None:
            self.policy.value_normalization.update(rollout.returns, self.policy.value_net)
        old = self._evaluate_old_policy(rollout)

        # Update the policy, in train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        epochs = self._run_epochs(rollout, old, clip_ranges)

        # What follows once per iteration
        self._end_iteration(rollout.observations)
        self._n_iterations += 1

        # Logs
        for name, value in self._statistics(epochs).items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_ranges.policy)
        if clip_ranges.value is not None:
            self.logger.record("train/clip_range_vf", clip_ranges.value)

    def _run_epochs(self, rollout: Any, old: Any, clip_ranges: ClipRanges) -> list[list[dict[str, th.Tensor]]]:
        """
        :param rollout: The rollout
        :param old: The same under the policy that collected it
        :param clip_ranges: Sizes of the trust regions
        :return: what is logged of each minibatch of each epoch
        """
        updates = None if self._only_critic else self._captured_updates(rollout, old, clip_ranges)
        epochs: list[list[dict[str, th.Tensor]]] = []
        for epoch in range(self.n_epochs):
            epochs.append([])
            self._n_updates += 1
            # Do a complete pass on the rollout
            for indices in self._epoch_minibatches(epoch, len(rollout.returns)):
                if updates is not None:
                    epochs[-1].append(updates(indices))
                    continue
                # (the KL divergence is that of the last epoch in the logs)
                needs_kl = self.target_kl is not None or epoch == self.n_epochs - 1
                loss, values = self._losses(rollout.select(indices), old.select(indices), clip_ranges, needs_kl)
                epochs[-1].append(values)
                if self.target_kl is not None and distributed.mean(values["approx_kl"]) > 1.5 * self.target_kl:
                    if self.verbose >= 1 and distributed.rank() == 0:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {values['approx_kl']:.2f}")
                    return epochs
                self._optimization_step(loss, values)
        if updates is not None:
            updates.check_finite()
        return epochs

    def _clip_ranges(self) -> ClipRanges:
        """Those of now (a schedule may end at zero)."""
        # (functions by now, of numbers before _setup_model(), which mypy does not see)
        progress = self._current_progress_remaining
        clip_range_vf = None if self.clip_range_vf is None else self.clip_range_vf(progress)  # type: ignore[operator]
        return ClipRanges(max(self.clip_range(progress), 1e-8), clip_range_vf)  # type: ignore[operator]

    def _captured_updates(self, rollout: Any, old: Any, clip_ranges: ClipRanges) -> Any:
        """
        :param rollout: The rollout
        :param old: The same under the policy that collected it
        :param clip_ranges: Sizes of the trust regions
        :return: a function that does an update with the transitions at some indices, and returns what is logged of it.
            None if an update is what follows here.
        """
        return None

    @abstractmethod
    def _to_rollout(self, data: RolloutBufferSamples | DictRolloutBufferSamples) -> Any:
        """
        :param data: The whole rollout, on the device and shuffled
        :return: what the updates need of it: at least its observations, old values, advantages and returns, and a method
            ``select`` of indices
        """

    @abstractmethod
    def _evaluate_old_policy(self, rollout: Any) -> Any:
        """
        :param rollout: The rollout, with the policy that collected it
        :return: what the updates compare their policy with, and a method ``select`` of indices
        """

    @abstractmethod
    def _losses(self, batch: Any, old: Any, clip_ranges: ClipRanges, needs_kl: bool) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        :param batch: Transitions
        :param old: The same under the policy that collected the rollout
        :param clip_ranges: Sizes of the trust regions
        :param needs_kl: Whether the KL divergence, ``approx_kl``, is among the statistics
        :return: the loss, and what is logged of it
        """

    def _end_iteration(self, observations: PyTorchObs) -> None:
        """
        :param observations: Those of the rollout
        """
        self.policy.update_normalization(observations)

    @property
    def _only_critic(self) -> bool:
        """Whether the actor waits for its critic."""
        return self._n_iterations < self.critic_warmup

    def _value_loss(self, values: th.Tensor, batch: Any, clip_range_vf: float | th.Tensor | None) -> th.Tensor:
        """
        :param values: Estimated values, (batch,)
        :param batch: Transitions
        :param clip_range_vf: Largest difference between old and new value, None for no clipping
        :return: mean squared error, using the TD(gae_lambda) target
        """
        if clip_range_vf is not None:
            # Clip the difference between old and new value
            # NOTE: this depends on the reward scaling
            # (both bounds are numbers, or both tensors, which mypy does not see)
            change = th.clamp(values - batch.old_values, -clip_range_vf, clip_range_vf)  # type: ignore[arg-type]
            values = batch.old_values + change
        loss = F.mse_loss(batch.returns, values)
        if self.policy.value_normalization is not None:
            loss = loss / self.policy.value_normalization.std.square().squeeze()
        return loss

    def _optimization_step(self, loss: th.Tensor, statistics: dict[str, th.Tensor]) -> None:
        """
        :param loss: Of a minibatch
        :param statistics: What is logged of it
        :raises ValueError: if the gradient is not finite, before it changes the weights
        """
        # (a loss may be NaN without its gradient)
        if not th.isfinite(self._backward(loss, self._only_critic) + loss.detach()):
            raise ValueError(not_finite({name: value.item() for name, value in statistics.items()}))
        self.policy.optimizer.step()

    def _backward(self, loss: th.Tensor, only_critic: bool = False) -> th.Tensor:
        """
        :param loss: Of a minibatch
        :param only_critic: Whether the actor has no gradient
        :return: norm of its gradient, before the clipping
        """
        self.policy.optimizer.zero_grad()
        loss.backward()
        if only_critic:
            for parameter in self.policy.actor_parameters():
                parameter.grad = None
        distributed.average_gradients(self.policy.parameters())
        # Clip grad norm
        max_grad_norm = np.inf if self.max_grad_norm is None else self.max_grad_norm
        if self.critic_learning_rate is None:
            return th.nn.utils.clip_grad_norm_(self.policy.parameters(), max_grad_norm)
        groups = [group["params"] for group in self.policy.optimizer.param_groups]
        norms = [th.nn.utils.clip_grad_norm_(parameters, max_grad_norm) for parameters in groups]
        return th.stack([norm.to(self.device) for norm in norms]).norm()

    def _statistics(self, epochs: list[list[dict[str, th.Tensor]]]) -> dict[str, float]:
        """
        :param epochs: Those of the minibatches of each epoch
        :return: what is logged of an iteration, of all processes
        """
        reductions = {"ratio_min": min, "ratio_max": max, "raw_action_max": max}
        minibatches = [row for epoch in epochs for row in epoch]
        # Most are those of all minibatches
        rows = {"approx_kl": epochs[-1], "loss": minibatches[-1:]}
        statistics = {
            name: reductions.get(name, np.mean)(th.stack([row[name] for row in rows.get(name, minibatches)]).tolist())
            for name in minibatches[-1]
        }
        statistics["raw_action_max"] = float(np.abs(self.rollout_buffer.actions).max())
        statistics["explained_variance"] = explained_variance(
            self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten()
        )
        if self.bounds_loss_coef == 0:
            del statistics["bounds_loss"]
        everyones = distributed.gather(statistics)
        return {name: float(reductions.get(name, np.mean)([theirs[name] for theirs in everyones])) for name in statistics}

    def _get_rollout(self) -> Any:
        """
        The whole rollout, on the device and shuffled.

        :raises ValueError: if one of its fields is not finite
        """
        data = next(self.rollout_buffer.get(batch_size=None))
        observations = data.observations if isinstance(data.observations, dict) else {"obs": data.observations}
        fields = {
            **{f"observations (`{key}`)": obs for key, obs in observations.items()},
            "actions": data.actions,
            # Non-finite rewards end up here, even if they are normalized
            "rewards (or values)": data.returns,
            "advantages": data.advantages,
        }
        for name, tensor in fields.items():
            if not th.isfinite(tensor).all():
                raise ValueError(f"NaN or inf in the {name} of the rollout: training stopped before it reached the weights")

        if self.normalize_advantage == "rollout":
            data = data._replace(advantages=distributed.normalize(data.advantages))
        return self._to_rollout(data)

    def _minibatches(self, n_transitions: int) -> list[slice]:
        """In the order of the (shuffled) rollout."""
        batch_size = distributed.share("batch_size", self.batch_size)
        return [slice(start, start + batch_size) for start in range(0, n_transitions, batch_size)]

    def _epoch_minibatches(self, epoch: int, n_transitions: int) -> Iterable[slice | th.Tensor]:
        # The first epoch goes through the rollout in its order, so that its first ratio is exactly one
        return self._minibatches(n_transitions) if epoch == 0 else self._shuffled_minibatches(n_transitions)

    def _shuffled_minibatches(self, n_transitions: int) -> Iterator[th.Tensor]:
        return iter(th.randperm(n_transitions, device=self.device).split(distributed.share("batch_size", self.batch_size)))

    def pretrain(
        self: SelfFlowOnPolicyAlgorithm,
        dataset: Dataset | list[Dataset] | None = None,
        gradient_steps: int = 50_000,
        learning_rate: float | Schedule = 1e-3,
        batch_size: int = 256,
        ema_decay: float = 0.995,
        dataset_kwargs: dict[str, Any] | None = None,
        callback: MaybeCallback = None,
        log_interval: int | None = OFFLINE_LOG_INTERVAL,
        tb_log_name: str = "pretrain",
        progress_bar: bool = False,
    ) -> SelfFlowOnPolicyAlgorithm:
        """
        Clone the behavior of a dataset with the actor, by flow matching (as :class:`~sb3_flow.flow_bc.FlowBC` does).
        Observations and actions are enough. In the end, also of an interrupted one, the actor is an exponential moving average
        of its weights, and from then on the policy normalizes observations by the statistics of the dataset. (A
        ``VecNormalize`` that has not seen anything begins with them, but goes on with what it sees: it is not needed.)

        :param dataset: What to clone, see :func:`sb3_flow.offline.datasets.load_dataset`. That of the constructor if None
        :param gradient_steps: Number of gradient steps
        :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0)
        :param batch_size: Minibatch size for each gradient step (of all processes together)
        :param ema_decay: Decay of the average, for one gradient step
        :param dataset_kwargs: Keyword arguments of ``OfflineAlgorithm.set_dataset``: what to hold out for validation, ...
            Those of the constructor if the dataset is that of the constructor
        :param callback: callback(s) called at every gradient step. To them the model is the clone: what they evaluate is the
            average, and what they save is a model of this algorithm
        :param log_interval: The number of gradient steps before logging
        :param tb_log_name: the name of the run for TensorBoard logging
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the model, with the clone as its actor
        :raises ValueError: if there is no dataset, or it does not fit the spaces of the environment, naming the field and the
            row, or an argument is out of its range
        """
        # Datasets are for those who have one
        from sb3_flow.on_policy.pretraining import ActorCloning

        if dataset is None:
            dataset, dataset_kwargs = self.dataset, self.dataset_kwargs | (dataset_kwargs or {})
        if dataset is None:
            raise ValueError("There is no dataset: pass `dataset`")
        if self.env is None:
            raise ValueError("There is no environment: pass `env` to `load()`, or call `set_env()`")
        gradient_steps = to_int("gradient_steps", gradient_steps, at_least=1)
        cloning = ActorCloning(
            self,
            to_float("ema_decay", ema_decay, DECAY),
            dataset=dataset,
            dataset_kwargs=dataset_kwargs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            tensorboard_log=self.tensorboard_log,
            verbose=self.verbose,
            device=self.device,
        )
        if self._custom_logger:
            cloning.set_logger(self.logger)
        try:
            cloning.learn_offline(gradient_steps, callback, log_interval, tb_log_name, progress_bar=progress_bar)
        finally:
            # (Ctrl-C, or a callback that stops it)
            if cloning._n_offline_updates > 0:
                self.policy.load_actor(cloning.policy.average.module.state_dict())
                # (the critic begins now)
                self._n_iterations = 0
        return self

    @classmethod
    def from_flow_bc(
        cls: type[SelfFlowOnPolicyAlgorithm],
        clone: "FlowBC",
        env: GymEnv | str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SelfFlowOnPolicyAlgorithm:
        """
        A new model with the flow of a :class:`~sb3_flow.flow_bc.FlowBC` as its actor: both predict the same (but for the noise
        that DPPO adds at each step).

        :param clone: The model that has cloned a dataset
        :param env: The environment to learn from, that of the clone if None
        :param policy_kwargs: Arguments of the policy, but for those of the flow network, which are the clone's:
            ``net_arch=dict(vf=[...])`` is the value network's
        :param kwargs: Further ones of the constructor
        :return: the model
        :raises ValueError: if the clone is no FlowBC, acts in chunks, has a policy of its own or other spaces than the
            environment, or an argument is not the clone's
        """
        from sb3_flow.flow_bc import FlowBC

        if not isinstance(clone, FlowBC):
            raise ValueError(f"`clone` must be a FlowBC model, it is a {type(clone).__name__}")
        aliases: dict[Any, str] = {policy_class: name for name, policy_class in FlowBC.policy_aliases.items()}
        if type(clone.policy) not in aliases:
            raise ValueError(f"`clone` must have one of FlowBC's policies, it has a {type(clone.policy).__name__}")
        for name in ("dataset", "dataset_kwargs", "pretrain_steps"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` must not be given: the actor is that of the clone. `pretrain()` goes on with it")
        if clone.chunk_size > 1:
            raise ValueError(f"`clone` must have a `chunk_size` of 1, it is {clone.chunk_size}")
        env = clone.get_env() if env is None else env
        if env is None:
            raise ValueError("There is no environment: pass `env`")
        alias = aliases[type(clone.policy)]
        # (the policies of subclasses are flow policies, which mypy does not see)
        policy_class: Any = cls.policy_aliases[alias]
        given = {name: value for name, value in (policy_kwargs or {}).items() if value is not None}
        of_clone, flow_arch = policy_class.arguments_of_clone(clone.policy), clone.policy.bc_flow.net_arch
        net_arch: Any = to_net_arch(given.get("net_arch", {}), ("pi", "vf"))
        net_arch = net_arch if isinstance(net_arch, dict) else dict(pi=net_arch, vf=net_arch)
        for name, value, wanted in [
            ("net_arch", net_arch.get("pi", flow_arch), flow_arch),
            *((name, given.get(name, wanted), wanted) for name, wanted in of_clone.items()),
        ]:
            if value != wanted:
                raise ValueError(f"`policy_kwargs`: `{name}` must be the clone's, {wanted}, it is {value}")
        policy_kwargs = {**given, **of_clone, "net_arch": {**policy_class.DEFAULT_NET_ARCH, **net_arch, "pi": flow_arch}}
        model = cls(alias, env, policy_kwargs=policy_kwargs, **kwargs)
        assert model.env is not None
        check_for_correct_spaces(model.env, clone.observation_space, clone.action_space)
        flow = clone.policy.bc_flow
        model.policy.action_net.load_state_dict(flow.network.state_dict())
        model.policy.pi_features_extractor.load_state_dict(flow.features_extractor.state_dict())
        # (a moving average begins there too)
        model.policy.load_actor(model.policy._actor().state_dict())
        model._n_pretrain_updates = clone._n_offline_updates
        return model

    def learn(
        self: SelfFlowOnPolicyAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "OnPolicyAlgorithm",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfFlowOnPolicyAlgorithm:
        """
        Return a trained model: one that learns from rewards, after what remains of the ``pretrain_steps``.

        :param total_timesteps: The total number of samples (env steps) to train on
        :param callback: callback(s) called at every step with state of the algorithm (not while it is pretrained).
        :param log_interval: for on-policy algos (e.g., PPO, A2C, ...) this is the number of
            training iterations (i.e., log_interval * n_steps * n_envs timesteps) before logging
        :param tb_log_name: the name of the run when using TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        """
        remaining = self.pretrain_steps - self._n_pretrain_updates
        if self.dataset is not None and self.pretrain_steps == self._n_pretrain_updates == 0:
            raise ValueError(
                "`pretrain_steps` must be positive to learn from a `dataset` first, it is 0. Or call `pretrain()`"
            )
        if remaining > 0 and self.dataset is None:
            raise ValueError(
                f"{remaining} of the `pretrain_steps` are left, but the dataset was given as arrays, which are not saved: "
                "call `pretrain()` with it"
            )
        if remaining > 0:
            self.pretrain(gradient_steps=remaining, tb_log_name=f"{tb_log_name}_pretrain", progress_bar=progress_bar)
        return self._learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    @learns_together
    def _learn(self: SelfFlowOnPolicyAlgorithm, total_timesteps: int, *args: Any) -> SelfFlowOnPolicyAlgorithm:
        return super().learn(total_timesteps, *args)


def not_finite(statistics: dict[str, float]) -> str:
    losses = dict(policy="policy_gradient_loss", value="value_loss", bounds="bounds_loss")
    parts = ", ".join(f"{name} loss: {statistics[key]}" for name, key in losses.items())
    return f"The gradient is not finite ({parts}): training stopped before it reached the weights"
