"""What the benchmarks make of the results that runs have left."""

import json

import numpy as np
import pytest
import torch as th

pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')
pytest.importorskip("rliable", reason='needs pip install "sb3-flow[plots]"')

import ablations
import dmc
import envpool_tasks
import levers
import report
import runs

import sb3_flow
from sb3_flow.envs import envpool

TASKS = ["Hopper-v5", "Ant-v5"]


def leave_result(algo, env_id, seed, mean_return, steps=dmc.STEPS, **kwargs):
    result = dict(
        algo=algo,
        env=env_id,
        seed=seed,
        steps=steps,
        hyperparameters=dmc.hyperparameters(algo, env_id),
        deterministic=dict(mean_return=mean_return),
        stochastic=dict(mean_return=mean_return / 2),
        train_seconds=100.0,
        training_curve=[[5000, 0.0], [15_000, mean_return]],
    )
    runs.write_result(dmc.result_file(algo, env_id, seed, steps), result | kwargs)


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    for module in (dmc, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_run_is_done_once(results):
    """A run is not repeated, unless it was one of other hyperparameters or of other steps."""
    assert not dmc.is_done("fpo", "Hopper-v5", 0, dmc.STEPS)
    leave_result("fpo", "Hopper-v5", 0, 1.0)
    assert dmc.is_done("fpo", "Hopper-v5", 0, dmc.STEPS)
    assert not dmc.is_done("fpo", "Hopper-v5", 1, dmc.STEPS) and not dmc.is_done("ppo", "Hopper-v5", 0, dmc.STEPS)
    # A shorter one is not taken for it, and leaves it alone
    leave_result("fpo", "Hopper-v5", 0, 2.0, steps=1000)
    assert dmc.is_done("fpo", "Hopper-v5", 0, 1000)
    assert json.loads((results / "Hopper-v5-fpo-seed0.json").read_text())["deterministic"]["mean_return"] == 1.0
    leave_result("fpo", "Hopper-v5", 0, 1.0, hyperparameters={})
    assert not dmc.is_done("fpo", "Hopper-v5", 0, dmc.STEPS)


def test_result_is_whole_or_not_there(results):
    class Unserialisable:
        pass

    leave_result("fpo", "Hopper-v5", 0, 1.0)
    with pytest.raises(TypeError):
        leave_result("fpo", "Hopper-v5", 0, Unserialisable())
    assert dmc.is_done("fpo", "Hopper-v5", 0, dmc.STEPS)


def test_failed_runs_are_told(tmp_path, capsys):
    jobs = [runs.Job("good", ["-c", "print('hello')"]), runs.Job("bad", ["-c", "raise SystemExit(3)"])]
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        runs.run_jobs(jobs, 2, tmp_path)
    out = capsys.readouterr().out
    assert "good: done" in out and "bad: failed" in out and (tmp_path / "good.log").read_text() == "hello\n"


def test_report(monkeypatch, tmp_path):
    """Seeds that both algorithms have, of the hyperparameters and steps of now; tasks of different scales count the same."""
    for seed, (fpo, ppo) in enumerate([(200.0, 100.0), (400.0, 200.0), (600.0, 300.0)]):
        leave_result("fpo", "Hopper-v5", seed, fpo)
        leave_result("ppo", "Hopper-v5", seed, ppo)
        leave_result("fpo", "Ant-v5", seed, 10 * ppo)
        leave_result("ppo", "Ant-v5", seed, 10 * fpo)
    leave_result("fpo", "Hopper-v5", 3, 1e6)
    leave_result("ppo", "Hopper-v5", 4, 1e6, hyperparameters={})
    leave_result("fpo", "Hopper-v5", 4, 1e6)
    leave_result("ppo", "Hopper-v5", 5, 1e6, steps=1000)
    leave_result("fpo", "Hopper-v5", 5, 1e6, steps=1000)
    loaded = report.load(TASKS)
    assert [result["seed"] for result in loaded["Hopper-v5"]["fpo"]] == [0, 1, 2]
    estimates = report.aggregates(loaded, relative=True)
    assert estimates["ppo"]["mean"][0] == pytest.approx(1) and estimates["fpo"]["mean"][0] == pytest.approx(1.25)
    low, high = estimates["fpo"]["mean"][1:]
    assert low < 1.25 < high
    # (of the returns themselves, Ant would decide)
    assert report.aggregates(loaded, relative=False)["fpo"]["mean"][0] == pytest.approx(np.mean([400, 2000]))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    page = report.section("MuJoCo", loaded, True, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "FPO is ahead on 1 of 2 tasks" in page and "**1.25**" in page and "400 ± 163" in page
    assert "FPO 16, PPO 1" in page


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
