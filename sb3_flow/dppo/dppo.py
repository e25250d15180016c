import math
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    DictRolloutBufferSamples,
    GymEnv,
    MaybeCallback,
    PyTorchObs,
    RolloutBufferSamples,
    Schedule,
)

from sb3_flow import distributed
from sb3_flow.common.checks import FINITE_POSITIVE, FRACTION, check_floats, to_float, to_int
from sb3_flow.common.flow import check_choice
from sb3_flow.common.surrogates import surrogate_objective
from sb3_flow.dppo.buffers import ChainDictRolloutBuffer, ChainRolloutBuffer
from sb3_flow.dppo.policies import CnnPolicy, DPPOPolicy, MlpPolicy, MultiInputPolicy
from sb3_flow.offline.datasets import Dataset
from sb3_flow.on_policy.algorithm import ClipRanges, FlowOnPolicyAlgorithm, select, select_observations

SelfDPPO = TypeVar("SelfDPPO", bound="DPPO")

#: What arguments that only DPPO has may be, and which of them may be None
FLOATS = dict(gamma_denoising=FRACTION, first_clip_range=FINITE_POSITIVE)
OPTIONAL = ("first_clip_range",)
#: How the log-likelihood of a step is reduced over the action dimensions.
LOG_PROB_REDUCTIONS = ("sum", "mean")
#: How fast the trust regions grow over the steps, DPPO's ``clip_ploss_coef_rate``
CLIP_RATE = 3.0


class ChainRollout(NamedTuple):
    """Transitions of a rollout, and how their actions were made."""

    observations: PyTorchObs
    old_values: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    #: States of the chain before and after each of the steps that are trained, (n_transitions, n_steps + 1, action_dim)
    chains: th.Tensor

    def select(self, indices: th.Tensor | slice) -> "ChainRollout":
        observations, *rest = self
        return ChainRollout(select_observations(observations, indices), *(select(x, indices) for x in rest))


class OldPolicy(NamedTuple):
    """What the policy that collected a rollout makes of it, before the updates."""

    #: Of each step, (n_transitions, n_steps)
    log_probs: th.Tensor

    def select(self, indices: th.Tensor | slice) -> "OldPolicy":
        return OldPolicy(select(self.log_probs, indices))


def step_log_probs(means: th.Tensor, states: th.Tensor, noise_std: float, reduction: str = "sum") -> th.Tensor:
    """
    Log-likelihoods of the steps of denoising chains.

    :param means: of the Gaussians, (batch, n_steps, action_dim)
    :param states: after each step, (batch, n_steps, action_dim)
    :param noise_std: Standard deviation of the Gaussians
    :param reduction: "sum" or "mean" over the action dimensions
    :return: (batch, n_steps)
    """
    log_probs = -0.5 * ((states - means) / noise_std).square() - math.log(noise_std) - 0.5 * math.log(2 * math.pi)
    return log_probs.sum(dim=-1) if reduction == "sum" else log_probs.mean(dim=-1)


class DPPO(FlowOnPolicyAlgorithm):
    """
    Diffusion Policy Policy Optimization (DPPO)

    PPO for flow policies whose steps from noise to action are noisy: each of them is an action of its own, with a Gaussian
    likelihood, and PPO's clipped ratio; all of them have the advantage of the action that they end in.

    Paper: https://arxiv.org/abs/2409.00588 (DPPO, for diffusion policies), https://arxiv.org/abs/2507.21053 (as the authors of
    FPO compare with it, for flow policies)
    Reference implementations: https://github.com/irom-princeton/dppo, https://github.com/akanazawa/fpo

    The defaults are what learns on most tasks. The settings of the papers are in ``sb3_flow.dppo.presets``.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, it can be a function
        of the current progress remaining (from 1 to 0)
    :param n_steps: The number of steps to run for each environment per update
        (i.e. rollout buffer size is n_steps * n_envs where n_envs is number of environment copies running in parallel)
        NOTE: n_steps * n_envs must be greater than 1 (because of the advantage normalization)
    :param batch_size: Minibatch size: transitions, with all steps of their chains (of all processes together, if ``torchrun``
        has started several)
    :param n_epochs: Number of epoch when optimizing the surrogate loss
    :param gamma: Discount factor
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator
    :param clip_range: Clipping parameter, it can be a function of the current progress
        remaining (from 1 to 0).
    :param clip_range_vf: Clipping parameter for the value function,
        it can be a function of the current progress remaining (from 1 to 0).
        This is a parameter specific to the OpenAI implementation. If None is passed (default),
        no clipping will be done on the value function.
        IMPORTANT: this clipping depends on the reward scaling.
    :param normalize_advantage: Whether to normalize or not the advantage, in each minibatch (True), or "rollout" to normalize
        it over the whole rollout
    :param vf_coef: Value function coefficient for the loss calculation
    :param max_grad_norm: The maximum value for the gradient clipping. If None, the gradient is not clipped.
    :param bounds_loss_coef: Coefficient of a loss on predicted actions far outside of the bounds of the action space, where
        rewards no longer depend on the action: see ``DPPOPolicy.bounds_loss``
    :param n_trained_steps: How many of the steps of a chain have a ratio, the last ones. All if None.
    :param gamma_denoising: Discount of the advantage for each step between a step and the action
    :param first_clip_range: Clipping parameter of the first step that is trained, from where that of the others grows to
        ``clip_range``, exponentially. That of all is ``clip_range`` if None.
    :param log_prob_reduction: How the log-likelihood of a step is reduced over the action dimensions: "sum", or "mean" (DPPO)
    :param rollout_buffer_class: Rollout buffer class to use, a :class:`.ChainRolloutBuffer`. If ``None``, it will be
        automatically selected.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param target_kl: Limit the KL divergence between updates, because the clipping is not enough to prevent large update
        see issue #213 (cf https://github.com/hill-a/stable-baselines/issues/213)
        By default, there is no limit on the kl div.
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
    :param policy_kwargs: additional arguments to be passed to the policy on creation. See :class:`.DPPOPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range, or unknown
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    # (that of the parent's parent is one of SB3's own)
    policy: DPPOPolicy  # type: ignore[assignment]
    rollout_buffer: ChainRolloutBuffer

    def __init__(
        self,
        policy: str | type[DPPOPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 5e-4,
        n_steps: int = 2048,
        batch_size: int = 128,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool | str = True,
        vf_coef: float = 0.5,
        max_grad_norm: float | None = 0.5,
        bounds_loss_coef: float = 0.3,
        n_trained_steps: int | None = None,
        gamma_denoising: float = 1.0,
        first_clip_range: float | None = None,
        log_prob_reduction: str = "sum",
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        critic_learning_rate: float | Schedule | None = None,
        critic_warmup: int = 0,
        dataset: Dataset | list[Dataset] | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        pretrain_steps: int = 0,
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
            learning_rate,
            n_steps,
            batch_size,
            n_epochs,
            gamma,
            gae_lambda,
            clip_range,
            clip_range_vf,
            normalize_advantage,
            # That of the steps does not depend on the policy
            0.0,
            vf_coef,
            max_grad_norm,
            bounds_loss_coef,
            rollout_buffer_class,
            rollout_buffer_kwargs,
            target_kl,
            critic_learning_rate,
            critic_warmup,
            dataset,
            dataset_kwargs,
            pretrain_steps,
            stats_window_size,
            tensorboard_log,
            policy_kwargs,
            verbose,
            seed,
            device,
        )
        self.n_trained_steps = n_trained_steps
        self.gamma_denoising = gamma_denoising
        self.first_clip_range = first_clip_range
        self.log_prob_reduction = log_prob_reduction
        # (rl-zoo3 loads models that will not train with a clip range of zero)
        last_clip_range = float(clip_range(1.0) if callable(clip_range) else clip_range)
        if first_clip_range is not None and to_float("first_clip_range", first_clip_range, FINITE_POSITIVE) > last_clip_range:
            raise ValueError(
                f"`first_clip_range` must be at most `clip_range` = {last_clip_range}, to which it grows over the steps, "
                f"it is {first_clip_range}"
            )

        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        check_choice("log_prob_reduction", self.log_prob_reduction, LOG_PROB_REDUCTIONS)
        check_floats(self, FLOATS, OPTIONAL)
        if self.n_trained_steps is not None:
            self.n_trained_steps = to_int("n_trained_steps", self.n_trained_steps, at_least=1)
        self._check_rollout_buffer_class()
        super()._check_arguments()

    def _check_rollout_buffer_class(self) -> None:
        is_dict = isinstance(self.observation_space, spaces.Dict)
        wanted = ChainDictRolloutBuffer if is_dict else ChainRolloutBuffer
        found = self.rollout_buffer_class
        if found is None:
            return
        if not (isinstance(found, type) and issubclass(found, wanted) and issubclass(found, DictRolloutBuffer) == is_dict):
            raise ValueError(f"`rollout_buffer_class` must be a {wanted.__name__} for these observations, it is {found!r}")

    def _setup_model(self) -> None:
        if self.rollout_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = ChainDictRolloutBuffer if is_dict else ChainRolloutBuffer
        super()._setup_model()
        self._count_trained_steps()

    def _count_trained_steps(self) -> int:
        n_flow_steps = self.policy.n_flow_steps
        n_trained_steps = n_flow_steps if self.n_trained_steps is None else self.n_trained_steps
        if n_trained_steps > n_flow_steps:
            raise ValueError(f"`n_trained_steps` must be at most `n_flow_steps` = {n_flow_steps}, it is {n_trained_steps}")
        return n_trained_steps

    def collect_rollouts(self, *args, **kwargs) -> bool:
        self.rollout_buffer.n_states = self._count_trained_steps() + 1
        return super().collect_rollouts(*args, **kwargs)

    def _to_rollout(self, data: RolloutBufferSamples | DictRolloutBufferSamples) -> ChainRollout:
        chains = data.old_log_prob.view(len(data.returns), -1, self.rollout_buffer.action_dim)
        return ChainRollout(data.observations, data.old_values, data.advantages, data.returns, chains)

    def _evaluate_old_policy(self, rollout: ChainRollout) -> OldPolicy:
        """
        :param rollout: The rollout, with the policy that collected it
        :return: what the updates compare their policy with
        """
        batches = [rollout.select(indices) for indices in self._minibatches(len(rollout.returns))]
        with th.no_grad():
            return OldPolicy(th.cat([self._evaluate_chains(batch)[1] for batch in batches]))

    def _evaluate_chains(self, batch: ChainRollout) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param batch: Transitions
        :return: estimated values, (batch, 1), log-likelihoods of the steps, (batch, n_steps), and the actions that they are
            on the way to, (batch, n_steps, action_dim)
        """
        values, means, actions = self.policy.evaluate_chains(batch.observations, batch.chains[:, :-1])
        log_probs = step_log_probs(means, batch.chains[:, 1:], self.policy.noise_std, self.log_prob_reduction)
        return values, log_probs, actions

    def _losses(
        self, batch: ChainRollout, old: OldPolicy, clip_ranges: ClipRanges, needs_kl: bool
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        :param batch: Transitions
        :param old: The same under the policy that collected the rollout
        :param clip_ranges: Sizes of the trust regions
        :param needs_kl: Whether the KL divergence is among the statistics
        :return: the loss, and what is logged of it
        """
        values, log_probs, actions = self._evaluate_chains(batch)
        # Ratio between old and new policy, one at the first iteration, for each step
        log_ratio = log_probs - old.log_probs
        ratio = log_ratio.exp()
        clip_range = self._clip_range_of_steps(float(clip_ranges.policy), ratio)
        policy_loss = self._policy_loss(ratio, batch.advantages, clip_range)
        value_loss = self._value_loss(values.flatten(), batch, clip_ranges.value)
        bounds_loss = self.policy.bounds_loss(actions).mean() if self.bounds_loss_coef > 0 else actions.new_zeros(())
        loss = policy_loss + self.vf_coef * value_loss + self.bounds_loss_coef * bounds_loss

        with th.no_grad():
            ratio_min, ratio_max = ratio.aminmax()
            statistics = dict(
                policy_gradient_loss=policy_loss.detach(),
                value_loss=value_loss.detach(),
                bounds_loss=bounds_loss.detach(),
                clip_fraction=((ratio - 1).abs() > clip_range).float().mean(),
                ratio_min=ratio_min,
                ratio_max=ratio_max,
                loss=loss.detach(),
            )
            if needs_kl:
                # Approximate form of reverse KL Divergence, see Schulman's blog: http://joschu.net/blog/kl-approx.html
                statistics["approx_kl"] = (ratio - 1 - log_ratio).mean()
        return loss, statistics

    def _policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
        """
        PPO's clipped objective of each step, to be minimised. The action is that of the last one: what the others do is
        discounted.

        :param ratio: (batch, n_steps)
        :param advantages: (batch,)
        :param clip_range: Size of the trust region, or that of each step
        :return: mean over the batch and the steps
        """
        if self.normalize_advantage is True:
            advantages = distributed.normalize(advantages)
        n_left = th.arange(ratio.shape[1] - 1, -1, -1, device=ratio.device)
        advantages = advantages.unsqueeze(1) * self.gamma_denoising**n_left
        return -surrogate_objective(ratio, advantages, clip_range).mean()

    def _clip_range_of_steps(self, clip_range: float, ratio: th.Tensor) -> float | th.Tensor:
        """
        :param clip_range: That of the last step
        :param ratio: (batch, n_steps)
        :return: that of each of them, from ``first_clip_range`` (or that of now, if it has become smaller) on
        """
        if self.first_clip_range is None or ratio.shape[1] == 1:
            return clip_range
        progress = th.linspace(0, 1, ratio.shape[1], device=ratio.device)
        growth = th.expm1(CLIP_RATE * progress) / math.expm1(CLIP_RATE)
        first_clip_range = min(self.first_clip_range, clip_range)
        return first_clip_range + (clip_range - first_clip_range) * growth

    def learn(
        self: SelfDPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "DPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDPPO:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
