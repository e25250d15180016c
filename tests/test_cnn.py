import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage, is_vecenv_wrapped
from torch.nn import functional as F

from sb3_flow import DPPO, FPO, FQL
from sb3_flow.common.networks import ImpalaCNN


def make_model(env, algorithm=FPO, **policy_kwargs):
    policy_kwargs = dict(net_arch=[16], features_extractor_kwargs=dict(features_dim=16)) | policy_kwargs
    kwargs = dict(n_steps=32, batch_size=32, n_epochs=1)
    if algorithm is FQL:
        kwargs = dict(buffer_size=100, learning_starts=50, batch_size=8, random_crop=3)
    return algorithm("CnnPolicy", env, seed=0, device="cpu", policy_kwargs=policy_kwargs, **kwargs)


def make_env(channel_first=False):
    return FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False, channel_first=channel_first)


@pytest.mark.parametrize("share_features_extractor", [True, False])
@pytest.mark.parametrize("channel_first", [True, False])
@pytest.mark.parametrize("algorithm", [FPO, DPPO, FQL])
def test_cnn(tmp_path, algorithm, share_features_extractor, channel_first):
    model = make_model(make_env(channel_first), algorithm, share_features_extractor=share_features_extractor).learn(64)
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage) != channel_first
    obs, _ = make_env(channel_first).reset()
    action, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model.zip")
    loaded = algorithm.load(tmp_path / "model.zip", device="cpu")
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], action)


def test_frame_stack_and_reward_normalization():
    env = VecFrameStack(DummyVecEnv([make_env] * 2), 3)
    assert make_model(VecNormalize(env, norm_obs=False)).learn(128).observation_space.shape == (3, 40, 40)
    # (replay buffers of SB3 hold images without normalization only)
    assert make_model(env, FQL).learn(64).observation_space.shape == (3, 40, 40)


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_which_loss_trains_which_features_extractor(share_features_extractor):
    policy = make_model(make_env(), share_features_extractor=share_features_extractor).policy
    action_dim = policy.action_net.action_dim
    obs = th.randint(256, (4, 1, 40, 40), dtype=th.uint8)
    values, outputs = policy.evaluate_flow(obs, th.randn(4, 3, action_dim), th.rand(4, 3))
    extractors = (policy.pi_features_extractor, policy.vf_features_extractor)
    for loss, own in [(outputs.square().mean(), 0), (values.square().mean(), 1)]:
        policy.zero_grad()
        loss.backward(retain_graph=True)
        touched = [all(parameter.grad is not None for parameter in extractor.parameters()) for extractor in extractors]
        assert touched == [share_features_extractor or own == 0, share_features_extractor or own == 1]


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_fql_features_extractors(share_features_extractor):
    """One for each network, or one for all, which the values do not train. The target network has its own, which follows."""
    model = make_model(make_env(), FQL, share_features_extractor=share_features_extractor)
    networks = [model.actor, model.bc_flow, model.critic, model.critic_target]
    assert len({id(network.features_extractor) for network in networks}) == (2 if share_features_extractor else 4)
    model.learn(50)
    batch = model._sample(8)
    for loss, index in [
        (model._critic_loss(batch)[0], 2),
        (model._bc_flow_losses(batch).mean(), 1),
        (sum(model._actor_losses(batch)), 0),
    ]:
        model.policy.zero_grad(set_to_none=True)
        loss.backward()
        touched = [all(p.grad is not None for p in network.features_extractor.parameters()) for network in networks]
        if share_features_extractor:
            assert touched == [index != 2] * 3 + [False]
        else:
            assert touched == [index == i for i in range(4)]
    before = [parameter.clone() for parameter in model.critic_target.features_extractor.parameters()]
    model.tau = 0.5
    model.train(2, 8)
    after = model.critic_target.features_extractor.parameters()
    assert not any(th.equal(a, b) for a, b in zip(before, after, strict=True) if a.dim() > 1)


def test_impala():
    """Three stages halve the size. Windows of the pooling that do not fit hang over the end, as in JAX."""
    space = FakeImageEnv(screen_height=64, screen_width=64, n_channels=9, discrete=False, channel_first=True).observation_space
    encoder = ImpalaCNN(space, features_dim=512)
    assert encoder.linear[0].in_features == 32 * 8 * 8
    images = th.zeros(1, 9, 64, 64)
    assert encoder(images).shape == (1, 512)
    pool = encoder.cnn[1]
    x = th.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0], x[0, 0, 3, 3] = 1, 2
    assert pool(x)[0, 0].tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize("size", [(1, 5), (64, 64), (63, 50), (96, 17)])
def test_impala_cnn_halves_sizes_rounded_up(size):
    """As JAX pads ("SAME"): the pixels at the borders, too, reach the features."""
    space = spaces.Box(0, 255, (3, *size), np.uint8)
    encoder = ImpalaCNN(space, features_dim=8)
    height, width = (-(-side // 8) for side in size)
    assert encoder.linear[0].in_features == 32 * height * width
    images = th.rand(2, 3, *size)
    # The windows of the first stage, from their definition
    convolution, pooling = encoder.cnn[0], encoder.cnn[1]
    with th.no_grad():
        x = convolution(images)
        total = [max((-(-side // 2) - 1) * 2 + 3 - side, 0) for side in size]
        before = [pad // 2 for pad in total]
        (top, left), (bottom, right) = before, [pad - first for pad, first in zip(total, before, strict=True)]
        padded = F.pad(x, (left, right, top, bottom), value=-th.inf)
        assert th.equal(pooling(x), F.max_pool2d(padded, 3, stride=2))
        assert encoder(images).shape == (2, 8)
