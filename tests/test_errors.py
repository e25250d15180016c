"""Bad input: an error that names the argument or the cause, before anything is lost."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_flow import FPO
from sb3_flow.fpo import MlpPolicy


@pytest.mark.parametrize("name", ["cfm_loss", "ratio_type", "trust_region"])
def test_unknown_choice_lists_the_choices(name):
    with pytest.raises(ValueError, match=f"Unknown `{name}`: 'foo', it must be one of '.*', '.*'"):
        FPO("MlpPolicy", "Pendulum-v1", **{name: "foo"})


@pytest.mark.parametrize("name", ["prediction_type", "sampler", "squash_type"])
def test_unknown_policy_choice_lists_the_choices(name):
    with pytest.raises(ValueError, match=f"Unknown `{name}`: 'foo', it must be one of '.*', '.*'"):
        FPO("MlpPolicy", "Pendulum-v1", policy_kwargs={name: "foo"})


@pytest.mark.parametrize(
    "name",
    ["clip_range", "n_steps", "batch_size", "n_epochs", "n_mc_samples", "max_grad_norm", "cfm_loss_clip", "log_ratio_clip",
     "target_kl"],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -1])
def test_not_positive(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .* it is {value}"):
        FPO("MlpPolicy", "Pendulum-v1", **{name: value})


def test_single_time(tmp_path):
    with pytest.raises(ValueError, match="`n_flow_steps` must be at least 2"):
        FPO("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(n_flow_steps=1))
    model = FPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=64)
    model.policy.set_sampler(n_flow_steps=1)
    with pytest.raises(ValueError, match="`n_flow_steps` must be at least 2"):
        model.learn(64)
    # It predicts, also after it was saved
    model.save(tmp_path / "model")
    loaded = FPO.load(tmp_path / "model")
    obs = loaded.observation_space.sample()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("name", ["ema_start", "n_baseline_actions", "bounds_loss_coef"])
def test_negative(name):
    with pytest.raises(ValueError, match=f"`{name}` must not be negative, it is -1"):
        FPO("MlpPolicy", "Pendulum-v1", **{name: -1})


def test_out_of_range():
    with pytest.raises(ValueError, match="`clip_range` must be positive"):
        FPO("MlpPolicy", "Pendulum-v1", clip_range=lambda progress: -progress)
    with pytest.raises(ValueError, match=r"`log_ratio_clip` must be more than -log\(1 - clip_range\) = 0.693, it is 0.5"):
        FPO("MlpPolicy", "Pendulum-v1", clip_range=0.5, log_ratio_clip=0.5)
    with pytest.raises(AssertionError, match="`clip_range_vf` must be positive"):
        FPO("MlpPolicy", "Pendulum-v1", clip_range_vf=-0.2)
    with pytest.raises(ValueError, match="`ema_decay` must be between 0 and 1"):
        FPO("MlpPolicy", "Pendulum-v1", ema_decay=1.5)
    for name, value in [("n_flow_steps", 0), ("sampler_sigma", -0.1), ("action_perturbation_std", -1), ("action_scale", 0)]:
        with pytest.raises(ValueError, match=f"`{name}`"):
            FPO("MlpPolicy", "Pendulum-v1", policy_kwargs={name: value})


def test_not_for_a_flow_policy():
    with pytest.raises(ValueError, match="`use_sde`"):
        MlpPolicy(ConstantEnv.observation_space, spaces.Box(-1, 1, (1,)), lambda _: 1e-3, use_sde=True)
    with pytest.raises(AssertionError, match="action spaces but Discrete"):
        FPO("MlpPolicy", "CartPole-v1")
    with pytest.raises(gym.error.NameNotFound, match="Pendolum"):
        FPO("MlpPolicy", "Pendolum-v1")
    model = FPO("MlpPolicy", "Pendulum-v1", device="cpu")
    with pytest.raises(NotImplementedError, match="likelihood"):
        model.policy.evaluate_actions(th.zeros(1, 3), th.zeros(1, 1))
    with pytest.raises(NotImplementedError, match="distribution"):
        model.policy.get_distribution(th.zeros(1, 3))


def test_choices_are_checked_when_a_model_is_loaded(tmp_path):
    model = FPO("MlpPolicy", "Pendulum-v1")
    model.save(tmp_path / "model.zip")
    for kwargs in (dict(trust_region="foo"), dict(ratio_type="foo"), dict(cfm_loss="foo"), dict(n_epochs=0)):
        with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}`"):
            FPO.load(tmp_path / "model.zip", **kwargs)


class ConstantEnv(gym.Env):
    """Observations and rewards of the wrong kind, after some steps."""

    observation_space = spaces.Box(-1, 1, (2,))

    def __init__(self, action_space=None, bad_observation=0.0, bad_reward=0.0):
        self.action_space = action_space or spaces.Box(-1, 1, (1,))
        self.bad_observation, self.bad_reward = bad_observation, bad_reward
        self.n_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        assert np.isfinite(action).all()
        self.n_steps += 1
        bad = self.n_steps > 100
        observation = np.array([0.0, self.bad_observation if bad else 0.0], dtype=np.float32)
        return observation, self.bad_reward if bad else 0.0, False, self.n_steps % 20 == 0, {}


def test_unbounded_actions():
    action_space = spaces.Box(-np.inf, np.inf, (2,))
    with pytest.raises(AssertionError, match="finite lower and upper bound"):
        FPO("MlpPolicy", ConstantEnv(action_space))
    # SB3's algorithms refuse such environments, but a policy that clips does not need bounds
    with pytest.raises(ValueError, match='`squash_type="tanh"` needs an action space with finite bounds'):
        MlpPolicy(ConstantEnv.observation_space, action_space, lambda _: 1e-3, squash_type="tanh")
    policy = MlpPolicy(ConstantEnv.observation_space, action_space, lambda _: 1e-3)
    assert policy.predict(np.zeros(2, dtype=np.float32))[0].shape == (2,)


def test_policy_of_another_kind():
    with pytest.raises(ValueError, match="`policy` must be a FlowPolicy"):
        FPO(ActorCriticPolicy, "Pendulum-v1")


def test_integer_actions():
    with pytest.raises(ValueError, match="floating point dtype"):
        FPO("MlpPolicy", ConstantEnv(spaces.Box(0, 255, (2,), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(bad_observation=np.nan), "NaN or inf in the observations"),
        (dict(bad_observation=np.inf), "NaN or inf in the observations"),
        (dict(bad_reward=np.nan), "NaN or inf in the rewards"),
        (dict(bad_reward=-np.inf), "NaN or inf in the rewards"),
    ],
)
def test_not_finite_from_the_env(kwargs, message):
    model = FPO("MlpPolicy", DummyVecEnv([lambda: ConstantEnv(**kwargs)]), n_steps=64, batch_size=64, device="cpu")
    model.learn(64)
    before = model.policy.parameters_to_vector()
    with pytest.raises(ValueError, match=message):
        model.learn(640)
    assert np.array_equal(model.policy.parameters_to_vector(), before)


def test_not_finite_weights_and_losses():
    model = FPO("MlpPolicy", ConstantEnv(), n_steps=64, batch_size=64, device="cpu")
    with th.no_grad():
        model.policy.action_net.input_layer.bias[0] = np.nan
    with pytest.raises(ValueError, match="the weights of the policy are not finite"):
        model.learn(64)

    # (normalized values change the last layer with their statistics)
    policy_kwargs = dict(normalize_values=False)
    model = FPO("MlpPolicy", ConstantEnv(), n_steps=64, batch_size=64, device="cpu", policy_kwargs=policy_kwargs)
    model.policy.value_net.register_forward_hook(
        lambda module, inputs, output: output * (np.nan if th.is_grad_enabled() else 1)
    )
    before = model.policy.parameters_to_vector()
    with pytest.raises(ValueError, match=r"The gradient is not finite .*value loss: nan"):
        model.learn(64)
    assert np.array_equal(model.policy.parameters_to_vector(), before)
