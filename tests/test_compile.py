"""``compile=True``: the same updates from tensors that stay where they are, captured as graphs on a GPU."""

import contextlib
import copy
import io
import pickle
import warnings
import weakref
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_flow import FAWAC, FBRAC, FPO, FQL, IFQL, QC, FlowBC
from sb3_flow.common import cuda_graphs
from sb3_flow.common.cuda_graphs import ModuleState, OptimizerState
from sb3_flow.fpo import fpo as fpo_module

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="CUDA graphs need a GPU")),
]
SMALL = dict(net_arch=dict(pi=[16], vf=[16]))


def make_dataset(n=300, seed=0):
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(n, 3)).astype(np.float32)
    return dict(
        observations=observations,
        next_observations=np.roll(observations, -1, axis=0),
        actions=rng.uniform(-2, 2, size=(n, 1)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        terminations=np.zeros(n, bool),
        truncations=np.arange(n) % 20 == 19,
    )


def make_fql(**kwargs):
    settings = dict(dataset=make_dataset(), seed=0, device="cpu", batch_size=32, compile=True)
    return FQL("MlpPolicy", "Pendulum-v1", **{**settings, "policy_kwargs": dict(net_arch=[16, 16])} | kwargs)


OTHERS = {
    "FlowBC": (FlowBC, {}),
    "FlowBC, chunks": (FlowBC, dict(chunk_size=3)),
    "IFQL": (IFQL, dict(rho=0.5, q_agg="mean", n_steps=3, policy_kwargs=dict(net_arch=[16, 16], n_critics=4))),
    "FBRAC": (
        FBRAC,
        dict(normalize_q_loss=True, balanced_sampling=True, policy_kwargs=dict(net_arch=[16, 16], n_flow_steps=3)),
    ),
    "FAWAC": (FAWAC, dict(dataset_kwargs=dict(reward_scale=2.0, reward_shift=-1.0))),
    "QC": (QC, dict(chunk_size=3, policy_kwargs=dict(net_arch=[16, 16], n_samples=4))),
}


def make_other(name, **kwargs):
    algorithm, others = OTHERS[name]
    settings = dict(dataset=make_dataset(), seed=0, device="cpu", batch_size=32, compile=True)
    settings |= dict(policy_kwargs=dict(net_arch=[16, 16])) | others
    return algorithm("MlpPolicy", "Pendulum-v1", **settings | kwargs)


def make_fpo(policy="MlpPolicy", env=None, **kwargs):
    # (the last minibatch is a smaller one)
    settings = dict(n_steps=24, batch_size=20, n_epochs=3, seed=0, device="cpu", policy_kwargs=SMALL, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        env = make_vec_env("Pendulum-v1", 2, seed=0) if env is None else env
        return FPO(policy, env, **settings | kwargs)


def weights(model):
    return {name: value.detach().cpu().clone() for name, value in model.policy.state_dict().items()}


def assert_close(model, other, **tolerance):
    for (name, a), b in zip(weights(model).items(), weights(other).values(), strict=True):
        th.testing.assert_close(a, b, msg=name, **tolerance or dict(rtol=1e-4, atol=1e-5))


def losses(model):
    return {name: value for name, value in model.logger.name_to_value.items() if name.startswith("train/")}


@pytest.fixture(autouse=True)
def captured_without_a_word(request):
    """Where nothing else is expected, there is a graph for everything."""
    with warnings.catch_warnings():
        if "obstacle" not in request.node.name:
            warnings.filterwarnings("error", message="`compile=True`")
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(clip_range_vf=lambda p: 0.2 * p + 0.01, clip_range=lambda p: 0.1 * p, learning_rate=lambda p: 1e-3 * p),
        dict(ent_coef=0.0, n_baseline_actions=0, bounds_loss_coef=0.0, max_grad_norm=None, ratio_type="averaged"),
        dict(normalize_advantage="rollout", cfm_loss="fpo++", trust_region="aspo", ema_decay=0.9, ema_start=1),
        dict(policy_kwargs=dict(SMALL, sampler="sde", action_perturbation_std=0.1, optimizer_class=th.optim.AdamW)),
    ],
)  # fmt: skip
def test_fpo_equals_the_eager_run(device, kwargs):
    models = []
    for compiled in (False, True):
        models.append(make_fpo(device=device, compile=compiled, **kwargs))
        models[-1].learn(48 * 2)
    assert_close(*models, **(dict(rtol=1e-4, atol=1e-5) if device == "cpu" else dict(rtol=1e-3, atol=1e-4)))
    assert losses(models[1]) == pytest.approx(losses(models[0]), rel=1e-3, abs=1e-4)
    assert models[0]._n_updates == models[1]._n_updates == 6 and not models[0]._graphs
    assert set(models[1]._graphs["updates"].updates) == {20, 8} and len(models[1].policy._graphs) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("phases", ["offline", "both", "online"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(q_agg="min", normalize_q_loss=True, balanced_sampling=True, n_steps=3, learning_rate=lambda p: 1e-3 * p),
        dict(dataset_kwargs=dict(reward_scale=2.0, reward_shift=-1.0, validation=0.2), alpha=1.0, tau=0.1),
        dict(chunk_size=3),
    ],
)
def test_fql_equals_the_eager_run(device, phases, kwargs):
    models = []
    if phases == "online":
        kwargs = {name: value for name, value in kwargs.items() if name != "dataset_kwargs"} | dict(
            dataset=None, learning_starts=20
        )
    for compiled in (False, True):
        models.append(make_fql(device=device, compile=compiled, **kwargs))
        if phases != "online":
            models[-1].learn_offline(12)
            offline = losses(models[-1])
        if phases != "offline":
            models[-1].learn(15 if phases == "both" else 30)
            models[-1].train(2, batch_size=16)
    assert_close(*models, **(dict(rtol=1e-4, atol=1e-5) if device == "cpu" else dict(rtol=1e-3, atol=1e-4)))
    assert losses(models[1]) == pytest.approx(losses(models[0]), rel=1e-3, abs=1e-4)
    if phases != "online":
        assert "train/critic_loss" in offline
    assert models[1]._graphs and not models[0]._graphs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*OTHERS])
def test_other_offline_methods_equal_the_eager_run(device, name):
    models = [make_other(name, compile=compiled, device=device) for compiled in (False, True)]
    for model in models:
        model.set_random_seed(0)
        model.learn_offline(12)
        assert "train/bc_flow_loss" in losses(model)
        if model.learns_online:
            model.learn(15)
    assert_close(*models, **(dict(rtol=1e-4, atol=1e-5) if device == "cpu" else dict(rtol=1e-3, atol=1e-4)))
    assert losses(models[1]) == pytest.approx(losses(models[0]), rel=1e-3, abs=1e-4)
    assert models[1]._graphs and not models[0]._graphs
    assert all((update.function.graph is not None) is (device == "cuda") for _, update in models[1]._graphs.values())


@pytest.mark.parametrize("make", [make_fql, partial(make_other, "FBRAC")])
def test_a_features_extractor_that_is_shared(make):
    models = [
        make(compile=compiled, policy_kwargs=dict(net_arch=[16], share_features_extractor=True)) for compiled in (False, True)
    ]
    for model in models:
        model.set_random_seed(0)
        model.learn_offline(8)
    assert_close(*models)
    assert models[1]._graphs


def test_only_cloned():
    models = [make_fql(dataset_kwargs=dict(need_rewards=False), compile=compiled) for compiled in (False, True)]
    for model in models:
        model.set_random_seed(0)
        model.learn_offline(12)
    assert_close(*models)
    assert len(models[1]._graphs) == 1


@pytest.mark.parametrize("kind", ["dict", "normalize", "her"])
def test_batches_that_are_drawn_outside_of_the_graph(kind):
    models = []
    for compiled in (False, True):
        policy, kwargs = "MlpPolicy", {}
        if kind == "normalize":
            env = VecNormalize(make_vec_env("Pendulum-v1", 1, seed=0))
            kwargs = dict(dataset=make_dataset())
        elif kind == "dict":
            policy, env = "MultiInputPolicy", DummyVecEnv([dict_env])
        else:
            from stable_baselines3.common.envs import BitFlippingEnv

            policy, env = "MultiInputPolicy", DummyVecEnv([lambda: BitFlippingEnv(n_bits=3, continuous=True)])
            kwargs = dict(replay_buffer_class=HerReplayBuffer)
        model = FQL(policy, env, seed=0, device="cpu", batch_size=16, learning_starts=20, compile=compiled,
                    policy_kwargs=dict(net_arch=[16]), **kwargs)  # fmt: skip
        models.append(model.learn(30))
    assert_close(*models)
    assert len(models[1]._graphs) >= 1


def dict_env():
    # (its images are drawn when it is created)
    np.random.seed(0)
    return gym.wrappers.TimeLimit(SimpleMultiObsEnv(random_start=False, discrete_actions=False), 10)


def test_fpo_with_dict_observations():
    models = []
    for compiled in (False, True):
        model = make_fpo(
            "MultiInputPolicy", DummyVecEnv([dict_env] * 2), compile=compiled, n_steps=16, batch_size=16, n_epochs=1
        )
        models.append(model.learn(64))
    assert_close(*models)
    assert models[1]._graphs and models[1].policy._graphs


class FakeStream:
    def __init__(self, *args):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


def test_what_is_saved_for_gradients_is_kept_until_all_streams_are_done(monkeypatch):
    """A stream of a graph may still read it when the next kernel of another one overwrites the memory of what is gone."""
    main, streams = FakeStream(), []
    fakes = dict(
        is_initialized=lambda: True,
        is_current_stream_capturing=lambda: True,
        current_stream=lambda *args: main,
        Stream=lambda *args: streams.append(FakeStream()) or streams[-1],
        stream=contextlib.nullcontext,
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(th.cuda, name, fake)
    array = np.ones((4, 3), dtype=np.float32)
    kept, batch, layer = weakref.ref(array), th.from_numpy(array), nn.Linear(3, 2)
    del array
    with cuda_graphs._side_by_side():
        loss, other = cuda_graphs.in_parallel(lambda batch=batch: layer(batch).sum(), lambda: 1)
        assert other == 1 and streams[0].waited_for == [main] and main.waited_for == streams
        del batch
        loss.backward()
        del loss
        assert kept() is not None
    assert kept() is None and main.waited_for == 2 * streams and layer.weight.grad is not None
    # Outside of an update, there is one stream
    assert cuda_graphs.in_parallel(lambda: 2) == [2] and len(streams) == 1


# --- What is not finite


def test_fpo_that_is_not_finite():
    model = make_fpo()
    model.learn(48)
    before = weights(model)
    # (a loss that is finite, but for its gradient)
    model.vf_coef = 1e38
    with pytest.raises(
        ValueError, match=r"The gradient is not finite .policy loss: .*training stopped before it reached the w"
    ):
        model.learn(48)
    # (the last layer of the value network has followed the units of the returns, its values are the same)
    assert all(th.equal(value, before[name]) for name, value in weights(model).items() if not name.startswith("value_n"))
    model.vf_coef = 0.25
    model.learn(48)
    assert any(not th.equal(value, before[name]) for name, value in weights(model).items())


class AtStep(BaseCallback):
    def __init__(self, n, function):
        super().__init__()
        self.n, self.function = n, function

    def _on_step(self):
        if self.n_calls == self.n:
            self.function(self.model)
        return True


def break_rewards(model):
    model.offline_buffer.rewards.fill_(np.inf)


def save(model):
    model.save(io.BytesIO())


@pytest.mark.parametrize("when", ["end", "logs", "save", "train", "other settings"])
def test_fql_that_is_not_finite(when):
    model = make_fql()
    model.learn_offline(5)
    before, updates = weights(model), []
    with pytest.raises(
        ValueError, match=r"The loss is not finite .critic: inf, bc_flow: [0-9.]+, .*before it reached the weights"
    ):
        break_rewards(model)
        if when == "train":
            model.train(2, 32)
        else:
            change = AtStep(4, lambda model: setattr(model, "alpha", 1.0))
            what = {"save": AtStep(3, save), "other settings": change}.get(when)
            count = AtStep(None, None)
            count._on_step = lambda: updates.append(0) or True
            model.learn_offline(8, [count, *([what] if what else [])], log_interval=3 if when == "logs" else None)
    assert len(updates) == {"end": 8, "logs": 3, "save": 3, "train": 0, "other settings": 4}[when]
    assert all(th.equal(value, before[name]) for name, value in weights(model).items())
    # Nothing of it is left
    model.set_dataset(make_dataset())
    model.learn_offline(3)
    assert any(not th.equal(value, before[name]) for name, value in weights(model).items())


def test_an_update_after_one_that_is_not_finite_changes_nothing():
    model = make_fql()
    model.learn_offline(5)
    before, step = weights(model), model.policy.optimizer.state_dict()["state"][0]["step"].item()
    repair = AtStep(2, lambda model: model.offline_buffer.rewards.zero_())
    break_rewards(model)
    with pytest.raises(ValueError, match="critic: inf"):
        model.learn_offline(6, repair)
    assert all(th.equal(value, before[name]) for name, value in weights(model).items())
    assert model.policy.optimizer.state_dict()["state"][0]["step"].item() == step


def test_a_run_that_was_interrupted_and_not_finite():
    """It is told before the next one does anything."""
    model = make_fql()
    model.learn_offline(5)
    break_rewards(model)

    def interrupt(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.learn_offline(6, AtStep(3, interrupt))
    model.offline_buffer.rewards.zero_()
    n_updates = model._n_updates
    with pytest.raises(ValueError, match="critic: inf"):
        model.learn_offline(6)
    assert model._n_updates == n_updates
    model.learn_offline(6)
    assert model._n_updates == n_updates + 6


# --- What is saved and copied


@pytest.mark.parametrize("make", [make_fpo, make_fql])
def test_nothing_of_it_is_saved(make):
    models = {compiled: make(compile=compiled) for compiled in (False, True)}
    files = {}
    for compiled, model in models.items():
        model.learn(48) if make is make_fpo else model.learn_offline(10)
        files[compiled] = io.BytesIO()
        model.save(files[compiled])
    state, plain = (models[compiled].policy.optimizer.state_dict() for compiled in (True, False))
    assert [{name: type(x) for name, x in group.items()} for group in state["param_groups"]] == [
        {name: type(x) for name, x in group.items()} for group in plain["param_groups"]
    ]
    assert all(group["capturable"] is False and group["lr"] == models[False].learning_rate for group in state["param_groups"])
    assert not hasattr(models[True].policy.optimizer, "found_inf")
    assert models[True].policy.state_dict().keys() == models[False].policy.state_dict().keys()
    for compiled, file in files.items():
        for now in (None, False, True):
            file.seek(0)
            kwargs = {} if now is None else dict(compile=now)
            loaded = type(models[compiled]).load(file, env=models[compiled].env, device="cpu", **kwargs)
            assert loaded.compile is (compiled if now is None else now) and not loaded._graphs
            assert all(
                th.equal(x, y) for x, y in zip(weights(loaded).values(), weights(models[compiled]).values(), strict=True)
            )
            if make is make_fql:
                loaded.set_dataset(make_dataset())
                loaded.learn_offline(3)
            else:
                assert loaded.policy.captures_forward is loaded.compile
                loaded.learn(48)
            assert bool(loaded._graphs) is loaded.compile


@pytest.mark.parametrize("make", [make_fpo, make_fql])
def test_copies_have_graphs_of_their_own(make):
    model = make()
    model.learn(48) if make is make_fpo else model.learn_offline(10)
    assert model._graphs
    copied = copy.deepcopy(model.policy)
    assert all(th.equal(a, b) for a, b in zip(copied.state_dict().values(), model.policy.state_dict().values(), strict=True))
    assert not getattr(copied, "_graphs", None)
    assert not copy.deepcopy(model._graphs) and not pickle.loads(pickle.dumps(model._graphs))
    pickle.loads(pickle.dumps(model.policy))


class Collect(nn.Module):
    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, obs):
        return self.policy(obs)[0]


def test_trace_of_a_policy():
    """A trace is of the plain modules, not of the memory of a graph."""
    model = make_fpo()
    model.learn(48)
    collect, obs = Collect(model.policy), th.randn(4, 3)
    with th.no_grad():
        traced = th.jit.trace(collect, obs, check_trace=False)
        results = [th.manual_seed(0) and function(2 * obs) for function in (traced, collect)]
    assert th.allclose(*results, atol=1e-6)


def test_compile_must_be_a_bool():
    for make in (make_fpo, make_fql):
        with pytest.raises(ValueError, match="`compile`"):
            make(compile="yes")


# --- What a graph depends on


def make_module():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Tanh(), nn.BatchNorm1d(3)))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach())),
        lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()),
        lambda m: setattr(m[0].weight, "data", m[0].weight.data.view(2, 3)),
        lambda m: m[0].weight.requires_grad_(False),
        lambda m: setattr(m[0], "bias", None),
        lambda m: setattr(m[1][1], "running_mean", m[1][1].running_mean.clone()),
        lambda m: setattr(m[1][1], "momentum", 0.5),
        lambda m: m[0].register_buffer("mask", th.ones(3)),
        lambda m: m.eval(),
        lambda m: m[1].eval(),
        lambda m: m.append(nn.Tanh()),
        lambda m: m[1].__setitem__(0, nn.Tanh()),
        lambda m: setattr(m[0], "forward", lambda x: x),
        lambda m: setattr(m[0], "__class__", type("Other", (nn.Linear,), {})),
        lambda m: m[1][0].register_forward_hook(lambda *args: None),
        lambda m: m[1][0].register_forward_pre_hook(lambda *args: None),
        lambda m: m[0].register_full_backward_hook(lambda *args: None),
        lambda m: m.double(),
        lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    ],
)
def test_state_of_a_module(change):
    module = make_module()
    state = ModuleState(module)
    # Values may change
    with th.no_grad():
        module[0].weight.add_(1)
    module(th.randn(4, 2))
    module.load_state_dict(make_module().state_dict())
    module.eval().train()
    assert not state.has_changed()
    change(module)
    assert state.has_changed()


def step(optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = th.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.param_groups[0].__setitem__("eps", 1e-3),
        lambda o: o.param_groups[0].__setitem__("betas", (0.5, 0.9)),
        lambda o: o.param_groups[0].__setitem__("weight_decay", 0.1),
        lambda o: o.add_param_group(dict(params=[nn.Parameter(th.ones(1))])),
        lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
        lambda o: o.state.clear(),
        lambda o: next(iter(o.state.values())).__setitem__("exp_avg", th.zeros(3, 2)),
    ],
)
def test_state_of_an_optimizer(change):
    optimizer = th.optim.Adam(nn.Linear(2, 3).parameters(), fused=True)
    step(optimizer)
    state = OptimizerState(optimizer)
    step(optimizer)
    optimizer.param_groups[0]["lr"] = 1e-5
    assert not state.has_changed()
    change(optimizer)
    assert state.has_changed()


def set_attribute(name, value, model):
    setattr(model, name, value)


def is_kept(model, change, more):
    """Whether the graphs of a model survive a change."""
    more(model)
    more(model)
    graphs = {name: value for name, value in model._graphs.items()}
    assert graphs
    change(model)
    more(model)
    return all(model._graphs.get(name) is value for name, value in graphs.items())


FQL_CHANGES = {
    "alpha": lambda m: setattr(m, "alpha", 2.0),
    "tau": lambda m: setattr(m, "tau", 0.5),
    "gamma": lambda m: setattr(m, "gamma", 0.5),
    "q_agg": lambda m: setattr(m, "q_agg", "min"),
    "normalize_q_loss": lambda m: setattr(m, "normalize_q_loss", True),
    "batch size": lambda m: setattr(m, "batch_size", 16),
    "rewards": lambda m: m.dataset_kwargs.update(reward_scale=2.0),
    "only cloned": lambda m: m.dataset_kwargs.update(need_rewards=False),
    "dataset": lambda m: m.set_dataset(make_dataset(n=200)),
    "array of the dataset": lambda m: setattr(m.offline_buffer, "rewards", m.offline_buffer.rewards.clone()),
    "rows of the dataset": lambda m: setattr(m.offline_buffer, "rows", th.arange(100)),
    "steps of the returns": lambda m: setattr(m.offline_buffer, "n_steps", 2),
    "sampler": lambda m: m.policy.set_sampler(n_flow_steps=3),
    "parameters": lambda m: m.set_parameters(copy.deepcopy(m.get_parameters())),
    "frozen": lambda m: m.actor.requires_grad_(False),
    "precision": lambda m: th.set_float32_matmul_precision("high"),
    "method": lambda m: setattr(m, "_bc_flow_losses", lambda batch: th.zeros(len(batch.actions))),
}


FPO_CHANGES = {
    **{name: partial(set_attribute, name, value) for name, value in dict(
        ent_coef=0.1, vf_coef=1.0, max_grad_norm=1.0, bounds_loss_coef=0.5, ratio_type="averaged", trust_region="aspo",
        cfm_loss_clip=5.0, log_ratio_clip=1.0, normalize_advantage="rollout", n_mc_samples=8, n_baseline_actions=1,
        target_kl=10.0, clip_range_vf=lambda _: 0.1,
    ).items()},
    "output scale": lambda m: setattr(m.policy.action_net, "output_scale", 2.0),
    "prediction type": lambda m: setattr(m.policy.action_net, "prediction_type", "noise"),
    "parameters": lambda m: m.set_parameters(copy.deepcopy(m.get_parameters())),
    "optimizer": lambda m: m.policy.optimizer.param_groups[0].update(weight_decay=0.1),
    "average": lambda m: m.policy.create_ema(0.9),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`compile=True`")
@pytest.mark.parametrize("name", [*FQL_CHANGES])
def test_fql_is_captured_again_obstacle(name):
    model = make_fql()
    try:
        assert not is_kept(model, FQL_CHANGES[name], lambda model: model.learn_offline(1))
    finally:
        th.set_float32_matmul_precision("highest")


@pytest.mark.filterwarnings("ignore:`compile=True`")
@pytest.mark.parametrize("name", [*FPO_CHANGES])
def test_fpo_is_captured_again_obstacle(name):
    assert not is_kept(make_fpo(n_epochs=1), FPO_CHANGES[name], lambda model: model.learn(48))


@pytest.mark.filterwarnings("ignore:`compile=True`")
@pytest.mark.parametrize("name", [*OTHERS])
def test_other_offline_methods_are_captured_again_obstacle(name):
    for argument, value in dict(alpha=0.3, expectile=0.3, rho=0.3, tau=0.3, normalize_q_loss=False).items():
        model = make_other(name)
        assert is_kept(model, lambda model: None, lambda model: model.learn_offline(1))
        if argument in model.in_graph:
            assert not is_kept(model, partial(set_attribute, argument, value), lambda model: model.learn_offline(1)), argument


def test_another_number_of_samples_is_captured_again():
    model = make_other("QC")
    assert not is_kept(model, lambda model: model.policy.set_sampler(n_samples=3), lambda model: model.learn_offline(1))


@pytest.mark.parametrize("algorithm", [FlowBC, IFQL])
def test_a_sampler_that_no_update_calls(algorithm):
    """It is no obstacle."""
    settings = dict(compile=True, device="cpu", policy_kwargs=dict(net_arch=[16], sampler="midpoint"))
    model = algorithm("MlpPolicy", "Pendulum-v1", make_dataset(), **settings)
    assert model.learn_offline(2)._graphs


@pytest.mark.parametrize("change", [lambda m: m.policy.set_sampler(n_flow_steps=3), lambda m: m.policy.set_sampler("sde")])
def test_rollouts_are_captured_again(change):
    model = make_fpo()
    model.learn(48)
    ((_, before),) = model.policy._graphs.values()
    model.learn(48)
    assert [function for _, function in model.policy._graphs.values()] == [before]
    change(model)
    model.learn(48)
    ((_, after),) = model.policy._graphs.values()
    assert after is not before


def test_graphs_survive_what_does_not_concern_them():
    model = make_fql(learning_rate=lambda progress: 1e-3 * progress)
    evaluation = EvalCallback(gym.make("Pendulum-v1"), eval_freq=3, n_eval_episodes=1, verbose=0, warn=False)
    assert is_kept(model, lambda model: None, lambda model: model.learn_offline(5, evaluation))
    assert is_kept(model, save, lambda model: model.learn_offline(5))
    assert is_kept(make_fpo(learning_rate=lambda progress: 1e-3 * progress), save, lambda model: model.learn(48))


class Reads(set):
    """Names of attributes of a model that are read while ``active``."""

    active = False


@pytest.mark.parametrize("algorithm", [FPO, FQL, FlowBC, IFQL, FBRAC, FAWAC, QC])
def test_all_that_a_graph_reads_of_a_model_is_compared(monkeypatch, algorithm):
    reads, update = Reads(), cuda_graphs.CapturedUpdate._update

    def recorded(self, name):
        if reads.active:
            reads.add(name)
        return object.__getattribute__(self, name)

    def recorded_update(self):
        reads.active = True
        try:
            return update(self)
        finally:
            reads.active = False

    monkeypatch.setattr(cuda_graphs.CapturedUpdate, "_update", recorded_update)
    monkeypatch.setattr(algorithm, "__getattribute__", recorded, raising=False)
    if algorithm is FPO:
        model = make_fpo(clip_range_vf=0.2, ent_coef=0.1, bounds_loss_coef=0.1)
        model.learn(48)
        in_graph, others = {*fpo_module.IN_GRAPH}, {"policy", "clip_range_vf", "__dict__", "__class__"}
        assert in_graph & reads
    else:
        models = [make_other(name) for name, (other, _) in OTHERS.items() if other is algorithm]
        if algorithm is FQL:
            models = [make_fql(n_steps=2, dataset_kwargs=dict(reward_scale=2.0)), make_fql(chunk_size=3)]
        for model in models:
            model.learn_offline(3)
        others = {"policy", "offline_buffer", "dataset_kwargs", "device", *model.policy.network_names}
        in_graph = {*model.in_graph}
        assert in_graph <= reads
    # (also what the class has for all of its models, such as the aggregation of QC)
    data = {name for name in reads if name in vars(model) or type(getattr(algorithm, name, None)) in (int, float, str, bool)}
    assert data <= in_graph | others


# --- What is not captured


class BatchNormExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.batch_norm = nn.BatchNorm1d(3)

    def forward(self, observations):
        return self.batch_norm(observations)


class OtherFPO(FPO):
    pass


class OtherFQL(FQL):
    pass


def sub_class(cls, model):
    model.__class__ = cls
    return model


OBSTACLES = {
    "BatchNormExtractor": dict(policy_kwargs=dict(features_extractor_class=BatchNormExtractor)),
    "the optimizer SGD": dict(policy_kwargs=dict(optimizer_class=th.optim.SGD)),
    "the optimizer is not fused": dict(policy_kwargs=dict(optimizer_kwargs=dict(foreach=True))),
    "PReLU": dict(policy_kwargs=dict(activation_fn=nn.PReLU)),
}


@pytest.mark.parametrize("make", [make_fpo, make_fql])
@pytest.mark.parametrize("reason", [*OBSTACLES, "hooks", "was replaced", "of its own"])
def test_obstacle(make, reason):
    """One warning, and the run is the eager one, bit by bit."""
    results = []
    for compiled in (False, True):
        kwargs = OBSTACLES.get(reason, {})
        policy_kwargs = (SMALL if make is make_fpo else dict(net_arch=[16])) | kwargs.get("policy_kwargs", {})
        model = make(compile=compiled, policy_kwargs=policy_kwargs)
        module = model.policy.action_net.input_layer if make is make_fpo else model.actor.mu[0]
        if reason == "hooks":
            module.register_forward_hook(lambda *args: None)
        elif reason == "was replaced":
            module.forward = lambda x, forward=module.forward: forward(x)
        elif reason == "of its own":
            sub_class(OtherFPO if make is make_fpo else OtherFQL, model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model.learn(48) if make is make_fpo else model.learn_offline(5)
        texts = {str(warning.message) for warning in caught if "compile=True" in str(warning.message)}
        assert len(texts) == compiled and all(reason in text for text in texts)
        assert len([warning for warning in caught if "compile=True" in str(warning.message)]) <= 2
        results.append(weights(model))
    assert all(th.equal(x, results[1][name]) for name, x in results[0].items())


@pytest.mark.parametrize("algorithm", [FQL, FlowBC, IFQL, FBRAC, FAWAC, QC])
def test_obstacle_subclass(algorithm):
    """What it inherits says nothing of what it does."""
    other = type("Other", (algorithm,), {})
    model = other("MlpPolicy", "Pendulum-v1", make_dataset(), policy_kwargs=dict(net_arch=[16]), compile=True, device="cpu")
    with pytest.warns(UserWarning, match="Other is an algorithm of its own"):
        model.learn_offline(2)
    assert not model._graphs


def test_obstacle_target_kl():
    models = []
    for compiled in (False, True):
        models.append(make_fpo(target_kl=1e-7, compile=compiled))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            models[-1].learn(48 * 3)
        assert any("target_kl" in str(warning.message) for warning in caught) is compiled
    assert_close(*models)
    assert models[1]._n_updates < 9
