import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv, SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_flow import DPPO, FPO, FQL
from sb3_flow.offline.datasets import from_replay_buffer


def make_env(channel_last=True):
    env = SimpleMultiObsEnv(random_start=False, discrete_actions=False, channel_last=channel_last)
    return gym.wrappers.TimeLimit(env, 30)


@pytest.mark.parametrize("channel_last", [True, False])
@pytest.mark.parametrize("share_features_extractor", [True, False])
@pytest.mark.parametrize("wrapper", [None, "normalize", "stack"])
@pytest.mark.parametrize("algorithm", [FPO, DPPO, FQL])
def test_dict_spaces(algorithm, channel_last, share_features_extractor, wrapper):
    if algorithm is FQL and wrapper == "normalize" and channel_last:
        pytest.skip("replay buffers of SB3 hold transposed images without normalization only")
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
    kwargs = dict(n_steps=32, batch_size=32, n_epochs=1)
    if algorithm is FQL:
        kwargs = dict(buffer_size=200, learning_starts=100, batch_size=8, train_freq=8)
    model = algorithm("MultiInputPolicy", env, device="cpu", policy_kwargs=policy_kwargs, **kwargs)
    model.learn(128)
    obs = model.env.reset()
    assert np.isfinite(model.predict(obs, deterministic=False)[0]).all()


def test_policy_hint():
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        FPO("MlpPolicy", make_env())


@pytest.mark.parametrize("goal_selection_strategy", ["future", "final"])
def test_her_with_a_dataset(tmp_path, goal_selection_strategy):
    """Goals are relabelled in what is collected online, once an episode is over. The dataset is taken as it is."""
    env = BitFlippingEnv(n_bits=4, continuous=True, max_steps=20)
    kwargs = dict(
        replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(goal_selection_strategy=goal_selection_strategy),
        buffer_size=200, batch_size=16, policy_kwargs=dict(net_arch=[16]), device="cpu",
    )  # fmt: skip
    behaviour = FQL("MultiInputPolicy", env, learning_starts=60, **kwargs).learn(70)
    dataset = from_replay_buffer(behaviour.replay_buffer)
    assert len(dataset) == 70
    for balanced_sampling in (True, False):
        model = FQL("MultiInputPolicy", env, dataset=dataset, balanced_sampling=balanced_sampling, offline_steps=5, **kwargs)
        model.learn(50)
        # An update for every step, before the first episode was over too
        assert model._n_updates == 55 and 30 < model._n_online() <= 50
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = FQL.load(tmp_path / "model.zip", env=env, device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    loaded.set_dataset(dataset)
    loaded.learn(30, reset_num_timesteps=False)
