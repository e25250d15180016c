import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage, is_vecenv_wrapped

from sb3_flow import FPO


def make_model(env, **policy_kwargs):
    policy_kwargs = dict(net_arch=[16], features_extractor_kwargs=dict(features_dim=16)) | policy_kwargs
    return FPO("CnnPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu", policy_kwargs=policy_kwargs)


def make_env(channel_first=False):
    return FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False, channel_first=channel_first)


@pytest.mark.parametrize("share_features_extractor", [True, False])
@pytest.mark.parametrize("channel_first", [True, False])
def test_cnn(tmp_path, share_features_extractor, channel_first):
    model = make_model(make_env(channel_first), share_features_extractor=share_features_extractor).learn(64)
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage) != channel_first
    obs, _ = make_env(channel_first).reset()
    action, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model.zip")
    loaded = FPO.load(tmp_path / "model.zip", device="cpu")
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], action)


def test_frame_stack_and_reward_normalization():
    env = VecNormalize(VecFrameStack(DummyVecEnv([make_env] * 2), 3), norm_obs=False)
    model = make_model(env).learn(128)
    assert model.observation_space.shape == (3, 40, 40)


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_which_loss_trains_which_features_extractor(share_features_extractor):
    policy = make_model(make_env(), share_features_extractor=share_features_extractor).policy
    action_dim = policy.action_net.action_dim
    obs, actions = th.randint(256, (4, 1, 40, 40), dtype=th.uint8), th.randn(4, action_dim)
    values, outputs = policy.evaluate_flow(obs, actions, th.randn(4, 3, action_dim), th.rand(4, 3))
    extractors = (policy.pi_features_extractor, policy.vf_features_extractor)
    for loss, own in [(outputs.square().mean(), 0), (values.square().mean(), 1)]:
        policy.zero_grad()
        loss.backward(retain_graph=True)
        touched = [all(parameter.grad is not None for parameter in extractor.parameters()) for extractor in extractors]
        assert touched == [share_features_extractor or own == 0, share_features_extractor or own == 1]
