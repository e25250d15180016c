import io
import pathlib
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    DictRolloutBufferSamples,
    GymEnv,
    MaybeCallback,
    PyTorchObs,
    RolloutBufferSamples,
    Schedule,
)
from torch.optim.swa_utils import AveragedModel

from sb3_flow import distributed
from sb3_flow.common.checks import DECAY, POSITIVE, check_floats, to_bool, to_float, to_int
from sb3_flow.common.cuda_graphs import (
    CapturedUpdate,
    Graphs,
    clone,
    copy_into,
    find_obstacle,
    global_state,
    has_replaced_methods,
    layout,
)
from sb3_flow.common.flow import (
    CFMLoss,
    check_choice,
    check_flow_steps,
    draw_pairs,
    flow_target,
    interpolate,
    rescale_error,
    squared_error,
    to_action,
    to_cfm_loss,
)
from sb3_flow.common.surrogates import RATIO_TYPES, TRUST_REGIONS, flow_ratio, surrogate_objective
from sb3_flow.fpo.policies import CnnPolicy, FlowPolicy, MlpPolicy, MultiInputPolicy
from sb3_flow.offline.datasets import Dataset
from sb3_flow.on_policy.algorithm import ClipRanges, FlowOnPolicyAlgorithm, not_finite, select, select_observations

SelfFPO = TypeVar("SelfFPO", bound="FPO")

#: What the captured graph of an update depends on (beside the policy and its optimizer)
IN_GRAPH = (
    "ent_coef", "vf_coef", "max_grad_norm", "bounds_loss_coef", "ratio_type", "trust_region", "cfm_loss_clip",
    "log_ratio_clip", "normalize_advantage", "target_kl", "critic_learning_rate",
)  # fmt: skip
#: What arguments that only FPO has may be, all of them None too
FLOATS = dict(cfm_loss_clip=POSITIVE, log_ratio_clip=POSITIVE, ema_decay=DECAY)


class FlowRollout(NamedTuple):
    """Transitions of a rollout, and where the CFM loss of each is estimated. Actions are raw."""

    observations: PyTorchObs
    old_values: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    #: The action taken and the baseline actions, (n_transitions, 1 + n_baseline_actions, 1, action_dim)
    actions: th.Tensor
    #: Points between each of them and the noise of each Monte-Carlo pair, and what the flow network should predict there,
    #: (n_transitions, 1 + n_baseline_actions, n_mc_samples, action_dim)
    x_t: th.Tensor
    targets: th.Tensor
    #: Timesteps of the pairs, and weights of the squared errors, (n_transitions, 1, n_mc_samples)
    timesteps: th.Tensor
    weights: th.Tensor

    def select(self, indices: th.Tensor | slice) -> "FlowRollout":
        observations, *rest = self
        return FlowRollout(select_observations(observations, indices), *(select(x, indices) for x in rest))


class OldPolicy(NamedTuple):
    """What the policy that collected a rollout makes of it, before the updates."""

    #: Output of the flow network, (n_transitions, 1 + n_baseline_actions, n_mc_samples, action_dim), and CFM losses
    outputs: th.Tensor
    losses: th.Tensor
    #: How unlikely the actions are, (n_transitions,)
    surprise: th.Tensor

    def select(self, indices: th.Tensor | slice) -> "OldPolicy":
        return OldPolicy(*(select(x, indices) for x in self))


class FPO(FlowOnPolicyAlgorithm):
    """
    Flow Policy Optimization (FPO)

    PPO for flow policies: the likelihood ratio of PPO is replaced by the exponential of the difference
    between the conditional flow matching losses of the old and of the current policy.

    Paper: https://arxiv.org/abs/2507.21053 (FPO), https://arxiv.org/abs/2602.02481 (FPO++)
    Reference implementation: https://github.com/akanazawa/fpo

    The defaults are what learns on most tasks. The settings of the papers are in ``sb3_flow.presets``.

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
        remaining (from 1 to 0). It means what it means for PPO with ``cfm_loss="elbo"``. With others the ratio is more
        sensitive, the papers have 0.05.
    :param clip_range_vf: Clipping parameter for the value function,
        it can be a function of the current progress remaining (from 1 to 0).
        This is a parameter specific to the OpenAI implementation. If None is passed (default),
        no clipping will be done on the value function.
        IMPORTANT: this clipping depends on the reward scaling.
    :param normalize_advantage: Whether to normalize or not the advantage, in each minibatch (True), or "rollout" to normalize
        it over the whole rollout (FPO++)
    :param ent_coef: Entropy coefficient for the loss calculation. The entropy is that of the actions squashed by a tanh, which
        is largest when they fill the bounds. It is estimated by the likelihoods of the actions under the flow
        (:meth:`.FlowPolicy.exploration_log_likelihood`), but its gradient is taken with the ratio, so that it is one only with
        ``cfm_loss="elbo"`` and baseline actions
    :param vf_coef: Value function coefficient for the loss calculation
    :param max_grad_norm: The maximum value for the gradient clipping. If None, the gradient is not clipped.
    :param bounds_loss_coef: Coefficient of a loss on predicted actions far outside of the bounds of the action space, where
        rewards no longer depend on the action: see ``FlowPolicy.bounds_loss``
    :param cfm_loss: The conditional flow matching loss, and how it is estimated: "elbo", whose log-ratio is one of
        likelihoods, "fpo" (as the authors' code of FPO), "fpo++", "fpo-humanoid", or a dict of the arguments of
        :class:`~sb3_flow.common.flow.CFMLoss`, where the others are those of "elbo".
    :param n_mc_samples: Number of Monte-Carlo pairs (noise, timestep) for each transition,
        drawn once per rollout. A small number biases the ratio upwards.
    :param n_baseline_actions: Number of further actions, drawn for each observation of the rollout from the policy that
        collected it, whose change in CFM loss is subtracted from that of the action taken: what changes the loss of all
        actions alike does not change the policy. Each one costs as much as the action itself. The papers have none.
    :param ratio_type: "averaged" for one ratio per transition (FPO), "per_sample" for one per Monte-Carlo pair (FPO++)
    :param trust_region: "ppo" for PPO's clipping, or "aspo" for PPO's where the advantage is positive and the quadratic
        penalty of SPO where it is negative (FPO++)
    :param cfm_loss_clip: Upper bound on the CFM losses before they are compared, no bound if None
    :param log_ratio_clip: Bound on the absolute value of the log-ratio, no bound if None. Where the advantage is negative,
        PPO's objective pushes an action away with a force proportional to its ratio, however large: this bounds it. It must
        be more than ``-log(1 - clip_range)``.
    :param ema_decay: Decay, for one iteration (a rollout and its epochs), of an exponential moving average of the actor
        (FPO++), which is then what predicts, is evaluated and is saved beside the actor. No average is kept if None (default).
    :param ema_start: Number of iterations before the averaging starts
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it will be automatically selected.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param target_kl: Limit the pseudo-KL divergence between updates: the mean squared difference between the
        noise that the old and the current policy predict (FPO++).
        By default, there is no limit.
    :param critic_learning_rate: The learning rate of the value function, if it is not that of the actor. It can be a function
        of the current progress remaining (from 1 to 0). The gradients of the two are then clipped separately. (A features
        extractor that they share is the actor's.)
    :param critic_warmup: Number of first iterations (a rollout and its epochs) in which only the value function learns, for an
        actor that is good already. They are those since the model was made or, if it was later, pretrained
    :param dataset: What :meth:`learn` clones first, see :meth:`pretrain`
    :param dataset_kwargs: Keyword arguments of ``OfflineAlgorithm.set_dataset``
    :param pretrain_steps: Number of gradient steps on the dataset that :meth:`learn` starts with, see :meth:`pretrain`
    :param compile: On CUDA, run each forward pass of a rollout, and each update, as one captured graph: the same numbers, but
        for rounding. What cannot be captured (``target_kl``, networks and optimizers of your own, ...) runs as without it,
        with a warning that names it. On a CPU there are no graphs. It makes no difference to what is saved.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. See :class:`.FlowPolicy`
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
    policy: FlowPolicy  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[FlowPolicy],
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
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | None = 0.5,
        bounds_loss_coef: float = 0.3,
        cfm_loss: str | dict[str, str] | CFMLoss = "elbo",
        n_mc_samples: int = 4,
        n_baseline_actions: int = 2,
        ratio_type: str = "per_sample",
        trust_region: str = "ppo",
        cfm_loss_clip: float | None = None,
        log_ratio_clip: float | None = 0.5,
        ema_decay: float | None = None,
        ema_start: int = 500,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        critic_learning_rate: float | Schedule | None = None,
        critic_warmup: int = 0,
        dataset: Dataset | list[Dataset] | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        pretrain_steps: int = 0,
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
            learning_rate,
            n_steps,
            batch_size,
            n_epochs,
            gamma,
            gae_lambda,
            clip_range,
            clip_range_vf,
            normalize_advantage,
            ent_coef,
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

        # (a CFMLoss once it is checked)
        self.cfm_loss: Any = cfm_loss
        self.n_mc_samples = n_mc_samples
        self.n_baseline_actions = n_baseline_actions
        self.ratio_type = ratio_type
        self.trust_region = trust_region
        self.cfm_loss_clip = cfm_loss_clip
        self.log_ratio_clip = log_ratio_clip
        self.ema_decay = ema_decay
        self.ema_start = ema_start
        self.compile = compile
        self._graphs = Graphs()
        # (rl-zoo3 loads models that will not train with a clip range of zero)
        first_clip_range = float(clip_range(1.0) if callable(clip_range) else clip_range)
        log_ratio_clip = None if log_ratio_clip is None else to_float("log_ratio_clip", log_ratio_clip, POSITIVE)
        if log_ratio_clip is not None and np.exp(-log_ratio_clip) >= 1 - first_clip_range > 0:
            raise ValueError(
                f"`log_ratio_clip` must be more than -log(1 - clip_range) = {-np.log(1 - first_clip_range):.3g}, it is "
                f"{log_ratio_clip}: the ratio would never leave the trust region below"
            )

        if _init_setup_model:
            self._setup_model()
            self._check_flow_steps()

    def _check_arguments(self) -> None:
        self.cfm_loss = to_cfm_loss(self.cfm_loss)
        check_choice("ratio_type", self.ratio_type, RATIO_TYPES)
        check_choice("trust_region", self.trust_region, TRUST_REGIONS)
        for name, at_least in dict(n_mc_samples=1, ema_start=0, n_baseline_actions=0).items():
            setattr(self, name, to_int(name, getattr(self, name), at_least))
        check_floats(self, FLOATS, optional=FLOATS)
        self.compile = to_bool("compile", self.compile)
        super()._check_arguments()

    def _check_flow_steps(self) -> None:
        self.cfm_loss = to_cfm_loss(self.cfm_loss)
        check_flow_steps(self.cfm_loss, self.policy.prediction_type, self.policy.n_flow_steps)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.ema_decay is not None:
            self.policy.create_ema(self.ema_decay)
        self.policy.captures_forward = self.compile

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
        self.ema_decay = None if self.policy.ema is None else self.policy.ema_decay
        if "ema_decay" in self.policy_kwargs:
            self.policy_kwargs = self.policy_kwargs | dict(ema_decay=self.ema_decay)
        super().save(path, exclude, include)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_graphs"]

    def _to_rollout(self, data: RolloutBufferSamples | DictRolloutBufferSamples) -> FlowRollout:
        """
        Alg. 1, line 6: with Monte-Carlo pairs, drawn once.

        :param data: The whole rollout, on the device and shuffled
        :return: the same, and where the CFM losses are taken
        :raises ValueError: if the sampler has too few steps for the pairs
        """
        # They may have been changed since
        self._check_flow_steps()
        points = self._draw_points(data.observations, data.actions)
        return FlowRollout(data.observations, data.old_values, data.advantages, data.returns, **points)

    def _draw_points(self, observations: PyTorchObs, actions: th.Tensor) -> dict[str, th.Tensor]:
        """
        Draw baseline actions, and Monte-Carlo pairs for them and the actions taken: all that the CFM losses need but the
        network.

        :param observations: of the rollout
        :param actions: taken there, (n_transitions, action_dim)
        :return: actions, x_t, targets, timesteps and weights, as in :class:`FlowRollout`
        """
        prediction_type = self.policy.prediction_type
        shape = (len(actions), self.n_mc_samples, actions.shape[1])
        pairs = draw_pairs(shape, self.cfm_loss, prediction_type, self.policy.n_flow_steps, self.device)
        actions = actions.unsqueeze(1)
        if self.n_baseline_actions > 0:
            actions = th.cat([actions, self._draw_baseline_actions(observations, len(actions))], dim=1)
        # The pairs are the same for all actions of a transition
        actions = actions.unsqueeze(2)
        noise, timesteps, weights = (x.unsqueeze(1) for x in pairs)
        x_t = interpolate(actions, noise, timesteps)
        targets = flow_target(prediction_type, actions, noise).expand(x_t.shape).contiguous()
        return dict(actions=actions, x_t=x_t, targets=targets, timesteps=timesteps, weights=weights)

    def _draw_baseline_actions(self, observations: PyTorchObs, n_transitions: int) -> th.Tensor:
        """
        Draw further actions as the rollout was collected.

        :param observations: of the rollout
        :param n_transitions: Number of them
        :return: (n_transitions, n_baseline_actions, action_dim)
        """
        noise = th.randn((n_transitions, self.n_baseline_actions, self.rollout_buffer.action_dim), device=self.device)
        if self.cfm_loss.sampling == "stratified":
            n_opposite = self.n_baseline_actions // 2
            noise[:, n_opposite : 2 * n_opposite] = -noise[:, :n_opposite]
        minibatches = self._minibatches(n_transitions)
        with th.no_grad():
            return th.cat([self.policy.explore(select_observations(observations, i), noise[i]) for i in minibatches])

    def _evaluate_old_policy(self, rollout: FlowRollout) -> OldPolicy:
        """
        :param rollout: The rollout, with the policy that collected it
        :return: what the updates compare their policy with
        """
        batches = [rollout.select(indices) for indices in self._minibatches(len(rollout.actions))]
        with th.no_grad():
            outputs = [self._flow_output(batch) for batch in batches]
            losses = [self._cfm_loss(*pair) for pair in zip(outputs, batches, strict=True)]
        return OldPolicy(th.cat(outputs), th.cat(losses), self._surprise(rollout))

    def _surprise(self, rollout: FlowRollout) -> th.Tensor:
        """
        How unlikely the squashed actions are: the policy gradient of this "reward" is that of their entropy. It is the
        likelihood of the flow, not a CFM loss, whose Monte-Carlo estimate has several times the noise of what is to be seen.

        :param rollout: The rollout, with the policy that collected it
        :return: (n_transitions,), zero on average, and zero without a coefficient
        """
        if self.ent_coef == 0:
            return th.zeros_like(rollout.advantages)
        actions = rollout.actions[:, 0, 0]
        log_likelihoods = [
            self.policy.exploration_log_likelihood(select_observations(rollout.observations, indices), actions[indices])
            for indices in self._minibatches(len(actions))
        ]
        surprise = -th.cat(log_likelihoods) - self.policy.log_squashing(actions)
        return surprise - distributed.mean(surprise.mean())

    def _losses(
        self, batch: FlowRollout, old: OldPolicy, clip_ranges: ClipRanges, needs_kl: bool
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        The losses of Alg. 1 for a minibatch.

        :param batch: Transitions
        :param old: The same under the policy that collected the rollout
        :param clip_ranges: Sizes of the trust regions
        :param needs_kl: Whether the pseudo-KL divergence is among the statistics
        :return: the loss, and what is logged of it
        """
        values, outputs = self.policy.evaluate_flow(batch.observations, batch.x_t, batch.timesteps)
        cfm_losses = self._cfm_loss(outputs, batch)
        # Ratio between old and new policy, one at the first iteration
        ratio = flow_ratio(old.losses, cfm_losses, self.ratio_type, self.cfm_loss_clip, self.log_ratio_clip)
        policy_loss = self._policy_loss(ratio, batch.advantages, old.surprise, clip_ranges.policy)
        value_loss = self._value_loss(values.flatten(), batch, clip_ranges.value)
        bounds_loss = self._bounds_loss(outputs, batch)
        loss = policy_loss + self.vf_coef * value_loss + self.bounds_loss_coef * bounds_loss

        with th.no_grad():
            ratio_min, ratio_max = ratio.aminmax()
            statistics = dict(
                policy_gradient_loss=policy_loss.detach(),
                value_loss=value_loss.detach(),
                bounds_loss=bounds_loss.detach(),
                cfm_loss=cfm_losses[:, 0].mean(),
                clip_fraction=((ratio - 1).abs() > clip_ranges.policy).float().mean(),
                ratio_min=ratio_min,
                ratio_max=ratio_max,
                loss=loss.detach(),
            )
            if needs_kl:
                statistics["approx_kl"] = self._pseudo_kl(outputs - old.outputs, batch.timesteps)
        return loss, statistics

    def _policy_loss(
        self, ratio: th.Tensor, advantages: th.Tensor, surprise: th.Tensor, clip_range: float | th.Tensor
    ) -> th.Tensor:
        """
        Surrogate objective, to be minimised.

        :param ratio: (batch, 1) or (batch, n_mc_samples)
        :param advantages: (batch,)
        :param surprise: (batch,), see :meth:`_surprise`
        :param clip_range: Size of the trust region
        :return: mean over the batch
        """
        if self.normalize_advantage is True:
            advantages = distributed.normalize(advantages)
        advantages = advantages + self.ent_coef * surprise
        return -surrogate_objective(ratio, advantages.unsqueeze(1), clip_range, self.trust_region).mean()

    def _flow_output(self, batch: FlowRollout) -> th.Tensor:
        """Output of the flow network, (batch, 1 + n_baseline_actions, n_mc_samples, action_dim)."""
        return self.policy.flow_output(batch.observations, batch.x_t, batch.timesteps)

    def _cfm_loss(self, outputs: th.Tensor, batch: FlowRollout) -> th.Tensor:
        """
        :param outputs: Output of the flow network, (batch, 1 + n_baseline_actions, n_mc_samples, action_dim)
        :param batch:
        :return: CFM loss of each action and Monte-Carlo pair, (batch, 1 + n_baseline_actions, n_mc_samples)
        """
        return batch.weights * squared_error(outputs, batch.targets)

    def _bounds_loss(self, outputs: th.Tensor, batch: FlowRollout) -> th.Tensor:
        """Mean loss of the actions that the flow predicts where its CFM losses are taken (zero if it has no weight)."""
        if self.bounds_loss_coef == 0:
            return outputs.new_zeros(())
        actions = to_action(outputs, batch.x_t, batch.timesteps, self.policy.prediction_type)
        return self.policy.bounds_loss(actions).mean()

    def _pseudo_kl(self, output_change: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """Mean squared change of the predicted noise, FPO++."""
        return rescale_error(output_change, timesteps, self.policy.prediction_type, "noise").square().mean()

    def _end_iteration(self, observations: PyTorchObs) -> None:
        super()._end_iteration(observations)
        if self.policy.ema is not None:
            self.policy.update_ema(restart=self._n_iterations < self.ema_start)

    def _captured_updates(self, rollout: FlowRollout, old: OldPolicy, clip_ranges: ClipRanges) -> "CapturedUpdates | None":
        """
        :param rollout: The rollout
        :param old: The same under the policy that collected it
        :param clip_ranges: Sizes of the trust regions
        :return: updates of the policy in graphs, None if there are none
        """
        if not self.compile:
            return None
        graphs, policy = self._graphs, self.policy
        key = (
            [getattr(self, name) for name in IN_GRAPH],
            layout((rollout, old)),
            clip_ranges.value is None,
            global_state(),
            has_replaced_methods(self, FPO),
        )
        if not graphs.is_current(key, policy, policy.optimizer):
            graphs.restart(self._find_obstacle(), key, policy, policy.optimizer)
        if graphs.obstacle is not None:
            return None
        if "updates" not in graphs:
            graphs["updates"] = CapturedUpdates(self, rollout, old)
        updates = graphs["updates"]
        updates.set_inputs(rollout, old, clip_ranges)
        return updates

    def _find_obstacle(self) -> str | None:
        if has_replaced_methods(self, FPO):
            return f"{type(self).__name__} is an algorithm of its own"
        if self.target_kl is not None:
            return "`target_kl` is decided between the gradient and the step"
        if self.critic_learning_rate is not None:
            return "`critic_learning_rate` is that of a part of the policy"
        if type(self.policy) not in self.policy_aliases.values():
            return f"{type(self.policy).__name__} is a policy of its own"
        return find_obstacle(self.policy, [type(self.policy), AveragedModel], self.policy.optimizer)

    def learn(
        self: SelfFPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "FPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfFPO:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)


class CapturedUpdates:
    """
    Updates with minibatches of a rollout, as graphs of tensors that stay where they are: one for each size of a minibatch.

    :param model: The model
    :param rollout: The rollout
    :param old: The same under the policy that collected it
    """

    def __init__(self, model: FPO, rollout: FlowRollout, old: OldPolicy):
        self.model = model
        self.rollout, self.old = clone(rollout), clone(old)
        device = model.device
        self.clip_ranges = [th.zeros((), device=device) for _ in ClipRanges._fields]
        self.order = th.arange(len(rollout.actions), device=device)
        self.updates: dict[int, tuple[th.Tensor, CapturedUpdate]] = {}

    def set_inputs(self, rollout: FlowRollout, old: OldPolicy, clip_ranges: ClipRanges) -> None:
        """
        :param rollout: The rollout
        :param old: The same under the policy that collected it
        :param clip_ranges: Sizes of the trust regions
        """
        copy_into((self.rollout, self.old), (rollout, old))
        for static, value in zip(self.clip_ranges, clip_ranges, strict=True):
            static.fill_(0.0 if value is None else value)

    def __call__(self, indices: slice | th.Tensor) -> dict[str, th.Tensor]:
        """
        :param indices: Transitions of a minibatch
        :return: what is logged of it
        """
        indices = self.order[indices] if isinstance(indices, slice) else indices
        if len(indices) not in self.updates:
            self.updates[len(indices)] = self._create(indices)
        static, update = self.updates[len(indices)]
        static.copy_(indices)
        values = update()
        return dict(zip(update.names, values.unbind(), strict=True))

    def _create(self, indices: th.Tensor) -> tuple[th.Tensor, CapturedUpdate]:
        model, static = self.model, indices.clone()
        clip_range, clip_range_vf = self.clip_ranges
        clip_ranges = ClipRanges(clip_range, None if model.clip_range_vf is None else clip_range_vf)

        def losses() -> tuple[th.Tensor, dict[str, th.Tensor]]:
            return model._losses(self.rollout.select(static), self.old.select(static), clip_ranges, needs_kl=True)

        guards = model._graphs.guards
        return static, CapturedUpdate(model.policy.optimizer, losses, model._backward, model.device, guards)

    def check_finite(self) -> None:
        """
        :raises ValueError: if a gradient was not finite
        """
        failure = self.model._graphs.failure()
        if failure is not None:
            raise ValueError(not_finite(failure))
