"""
Normalization within a policy: of observations by their running statistics, and of values by those of the returns.

Statistics only change between a rollout and the next, so that the policy that is updated is the one that collected it.
"""

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from torch import nn

from sb3_flow import distributed

#: Bound on normalized observations, that of SB3's ``VecNormalize``
CLIP_OBS = 10.0
#: What is added to the variance of observations, as there
EPSILON = 1e-8
#: Weight of the returns of the last rollout: those of former policies are forgotten
LAST_ROLLOUT = 0.2
#: Least standard deviation of returns
MIN_STD = 1e-2


class RunningStatistics(nn.Module):
    """
    Mean and variance of what was seen.

    :param n_features: Number of features
    :param last_weight: Weight of what was seen last, beside zero and one, which they start with. None if all counts alike
    """

    mean: th.Tensor
    var: th.Tensor
    count: th.Tensor

    def __init__(self, n_features: int, last_weight: float | None = None):
        super().__init__()
        self.last_weight = last_weight
        self.register_buffer("mean", th.zeros(n_features))
        self.register_buffer("var", th.ones(n_features))
        self.register_buffer("count", th.zeros(()))

    def reset(self) -> None:
        """Forget all that was seen."""
        self.mean.zero_()
        self.var.fill_(1.0)
        self.count.zero_()

    @th.no_grad()
    def update(self, x: th.Tensor) -> None:
        """
        Take in what was seen, in all processes (Chan et al., 1983).

        :param x: (batch, n_features), of as many in each process
        :raises ValueError: if it is too large for a finite variance, before anything has changed
        """
        n_seen = len(x) * distributed.world_size()
        weight = n_seen / (self.count + n_seen) if self.last_weight is None else self.last_weight
        mean = distributed.mean(x.mean(0))
        var = distributed.mean((x - mean).square().mean(0))
        shift = mean - self.mean
        var = self.var.lerp(var + (1 - weight) * shift.square(), weight)
        if not th.isfinite(var).all():
            raise ValueError("Observations or returns are too large to be normalized: their variance is not finite")
        self.count += n_seen
        self.var.copy_(var)
        self.mean += weight * shift


class RunningNormalization(nn.Flatten):
    """
    Flatten, subtract the mean of what was seen, and divide by its standard deviation.

    :param n_features: Number of features
    """

    def __init__(self, n_features: int):
        super().__init__()
        self.statistics = RunningStatistics(n_features)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (batch, ...)
        :return: within ±10, (batch, n_features)
        """
        mean, var = self.statistics.mean, self.statistics.var
        return ((super().forward(x) - mean) * (var + EPSILON).rsqrt()).clamp(-CLIP_OBS, CLIP_OBS)

    def update(self, x: th.Tensor) -> None:
        """
        :param x: (batch, ...), of as many in each process
        """
        self.statistics.update(super().forward(x))


class NormalizedFlattenExtractor(FlattenExtractor):
    """
    SB3's ``FlattenExtractor`` with normalized features (those of a ``Box``: others are one-hot).

    :param observation_space: The observation space of the environment
    """

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space)
        if isinstance(observation_space, spaces.Box):
            self.flatten = RunningNormalization(self.features_dim)

    def update(self, observations: th.Tensor) -> None:
        """
        :param observations: of a rollout, preprocessed
        """
        if isinstance(self.flatten, RunningNormalization):
            self.flatten.update(observations)


class NormalizedCombinedExtractor(CombinedExtractor):
    """
    SB3's ``CombinedExtractor`` with normalized features, but those of images (and what is one-hot).

    :param observation_space: The observation space of the environment
    :param cnn_output_dim: Number of features to output from each CNN submodule(s)
    :param normalized_image: Whether to assume that the image is already normalized or not, see ``CombinedExtractor``
    """

    def __init__(self, observation_space: spaces.Dict, cnn_output_dim: int = 256, normalized_image: bool = False):
        super().__init__(observation_space, cnn_output_dim, normalized_image)
        for key, subspace in observation_space.spaces.items():
            if isinstance(subspace, spaces.Box) and type(self.extractors[key]) is nn.Flatten:
                self.extractors[key] = RunningNormalization(get_flattened_obs_dim(subspace))

    def update(self, observations: dict[str, th.Tensor]) -> None:
        """
        :param observations: of a rollout, preprocessed
        """
        for key, extractor in self.extractors.items():
            if isinstance(extractor, RunningNormalization):
                extractor.update(observations[key])


class ValueNormalization(nn.Module):
    """
    The output of a value network in units of the standard deviation of the returns, from their mean, as PopArt has it
    (https://arxiv.org/abs/1602.07714): when these change, the last layer does too, so that the values stay what they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.returns = RunningStatistics(1, LAST_ROLLOUT)

    @property
    def std(self) -> th.Tensor:
        """Standard deviation of the returns, (1,)."""
        return self.returns.var.sqrt().clamp(min=MIN_STD)

    def forward(self, outputs: th.Tensor) -> th.Tensor:
        """
        :param outputs: of the last layer, (batch, 1)
        :return: values, (batch, 1)
        """
        return th.addcmul(self.returns.mean, outputs, self.std)

    @th.no_grad()
    def update(self, returns: th.Tensor, last_layer: nn.Linear) -> None:
        """
        :param returns: Those of a rollout, (batch,), of as many in each process
        :param last_layer: Of the value network
        :raises ValueError: if it is none whose outputs can be rescaled, or the returns are too large
        """
        if not isinstance(last_layer, nn.Linear) or last_layer.bias is None:
            raise ValueError(
                "`normalize_values` must be False: the last layer of the value network, which it rescales, must be an "
                f"nn.Linear with a bias, it is {last_layer}"
            )
        mean, std = self.returns.mean.clone(), self.std
        self.returns.update(returns.unsqueeze(1))
        last_layer.weight *= std / self.std
        last_layer.bias.copy_((last_layer.bias * std + mean - self.returns.mean) / self.std)
