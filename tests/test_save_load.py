import os

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_flow import FPO, presets
from sb3_flow.common.flow import CFMLoss
from sb3_flow.fpo import CnnPolicy, MlpPolicy, MultiInputPolicy

KWARGS = dict(n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu")
OBS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


def make_model(**kwargs):
    return FPO("MlpPolicy", make_vec_env("Pendulum-v1", 2, seed=0), **(KWARGS | kwargs))


def assert_same_weights(model, other):
    state, other_state = model.policy.state_dict(), other.policy.state_dict()
    assert state.keys() == other_state.keys()
    for name in state:
        assert th.equal(state[name], other_state[name]), name


def assert_same_predictions(model, other):
    assert np.array_equal(model.predict(OBS, deterministic=True)[0], other.predict(OBS, deterministic=True)[0])
    actions = []
    for policy in (model, other):
        th.manual_seed(3)
        actions.append(policy.predict(OBS, deterministic=False)[0])
    assert np.array_equal(*actions)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(ema_decay=0.9, ema_start=0),
        dict(cfm_loss="fpo", policy_kwargs=dict(net_arch=[8], n_flow_steps=3, prediction_type="action", sampler="sde")),
        dict(cfm_loss=dict(supervision="velocity", sampling="independent"), policy_kwargs=dict(squash_type="tanh")),
        presets.PAPER,
        dict(clip_range=lambda progress: 0.1 * progress, learning_rate=lambda progress: 1e-3 * progress, clip_range_vf=0.2),
    ],
)
def test_save_load(tmp_path, kwargs):
    model = make_model(**kwargs).learn(128)
    model.save(tmp_path / "model.zip")
    # Without an env, and then with one
    loaded = FPO.load(tmp_path / "model.zip", device="cpu")
    assert loaded.env is None
    assert_same_weights(model, loaded)
    assert_same_predictions(model, loaded)
    assert loaded.clip_range(0.5) == model.clip_range(0.5)
    assert loaded.n_mc_samples == model.n_mc_samples
    assert type(loaded.cfm_loss) is CFMLoss and loaded.cfm_loss == model.cfm_loss
    assert loaded.policy.n_flow_steps == model.policy.n_flow_steps

    # Training goes on, from the same state of the optimizer
    env = make_vec_env("Pendulum-v1", 2, seed=1)
    loaded = FPO.load(tmp_path / "model.zip", env=env, device="cpu")
    for continued in (model, loaded):
        env.seed(5)
        continued.set_env(env)
        continued.set_random_seed(5)
        continued.learn(128, reset_num_timesteps=False)
    assert model.num_timesteps == loaded.num_timesteps == 256
    assert_same_weights(model, loaded)
    assert_same_predictions(model, loaded)


def test_set_parameters():
    model, other = make_model().learn(64), make_model(seed=1)
    with pytest.raises(AssertionError):
        assert_same_weights(model, other)
    other.set_parameters(model.get_parameters(), exact_match=True)
    assert_same_weights(model, other)
    assert_same_predictions(model, other)


def test_checkpoint_holds_plain_parameters(tmp_path):
    model = make_model(policy_kwargs=dict(net_arch=[64, 64])).learn(64)
    model.save(tmp_path / "model.zip")
    data, params, _ = load_from_zip_file(tmp_path / "model.zip")
    assert set(params) == {"policy", "policy.optimizer"}
    # The embedding of the timestep is not a parameter, but statistics are part of a policy
    networks = {name for name in params["policy"] if "features_extractor" not in name and "normalization" not in name}
    assert {name.rsplit(".", 1)[1] for name in networks} == {"weight", "bias"}
    assert "rollout_buffer" not in data and "env" not in data
    assert os.path.getsize(tmp_path / "model.zip") < 500_000


@pytest.mark.parametrize("policy_class", [MlpPolicy, CnnPolicy, MultiInputPolicy])
def test_save_load_policy(tmp_path, policy_class):
    """A policy alone, as SB3 saves and loads it."""
    from gymnasium import spaces

    observation_space = {
        MlpPolicy: spaces.Box(-1, 1, (3,)),
        CnnPolicy: spaces.Box(0, 255, (3, 36, 36), dtype=np.uint8),
        MultiInputPolicy: spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Box(-1, 1, (2,))}),
    }[policy_class]
    policy = policy_class(
        observation_space, spaces.Box(-3, 3, (2,)), lambda _: 1e-3, net_arch=[8], share_features_extractor=False,
        n_flow_steps=4, output_scale=0.5, action_scale=0.3, squash_type="tanh", normalize_values=False, ortho_init=False,
        skip_connection=False, action_perturbation_std=0.1, ema_decay=0.9,
    )  # fmt: skip
    policy.save(tmp_path / "policy.pth")
    loaded = policy_class.load(tmp_path / "policy.pth", device="cpu")
    obs = observation_space.sample()
    assert np.array_equal(policy.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    for name in ("n_flow_steps", "output_scale", "action_perturbation_std", "ema_decay", "prediction_type", "sampler",
                 "sampler_sigma", "squash_output", "squash_type", "action_scale", "share_features_extractor",
                 "skip_connection", "normalize_values", "ortho_init"):  # fmt: skip
        assert getattr(loaded, name) == getattr(policy, name)


def test_moving_average_that_was_changed_is_saved(tmp_path):
    for kwargs in (dict(), dict(ema_decay=0.9), dict(policy_kwargs=dict(net_arch=[8], ema_decay=0.9))):
        model = make_model(**kwargs)
        for ema_decay in (0.5, None):
            if ema_decay is None:
                model.policy.ema = None
            else:
                model.policy.create_ema(ema_decay)
                model.learn(64)
            model.save(tmp_path / "model")
            loaded = FPO.load(tmp_path / "model", device="cpu")
            assert loaded.ema_decay == ema_decay and (loaded.policy.ema is None) == (ema_decay is None)
            assert_same_weights(model, loaded)
            assert_same_predictions(model, loaded)


def test_moving_average_of_only_one(tmp_path):
    make_model(ema_decay=0.9).save(tmp_path / "with")
    make_model().save(tmp_path / "without")
    assert FPO.load(tmp_path / "with", ema_decay=0.5).policy.ema_decay == 0.5
    with pytest.raises(ValueError, match="has a moving average of the actor, but this policy has none: `ema_decay` must be a"):
        FPO.load(tmp_path / "with", ema_decay=None)
    with pytest.raises(ValueError, match="has no moving average of the actor, but this policy has one: `ema_decay` must be N"):
        FPO.load(tmp_path / "without", ema_decay=0.9)
