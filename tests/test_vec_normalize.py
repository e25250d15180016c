import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

from sb3_flow import FPO


def test_vec_normalize(tmp_path):
    """The buffer holds normalized observations, and the statistics are saved and loaded as for PPO."""
    env = VecNormalize(make_vec_env("Pendulum-v1", 4, seed=0), clip_obs=10.0)
    model = FPO("MlpPolicy", env, n_steps=128, batch_size=64, n_epochs=1, seed=0, device="cpu").learn(1024)
    observations = model.rollout_buffer.observations.reshape(-1, 3)
    # The third one of Pendulum, the velocity, is in [-8, 8] before normalization
    assert 0.3 < observations[:, 2].std() < 2
    assert np.abs(model.rollout_buffer.returns).max() < 50

    env.save(tmp_path / "stats.pkl")
    model.save(tmp_path / "model.zip")
    test_env = VecNormalize.load(tmp_path / "stats.pkl", make_vec_env("Pendulum-v1", 1, seed=5))
    test_env.training = False
    loaded = FPO.load(tmp_path / "model.zip", env=test_env, device="cpu")
    assert loaded.get_vec_normalize_env() is test_env
    obs = test_env.reset()
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    # Evaluation during training gets the statistics of the training env
    test_env.obs_rms.mean[:] = 100
    sync_envs_normalization(model.env, loaded.env)
    assert np.array_equal(test_env.obs_rms.mean, env.obs_rms.mean)
