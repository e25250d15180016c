"""
Levers that the package does not have: `python benchmarks/ablations.py` measures those for FPO, and
`python benchmarks/tune.py` has PPO's.
"""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_flow import FPO
from sb3_flow.common.normalization import ValueNormalization
from sb3_flow.common.optimizers import make_optimizer
from sb3_flow.envs.envpool import EnvPoolVecEnv
from sb3_flow.fpo.fpo import FlowRollout
from sb3_flow.fpo.policies import FlowPolicy

#: Steps for which colored noise is drawn at once
HORIZON = 1000


def colored_noise(exponent: float, n_steps: int, n_series: int, generator: np.random.Generator) -> np.ndarray:
    """
    :param exponent: Of the spectrum, 1 / frequency ** exponent
    :param n_steps: Length of each series
    :param n_series: Number of independent series
    :param generator: Source of the randomness
    :return: each value standard normal by itself, (n_steps, n_series)
    """
    frequencies = np.fft.rfftfreq(n_steps)
    # (the mean of a series has the amplitude of the lowest frequency)
    amplitudes = np.maximum(frequencies, frequencies[1]) ** (-exponent / 2)
    parts = generator.standard_normal((2, n_series, len(frequencies))) * amplitudes
    # The first and, of an even length, the last one are real
    is_real = np.zeros(len(frequencies), dtype=bool)
    is_real[0], is_real[-1] = True, n_steps % 2 == 0
    parts[0, :, is_real] *= np.sqrt(2)
    parts[1, :, is_real] = 0
    # Each complex frequency counts twice in the variance of the series, with half of its parts' variances
    variance = 2 * ((2 - is_real) * amplitudes**2).sum() / n_steps**2
    return np.fft.irfft(parts[0] + 1j * parts[1], n_steps).T / np.sqrt(variance)


class ColoredNoisePolicy(FlowPolicy):
    """
    The noise that the actions of a rollout start from is correlated over time, as in "Colored Noise in PPO"
    (https://arxiv.org/abs/2312.11091). That of a single action is standard normal as ever, so that nothing else changes.

    :param noise_exponent: Of the spectrum
    """

    def __init__(self, *args, noise_exponent: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.noise_exponent = noise_exponent
        self._noise = th.zeros(0)
        self._step = 0

    def _actions_and_values(self, obs: PyTorchObs, deterministic: bool) -> tuple[th.Tensor, th.Tensor]:
        if deterministic:
            return super()._actions_and_values(obs, deterministic)
        latent_pi, values = self._latent_pi_and_values(obs)
        return self._explore(latent_pi, self._next_noise(len(latent_pi))), values

    def _next_noise(self, n_envs: int) -> th.Tensor:
        self._step += 1
        if self._step >= len(self._noise):
            # (seeded by torch, as all else in the policy)
            generator = np.random.default_rng(int(th.randint(2**31, ())))
            noise = colored_noise(self.noise_exponent, HORIZON, n_envs * self.action_net.action_dim, generator)
            self._noise = th.as_tensor(noise, dtype=th.float32).view(HORIZON, n_envs, -1)
            self._step = 0
        return self._noise[self._step]


class CategoricalValues(nn.Module):
    """
    A last layer of a value network whose output is a histogram (HL-Gauss, https://arxiv.org/abs/2403.03950), of values that
    are normalized by the returns.

    :param latent_dim: Number of features
    :param limit: The values are within ± this
    :param n_bins: Number of bins
    """

    edges: th.Tensor
    centers: th.Tensor

    def __init__(self, latent_dim: int, limit: float = 5.0, n_bins: int = 101):
        super().__init__()
        self.linear = nn.Linear(latent_dim, n_bins)
        edges = th.linspace(-limit, limit, n_bins + 1)
        self.register_buffer("edges", edges)
        self.register_buffer("centers", (edges[1:] + edges[:-1]) / 2)
        self.sigma = 0.75 * 2 * limit / n_bins
        self.logits = th.zeros(0)

    def forward(self, latent: th.Tensor) -> th.Tensor:
        self.logits = self.linear(latent)
        return (self.logits.softmax(dim=-1) * self.centers).sum(dim=-1, keepdim=True)

    def loss(self, targets: th.Tensor) -> th.Tensor:
        """
        :param targets: Normalized values, (batch,)
        :return: cross entropy of what was computed last, mean over the batch
        """
        targets = targets.clamp(self.centers[0], self.centers[-1])
        below = th.special.ndtr((self.edges - targets.unsqueeze(-1)) / self.sigma)
        shares = below.diff(dim=-1) / (below[:, -1:] - below[:, :1])
        return F.cross_entropy(self.logits, shares)


class ReturnStatistics(ValueNormalization):
    """There is no last layer to be rescaled: the epochs that follow fit the values to the new statistics."""

    def update(self, returns: th.Tensor, last_layer: nn.Module) -> None:
        self.returns.update(returns.unsqueeze(1))


class CategoricalValuePolicy(FlowPolicy):
    """Its values are the means of histograms."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.value_net: Any = CategoricalValues(self.mlp_extractor.latent_dim_vf)
        self.init_weights(self.value_net.linear, gain=1)
        self.value_normalization = ReturnStatistics()
        self.optimizer = make_optimizer(self.optimizer_class, self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class CategoricalValueFPO(FPO):
    """FPO with categorical values, see :class:`CategoricalValuePolicy`."""

    def _value_loss(self, values: th.Tensor, batch: FlowRollout, clip_range_vf: Any) -> th.Tensor:
        normalization = self.policy.value_normalization
        assert normalization is not None
        value_net: Any = self.policy.value_net
        return value_net.loss((batch.returns - normalization.returns.mean) / normalization.std)


class SeparateNormsFPO(FPO):
    """The gradients of the flow network and of the rest are clipped by themselves."""

    def _backward(self, loss: th.Tensor, only_critic: bool = False) -> th.Tensor:
        self.policy.optimizer.zero_grad()
        loss.backward()
        actor = set(self.policy.action_net.parameters())
        parts = [*actor], [parameter for parameter in self.policy.parameters() if parameter not in actor]
        max_grad_norm = np.inf if self.max_grad_norm is None else self.max_grad_norm
        return th.stack([nn.utils.clip_grad_norm_(part, max_grad_norm) for part in parts]).norm()


class AdaptiveRateFPO(FPO):
    """
    The learning rate follows the pseudo-KL divergence, as in FPO++ (https://arxiv.org/abs/2602.02481) for motion tracking.

    :param desired_kl: Where it stays as it is. That of the defaults on HalfCheetah-v5
    """

    def __init__(self, *args, desired_kl: float = 0.0015, **kwargs):
        self.desired_kl = desired_kl
        super().__init__(*args, **kwargs)
        self.rate = float(self.lr_schedule(1))

    def _update_learning_rate(self, optimizers: Any) -> None:
        for group in optimizers.param_groups:
            group["lr"] = self.rate
        self.logger.record("train/learning_rate", self.rate)

    def train(self) -> None:
        super().train()
        kl = self.logger.name_to_value["train/approx_kl"]
        if kl > 2 * self.desired_kl:
            self.rate = max(self.rate / 1.5, 1e-5)
        elif kl < self.desired_kl / 2:
            self.rate = min(self.rate * 1.5, 1e-2)


class StaggeredEnvPool(EnvPoolVecEnv):
    """The first episodes end one after the other, so that a rollout sees all parts of an episode from then on."""

    def reset(self) -> Any:
        self._full_limit = int(np.max(self._limit))
        self._limit = np.linspace(0, self._full_limit, self.num_envs + 1)[1:].astype(int)
        return super().reset()

    def step_wait(self) -> Any:
        result = super().step_wait()
        self._limit = np.where(result[2], self._full_limit, self._limit)
        return result


class RPOPolicy(ActorCriticPolicy):
    """
    PPO's policy in Robust Policy Optimization (https://arxiv.org/abs/2212.07536): uniform noise on the means of the actions
    that an update evaluates, so that the distribution does not become narrow.

    :param rpo_alpha: Largest noise
    """

    def __init__(self, *args, rpo_alpha: float = 0.5, **kwargs):
        self.rpo_alpha = rpo_alpha
        self._evaluates = False
        super().__init__(*args, **kwargs)

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        self._evaluates = True
        try:
            return super().evaluate_actions(obs, actions)
        finally:
            self._evaluates = False

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        distribution = super()._get_action_dist_from_latent(latent_pi)
        if not self._evaluates:
            return distribution
        assert isinstance(distribution, DiagGaussianDistribution)
        means = distribution.distribution.mean
        return distribution.proba_distribution(means + self.rpo_alpha * (2 * th.rand_like(means) - 1), self.log_std)
