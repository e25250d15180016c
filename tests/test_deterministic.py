import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flow import FPO


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_same_seed_same_run(sampler):
    """Parameters, rewards and predictions are bit-equal; another seed is another run."""
    results = []
    for seed in (7, 7, 8):
        env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=seed))
        policy_kwargs = dict(sampler=sampler, action_perturbation_std=0.05)
        model = FPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=3, seed=seed, device="cpu",
                    timestep_distribution="uniform", policy_kwargs=policy_kwargs)  # fmt: skip
        model.learn(512)
        actions, _ = model.predict(np.ones((5, 3), dtype=np.float32), deterministic=False)
        results.append((model.policy.parameters_to_vector(), model.rollout_buffer.rewards, actions))
    for first, second, other in zip(*results, strict=True):
        assert np.array_equal(first, second)
        assert not np.array_equal(first, other)


def test_train_and_eval_mode():
    """Rollouts and old losses are computed in evaluation mode, updates in training mode."""
    model = FPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, device="cpu")
    modes = []
    model.policy.action_net.register_forward_hook(
        lambda module, inputs, output: modes.append((module.training, th.is_grad_enabled()))
    )
    model.learn(64)
    # Two minibatches: old losses, then updates
    assert modes == [(False, False)] * 2 + [(True, True)] * 2
