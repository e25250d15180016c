"""The code on the pages of the documentation and in the README is run: that of a page in its order, with few steps."""

import contextlib
import functools
import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from sybil import Example, Sybil
from sybil.parsers import markdown, rest

from sb3_flow.offline.algorithm import OfflineAlgorithm
from sb3_flow.offline.policies import OfflinePolicy

ROOT = Path(__file__).parent
N_STEPS, SHORT_ROLLOUT = 3, 16
SLOW_PAGES = ("export.rst", "gridworld.rst", "zoo.rst")
#: What makes a command shorter
SHORTER = {
    "benchmark": ["-n", "200"],
    "enjoy": ["--no-render", "-n", "20"],
    "evaluate": ["-n", "1"],
    "optimize": ["-n", "200", "--n-trials", "1", "--max-total-trials", "1"],
    "plot-flow": ["--steps", "2"],
    "plot-train": ["--episode-window", "1"],
    "push-to-hub": ["-n", "2"],
    "record-video": ["-n", "20"],
}


def run_commands(example: Example) -> None:
    """Run those of ``sb3-flow``, and check that the others have options that there are. An error is a comment after it."""
    # (needs rl-zoo3)
    from sb3_flow.zoo import cli

    lines = re.sub(r"\\\n", " ", example.parsed).splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        words = shlex.split(line, comments=True)
        if "sb3_flow.zoo" in words:
            # (torchrun: one process is enough here)
            words = ["sb3-flow", *words[words.index("sb3_flow.zoo") + 1 :]]
        if not words:
            continue
        words[0] = Path(words[0]).name
        words = [word if word != "cuda" or th.cuda.is_available() else "cpu" for word in words]
        print(f"$ {line}", flush=True)
        if words[0] == "sb3-flow":
            sys.argv = [*words, *SHORTER.get(words[1], [])]
            message = following.removeprefix("# ") if following.startswith("# sb3-flow: error") else None
            with pytest.raises(SystemExit, match=re.escape(message)) if message else contextlib.nullcontext():
                cli.main()
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            check_options(words[1:])
        elif words[:2] == ["pip", "install"]:
            check_extras(words[2:])
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            subprocess.run(["make", "--dry-run", "--silent", *targets], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        else:
            raise ValueError(f"What is {words[0]}?")


def check_options(words: list[str]) -> None:
    known = subprocess.run([sys.executable, *words[:1], "--help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    missing = {word for word in words if word.startswith("--")} - set(re.findall(r"--[\w-]+", known))
    assert not missing, f"{words[0]} has no {missing}"


def check_extras(words: list[str]) -> None:
    from importlib.metadata import metadata

    extras = {extra for word in words if "[" in word for extra in word.split("[")[1].rstrip("]").split(",")}
    assert extras <= set(metadata("sb3-flow").get_all("Provides-Extra") or [])


@pytest.fixture
def few_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What learns does so for a moment, in the folder of the page, without a screen."""
    # What a page needs, all of it: its examples go on from each other. The data is not part of the repository
    text = request.node.example.document.text
    for name, data in dict(SB3_FLOW_DATA="ogbench", SB3_FLOW_MOCAP="HumanoidTracking").items():
        if data in text and name not in os.environ:
            pytest.skip(f"{name} is not set: no data of {data}")

    def shorten(algorithm: Any, name: str, steps: str) -> None:
        method = getattr(algorithm, name)

        def learn(*args: Any, **kwargs: Any) -> Any:
            arguments = inspect.signature(method).bind(*args, **kwargs).arguments
            return method(**arguments | {steps: min(arguments[steps], N_STEPS)})

        monkeypatch.setattr(algorithm, name, learn)

    def setup_model(self: OnPolicyAlgorithm) -> None:
        self.n_steps = min(self.n_steps, SHORT_ROLLOUT)
        setup(self)

    setup = OnPolicyAlgorithm._setup_model
    monkeypatch.setattr(OnPolicyAlgorithm, "_setup_model", setup_model)
    monkeypatch.setattr(OfflinePolicy, "DEFAULT_NET_ARCH", [64, 64])
    shorten(OnPolicyAlgorithm, "learn", "total_timesteps")
    shorten(OffPolicyAlgorithm, "learn", "total_timesteps")
    shorten(OfflineAlgorithm, "_learn_offline", "gradient_steps")
    monkeypatch.setattr(gym.spec("HalfCheetah-v5"), "max_episode_steps", 5)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


@functools.cache
def mujoco_draws() -> bool:
    # (the process may be aborted)
    program = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@pytest.fixture
def has_opengl() -> Any:
    """A function that says whether MuJoCo can draw."""
    return mujoco_draws


@pytest.fixture
def demonstrations() -> Any:
    """A function that records random actions: of an environment, to a file."""

    def record(env_id: str, file: str, n_steps: int = 100) -> None:
        env = gym.make(env_id)
        (obs, _), rows = env.reset(seed=0), []
        for _ in range(n_steps):
            action = env.action_space.sample()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, next_obs, terminated, truncated))
            obs = env.reset()[0] if terminated or truncated else next_obs
        names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
        arrays: dict[str, Any] = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        np.savez(file, **arrays)

    return record


def enter_folder(namespace: dict[str, Any]) -> None:
    """Each page has its own, and that of OGBench's datasets is where they would be downloaded to."""
    namespace["_before"] = Path.cwd(), os.environ.get("HOME")
    namespace["_folder"] = folder = tempfile.TemporaryDirectory()
    os.chdir(folder.name)
    os.environ["HOME"] = folder.name
    if "SB3_FLOW_DATA" in os.environ:
        Path(".ogbench").mkdir()
        for link in (".ogbench/data", "DATASETS"):
            Path(link).symlink_to(os.environ["SB3_FLOW_DATA"])


def leave_folder(namespace: dict[str, Any]) -> None:
    working_directory, home = namespace["_before"]
    os.chdir(working_directory)
    if home is None:
        del os.environ["HOME"]
    else:
        os.environ["HOME"] = home
    namespace["_folder"].cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW_PAGES:
            item.add_marker("slow")


of_all: dict[str, Any] = dict(
    setup=enter_folder, teardown=leave_folder, fixtures=["few_steps", "demonstrations", "has_opengl"]
)
pytest_collect_file = (
    Sybil(
        [rest.PythonCodeBlockParser(), rest.CodeBlockParser("bash", run_commands), rest.SkipParser()],
        pattern="docs/**/*.rst",
        **of_all,
    )
    + Sybil([markdown.PythonCodeBlockParser(), markdown.CodeBlockParser("bash", run_commands)], pattern="README.md", **of_all)
).pytest()
