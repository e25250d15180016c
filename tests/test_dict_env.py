import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_flow import FPO


def make_env(channel_last=True):
    env = SimpleMultiObsEnv(random_start=False, discrete_actions=False, channel_last=channel_last)
    return gym.wrappers.TimeLimit(env, 30)


@pytest.mark.parametrize("channel_last", [True, False])
@pytest.mark.parametrize("share_features_extractor", [True, False])
@pytest.mark.parametrize("wrapper", [None, "normalize", "stack"])
def test_dict_spaces(channel_last, share_features_extractor, wrapper):
    env = DummyVecEnv([lambda: make_env(channel_last)] * 2)
    if wrapper == "normalize":
        env = VecNormalize(env, norm_obs_keys=["vec"])
    elif wrapper == "stack":
        env = VecFrameStack(env, n_stack=2, channels_order={"vec": "last", "img": "last" if channel_last else "first"})
    policy_kwargs = dict(
        net_arch=[16],
        features_extractor_kwargs=dict(cnn_output_dim=8),
        share_features_extractor=share_features_extractor,
    )
    model = FPO("MultiInputPolicy", env, n_steps=32, batch_size=32, n_epochs=1, device="cpu", policy_kwargs=policy_kwargs)
    model.learn(128)
    obs = model.env.reset()
    assert np.isfinite(model.predict(obs, deterministic=False)[0]).all()


def test_policy_hint():
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        FPO("MlpPolicy", make_env())
