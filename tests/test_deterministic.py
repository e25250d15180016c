import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_flow import FPO


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_same_seed_same_run(sampler):
    """Parameters, rewards and predictions are bit-equal; another seed is another run."""
    results = []
    for seed in (7, 7, 8):
        env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=seed))
        policy_kwargs = dict(sampler=sampler, action_perturbation_std=0.05)
        model = FPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=3, seed=seed, device="cpu",
                    cfm_loss=dict(timestep_distribution="uniform"), policy_kwargs=policy_kwargs)  # fmt: skip
        model.learn(512)
        actions, _ = model.predict(np.ones((5, 3), dtype=np.float32), deterministic=False)
        results.append((model.policy.parameters_to_vector(), model.rollout_buffer.rewards, actions))
    for first, second, other in zip(*results, strict=True):
        assert np.array_equal(first, second)
        assert not np.array_equal(first, other)


class BatchNormExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.batch_norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, observations):
        return self.dropout(self.batch_norm(observations))


def test_batch_norm_and_dropout():
    """Their statistics change in updates only, predictions do not depend on chance, and the first ratio is that of a
    network in evaluation mode over one in training mode."""
    model = FPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, device="cpu", seed=0,
                policy_kwargs=dict(features_extractor_class=BatchNormExtractor))  # fmt: skip
    batch_norm = model.policy.features_extractor.batch_norm
    _, callback = model._setup_learn(64)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
    assert batch_norm.num_batches_tracked == 0
    model.train()
    # Not in the pass that computes the old losses
    assert batch_norm.num_batches_tracked == 2
    obs = np.ones((5, 3), dtype=np.float32)
    assert np.array_equal(model.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_train_and_eval_mode():
    """Rollouts and old losses are computed in evaluation mode, updates in training mode."""
    kwargs = dict(n_baseline_actions=0, ent_coef=0.0)
    model = FPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, device="cpu", **kwargs)
    modes = []
    model.policy.action_net.register_forward_hook(
        lambda module, inputs, output: modes.append((module.training, th.is_grad_enabled()))
    )
    model.learn(64)
    # Ten steps of the sampler for each step of the environment, and two minibatches: old losses, then updates
    assert modes == [(False, False)] * (64 * 10 + 2) + [(True, True)] * 2
