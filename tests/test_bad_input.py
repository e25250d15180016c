"""Wrong inputs of the command line end in one line, and leave nothing behind."""

import os
import pickle
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("hypothesis", reason='needs pip install "sb3-flow[tests]"')
pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')
pytest.importorskip("seaborn", reason='needs pip install "sb3-flow[plots]"')

import optuna
from bad_inputs import AGENT, BAD_INPUTS, ENJOY, SEARCH, TRAIN
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from sb3_flow import FPO, FQL
from sb3_flow.zoo import cli
from sb3_flow.zoo.search_spaces import sample_fpo_params, sample_fql_params

DAMAGES = {
    "truncated": lambda run: _rewrite(run / "Pendulum-v1.zip", lambda content: content[: len(content) // 2]),
    "changed": lambda run: _rewrite(run / "Pendulum-v1.zip", lambda content: content[:9000] + b"x" * 9 + content[9009:]),
    "empty": lambda run: _rewrite(run / "Pendulum-v1.zip", lambda content: b""),
    "other_zip": lambda run: zipfile.ZipFile(run / "Pendulum-v1.zip", "w").writestr("a", "b"),
    "other_algo": lambda run: shutil.copy("logs/ppo/Pendulum-v1_1/Pendulum-v1.zip", run),
    "other_env": lambda run: FPO("MlpPolicy", "MountainCarContinuous-v0", n_steps=64).save(run / "Pendulum-v1.zip"),
    "no_model": lambda run: (run / "Pendulum-v1.zip").unlink(),
    "no_statistics": lambda run: (run / "Pendulum-v1/vecnormalize.pkl").unlink(),
    "bad_statistics": lambda run: _rewrite(run / "Pendulum-v1/vecnormalize.pkl", lambda content: content[:-100]),
    "other_statistics": lambda run: _rewrite(run / "Pendulum-v1/vecnormalize.pkl", lambda content: pickle.dumps({})),
    "no_args": lambda run: (run / "Pendulum-v1/args.yml").unlink(),
    "bad_args": lambda run: _rewrite(run / "Pendulum-v1/args.yml", lambda content: content + b"[\n"),
    "empty_args": lambda run: _rewrite(run / "Pendulum-v1/args.yml", lambda content: b""),
    "no_config": lambda run: (run / "Pendulum-v1/config.yml").unlink(),
    "bad_config": lambda run: _rewrite(run / "Pendulum-v1/config.yml", lambda content: content + b"[\n"),
    "no_monitor": lambda run: (run / "0.monitor.csv").unlink(),
    "bad_monitor": lambda run: _rewrite(run / "0.monitor.csv", lambda content: b"a page\n"),
    "bad_evaluations": lambda run: _rewrite(run / "evaluations.npz", lambda content: content[:100]),
}


def _rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def run(command_line):
    """
    :return: exit status
    """
    arguments = command_line if isinstance(command_line, list) else shlex.split(command_line)
    sys.argv, before = ["sb3-flow", *arguments], sys.argv
    try:
        cli.main()
        return 0
    except SystemExit as error:
        return error.code
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two trained agents, copies of one with a damage each, a study, results, and files that are not what they seem."""
    folder = tmp_path_factory.mktemp("inputs")
    before = Path.cwd()
    os.chdir(folder)
    plt.switch_backend("agg")
    options = "--eval-episodes 2 --save-freq 64 --num-threads 1 --seed 0 --verbose 0"
    params = "n_envs:1 n_steps:64 batch_size:64 n_epochs:1 normalize:True"
    assert run(f"train {AGENT} -n 256 --eval-freq 64 {options} -params {params}") == 0
    assert run(f"train --algo ppo --env Pendulum-v1 -n 64 --eval-freq -1 {options} -params {params}") == 0
    for path in Path("logs/ppo/Pendulum-v1_1").glob("rl_model_*"):
        path.unlink()
    assert run("all-plots -a fpo -e Pendulum-v1 -f logs -o res --no-display") == 0
    for kind, damage in DAMAGES.items():
        shutil.copytree("logs/fpo/Pendulum-v1_1", f"damaged/{kind}/fpo/Pendulum-v1_1")
        damage(Path(f"damaged/{kind}/fpo/Pendulum-v1_1"))
    shutil.copytree("logs/fpo", "damaged/fpo_for_ppo/ppo")

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend("study.log"))
    for name, sample in [("search", sample_fpo_params), ("other", sample_fql_params), ("none", None)]:
        study = optuna.create_study(storage=storage, study_name=name)
        for _ in range(2 if sample else 0):
            trial = study.ask()
            sample(trial, 1, 1, {})
            study.tell(trial, 0.0)

    for name in ("folder", "folder.yml", "folder.zip", "folder.log"):
        Path(name).mkdir()
    for name in ("a_file", "text.yml", "text.zip", "text.log", "text.log2", "text.pkl"):
        Path(name).write_text("some text\n")
    Path("page.npz").write_text("<html></html>")
    Path("bad_package.py").write_text("1 / 0")
    Path("broken.py").write_text("1 / 0")
    Path("no_hyperparams.py").write_text("")
    Path("empty.yml").write_text("")
    Path("broken.yml").write_text("Pendulum-v1: [\n")
    Path("binary.yml").write_bytes(b"\xff\xfe\x00")
    block = dict(policy="MlpPolicy", n_timesteps=64)
    for name, content in {
        "list": [1],
        "no_key": {"Pendulum-v0": block},
        "number": {"Pendulum-v1": 5},
        "no_policy": {"Pendulum-v1": dict(n_timesteps=64)},
        "no_timesteps": {"Pendulum-v1": dict(policy="MlpPolicy")},
        "wrong_type": {"default": {**block, "n_steps": "many"}},
        "wrong_name": {"Pendulum-v1": {**block, "n_step": 5}},
        "wrong_kwargs": {"Pendulum-v1": {**block, "policy_kwargs": "dict(net_arc=[8])"}},
        "null": {"Pendulum-v1": {**block, "policy": None}},
        "wrong_callback": {
            "Pendulum-v1": {**block, "callback": [{"stable_baselines3.common.callbacks.CheckpointCallback": {"foo": 1}}]}
        },
        "wrong_wrapper": {"Pendulum-v1": {**block, "env_wrapper": [{"not_there.Wrapper": {"a": 1}}]}},
    }.items():
        Path(f"{name}.yml").write_text(yaml.safe_dump(content))
    Path("dict.pkl").write_bytes(pickle.dumps({"a": 1}))
    data = dict(observations=np.zeros((6, 3)), actions=np.zeros((6, 1)), next_observations=np.zeros((6, 3)))
    np.savez("no_rewards.npz", **data)
    np.savez("data.npz", **data, rewards=np.zeros(6))
    os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for screen in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(screen, raising=False)
    # What is under test writes here no more than elsewhere
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def contents(folder):
    """Every file, and whether it is the same that it was."""
    stats = {path: path.stat() for path in sorted(folder.rglob("*"))}
    return {path: path.is_file() and (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def check_one_line(status, err, texts=()):
    __tracebackhide__ = True
    errors = [line for line in err.splitlines() if "error:" in line.lower()]
    assert status == cli.WRONG_INPUT, err
    assert len(errors) == 1 and errors[0] == err.splitlines()[-1] and errors[0].startswith("sb3-flow: error: "), err
    assert "Traceback" not in err
    for text in texts:
        assert text in errors[0]


def test_the_corpus_is_large():
    assert len({command_line for command_line, _ in BAD_INPUTS}) == len(BAD_INPUTS) >= 150


@pytest.mark.parametrize(("command_line", "texts"), BAD_INPUTS, ids=[command_line for command_line, _ in BAD_INPUTS])
def test_bad_input(folder, capfd, command_line, texts):
    before = contents(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = run(command_line)
    check_one_line(status, capfd.readouterr().err, texts)
    assert contents(folder) == before


@pytest.mark.parametrize("command_line", [f"{TRAIN} -params foo:1", f"evaluate {AGENT} -f damaged/truncated", "fly"])
def test_debug_shows_the_traceback(capfd, command_line):
    for arguments in (f"--debug {command_line}", f"{command_line} --debug"):
        status = run(arguments)
        lines = capfd.readouterr().err.splitlines()
        assert status == cli.WRONG_INPUT
        assert "Traceback (most recent call last):" in lines and lines[-1].startswith("sb3-flow: error: ")


def test_as_a_program(folder):
    """Nothing is printed after the error, whatever the libraries do at the end of the process."""
    before = contents(folder)
    command = [sys.executable, "-W", "ignore", "-m", "sb3_flow.zoo", *shlex.split(f"{TRAIN} -params trust_region:5")]
    process = subprocess.run(command, capture_output=True, text=True)
    check_one_line(process.returncode, process.stderr)
    assert contents(folder) == before


def test_benchmark_stops_at_a_damaged_agent(folder, capfd):
    before = contents(folder)
    status = run("benchmark --log-dir damaged/truncated -n 10")
    check_one_line(status, capfd.readouterr().err, ["damaged", "Pendulum-v1.zip"])
    assert contents(folder) == before


@pytest.mark.parametrize("command_line", [f"evaluate {AGENT} -n 3", ENJOY, f"plot-flow {AGENT}", TRAIN, SEARCH])
def test_interrupted(monkeypatch, capfd, command_line):
    """Before a training has begun, and in commands that do not train."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gymnasium.envs.classic_control.PendulumEnv.__init__", interrupt)
    assert run(command_line) == cli.INTERRUPTED
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == "sb3-flow: interrupted" and "Traceback" not in err


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError])
def test_a_bug_keeps_its_traceback(monkeypatch, kind):
    def bug(*args, **kwargs):
        raise kind("a bug")

    monkeypatch.setattr(FPO, "train", bug)
    options = ["--log-folder", "bug", "-params", "n_steps:64", "batch_size:64"]
    with pytest.raises(kind, match="a bug"):
        run([*shlex.split(TRAIN), *options])
    shutil.rmtree("bug")
    monkeypatch.setattr(FPO, "predict", bug)
    with pytest.raises(kind, match="a bug"):
        run(f"evaluate {AGENT}")


def test_load(tmp_path):
    """In Python too, a file that is no model of the algorithm is one clear error."""
    fpo = "logs/fpo/Pendulum-v1_1/Pendulum-v1.zip"
    assert FPO.load(fpo).num_timesteps == 256
    shutil.copy(fpo, tmp_path / "model.zip")
    assert FPO.load(tmp_path / "model").num_timesteps == 256
    with open(fpo, "rb") as file:
        assert FPO.load(file).num_timesteps == 256
    for algorithm, path, message in [
        (FPO, "logs/ppo/Pendulum-v1_1/Pendulum-v1.zip", "not a model of FPO, but one with the policy .*ActorCriticPolicy"),
        (FQL, fpo, "not a model of FQL, but one with the policy .*FlowPolicy"),
        (FPO, "a_file", "a_file is not a model, or damaged: File is not a zip file"),
        (FPO, "damaged/truncated/fpo/Pendulum-v1_1/Pendulum-v1.zip", "not a model, or damaged"),
        (FPO, "damaged/changed/fpo/Pendulum-v1_1/Pendulum-v1.zip", "not a model, or damaged: Bad CRC"),
        (
            FPO,
            "damaged/other_zip/fpo/Pendulum-v1_1/Pendulum-v1.zip",
            "not a model, or damaged: there is no class of a policy in it",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            algorithm.load(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.zip"):
        FPO.load("nothing")


def test_good_hyperparameters_are_not_refused():
    """Those of all files of rl-zoo3 and of ours, but for classes that are not installed."""
    rl_zoo3 = pytest.importorskip("rl_zoo3")
    from sb3_flow.zoo import FLOW_ALGOS, default_conf_file, register
    from sb3_flow.zoo.errors import InputError
    from sb3_flow.zoo.hyperparams import check_hyperparams, expand_preset

    register()
    folder = Path(rl_zoo3.__file__).parent / "hyperparams"
    n_blocks = 0
    for algo in rl_zoo3.ALGOS:
        file = default_conf_file(algo) if algo in FLOW_ALGOS else folder / f"{algo}.yml"
        for env_id, hyperparams in yaml.safe_load(Path(file).read_text()).items():
            # (a default of rl-zoo3's that is wrong)
            if (algo, env_id) != ("ppo_lstm", "default"):
                try:
                    check_hyperparams(algo, expand_preset(algo, hyperparams, str), str)
                except InputError as error:
                    assert "No module named" in str(error)
                n_blocks += 1
    assert n_blocks > 300


#: Valid command lines, which are quick
GOOD_INPUTS = [
    f"{TRAIN} --num-threads 1 --seed 1 --vec-env dummy --log-folder logs -params n_steps:64 batch_size:64 gamma:0.9",
    f"evaluate {AGENT} -f logs --exp-id 1 -n 1 --device cpu --deterministic",
    f"{ENJOY} -f logs --seed 3 --verbose 0 --n-envs 1",
    f"plot-flow {AGENT} --obs -1 -2.5e-1 0 --dims 0 --n-samples 50 --load-best -o flow.png",
    "plot-train -a fpo -e Pendulum-v1 -f logs -w 1 -x steps",
    "all-plots -a fpo -e Pendulum-v1 -f logs --key results --no-display",
    "plot-from-file -i res.pkl --skip-timesteps --fontsize 10",
    "datasets info data.npz",
]


@pytest.fixture
def in_a_copy(folder, tmp_path, monkeypatch):
    for name in ("logs", "res.pkl", "data.npz"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command_line", GOOD_INPUTS)
def test_good_input(in_a_copy, monkeypatch, command_line):
    # (the animation takes long)
    monkeypatch.setattr("sb3_flow.plotting.flow._animate", lambda view, path, title: path)
    assert run(command_line) == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_misspelled(folder, capfd, data):
    """An option with a letter too many or too few is never taken for another one, nor a value of a wrong type."""
    arguments = shlex.split(data.draw(st.sampled_from(GOOD_INPUTS)))
    options = [index for index, argument in enumerate(arguments) if argument.startswith("-") and len(argument) > 2]
    typed = ("--num-threads", "--seed", "--exp-id", "-n", "--n-envs", "--n-samples", "--dims", "--fontsize", "-w", "--verbose")
    values = [index + 1 for index, argument in enumerate(arguments) if argument in typed]
    if data.draw(st.booleans()) and values:
        index = data.draw(st.sampled_from(values))
        arguments[index] = data.draw(
            st.sampled_from(["", "a", "1.5", "[1]", "None", "0x1", "1-", "True", "½", "nan", "-5", "1 2"])
        )
    elif options:
        index = data.draw(st.sampled_from(options))
        option = arguments[index]
        position = data.draw(st.integers(0, len(option) - 1))
        changed = option[:position] + option[position] * data.draw(st.sampled_from([0, 2])) + option[position + 1 :]
        assume(changed.startswith("-") and not changed[1:].lstrip("-")[:1].isdigit() and changed != "--")
        arguments[index] = changed
    else:
        arguments.append(data.draw(st.text(min_size=1, max_size=5).filter(lambda text: "\0" not in text)))
    before = contents(folder)
    capfd.readouterr()
    check_one_line(run(arguments), capfd.readouterr().err)
    assert contents(folder) == before
