"""Workers, which are processes of their own, share a study. One is killed, or suspended, in the middle."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')

import optuna
from optuna.trial import TrialState

from sb3_flow.zoo.shared_study import open_storage

# sb3-flow optimize, which does not take minutes to find out that a worker is dead
WORKER = """
import sb3_flow.zoo.shared_study as shared_study
shared_study.HEARTBEAT_INTERVAL, shared_study.GRACE_PERIOD = 1, 3
from sb3_flow.zoo.cli import main
main()
"""
# Nothing is learned in its trials
OPTIONS = ["--algo", "fql", "--env", "Pendulum-v1", "--study-name", "test", "--max-total-trials", "5",
           "--n-evaluations", "1", "--eval-episodes", "1", "--num-threads", "1", "--no-optim-plots",
           "-params", "learning_starts:100000", "buffer_size:1000"]  # fmt: skip


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "study.log")


@pytest.fixture
def postgresql():
    """A server of its own, on the loopback interface, in a temporary folder: apt-get install postgresql"""
    pytest.importorskip("psycopg", reason='needs pip install "sb3-flow[postgresql]"')
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    bin_path = shutil.which("initdb") or (versions and versions[-1] / "initdb")
    if not bin_path:
        pytest.skip("needs apt-get install postgresql")
    commands = Path(bin_path).resolve().parent
    # It does not run as root
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="postgresql_"))
    if user is not None:
        shutil.chown(folder, user)

    def run(name, *args):
        subprocess.run([commands / name, *args], check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run("initdb", "-D", folder / "data", "-U", "tester", "-A", "trust", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
    run("pg_ctl", "-D", folder / "data", "-o", options, "-l", folder / "log", "-w", "start")
    yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("storage", "fate"),
    [
        ("journal", "killed"),
        pytest.param("journal", "suspended", marks=pytest.mark.slow),
        pytest.param("postgresql", "killed", marks=pytest.mark.slow),
    ],
)
def test_worker_disappears(storage, fate, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = request.getfixturevalue(storage)

    def start(seed, n_timesteps=1000):
        study = ["--storage", storage, "--seed", str(seed), "-n", str(n_timesteps)]
        command = [sys.executable, "-c", WORKER, "optimize", *study, *OPTIONS]
        with open(f"{seed}.txt", "w") as file:
            return subprocess.Popen(command, stdout=file, stderr=file)

    # The one that will be killed is slow
    workers = [start(1, n_timesteps=12_000), start(2)]
    try:
        victim = running_trial_of(workers[0], storage)
        if fate == "killed":
            workers[0].kill()
        assert workers[1].wait(timeout=300) == 0, Path("2.txt").read_text()
        if fate == "suspended":
            # It comes back, and what it has to say is too late
            workers[0].send_signal(signal.SIGCONT)
            assert workers[0].wait(timeout=60) == 0, Path("1.txt").read_text()
            assert f"The trials [{victim.number}] were taken over" in Path("1.txt").read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()

    trials = optuna.load_study(study_name="test", storage=open_storage(storage)).trials
    finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    # As many as were asked for, each of them once, and none still waits for a worker
    assert len(finished) == 5 and len({str(trial.params) for trial in finished}) == 5
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    # That of the killed worker was run again by the other one, with the same hyperparameters
    assert trials[victim.number].state == TrialState.FAIL
    (retried,) = [t for t in finished if t.system_attrs.get("retry_history") == [victim.number]]
    assert victim.params.items() <= retried.params.items() and retried.user_attrs["pid"] == workers[1].pid
    # The report has them all, and another worker finds nothing to do
    assert fate == "suspended" or start(1).wait(timeout=60) == 0
    reports = [pd.read_csv(path) for path in Path("logs/fql").glob("report_*.csv")]
    assert len(reports) == 2 and all(list(report["state"]) == [trial.state.name for trial in trials] for report in reports)
    assert not list(Path("logs/fql").glob("Pendulum-v1_*"))


def running_trial_of(worker, storage):
    """Stop it in the middle of a trial."""
    deadline = time.time() + 120
    while time.time() < deadline and worker.poll() is None:
        try:
            trials = optuna.load_study(study_name="test", storage=open_storage(storage)).trials
        except (KeyError, optuna.exceptions.StorageInternalError):
            # Not created yet
            trials = []
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.user_attrs.get("pid") == worker.pid and "net_arch" in trial.params:
                worker.send_signal(signal.SIGSTOP)
                return trial
        time.sleep(0.5)
    raise AssertionError("the worker had no trial: " + Path("1.txt").read_text())
