import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_flow import DPPO, FPO, FQL


@pytest.mark.parametrize("device", ["cpu", "auto", pytest.param("cuda", marks=pytest.mark.skipif(
    not th.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
@pytest.mark.parametrize("algorithm", [FPO, DPPO, FQL])
def test_predict(algorithm, device):
    env = make_vec_env("Pendulum-v1", 2)
    model = algorithm("MlpPolicy", env, device=device)
    obs = env.reset()
    for deterministic in (True, False):
        action, state = model.predict(obs, deterministic=deterministic)
        assert isinstance(action, np.ndarray) and action.shape == (2, 1) and state is None
        action, _ = model.predict(obs[0], deterministic=deterministic)
        assert action.shape == (1,) and env.action_space.contains(action)
    single, _ = model.predict(obs[0], deterministic=True)
    both, _ = model.predict(obs, deterministic=True)
    assert np.allclose(single, both[0], atol=1e-6)
    evaluate_policy(model, env, n_eval_episodes=2)


@pytest.mark.parametrize("algorithm", [FPO, DPPO, FQL])
def test_deterministic_and_random(algorithm):
    model = algorithm("MlpPolicy", "Pendulum-v1", device="cpu", seed=0)
    obs = np.zeros((100, 3), dtype=np.float32)
    deterministic, _ = model.predict(obs, deterministic=True)
    assert np.allclose(deterministic, deterministic[0])
    assert len(np.unique(model.predict(obs, deterministic=False)[0])) > 50  # DPPO's clipped actions are the same


def test_mixing_gym_vecenv_api():
    env = gym.make("Pendulum-v1")
    model = FPO("MlpPolicy", env)
    with pytest.raises(ValueError, match="mixing Gym API"):
        model.predict(env.reset())
