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

#: Those of SB3's ``VecNormalize``: the bound on normalized observations, and what is added to their variance
CLIP_OBS, EPSILON = 10.0, 1e-8
#: Decay of the moments of the returns, for one rollout
DECAY = 0.9
#: Least variance of the returns
MIN_VAR = 1e-4


class RunningNormalization(nn.Flatten):
    """
    Flatten, subtract the mean of all that was seen, and divide by its standard deviation.

    :param n_features: Number of features
    """

    mean: th.Tensor
    var: th.Tensor
    count: th.Tensor

    def __init__(self, n_features: int):
        super().__init__()
        self.register_buffer("mean", th.zeros(n_features))
        self.register_buffer("var", th.ones(n_features))
        self.register_buffer("count", th.zeros((), dtype=th.float64))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (batch, ...)
        :return: normalized, within ±10, (batch, n_features)
        """
        return ((super().forward(x) - self.mean) * (self.var + EPSILON).rsqrt()).clamp(-CLIP_OBS, CLIP_OBS)

    @th.no_grad()
    def update(self, x: th.Tensor) -> None:
        """
        Take in what was seen, in all processes (Chan et al., 1983).

        :param x: (batch, ...), of as many in each process
        """
        # Moments about the former mean
        x = super().forward(x).double() - self.mean
        first, second = distributed.mean(th.stack([x.mean(0), x.square().mean(0)]))
        count = self.count + len(x) * distributed.world_size()
        weight = 1 - self.count / count
        shift = weight * first
        self.var.copy_(((1 - weight) * self.var + weight * second - shift.square()).clamp(min=0))
        self.mean += shift
        self.count.copy_(count)


class NormalizedFlattenExtractor(FlattenExtractor):
    """
    SB3's ``FlattenExtractor`` with normalized features, the default of "MlpPolicy".

    :param observation_space: The observation space of the environment
    """

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space)
        # (others are one-hot)
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
    SB3's ``CombinedExtractor`` with the features of vectors normalized, the default of "MultiInputPolicy".

    :param observation_space: The observation space of the environment
    :param cnn_output_dim: Number of features to output from each CNN submodule(s)
    :param normalized_image: Whether to assume that the image is already normalized or not, see ``CombinedExtractor``
    """

    def __init__(self, observation_space: spaces.Dict, cnn_output_dim: int = 256, normalized_image: bool = False):
        super().__init__(observation_space, cnn_output_dim, normalized_image)
        for key, subspace in observation_space.spaces.items():
            if isinstance(subspace, spaces.Box) and isinstance(self.extractors[key], nn.Flatten):
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
    Mean and standard deviation of returns, for a value network whose own output is normalized, with PopArt
    (https://arxiv.org/abs/1602.07714): when they change, the last layer does too, so that the values stay as they are.
    """

    mean: th.Tensor
    std: th.Tensor
    weight: th.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("mean", 0.0), ("std", 1.0), ("weight", 0.0), ("first", 0.0), ("second", 0.0)):
            self.register_buffer(name, th.tensor(value, dtype=th.float64))

    def forward(self, outputs: th.Tensor) -> th.Tensor:
        """
        :param outputs: of the last layer
        :return: values
        """
        return outputs * self.std.to(outputs) + self.mean.to(outputs)

    @th.no_grad()
    def update(self, returns: th.Tensor, last_layer: nn.Linear) -> None:
        """
        Take in the returns of a rollout, in all processes.

        :param returns: (batch,)
        :param last_layer: Of the value network
        """
        returns = returns.double()
        first, second = distributed.mean(th.stack([returns.mean(), returns.square().mean()]))
        for average, value in ((self.weight, 1.0), (self.first, first), (self.second, second)):
            average.mul_(DECAY).add_((1 - DECAY) * value)
        mean, std = self.mean.clone(), self.std.clone()
        self.mean.copy_(self.first / self.weight)
        self.std.copy_((self.second / self.weight - self.mean.square()).clamp(min=MIN_VAR).sqrt())
        last_layer.weight.mul_((std / self.std).to(last_layer.weight))
        last_layer.bias.mul_(std.to(last_layer.bias)).add_((mean - self.mean).to(last_layer.bias)).div_(
            self.std.to(last_layer.bias)
        )
