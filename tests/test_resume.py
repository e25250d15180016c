"""Runs that go on after whatever ended them."""

import argparse
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecNormalize

pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')

import rl_zoo3.train

import sb3_flow.zoo
from sb3_flow import FPO, FQL
from sb3_flow.zoo import cli
from sb3_flow.zoo.errors import InputError
from sb3_flow.zoo.runs import FREE_OPTIONS, Run, find_run, lock, run_folders

sb3_flow.zoo.register()

PARAMS = ["-params", "n_envs:2", "batch_size:64", "n_epochs:2", "n_steps:64", "normalize:True"]
OPTIONS = ["--algo", "fpo", "--env", "Pendulum-v1", "--num-threads", "1", "--seed", "1", "--verbose", "0",
           "--save-freq", "128", "--eval-freq", "256", "--eval-episodes", "1"]  # fmt: skip
TRAIN = ["train", *OPTIONS, *PARAMS]
RUN = Path("logs/fpo/Pendulum-v1_1")


def sb3_flow_main(*args):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["sb3-flow", *map(str, args)])
        cli.main()


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    """Nothing may depend on the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of 512 timesteps, with a checkpoint every 128."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        sb3_flow_main(*TRAIN, "-n", 512)
    return folder / RUN


@pytest.fixture
def run(finished_run):
    shutil.copytree(finished_run, RUN)
    return RUN


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    }


def saved_steps(run):
    return sorted(int(path.stem.split("_")[-2]) for path in run.glob("rl_model_*_steps.zip"))


def killed(run, keep):
    """As it is after it was killed with its checkpoint after so many timesteps."""
    (run / "Pendulum-v1.zip").unlink()
    for path in run.glob("rl_model_*"):
        if int(path.stem.split("_")[-2]) > keep:
            path.unlink()


def episodes(run):
    """Of its logs. Of a process that was killed in the beginning they may not even have a header."""
    rows = [row for path in run.glob("*monitor.csv") for row in path.read_text().splitlines()[2:]]
    return sorted(rows)


def check(run, n_timesteps, args, former_episodes=()):
    """It is whole, it is the run that it was, and nothing of its logs is lost."""
    assert FPO.load(run / "Pendulum-v1.zip").num_timesteps == n_timesteps
    assert (run / "Pendulum-v1" / "args.yml").read_bytes() == args
    now = episodes(run)
    assert len(load_results(str(run))) == len(now)
    for episode in former_episodes:
        now.remove(episode)
    if (run / "evaluations.npz").is_file():
        timesteps = np.load(run / "evaluations.npz")["timesteps"]
        assert (np.diff(timesteps) > 0).all() and set(timesteps % 256) == {0} and timesteps[-1] <= n_timesteps
    assert not list(run.rglob(".unfinished_*"))


def test_goes_on_with_its_own_options(capsys):
    """Of the command line and of a YAML file that has changed since, from anywhere, in a folder that was moved."""
    Path("my_tasks.py").write_text(
        "import gymnasium as gym; gym.register('MyTask-v0', lambda **kw: gym.make('Pendulum-v1', **kw))"
    )
    hyperparams = dict(n_timesteps=256, policy="MlpPolicy", n_steps=64, batch_size=64, n_epochs=1, learning_rate="lin_1e-3",
                       gamma=0.8, env_kwargs=dict(g=2.0))  # fmt: skip
    Path("mine.yml").write_text(yaml.safe_dump({"MyTask-v0": hyperparams}))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(Path.cwd()))
        sb3_flow_main(
            "train", "--algo", "fpo", "--env", "MyTask-v0", "--gym-packages", "my_tasks", "-conf", "mine.yml", "-f", "mylogs",
            "--eval-freq", -1, "--save-freq", 64, "--seed", 7, "-tb", "tb", "-params", "n_epochs:2", "normalize:True",
        )  # fmt: skip
        run = shutil.move("mylogs/fpo/MyTask-v0_1", "moved_1")
        args, config = (Path(run, "MyTask-v0", name).read_bytes() for name in ("args.yml", "config.yml"))
        finished = FPO.load(f"{run}/MyTask-v0.zip")
        Path("mine.yml").write_text(yaml.safe_dump({"MyTask-v0": hyperparams | dict(gamma=0.5, n_steps=32)}))
        Path(run, "MyTask-v0.zip").unlink()
        for steps in (192, 256):
            Path(run, f"rl_model_{steps}_steps.zip").unlink()
        capsys.readouterr()
        sb3_flow_main("train", "--resume", run)
    out = capsys.readouterr().out
    assert "after 128 of 256 timesteps" in out and "env_kwargs={'g': 2.0}" in out and "eval_env_kwargs={'g': 2.0}" in out
    resumed = FPO.load(f"{run}/MyTask-v0.zip")
    for name in ("num_timesteps", "gamma", "n_steps", "n_epochs", "batch_size", "n_envs"):
        assert getattr(resumed, name) == getattr(finished, name), name
    # The schedule goes on where it was
    assert resumed.learning_rate(0.5) == 5e-4 and resumed._current_progress_remaining == finished._current_progress_remaining
    # Without the random numbers of the beginning
    assert resumed.seed not in (7, None)
    assert [Path(run, "MyTask-v0", name).read_bytes() for name in ("args.yml", "config.yml")] == [args, config]
    assert yaml.unsafe_load(args)["seed"] == 7 and len(list(Path("tb/MyTask-v0").iterdir())) == 1
    assert not Path("mylogs/fpo/MyTask-v0_1").exists() and not Path("logs").exists()


def test_other_options_are_named(run, capsys):
    """All of them, before anything is changed."""
    before = contents(run)
    with pytest.raises(SystemExit) as error:
        sb3_flow_main(
            "train", "--resume", run, "--seed", 3, "-n", 511, "--env-kwargs", "g:5.0", "--eval-episodes", 2,
            "-params", "gamma:0.95", "n_envs:2", "vf_coef:3.0", "policy_kwargs:dict(net_arch=[8])",
        )  # fmt: skip
    message = str(error.value)
    assert message.startswith("sb3-flow: error: argument --resume: ") and len(message.splitlines()) == 1
    for difference in (
        "--seed: the run has 1, given 3",
        "--eval-episodes: the run has 1, given 2",
        "-n/--n-timesteps: the run has 512, given 511",
        "--env-kwargs: the run has None, given {'g': 5.0}",
        "-params/--hyperparams: the run has gamma:0.9, given gamma:0.95",
        "given vf_coef:3.0",
        "given policy_kwargs:{'net_arch': [8]}",
    ):
        assert difference in message
    assert "n_envs" not in message
    for others, expected in [
        (["--algo", "ppo", "--resume", run], "--algo: the run has 'fpo', given 'ppo'"),
        (["--env", "CartPole-v1", "--resume", run], "--env: the run has 'Pendulum-v1', given 'CartPole-v1'"),
        (["--resume", run, "-params", "normalize:False"], "normalize:True, given normalize:False"),
        (["--resume", run, "-i", run / "Pendulum-v1.zip"], "--resume: not with -i"),
        (["--resume", run, "-optimize"], "--resume: the trials of a search"),
        (["--resume", run / "Pendulum-v1"], "is not the folder of a run"),
        (["--resume", "nowhere"], "is not the folder of a run"),
        (["--resume", "--env", "MountainCarContinuous-v0"], "there is no run of MountainCarContinuous-v0 in logs/ppo"),
    ]:
        with pytest.raises(SystemExit, match=expected):
            sb3_flow_main("train", *others)
    for refused in (["--resume"], ["-i", run / "Pendulum-v1.zip"]):
        with pytest.raises(SystemExit, match="the trials of a search begin with new models"):
            sb3_flow_main("optimize", *OPTIONS, *refused)
    # The same in other words, and what does not matter
    capsys.readouterr()
    Path("same.yml").write_text(Path(sb3_flow.zoo.default_conf_file("fpo")).read_text())
    for same in [
        TRAIN[1:],
        [*OPTIONS, "-n", 512, "-params", "n_steps:64", "normalize:True", "gamma:.9", "n_envs:1+1", "batch_size:64.0"],
        [
            "--resume",
            run,
            "-conf",
            "same.yml",
            "--device",
            "cpu",
            "-P",
            "--verbose",
            2,
            "--vec-env",
            "subproc",
            "--num-threads",
            2,
        ],
        ["--resume", run, "-params", "cfm_loss:'fpo'", "frame_stack:None", "clip_range_vf:None", "-uuid"],
    ]:
        sb3_flow_main("train", *same, *([] if "--resume" in same else ["--resume"]))
        assert "is finished" in capsys.readouterr().out, same
    Path("same.yml").write_text(Path("same.yml").read_text().replace("gamma: 0.9\n", "gamma: 0.8\n"))
    with pytest.raises(SystemExit, match=r"-conf/--conf-file: the run has gamma:0\.9, given gamma:0.8"):
        sb3_flow_main("train", "--resume", run, "-conf", "same.yml")
    assert contents(run) == before


def test_each_option_is_compared_or_free(run):
    """Options that are new in rl-zoo3 included."""
    run = Run(run)
    not_given = dict(n_timesteps=-1, hyperparams=None, conf_file=None, trained_agent="")
    assert FREE_OPTIONS.keys() <= run.args.keys()
    for name in run.args.keys() - not_given.keys():
        args = argparse.Namespace(**{**run.args, **not_given, name: "another"})
        assert bool(run.differences(args)) == (name not in FREE_OPTIONS), name


def test_finished_run(run, capsys):
    """Nothing is done but for a larger number of timesteps. Then it goes on from the final model."""
    before = contents(run)
    sb3_flow_main(*TRAIN, "-n", 512, "--resume")
    assert "logs/fpo/Pendulum-v1_1 is finished, after 512 of 512 timesteps" in capsys.readouterr().out
    assert contents(run) == before
    n_updates = FPO.load(run / "Pendulum-v1.zip")._n_updates
    sb3_flow_main(*TRAIN, "-n", 768, "--resume")
    assert "Loading logs/fpo/Pendulum-v1_1/Pendulum-v1.zip" in capsys.readouterr().out
    model = FPO.load(run / "Pendulum-v1.zip")
    assert model.num_timesteps == 768 and model._n_updates == n_updates * 768 / 512
    assert load_statistics(run / "Pendulum-v1" / "vecnormalize.pkl").ret_rms.count == pytest.approx(768, abs=1)
    assert saved_steps(run) == [128, 256, 384, 512, 640, 768]
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [256, 512, 768]
    # What it was asked for since is now its own
    assert contents(run)[Path("Pendulum-v1/config.yml")] == before[Path("Pendulum-v1/config.yml")]
    args = before[Path("Pendulum-v1/args.yml")].decode().replace("- 512\n", "- 768\n")
    assert yaml.unsafe_load((run / "Pendulum-v1" / "args.yml").read_text()) == yaml.unsafe_load(args)
    killed(run, keep=640)
    sb3_flow_main("train", "--resume", run)
    assert "after 640 of 768 timesteps" in capsys.readouterr().out


def test_checkpoints_are_at_the_end_of_a_rollout(capsys):
    """From there a run has as many timesteps in the end as if nothing had happened."""
    sb3_flow_main(*TRAIN, "-n", 500, "--save-freq", 150, "--eval-freq", -1)
    assert saved_steps(RUN) == [256, 384, 512] and FPO.load(RUN / "Pendulum-v1.zip").num_timesteps == 512
    killed(RUN, keep=384)
    sb3_flow_main("train", "--resume", RUN)
    assert "after 384 of 500 timesteps" in capsys.readouterr().out
    assert FPO.load(RUN / "Pendulum-v1.zip").num_timesteps == 512


def load_statistics(path):
    statistics = pickle.loads(path.read_bytes())
    assert isinstance(statistics, VecNormalize)
    return statistics


def test_latest_state_is_continued(run, capsys):
    """Of the final model and the checkpoints, whichever has more timesteps."""
    # A final model of before, and a later checkpoint
    shutil.copy(run / "rl_model_256_steps.zip", run / "Pendulum-v1.zip")
    for n_timesteps in (512, 640):
        sb3_flow_main("train", "--resume", run, "-n", n_timesteps)
        out = capsys.readouterr().out
        assert f"after 512 of {n_timesteps} timesteps" in out
        assert f"Loading {run}/{'rl_model_512_steps' if n_timesteps == 512 else 'Pendulum-v1'}.zip" in out
    # Of both with as many the final model, which has learned from its last steps
    assert Run(run).last_state(640).model.path.name == "Pendulum-v1.zip"
    # A model that says something else than its name, or that is of another algorithm, is not taken
    shutil.copy(run / "rl_model_128_steps.zip", run / "rl_model_9999_steps.zip")
    shutil.copy(run / "rl_model_vecnormalize_128_steps.pkl", run / "rl_model_vecnormalize_9999_steps.pkl")
    state = Run(run).last_state(640)
    assert state.num_timesteps == 640 and state.skipped == ["rl_model_9999_steps.zip: it is a model of 128 timesteps"]


@pytest.fixture(scope="module")
def damaged_run(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "Pendulum-v1_1"
    shutil.copytree(finished_run, folder)
    return folder


#: Models of the run, the latest first, with what each of them needs
MODELS = [
    (512, ["Pendulum-v1.zip", "Pendulum-v1/vecnormalize.pkl"]),
    *((steps, [f"rl_model_{steps}_steps.zip", f"rl_model_vecnormalize_{steps}_steps.pkl"]) for steps in (512, 384, 256, 128)),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_checkpoints_are_skipped(finished_run, damaged_run, data):
    """Whatever was done to some of the files of the latest ones, and without changing anything."""
    n_damaged = data.draw(st.integers(0, len(MODELS)))
    touched: dict[Path, bytes | None] = {}
    try:
        for _, names in MODELS[:n_damaged]:
            path = damaged_run / data.draw(st.sampled_from(names))
            content = damage(path, data.draw)
            touched[path] = content
            path.unlink()
            if content is not None:
                path.write_bytes(content)
        before = contents(damaged_run)
        run = Run(damaged_run)
        if n_damaged == len(MODELS):
            with pytest.raises(InputError, match="Pendulum-v1_1 cannot be resumed: "):
                run.last_state(1000)
        else:
            state = run.last_state(1000)
            assert state.num_timesteps == MODELS[n_damaged][0]
            assert state.model.path == damaged_run / MODELS[n_damaged][1][0]
            # Each that is there is told, with a reason
            told = [path for path, content in touched.items() if content is not None or path.suffix == ".pkl"]
            assert len(state.skipped) == len(told) and all(": " in reason for reason in state.skipped)
        assert contents(damaged_run) == before
    finally:
        for path in touched:
            shutil.copy(finished_run / path.relative_to(damaged_run), path)


def damage(path, draw):
    """:return: what is left of it. None for nothing"""
    content = path.read_bytes()
    kinds = ["truncated", "removed", "empty", "other", *(["flipped"] if path.suffix == ".zip" else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "truncated":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "flipped":
        # Anywhere in the data of a member
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename == "data" or info.filename.endswith(".pth")]
        member = draw(st.sampled_from(members))
        end = min([info.header_offset for info in members if info.header_offset > member.header_offset], default=None)
        end = member.header_offset + member.compress_size if end is None else end - 1
        position = draw(st.integers(member.header_offset + 80, end))
        return content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]
    return dict(removed=None, empty=b"", other=pickle.dumps([1, 2]))[kind]


def test_damaged_checkpoint_is_told(run, capsys):
    args = (run / "Pendulum-v1" / "args.yml").read_bytes()
    killed(run, keep=512)
    (run / "rl_model_512_steps.zip").write_bytes((run / "rl_model_512_steps.zip").read_bytes()[:5000])
    (run / "rl_model_vecnormalize_384_steps.pkl").unlink()
    former = episodes(run)
    sb3_flow_main("train", "--resume", run)
    out = capsys.readouterr().out
    assert "Skipped rl_model_512_steps.zip: BadZipFile: File is not a zip file" in out
    assert "Skipped rl_model_384_steps.zip: there is no rl_model_vecnormalize_384_steps.pkl" in out
    assert "after 256 of 512 timesteps" in out
    check(run, 512, args, former)
    # Nothing that loads, nothing at all, no options
    for path in (*run.glob("rl_model_*.zip"), run / "Pendulum-v1.zip"):
        path.write_bytes(b"PK")
    before = contents(run)
    with pytest.raises(SystemExit, match=r"cannot be resumed: Pendulum-v1.zip: .*; rl_model_512_steps.zip: .*"):
        sb3_flow_main("train", "--resume", run)
    assert contents(run) == before
    for path in (*run.glob("rl_model_*"), run / "Pendulum-v1.zip"):
        path.unlink()
    with pytest.raises(SystemExit, match="cannot be resumed: it has no checkpoint yet"):
        sb3_flow_main("train", "--resume", run)
    (run / "Pendulum-v1" / "args.yml").write_bytes(args[:100])
    with pytest.raises(SystemExit, match="the options of logs/fpo/Pendulum-v1_1 cannot be read"):
        sb3_flow_main("train", "--resume", run)


def in_child(*args, before=lambda: None, wait=True):
    """The command in a process of its own, without the time of all the imports."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setpgid(0, 0)
            sys.stdout = sys.stderr = open("child.txt", "a")
            before()
            sb3_flow_main(*args)
            status = 0
        except SystemExit as error:
            print(error, flush=True)
            status = error.code if isinstance(error.code, int) else 1
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if wait else pid


def kill_at(moment):
    """Kill this process at the so-manyth time that it is about to change something in the file system."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        is_write = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
        if (is_write or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and "logs/fpo" in str(arguments[0]):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("moment", [4, 13, 21, 30, 36, 47, 58, 71, 200])
def test_killed_at(moment, capsys):
    """Each change in the file system is a moment after which the run can go on."""
    status = in_child(*TRAIN, "-n", 512, before=partial(kill_at, moment))
    assert status in (0, -signal.SIGKILL) and (moment > 40 or status != 0), Path("child.txt").read_text()
    resume_to_the_end(512, capsys)


def resume_to_the_end(n_timesteps, capsys):
    """:return: whether the run could go on"""
    if not (RUN / "Pendulum-v1" / "args.yml").is_file():
        with pytest.raises(SystemExit, match="there is no run of Pendulum-v1"):
            sb3_flow_main(*TRAIN, "-n", n_timesteps, "--resume")
        return False
    args, former, before = (RUN / "Pendulum-v1" / "args.yml").read_bytes(), episodes(RUN), saved_steps(RUN)
    if not before and not (RUN / "Pendulum-v1.zip").is_file():
        with pytest.raises(SystemExit, match="Pendulum-v1_1 cannot be resumed: it has no checkpoint yet"):
            sb3_flow_main(*TRAIN, "-n", n_timesteps, "--resume")
        return False
    capsys.readouterr()
    is_finished = (RUN / "Pendulum-v1.zip").is_file()
    sb3_flow_main(*TRAIN, "-n", n_timesteps, "--resume")
    out = capsys.readouterr().out
    # No checkpoint is there that is not whole
    assert "Skipped" not in out and (("is finished" in out) if is_finished else (f"after {before[-1]} of" in out))
    check(RUN, n_timesteps, args, former)
    return True


@pytest.mark.slow
def test_fifty_kills(capsys):
    """SIGKILL at random moments, of the same run again and again until it is finished."""
    # With all that is imported on the way
    sb3_flow_main(*TRAIN, "-n", 128)
    shutil.rmtree("logs")
    rng = np.random.default_rng(0)
    outcomes = []
    n_timesteps = 2048
    options = [*TRAIN, "-n", n_timesteps, "--save-freq", 64]
    while len(outcomes) < 50:
        resume = ["--resume"] if (RUN / "Pendulum-v1" / "args.yml").is_file() and saved_steps(RUN) else []
        if not resume:
            shutil.rmtree("logs", ignore_errors=True)
        former = episodes(RUN) if resume else []
        pid = in_child(*options, *resume, wait=False)
        time.sleep(rng.uniform(0.2, 4))
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), Path("child.txt").read_text()
        if resume:
            now = episodes(RUN)
            for episode in former:
                now.remove(episode)
            assert Run(RUN).last_state(n_timesteps).skipped == []
        outcomes.append((bool(resume), status))
        if (RUN / "Pendulum-v1.zip").is_file():
            check(RUN, n_timesteps, (RUN / "Pendulum-v1" / "args.yml").read_bytes(), former)
            shutil.rmtree("logs")
    assert sum(resumed for resumed, _ in outcomes) > 20 and (True, -signal.SIGKILL) in outcomes


def wait_for_checkpoint(run):
    deadline = time.time() + 120
    while not saved_steps(run) and time.time() < deadline:
        time.sleep(0.1)
    assert saved_steps(run), Path("child.txt").read_text()


@pytest.mark.parametrize(
    ("number", "vec_env", "status"),
    [(signal.SIGINT, "dummy", 0), (signal.SIGTERM, "dummy", 143), (signal.SIGINT, "subproc", 0)],
)
def test_interrupted_run_is_saved(number, vec_env, status):
    """It is told how to go on, and that works."""
    pid = in_child(*TRAIN, "-n", 100_000, "--save-freq", 512, "--eval-freq", -1, "-P", "--vec-env", vec_env, wait=False)
    wait_for_checkpoint(RUN)
    # Ctrl-C reaches all processes of a terminal
    os.killpg(pid, number) if number == signal.SIGINT else os.kill(pid, number)
    returned = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out = Path("child.txt").read_text()
    assert returned == status and "Traceback" not in out, out
    steps = FPO.load(RUN / "Pendulum-v1.zip").num_timesteps
    assert 512 <= steps < 100_000
    assert f"Interrupted after {steps} timesteps. To go on: sb3-flow train --resume {RUN}\n" in out
    assert load_statistics(RUN / "Pendulum-v1" / "vecnormalize.pkl").ret_rms.count == pytest.approx(steps, abs=2)
    assert Run(RUN).last_state(100_000).num_timesteps == steps


@pytest.mark.parametrize("where", ["create_envs", "_load_pretrained_agent", "_save_config", "learn"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_before_the_first_step(run, where, number, monkeypatch, capsys):
    """No untrained model is the latest run, and a run that was to go on is as it was."""
    from sb3_flow.zoo.experiment import FlowExperimentManager

    before = contents(run)

    def interrupted(function, *args, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(5)

    owner = FPO if where == "learn" else FlowExperimentManager
    monkeypatch.setattr(owner, where, partial(interrupted, getattr(owner, where)))
    for args in ([*TRAIN, "-n", 512], ["train", "--resume", run, "-n", 1024]):
        if where == "_load_pretrained_agent" and "--resume" not in args:
            continue
        with pytest.raises(SystemExit) as error:
            sb3_flow_main(*args)
        assert error.value.code == 128 + number
        assert "sb3-flow: interrupted" in capsys.readouterr().err
        assert [path.name for path in run.parent.iterdir()] == ["Pendulum-v1_1"]
        after = contents(run)
        if where == "learn":
            # It had been asked for more
            after.pop(Path("Pendulum-v1/args.yml")), before.pop(Path("Pendulum-v1/args.yml"), None)
        if "--resume" in args:
            assert after == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_error_before_the_first_step(capsys):
    """A run that learned nothing leaves nothing."""
    with pytest.raises(SystemExit, match="no dataset file"):
        sb3_flow_main(
            "train", "--algo", "fql", "--env", "Pendulum-v1", "-n", 10, "-params", "dataset:'nowhere.npz'", "offline_steps:10"
        )
    assert not Path("logs").exists()


def test_full_disk(capsys):
    """What was whole before stays so, and is gone on from when there is space."""

    def limit_files():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = FPO.save

        def save_on_a_full_disk(model, *args, **kwargs):
            if model.num_timesteps == 384:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            save(model, *args, **kwargs)

        FPO.save = save_on_a_full_disk

    assert in_child(*TRAIN, "-n", 512, before=limit_files) == 2
    message = Path("child.txt").read_text().splitlines()[-1]
    assert message.startswith("sb3-flow: error: [Errno 27] File too large") and "--resume goes on" in message
    assert saved_steps(RUN) == [128, 256] and not list(RUN.rglob(".unfinished_*"))
    assert resume_to_the_end(512, capsys)


def test_one_process_at_a_time(run):
    before = contents(run)
    (run / "rl_model_512_steps.zip").touch()
    with lock(run), pytest.raises(SystemExit, match="logs/fpo/Pendulum-v1_1 is being trained by another process"):
        sb3_flow_main("train", "--resume", run, "-n", 1024)
    assert contents(run) == before
    # A run that is killed does not hold it
    pid = in_child(*TRAIN, "-n", 100_000, wait=False)
    second = run.with_name("Pendulum-v1_2")
    wait_for_checkpoint(second)
    with pytest.raises(SystemExit, match="Pendulum-v1_2 is being trained by another process"):
        sb3_flow_main(*TRAIN, "--resume")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lock(second).release()


def test_new_runs_at_the_same_time(run):
    """Each has a folder of its own."""
    from sb3_flow.zoo.experiment import FlowExperimentManager

    managers = [FlowExperimentManager(argparse.Namespace(), "fpo", "Pendulum-v1", "logs") for _ in range(3)]
    for manager in managers:
        manager.create_log_folder()
    assert [Path(manager.save_path).name for manager in managers] == ["Pendulum-v1_2", "Pendulum-v1_3", "Pendulum-v1_4"]
    # Without a training that has begun they are not the latest run
    assert find_run(Path("logs/fpo"), "Pendulum-v1").folder == run


def test_runs_with_a_uuid(capsys):
    """They are found, the latest of them."""
    for n_timesteps in (128, 256):
        sb3_flow_main(*TRAIN, "-n", n_timesteps, "-uuid")
        time.sleep(0.05)
    first, second = sorted(Path("logs/fpo").iterdir(), key=lambda path: path.stat().st_mtime)
    assert run_folders(Path("logs/fpo"), "Pendulum-v1") == [second, first]
    options = ["--algo", "fpo", "--env", "Pendulum-v1"]
    capsys.readouterr()
    sb3_flow_main("train", *options, "--resume")
    assert f"{second} is finished, after 256 of 256 timesteps" in capsys.readouterr().out
    sb3_flow_main("evaluate", *options, "-n", 1)
    assert f"{second}/Pendulum-v1.zip: " in capsys.readouterr().out
    sb3_flow_main("enjoy", *options, "-n", 200, "--no-render")
    out = capsys.readouterr().out
    assert f"Loading {second}/Pendulum-v1.zip" in out and "1 Episodes" in out


def test_best_model_has_its_own_statistics(run, capsys):
    from sb3_flow.zoo.evaluate import load_run

    for load_best, name in [(True, "best_model_vecnormalize.pkl"), (False, "Pendulum-v1/vecnormalize.pkl")]:
        model, env, _ = load_run("fpo", "Pendulum-v1", load_best=load_best)
        statistics = load_statistics(run / name)
        assert env.obs_rms.count == statistics.obs_rms.count == pytest.approx(model.num_timesteps, abs=4)
        assert env.ret_rms is not None and not env.training
    # A run that goes on leaves the final model its statistics
    before = contents(run)[Path("Pendulum-v1/vecnormalize.pkl")]
    (run / "evaluations.npz").unlink()
    status = in_child("train", "--resume", run, "-n", 1024, before=partial(kill_at, 30))
    assert status == -signal.SIGKILL and contents(run)[Path("Pendulum-v1/vecnormalize.pkl")] == before
    # The evaluation of a model that is not the latest says so
    last = saved_steps(run)[-1]
    assert last > 512
    capsys.readouterr()
    load_run("fpo", "Pendulum-v1")
    assert f"rl_model_{last}_steps.zip is later than {run}/Pendulum-v1.zip" in capsys.readouterr().out


def test_tensorboard_goes_on(run):
    """In the same folder, though another run has begun since, with the timesteps that follow."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        sb3_flow_main(*TRAIN, "-n", 256, "-tb", "tb")
    first, second = Path("tb/Pendulum-v1/FPO_1"), Path("tb/Pendulum-v1/FPO_2")
    before = contents(second)
    sb3_flow_main("train", "--resume", run.with_name("Pendulum-v1_2"), "-n", 512)
    assert contents(second) == before and {path.name for path in first.parent.iterdir()} == {"FPO_1", "FPO_2"}
    events = event_accumulator.EventAccumulator(str(first)).Reload()
    assert [event.step for event in events.Scalars("time/fps")] == [128, 256, 384, 512]


def make_dataset(n=200):
    rng = np.random.default_rng(0)
    np.savez(
        "data.npz", observations=np.zeros((n, 3)), next_observations=np.zeros((n, 3)), rewards=np.zeros(n),
        actions=rng.uniform(-2, 2, size=(n, 1)),
    )  # fmt: skip
    return ["-params", "dataset:'data.npz'", "offline_steps:100", "policy_kwargs:dict(net_arch=[16])", "batch_size:32"]


def test_fql_resumes(capsys):
    """With its replay buffer, and for what is left of both phases."""
    train = ["train", "--algo", "fql", "--env", "Pendulum-v1", "--eval-freq", -1, "--save-freq", 40, "--save-replay-buffer"]
    params = make_dataset()
    run = Path("logs/fql/Pendulum-v1_1")
    sb3_flow_main(*train, "-n", 50, *params)
    assert saved_steps(run) == [40, 80, 120]
    # Only the latest, which can be large
    assert [path.name for path in run.glob("rl_model_replay_buffer_*")] == ["rl_model_replay_buffer_120_steps.pkl"]
    sb3_flow_main(*train, "-n", 50, *params, "--resume")
    assert "is finished, after 150 of 150 timesteps" in capsys.readouterr().out
    # A run that was killed before, or while, the buffer was written
    for path in (run / "rl_model_130_steps.zip", run / "rl_model_140_steps.zip"):
        shutil.copy(run / "rl_model_120_steps.zip", path)
    (run / "rl_model_replay_buffer_140_steps.pkl").write_bytes(
        (run / "rl_model_replay_buffer_120_steps.pkl").read_bytes()[:-100]
    )
    (run / "Pendulum-v1.zip").unlink()
    sb3_flow_main("train", "--resume", run, "-n", 60)
    out = capsys.readouterr().out
    assert f"Resuming {run} after 120 of 160 timesteps" in out and "lost" not in out
    model = FQL.load(run / "Pendulum-v1.zip")
    model.load_replay_buffer(run / "replay_buffer.pkl")
    # (SB3 saves an online checkpoint before the transition of its step is stored and learned from)
    assert model.num_timesteps == 160 and model._n_updates == 159 and model.replay_buffer.size() == 59
    # From the end
    sb3_flow_main("train", "--resume", run, "-n", 70)
    assert f"Resuming {run} after 160 of 170 timesteps" in capsys.readouterr().out
    model = FQL.load(run / "Pendulum-v1.zip")
    model.load_replay_buffer(run / "replay_buffer.pkl")
    assert model.num_timesteps == 170 and model._n_updates == 169 and model.replay_buffer.size() == 69
    # From a checkpoint of the offline phase, all of the online phase is left
    for path in [*run.glob("rl_model_1*"), run / "Pendulum-v1.zip", *run.glob("*replay_buffer*.pkl")]:
        path.unlink(missing_ok=True)
    Path("moved").mkdir()
    shutil.move("data.npz", "moved")
    sb3_flow_main("train", "--resume", run, "-params", "dataset:'moved/data.npz'")
    out = capsys.readouterr().out
    assert "after 80 of 170 timesteps" in out and "is lost" not in out
    model = FQL.load(run / "Pendulum-v1.zip")
    model.load_replay_buffer(run / "replay_buffer.pkl")
    assert model.num_timesteps == model._n_updates == 170 and model.replay_buffer.size() == 70
    # Without what was collected online it goes on, and says so
    for path in run.glob("*replay_buffer*.pkl"):
        path.unlink()
    shutil.move("moved/data.npz", "data.npz")
    sb3_flow_main("train", "--resume", run, "-n", 80)
    assert "Pendulum-v1.zip had collected is lost: there is no replay_buffer.pkl" in capsys.readouterr().out


def test_offline_only(capsys):
    """-n 0 is none, not those of the file."""
    sb3_flow_main("train", "--algo", "fql", "--env", "Pendulum-v1", "--eval-freq", -1, "-n", 0, *make_dataset())
    run = Path("logs/fql/Pendulum-v1_1")
    assert FQL.load(run / "Pendulum-v1.zip", buffer_size=1).num_timesteps == 100
    sb3_flow_main("train", "--resume", run)
    assert "is finished, after 100 of 100 timesteps" in capsys.readouterr().out
    sb3_flow_main("train", "--resume", run, "-n", 10)
    model = FQL.load(run / "Pendulum-v1.zip", buffer_size=1)
    assert model.num_timesteps == 110 and model._n_offline_updates == 100


def test_run_of_a_trained_agent_resumes(capsys):
    """Its timesteps are its own: those of the agent, and of its offline phase, do not count."""
    train = ["train", "--algo", "fql", "--env", "Pendulum-v1", "--eval-freq", -1, "--save-freq", 40]
    params = make_dataset()
    sb3_flow_main(*train, "-n", 10, *params)
    sb3_flow_main(*train, "-n", 90, *params, "-i", "logs/fql/Pendulum-v1_1/Pendulum-v1.zip")
    run = Path("logs/fql/Pendulum-v1_2")
    assert FQL.load(run / "Pendulum-v1.zip", buffer_size=1).num_timesteps == 90
    shutil.rmtree("logs/fql/Pendulum-v1_1")
    (run / "Pendulum-v1.zip").unlink()
    capsys.readouterr()
    sb3_flow_main("train", "--algo", "fql", "--env", "Pendulum-v1", "--resume")
    assert f"Resuming {run} after 80 of 90 timesteps" in capsys.readouterr().out
    model = FQL.load(run / "Pendulum-v1.zip", buffer_size=1)
    assert model.num_timesteps == 90 and model._n_offline_updates == 100
    sb3_flow_main("train", "--resume", run)
    assert "is finished, after 90 of 90 timesteps" in capsys.readouterr().out


def test_run_of_a_trial_resumes(capsys):
    """Without its study."""
    study = ["--algo", "fql", "--env", "Pendulum-v1", "--storage", "study.log", "--study-name", "test", "-n", 40]
    params = ["-params", "buffer_size:100", "learning_starts:1000"]
    sb3_flow_main("optimize", *study, "--n-trials", 1, "--n-evaluations", 1, "--eval-episodes", 1, "--no-optim-plots", *params)
    sb3_flow_main("train", *study, "--trial-id", 0, "--save-freq", 20, "--eval-freq", -1, *params)
    run = Path("logs/fql/Pendulum-v1_1")
    # The same file again is no other option
    capsys.readouterr()
    sb3_flow_main("train", *study, "--trial-id", 0, "-conf", sb3_flow.zoo.default_conf_file("fql"), "--resume")
    assert "is finished" in capsys.readouterr().out
    gamma = FQL.load(run / "Pendulum-v1.zip").gamma
    (run / "Pendulum-v1.zip").unlink()
    (run / "rl_model_40_steps.zip").unlink()
    Path("study.log").unlink()
    sb3_flow_main("train", *study, "--resume")
    assert f"Resuming {run} after 20 of 40 timesteps" in capsys.readouterr().out
    assert FQL.load(run / "Pendulum-v1.zip").gamma == gamma


@pytest.mark.parametrize("algo", ["sac", "fpo", "ppo"])
def test_other_runs_resume(algo, capsys):
    """HER, stacked frames with normalization, rl-zoo3's own algorithms."""
    pytest.importorskip("sb3_contrib")
    options = dict(
        sac=["-params", "learning_starts:60", "replay_buffer_class:'HerReplayBuffer'", "buffer_size:500"],
        fpo=["-params", "n_envs:2", "n_steps:32", "batch_size:32", "frame_stack:3", "normalize:True", "n_epochs:1"],
        ppo=["-params", "n_envs:1", "n_steps:32"],
    )[algo]
    if algo == "sac":
        Path("goals.py").write_text(
            "import gymnasium as gym\n"
            "from stable_baselines3.common.envs import BitFlippingEnv\n"
            "gym.register('Goal-v0', lambda: BitFlippingEnv(n_bits=3, continuous=True, max_steps=10))\n"
        )
        env = ["--env", "Goal-v0", "--gym-packages", "goals"]
        options += ["policy:'MultiInputPolicy'", "policy_kwargs:dict(net_arch=[8])"]
    else:
        env = ["--env", "Pendulum-v1"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(Path.cwd()))
        train = ["train", "--algo", algo, *env, "--eval-freq", 64, "--eval-episodes", 1, "--save-freq", 64]
        conf = ["-conf", "conf.yml"]
        Path("conf.yml").write_text(yaml.safe_dump({"default": dict(n_timesteps=128, policy="MlpPolicy")}))
        sb3_flow_main(*train, *conf, *options, *(["--save-replay-buffer"] if algo == "sac" else []))
        (run,) = Path(f"logs/{algo}").iterdir()
        name = run.name[:-2]
        (run / f"{name}.zip").unlink()
        for path in run.glob("rl_model_*_128_steps.*"):
            path.unlink()
        (run / "rl_model_128_steps.zip").unlink()
        buffers = list(run.glob("*replay_buffer*"))
        for path in buffers:
            path.unlink()
        capsys.readouterr()
        sb3_flow_main(*train, *conf, "--resume")
    out = capsys.readouterr().out
    assert "after 64 of 128 timesteps" in out and (f"{run}/rl_model_64_steps.zip had collected is lost" in out) == (
        algo == "sac"
    )
    assert Run(run).last_state(128).num_timesteps == 128 and bool(buffers) == (algo == "sac")
    assert rl_zoo3.train.ExperimentManager.__name__ == "ExperimentManager"
