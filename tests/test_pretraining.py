"""Behavioral cloning of the actor of FPO and DPPO, and what keeps the clone while it learns from rewards."""

import sys
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_flow import DPPO, FPO, FQL, FlowBC
from sb3_flow.common.flow import SINGULARITY_MARGIN, interpolate
from sb3_flow.fpo import MlpPolicy as FlowPolicy
from sb3_flow.on_policy.pretraining import ActorCloning

ALGORITHMS = [FPO, DPPO]
SMALL = dict(n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu")


def demonstrations(n_episodes=4, action=lambda obs: np.clip([-obs[1] - 0.5 * obs[2]], -2, 2)):
    """Episodes of Pendulum-v1, with actions that are a function of the observation."""
    env = gym.make("Pendulum-v1")
    observations, actions, next_observations, timeouts = [], [], [], []
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=episode)
        truncated = False
        while not truncated:
            observations.append(obs)
            actions.append(np.asarray(action(obs), dtype=np.float32))
            obs, _, _, truncated, _ = env.step(actions[-1])
            next_observations.append(obs)
            timeouts.append(truncated)
    columns = dict(observations=observations, actions=actions, next_observations=next_observations, timeouts=timeouts)
    return dict(terminals=np.zeros(len(timeouts), dtype=bool), **{name: np.array(rows) for name, rows in columns.items()})


@pytest.fixture(scope="module")
def data():
    return demonstrations()


def make_model(algorithm, env="Pendulum-v1", **kwargs):
    policy_kwargs = dict(net_arch=[16], n_flow_steps=4) | kwargs.pop("policy_kwargs", {})
    return algorithm("MlpPolicy", env, policy_kwargs=policy_kwargs, **SMALL | kwargs)


def parameters(module):
    return deepcopy(module.state_dict())


def equal(first, second):
    return first.keys() == second.keys() and all(th.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("squash_type", ["clip", "tanh"])
def test_clone_acts_as_the_dataset(data, algorithm, squash_type):
    model = make_model(algorithm, policy_kwargs=dict(squash_type=squash_type, action_scale=0.7, net_arch=[64, 64]))
    model.pretrain(data, 1500)
    error = model.predict(data["observations"], deterministic=True)[0] - data["actions"]
    assert np.abs(error).mean() < 0.1 < np.abs(data["actions"]).mean()


@pytest.mark.parametrize("kind", ["velocity", "noise", "action"])
@pytest.mark.parametrize("squash_type", ["clip", "tanh"])
def test_loss(data, kind, squash_type):
    """The squared error of what the network predicts, between noise and raw action, at uniform times."""
    model = make_model(FPO, policy_kwargs=dict(prediction_type=kind, squash_type=squash_type, action_scale=0.7))
    cloning = ActorCloning(model, 0.9, dataset=data, device="cpu")
    rows = np.arange(100)
    scaled = np.clip(data["actions"][rows] / 2, -1 + 1e-5, 1 - 1e-5)
    raw = th.as_tensor((np.arctanh(scaled) if squash_type == "tanh" else scaled) / 0.7)
    th.testing.assert_close(cloning.offline_buffer.actions[rows], raw, atol=1e-4, rtol=1e-4)

    batch = cloning.offline_buffer.sample(100)
    th.manual_seed(1)
    losses = cloning._bc_flow_losses(batch)
    th.manual_seed(1)
    noise = th.randn(100, 1)
    # (noise, and actions, have no velocity at one end)
    margin = SINGULARITY_MARGIN
    low, high = dict(velocity=(0, 1), noise=(0, 1 - margin), action=(margin, 1))[kind]
    times = low + (high - low) * th.rand(100)
    targets = dict(velocity=noise - batch.actions, noise=noise, action=batch.actions)[kind]
    x_t = interpolate(batch.actions, noise, times)
    features = model.policy.extract_features(batch.observations)
    output = model.policy.action_net.forward_plain(features, x_t.unsqueeze(1), times.unsqueeze(1)).squeeze(1)
    th.testing.assert_close(losses, (output - targets).square().mean(dim=1))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_the_actor_learns(data, algorithm):
    model = make_model(algorithm)
    critic = parameters(model.policy.mlp_extractor), parameters(model.policy.value_net)
    optimizer, actor = deepcopy(model.policy.optimizer.state_dict()), parameters(model.policy.action_net)
    model.pretrain(data, 10)
    assert equal(critic[0], model.policy.mlp_extractor.state_dict()) and equal(critic[1], model.policy.value_net.state_dict())
    assert model.policy.optimizer.state_dict() == optimizer
    assert not equal(actor, model.policy.action_net.state_dict())


def test_actor_is_the_average(data):
    model = make_model(FPO)
    cloning = ActorCloning(model, 0.9, dataset=data, device="cpu")
    weights = [parameters(model.policy.action_net)]

    def note(*_):
        weights.append(parameters(model.policy.action_net))
        return True

    cloning.learn_offline(5, callback=note)
    expected = weights[0]
    for later in weights[1:]:
        expected = {name: 0.9 * value + 0.1 * later[name] for name, value in expected.items()}
    average = cloning.policy.average.module[1].state_dict()
    for name, value in expected.items():
        th.testing.assert_close(average[name], value)
    # What acts is the average, and what is trained goes on from where it was
    obs = data["observations"][:7]
    acted = cloning.predict(obs, deterministic=True)[0]
    assert equal(weights[-1], model.policy.action_net.state_dict())
    assert not np.array_equal(acted, model.predict(obs, deterministic=True)[0])
    model.policy.load_actor(cloning.policy.average.module.state_dict())
    np.testing.assert_array_equal(acted, model.predict(obs, deterministic=True)[0])


def test_statistics_are_those_of_the_dataset(data):
    parts = {name: data[name].copy() for name in ("observations", "next_observations")}
    for part in parts.values():
        part[:, 1] = 12345.67
        part[:, 2] *= 1e-5
    observations, data = parts["observations"], data | parts
    model = make_model(FPO)
    model.pretrain(data, 2)
    (statistics,) = (x.flatten.statistics for x in model.policy._features_extractors())
    np.testing.assert_allclose(statistics.mean, observations.astype(np.float64).mean(axis=0), rtol=1e-3)
    # What never varies is not divided by next to nothing
    # (but for rounding)
    expected = observations.astype(np.float64).var(axis=0)
    expected[1] = 1
    np.testing.assert_allclose(statistics.var, expected, rtol=1e-3)
    before = parameters(statistics)
    model.learn(128)
    assert equal(before, statistics.state_dict())
    # Once more, and not of twice the number
    model.pretrain(data, 2)
    assert equal(before, statistics.state_dict())


def test_vec_normalize(data):
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    model = make_model(FPO, env)
    model.pretrain(data, 400)
    # There are no rewards to take statistics of
    assert env.ret_rms.count < 1
    np.testing.assert_allclose(env.obs_rms.mean, data["observations"].mean(axis=0), atol=1e-3)
    # Its own statistics are of what it sees
    statistics = model.policy.features_extractor.flatten.statistics
    np.testing.assert_allclose(statistics.mean, 0, atol=1e-3)
    obs = env.normalize_obs(data["observations"])
    assert np.abs(model.predict(obs, deterministic=True)[0] - data["actions"]).mean() < 0.4


@pytest.mark.parametrize(
    ("algorithm", "kwargs"), [(FPO, {}), (FPO, dict(ema_decay=0.9)), (DPPO, {})], ids=["FPO", "FPO with an average", "DPPO"]
)
def test_callbacks_save_models_of_the_algorithm(data, algorithm, kwargs, tmp_path):
    model = make_model(algorithm, tensorboard_log=str(tmp_path / "logs"), pretrain_steps=10, dataset=data, **kwargs)
    evaluation = EvalCallback(
        make_vec_env("Pendulum-v1"),
        n_eval_episodes=1,
        eval_freq=5,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model.pretrain(gradient_steps=10, callback=[evaluation, CheckpointCallback(10, str(tmp_path))])
    assert [*evaluation.evaluations_timesteps] == [5, 10]
    assert isinstance(algorithm.load(tmp_path / "best_model"), algorithm)
    # The average is what is saved, and what the model is in the end
    loaded = algorithm.load(tmp_path / "rl_model_10_steps", env=make_vec_env("Pendulum-v1"))
    obs = data["observations"]
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    # There is nothing left to clone, and its observations are normalized as they were
    statistics = parameters(loaded.policy.features_extractor)
    loaded.learn(64)
    assert loaded._n_pretrain_updates == 10 and equal(statistics, loaded.policy.features_extractor.state_dict())
    assert (tmp_path / "logs" / "pretrain_1").is_dir()
    assert model.num_timesteps == 0


def test_validation_loss(data, tmp_path):
    from stable_baselines3.common.logger import configure

    model = make_model(FPO)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.pretrain(data, 4, log_interval=2, dataset_kwargs=dict(validation=0.25))
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    assert {"train/bc_flow_loss", "validation/bc_flow_loss"} <= {*header.split(",")} and len(rows) == 2


def test_learn_begins_with_it(data, tmp_path):
    np.savez(tmp_path / "data.npz", **data)
    arguments = dict(dataset=str(tmp_path / "data.npz"), pretrain_steps=20)
    by_itself = make_model(FPO).pretrain(str(tmp_path / "data.npz"), 20)
    first, second = (make_model(FPO, **arguments).learn(0) for _ in range(2))
    assert equal(first.policy.state_dict(), by_itself.policy.state_dict())
    assert equal(first.policy.state_dict(), second.policy.state_dict())
    # Once only, also after it was saved
    first.save(tmp_path / "model")
    loaded = FPO.load(tmp_path / "model", env=make_vec_env("Pendulum-v1"))
    actor = parameters(loaded.policy.action_net)
    assert equal(actor, loaded.learn(0).policy.action_net.state_dict())
    assert loaded.learn(128).num_timesteps == 128 and loaded._n_pretrain_updates == 20


def test_interrupted(data, tmp_path):
    """Ctrl-C leaves the average, and what remains is done later."""

    def interrupt(local_variables, _):
        if local_variables["self"].num_timesteps == 5:
            raise KeyboardInterrupt
        return True

    model = make_model(FPO, dataset=data, pretrain_steps=8)
    with pytest.raises(KeyboardInterrupt):
        model.pretrain(gradient_steps=8, callback=interrupt)
    assert model._n_pretrain_updates == 5
    model.save(tmp_path / "model")
    loaded = FPO.load(tmp_path / "model", env=make_vec_env("Pendulum-v1"))
    # Arrays are not saved
    with pytest.raises(ValueError, match="3 of the `pretrain_steps` are left, but the dataset was given as arrays"):
        loaded.learn(64)
    assert model.learn(64)._n_pretrain_updates == 8


def test_moving_average_restarts(data):
    model = make_model(FPO, ema_decay=0.9)
    model.learn(64)
    model.pretrain(data, 5)
    assert equal(parameters(model.policy.ema.module), parameters(model.policy._actor()))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_critic_warmup(algorithm, policy):
    """The actor does not change in the first iterations, nor what it shares with the critic."""
    if policy == "CnnPolicy":
        env, kwargs = FakeImageEnv(2, 40, 40, discrete=False), dict(n_steps=32, batch_size=32)
    else:
        env, kwargs = "Pendulum-v1", {}
    model = algorithm(
        policy, env, critic_warmup=2, policy_kwargs=dict(net_arch=[8], n_flow_steps=2), **SMALL | dict(n_epochs=1) | kwargs
    )
    for n in range(3):
        actor, critic = [x.detach().clone() for x in model.policy.actor_parameters()], parameters(model.policy.value_net)
        model.learn(model.n_steps, reset_num_timesteps=False)
        is_same = [th.equal(old, new) for old, new in zip(actor, model.policy.actor_parameters(), strict=True)]
        assert all(is_same) if n < 2 else not any(is_same)
        assert not equal(critic, model.policy.value_net.state_dict())


def test_critic_warms_up_again(data):
    """For a clone that is made later."""
    model = make_model(FPO, critic_warmup=1).learn(128)
    model.pretrain(data, 5)
    actor = parameters(model.policy.action_net)
    model.learn(64)
    assert equal(actor, model.policy.action_net.state_dict())
    model.learn(64)
    assert not equal(actor, model.policy.action_net.state_dict())


def test_layers_of_the_values_are_the_critics():
    """Also of an extractor that has layers for the actor."""

    class Policy(FlowPolicy):
        def _build_mlp_extractor(self):
            self.mlp_extractor = MlpExtractor(self.features_dim, dict(pi=[8], vf=[8]), self.activation_fn)

    model = FPO(Policy, "Pendulum-v1", critic_warmup=1, critic_learning_rate=1e-3, **SMALL)
    actor, critic = (parameters(getattr(model.policy.mlp_extractor, name)) for name in ("policy_net", "value_net"))
    model.learn(64)
    assert equal(actor, model.policy.mlp_extractor.policy_net.state_dict())
    assert not equal(critic, model.policy.mlp_extractor.value_net.state_dict())


def test_groups_of_the_optimizer(tmp_path):
    """Parameters of one group do not fit two, nor the other way round, and an optimizer of one's own has one."""
    old, new = make_model(FPO), make_model(FPO, critic_learning_rate=1e-3)
    old.save(tmp_path / "model")
    for load in (
        lambda: FPO.load(tmp_path / "model", critic_learning_rate=1e-3),
        lambda: new.set_parameters(old.get_parameters()),
        lambda: old.set_parameters(new.get_parameters()),
    ):
        with pytest.raises(ValueError, match="`critic_learning_rate` must be None, or a number"):
            load()
    new.policy.optimizer = th.optim.Adam(new.policy.parameters())
    with pytest.raises(ValueError, match="`critic_learning_rate` must be None"):
        new.learn(64)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learning_rates_of_actor_and_critic(algorithm, tmp_path):
    model = make_model(algorithm, learning_rate=0.0, critic_learning_rate=lambda progress: 1e-3 * progress)
    actor, critic = parameters(model.policy.action_net), parameters(model.policy.value_net)
    model.learn(128)
    assert equal(actor, model.policy.action_net.state_dict()) and not equal(critic, model.policy.value_net.state_dict())
    assert model.logger.name_to_value["train/critic_learning_rate"] == 0.0
    # The other way round
    model = make_model(algorithm, critic_learning_rate=0.0, policy_kwargs=dict(normalize_values=False))
    actor, critic = parameters(model.policy.action_net), parameters(model.policy.value_net)
    model.learn(64)
    assert not equal(actor, model.policy.action_net.state_dict()) and equal(critic, model.policy.value_net.state_dict())
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env())
    assert [len(group["params"]) for group in loaded.policy.optimizer.param_groups] == [
        len(group["params"]) for group in model.policy.optimizer.param_groups
    ]
    for copy in (model, loaded):
        copy.set_random_seed(1)
        copy.learn(64)
    assert equal(model.policy.state_dict(), loaded.policy.state_dict())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_are_clipped_separately(algorithm):
    model = make_model(algorithm, critic_learning_rate=1e-3, max_grad_norm=0.5, critic_warmup=0)
    model.policy.zero_grad()
    actor, others = (group["params"] for group in model.policy.optimizer.param_groups)
    assert {*actor} == {*model.policy.actor_parameters()} and {*actor, *others} == {*model.policy.parameters()}
    loss = 1e-3 * sum(x.sum() for x in actor) + 1e3 * sum(x.sum() for x in others)
    norms = [(factor**2 * sum(x.numel() for x in group)) ** 0.5 for factor, group in ((1e-3, actor), (1e3, others))]
    assert model._backward(loss).item() == pytest.approx((norms[0] ** 2 + norms[1] ** 2) ** 0.5, rel=1e-4)
    for group, expected in ((actor, norms[0]), (others, 0.5)):
        norm = th.stack([x.grad.norm() for x in group]).norm().item()
        assert norm == pytest.approx(min(expected, 0.5), rel=1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("normalize", [False, True])
def test_from_flow_bc(data, algorithm, normalize, tmp_path):
    env = make_vec_env("Pendulum-v1")
    rewards = np.zeros(len(data["actions"]), dtype=np.float32)
    clone = FlowBC(
        "MlpPolicy",
        VecNormalize(env) if normalize else env,
        dataset={**data, "rewards": rewards},
        offline_steps=20,
        policy_kwargs=dict(net_arch=[16], n_flow_steps=5),
        seed=0,
        device="cpu",
    ).learn()
    model = algorithm.from_flow_bc(clone, policy_kwargs=dict(net_arch=dict(vf=[8])), **SMALL)
    obs = data["observations"]
    # (DPPO: and no noise in its steps)
    noise = th.zeros(len(obs), *model.policy.noise_shape)
    first = noise.view(len(obs), -1)[:, :1]
    first.normal_()
    observations = model.policy.obs_to_tensor(obs)[0]
    raw = model.policy.act(observations, noise)
    th.testing.assert_close(raw.detach().clamp(-1, 1), clone.policy.act(observations, first))
    np.testing.assert_array_equal(clone.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    assert model.get_env() is clone.get_env() and model.policy.mlp_extractor.value_net[0].out_features == 8
    model.learn(64).save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_from_flow_bc_of_images_and_dicts():
    class Env(gym.Env):
        observation_space = spaces.Dict(
            image=spaces.Box(0, 255, (1, 36, 36), np.uint8), vector=spaces.Box(-1, 1, (3,), np.float32)
        )
        action_space = spaces.Box(-3, 3, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, True, False, {}

    clone = FlowBC("MultiInputPolicy", DummyVecEnv([Env]), policy_kwargs=dict(net_arch=[16], n_flow_steps=3), device="cpu")
    model = FPO.from_flow_bc(clone, **SMALL)
    obs = {key: np.stack([space.sample() for _ in range(5)]) for key, space in Env.observation_space.items()}
    np.testing.assert_array_equal(clone.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize(
    "of_clone, arguments, text",
    [
        (dict(chunk_size=3), {}, "`chunk_size` of 1, it is 3"),
        ({}, dict(policy_kwargs=dict(n_flow_steps=3)), "`n_flow_steps` must be the clone's, 10, it is 3"),
        ({}, dict(policy_kwargs=dict(net_arch=[8])), r"`net_arch` must be the clone's, \[16\], it is \[8\]"),
        (dict(policy_kwargs=dict(net_arch=[16], sampler="heun")), dict(algorithm=DPPO), 'it has "heun"'),
        ({}, dict(dataset="data.npz", pretrain_steps=10), "`dataset` must not be given"),
        (
            {},
            dict(env=gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-1), np.float32(1))),
            "Action spaces do not match",
        ),
        ({}, dict(env="MountainCarContinuous-v0"), "Observation spaces do not match"),
    ],
)
def test_what_is_not_the_clones(of_clone, arguments, text):
    if "sampler" in of_clone.get("policy_kwargs", {}):
        pytest.importorskip("torchdiffeq", reason='needs pip install "sb3-flow[solvers]"')
    clone = FlowBC("MlpPolicy", "Pendulum-v1", **dict(policy_kwargs=dict(net_arch=[16])) | of_clone)
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=text):
        arguments.pop("algorithm", FPO).from_flow_bc(clone, **arguments)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(pretrain_steps=10), "`pretrain_steps` needs a `dataset`"),
        (dict(dataset_kwargs=dict(validation=0.1)), "`dataset_kwargs` needs a `dataset`"),
        (dict(pretrain_steps=-1), "`pretrain_steps`"),
        (dict(critic_warmup=1.5), "`critic_warmup`"),
        (dict(dataset="data.npz", dataset_kwargs="validation"), "`dataset_kwargs` must be a dictionary"),
        (dict(critic_learning_rate=-1.0), "`critic_learning_rate`"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bad_arguments(algorithm, arguments, text):
    with pytest.raises(ValueError, match=text):
        make_model(algorithm, **arguments)


def test_bad_arguments_of_pretrain(data):
    model = make_model(FPO)
    for arguments, text in [
        (dict(), "pass `dataset`"),
        (dict(dataset=data, ema_decay=1.0), "`ema_decay`"),
        (dict(dataset=data, batch_size=0), "`batch_size`"),
        (dict(dataset=data, gradient_steps=0), "`gradient_steps`"),
        (dict(dataset=data | dict(actions=3 * data["actions"])), "outside of the action space"),
        (dict(dataset=data | dict(observations=data["observations"][:, :2])), "observations"),
    ]:
        with pytest.raises(ValueError, match=text):
            model.pretrain(**arguments)
    assert model._n_pretrain_updates == 0
    # One that would not be looked at
    with pytest.raises(ValueError, match="`pretrain_steps` must be positive"):
        make_model(FPO, dataset=data).learn(64)
    for other in (FQL("MlpPolicy", "Pendulum-v1", buffer_size=10), model):
        with pytest.raises(ValueError, match="`clone` must be a FlowBC"):
            FPO.from_flow_bc(other)


def test_arrays_are_not_saved(data, tmp_path):
    model = make_model(FPO, dataset=data, pretrain_steps=5, dataset_kwargs=dict(validation=data)).learn(0)
    model.save(tmp_path / "model")
    loaded = FPO.load(tmp_path / "model")
    assert loaded.dataset is None and loaded.dataset_kwargs == {} and loaded.pretrain_steps == 5


def test_command_line(data, tmp_path, monkeypatch):
    pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')
    from sb3_flow.zoo import cli

    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", **data)
    parameters = ["dataset:'data.npz'", "pretrain_steps:30", "preset:'fine-tune'", "n_steps:64", "batch_size:32", "n_epochs:1"]
    parameters += ["critic_learning_rate:'lin_1e-3'"]
    # (a rollout of four environments, and by itself)
    for n_timesteps, n_done in (("64", 256), ("0", 0)):
        command = ["train", "--algo", "fpo", "--env", "Pendulum-v1", "-n", n_timesteps, "--seed", "0", "--eval-freq", "-1"]
        monkeypatch.setattr(sys, "argv", ["sb3-flow", *command, "--num-threads", "1", "-params", *parameters])
        cli.main()
        model = FPO.load(f"logs/fpo/Pendulum-v1_{1 if n_done else 2}/Pendulum-v1.zip")
        assert model._n_pretrain_updates == 30 and model.num_timesteps == n_done and model.critic_warmup > 0
