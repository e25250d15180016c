"""What the benchmarks make of the results that runs have left."""

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO

pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')
pytest.importorskip("rliable", reason='needs pip install "sb3-flow[plots]"')

import ablations
import dmc
import envpool_tasks
import levers
import make_ogbench_data
import optuna
import report
import runs
import tune

import sb3_flow
from sb3_flow.envs import envpool


def leave_result(algo, task, seed, mean_return, **kwargs):
    result = dict(
        algo=algo,
        env=dmc.TASKS[task].env_id,
        seed=seed,
        deterministic=dict(mean_return=mean_return),
        stochastic=dict(mean_return=mean_return / 2),
        train_seconds=100.0,
        gflop_per_step=0.002,
        training_curve=[[5000, 0.0], [15_000, mean_return]],
        **dmc.settings(algo, task),
    )
    runs.write_result(dmc.result_file(algo, task, seed), result | kwargs)


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    for module in (dmc, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_run_is_done_once():
    """A run is not repeated, unless it was one of other hyperparameters or of other steps."""
    assert not dmc.is_done("fpo", "Hopper", 0)
    leave_result("fpo", "Hopper", 0, 1.0)
    assert dmc.is_done("fpo", "Hopper", 0)
    assert not dmc.is_done("fpo", "Hopper", 1) and not dmc.is_done("ppo", "Hopper", 0)
    for change in (dict(steps=1000), dict(hyperparameters={})):
        leave_result("fpo", "Hopper", 0, 1.0, **change)
        assert not dmc.is_done("fpo", "Hopper", 0) and not dmc.is_current("fpo", "Hopper", 0)


def test_what_a_result_depends_on(tmp_path):
    """An argument that has come since changes nothing, one that was changed or removed does."""
    file, defaults = tmp_path / "result.json", dict(gamma="0.99", tau="0.5")
    for settings in (dict(defaults=defaults), dict(settings=dict(steps=3, defaults=defaults))):
        runs.write_result(file, settings | dict(score=1.0))
        assert runs.has_result(file, settings) and not runs.has_result(tmp_path / "another.json", settings)
        for wanted, is_same in [
            (defaults | dict(new="None"), True),
            (defaults | dict(tau="0.1"), False),
            (dict(gamma="0.99"), False),
        ]:
            inner = settings.get("settings", settings) | dict(defaults=wanted)
            assert runs.has_result(file, dict(settings=inner) if "settings" in settings else inner) == is_same
        assert not runs.has_result(file, settings | dict(hyperparameters={}))
    # (the last one was of three steps)
    assert not runs.has_result(file, dict(settings=dict(defaults=defaults)))


@pytest.mark.parametrize("algorithm", [sb3_flow.FPO, sb3_flow.DPPO, sb3_flow.FQL])
def test_defaults_have_the_size_of_the_networks(monkeypatch, algorithm):
    """Which is not in the signature."""
    before = runs.class_defaults(algorithm)
    monkeypatch.setattr(algorithm.policy_aliases["MlpPolicy"], "DEFAULT_NET_ARCH", [8])
    assert algorithm("MlpPolicy", "Pendulum-v1").policy.net_arch == [8]
    assert runs.class_defaults(algorithm) != before


def test_what_is_planned():
    """Each run has hyperparameters, and what is not planned is not run."""
    for task in dmc.TASKS:
        for algo in dmc.ALGOS:
            seeds = [seed for seed in dmc.SEEDS if dmc.is_planned(algo, task, seed)]
            if seeds:
                assert dmc.hyperparameters(algo, task)["n_timesteps"] > 0 and not dmc.is_done(algo, task, seeds[0])
            assert all(dmc.is_done(algo, task, seed) for seed in dmc.SEEDS if seed not in seeds)
    assert dmc.is_planned("dppo", "Hopper", 2) and not dmc.is_planned("dppo", "Hopper", 3)


def test_result_is_whole_or_not_there(results):
    class Unserialisable:
        pass

    leave_result("fpo", "Hopper", 0, 1.0)
    with pytest.raises(TypeError):
        leave_result("fpo", "Hopper", 0, Unserialisable())
    assert dmc.is_done("fpo", "Hopper", 0)


def test_failed_runs_are_told(tmp_path, capsys):
    jobs = [runs.Job("good", ["-c", "print('hello')"]), runs.Job("bad", ["-c", "raise SystemExit(3)"])]
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        runs.run_jobs(jobs, 2, tmp_path)
    out = capsys.readouterr().out
    assert "good: done" in out and "bad: failed" in out and (tmp_path / "good.log").read_text() == "hello\n"


def test_report(monkeypatch, tmp_path):
    """Planned runs, of the hyperparameters and steps of now; tasks of different scales count the same."""
    for seed, (fpo, ppo) in enumerate([(200.0, 100.0), (400.0, 200.0), (600.0, 300.0)]):
        leave_result("fpo", "Hopper", seed, fpo)
        leave_result("ppo", "Hopper", seed, ppo)
        leave_result("fpo", "Ant", seed, 10 * ppo)
        leave_result("ppo", "Ant", seed, 10 * fpo)
    leave_result("dppo", "Hopper", 0, 50.0)
    # Of other hyperparameters, or steps, or not planned
    leave_result("ppo", "Hopper", 3, 1e6, hyperparameters={})
    leave_result("ppo", "Hopper", 4, 1e6, steps=1000)
    leave_result("ppo", "Ant", 3, 1e6)
    monkeypatch.setattr(report, "REPS", 1000)
    loaded = report.load(["Hopper", "Ant"])
    assert (
        [result["seed"] for result in loaded["Hopper"]["ppo"]]
        == [0, 1, 2]
        == [result["seed"] for result in loaded["Ant"]["ppo"]]
    )
    scores = {algo: report.scores(loaded, algo, "deterministic", relative=True) for algo in ("fpo", "ppo")}
    (iqm, (mean, low, high)), (_, (unit, *_)) = (report.aggregates(scores[algo]) for algo in ("fpo", "ppo"))
    assert mean == pytest.approx(1.25) and low < 1.25 < high and unit == pytest.approx(1)
    ratio, mean_ratio, probability = report.comparison(scores["fpo"], scores["ppo"])
    assert ratio[0] == pytest.approx(iqm[0] / report.aggregates(scores["ppo"])[0][0]) and mean_ratio[0] == pytest.approx(1.25)
    # 7.5 of 9 pairs on Hopper, and 1.5 on Ant
    assert probability[0] == pytest.approx(0.5)
    # (of the returns themselves, Ant would decide)
    absolute = report.scores(loaded, "fpo", "deterministic", relative=False)
    assert report.aggregates(absolute)[1][0] == pytest.approx(np.mean([400, 2000]))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "REPS", 100)
    page = "\n".join(report.section("MuJoCo", "", ["Hopper", "Ant"], True, tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "400 ± 163 (3)" in page and "50 (1)" in page and "1 of 2" in page
    # 15 - 6 - 1 of Hopper (with those of rl-zoo3, 18), and 9 - 6 of Ant
    assert "**14 of the 27 planned runs are missing** (2 of FPO, 2 of DPPO, 2 of PPO, 8 of PPO, rl-zoo3)." in page
    assert "10000" in page and "2.0" in page


def test_budgets_of_the_search(monkeypatch):
    """The same first trial, and the same ranges of what the algorithms share."""
    first, shared = {}, {}
    for algo in tune.ALGOS:
        study = optuna.create_study()
        study.enqueue_trial(tune.FIRST_TRIAL)
        trial = study.ask()
        first[algo] = tune.suggest(algo, trial)
        shared[algo] = trial.distributions
    for name in set.intersection(*(set(distributions) for distributions in shared.values())):
        assert len({str(distributions[name]) for distributions in shared.values()}) == 1
    for name in ("n_envs", "n_steps", "batch_size", "n_epochs", "learning_rate", "gamma", "clip_range"):
        assert first["fpo"][name] == first["dppo"][name] == first["ppo"][name]


def test_rpo():
    """Actions are sampled as ever, and evaluated under means that are moved by up to ``rpo_alpha``."""
    model = PPO(levers.RPOPolicy, "Pendulum-v1", n_steps=64, batch_size=64, policy_kwargs=dict(rpo_alpha=0.3), seed=0)
    obs, actions = th.zeros(1000, 3), th.zeros(1000, 1)
    with th.no_grad():
        log_probs = model.policy.evaluate_actions(obs, actions)[1]
        mean = model.policy.get_distribution(obs).distribution.mean[0].item()
        assert model.policy.get_distribution(obs).distribution.mean.std() < 1e-6
    # Of a standard normal: the distance from its mean
    distances = (-2 * log_probs - np.log(2 * np.pi)).clamp(min=0).sqrt()
    assert distances.std() > 0.05 and (distances <= abs(mean) + 0.3 + 1e-3).all()
    model.learn(64)


def test_tasks_that_differ_are_refused():
    """What the published comparison found is what EnvPool's tasks stand for."""
    results = envpool_tasks.load(envpool_tasks.RESULTS)
    assert results.keys() <= envpool_tasks.RESTORE.keys() == {*envpool.COMPARED, *envpool.MUJOCO}
    differences = envpool_tasks.differences(results, envpool_tasks.load(envpool_tasks.SAME_MUJOCO))
    differ = {env_id for env_id, found in differences.items() if found}
    # (refused for its contacts, which policies that have not learned to touch anything do not show)
    assert differ | {"dm_control/finger-turn_easy-v0"} == results.keys() & envpool.DIFFERENT.keys()


@pytest.mark.parametrize("env_id", ["InvertedDoublePendulum-v5", "dm_control/fish-swim-v0"])
def test_comparison_of_simulators(monkeypatch, env_id):
    """It tells a simulator whose time step is a thousandth longer, and no difference where there is none."""
    pytest.importorskip("envpool", reason='needs pip install "sb3-flow[envpool]"')
    pytest.importorskip("shimmy", reason='needs pip install "sb3-flow[dmc]"')
    monkeypatch.setattr(envpool_tasks, "N_STEPS", 60)
    ordinary = envpool_tasks.Ordinary(env_id)
    same = envpool_tasks.compare_steps(ordinary, seed=0)
    assert same["n_steps"] > 300 and same["observation"]["max"] < 1e-9 and same["n_other_ends"] == 0
    assert same["reward"]["max"] < 1e-6
    model, _ = ordinary.state
    model.opt.timestep *= 1.001
    assert envpool_tasks.compare_steps(ordinary, seed=0)["observation"]["max"] > 1e-5


@pytest.mark.parametrize("name", [name for name in ablations.VARIANTS if not name.startswith("PPO")])
def test_variants_of_the_ablation_learn(name):
    """Each is what it says, and an update changes all of its networks."""
    variant = ablations.VARIANTS[name]
    algorithm = getattr(levers, variant.algorithm, sb3_flow.FPO)
    policy = variant.policy if variant.policy == "MlpPolicy" else getattr(levers, variant.policy)
    arguments = variant.arguments or {}
    model = algorithm(policy, "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu", **arguments)
    assert type(model).__name__ == variant.algorithm
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(128)
    if name != "Moving average":
        assert not any(th.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))


def test_colored_noise():
    """Each value is standard normal, and depends on those before."""
    noise = levers.colored_noise(0.5, 1000, 2000, np.random.default_rng(0))
    assert noise.shape == (1000, 2000)
    assert noise.std() == pytest.approx(1, abs=0.02) and noise[500].std() == pytest.approx(1, abs=0.06)
    assert 0.1 < np.mean(noise[1:] * noise[:-1]) < 0.5
    white = levers.colored_noise(0.0, 1000, 2000, np.random.default_rng(0))
    assert abs(np.mean(white[1:] * white[:-1])) < 0.01


def test_categorical_values():
    """The mean of the histogram that has the least loss is the target."""
    values = levers.CategoricalValues(4)
    latent, optimizer = th.eye(4), th.optim.Adam(values.parameters(), lr=0.1)
    targets = th.tensor([-3.0, 0.0, 0.123, 4.0])
    for _ in range(300):
        values(latent)
        optimizer.zero_grad()
        values.loss(targets).backward()
        optimizer.step()
    th.testing.assert_close(values(latent).flatten(), targets, rtol=0, atol=0.03)


def test_staggered_episodes():
    """The first episodes end one after the other, those that follow have their whole length."""
    pytest.importorskip("envpool", reason='needs pip install "sb3-flow[envpool]"')
    env = levers.StaggeredEnvPool("HalfCheetah-v5", 4)
    env.seed(0)
    env.reset()
    ends: list[list[int]] = [[] for _ in range(4)]
    actions = np.zeros((4, *env.action_space.shape), np.float32)
    for step in range(1, 1300):
        for index in np.flatnonzero(env.step(actions)[2]):
            ends[index].append(step)
    assert [steps[0] for steps in ends] == [250, 500, 750, 1000]
    assert ends[0][1] == 1250


@pytest.mark.parametrize("dataset", ["scene-play-v0", "pointmaze-medium-navigate-v0"])
def test_datasets_of_ogbench(tmp_path, dataset):
    """An interrupted call goes on, and makes what one call does; a model learns from it."""
    pytest.importorskip("ogbench", reason='needs pip install "sb3-flow[offline]"')
    first, second = tmp_path / "first", tmp_path / "second"
    settings = dict(n_episodes=2, n_val_episodes=1, n_steps=30, seed=3, jobs=1)
    make_ogbench_data.make_dataset(dataset, first, **settings)
    parts = second / f"{dataset}-seed3-30"
    parts.mkdir(parents=True)
    make_ogbench_data.make_episode(1, dataset, 3, 30, parts)
    make_ogbench_data.make_dataset(dataset, second, **settings)
    assert not parts.exists()
    for name, rows in ((f"{dataset}.npz", 60), (f"{dataset}-val.npz", 30)):
        one, other = (dict(np.load(folder / name)) for folder in (first, second))
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
        assert len(one["observations"]) == rows and np.flatnonzero(one["terminals"]).tolist() == [*range(29, rows, 30)]
        assert one["observations"].dtype == one["actions"].dtype == np.float32 and np.abs(one["actions"]).max() <= 1
        assert one["observations"].std() > 0 and np.abs(one["actions"]).mean() > 0.05
    if dataset != "pointmaze-medium-navigate-v0":
        task = dataset.replace("-v0", "-singletask-v0")
        model = sb3_flow.FQL("MlpPolicy", f"ogbench/{task}", dataset=f"ogbench:{task}@{first}", batch_size=8)
        assert len(model.offline_buffer) == 58 and model.learn_offline(2)._n_updates == 2
