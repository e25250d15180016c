"""
Runs as repositories of the Hugging Face Hub, of the files that rl-zoo3 has in its own (its ``load_from_hub`` takes them too),
with a model card.
"""

import json
import shlex
import shutil
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from pprint import pformat
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_sb3 import EnvironmentName, ModelName
from rl_zoo3.utils import ALGOS

from sb3_flow.zoo.errors import InputError, user_input
from sb3_flow.zoo.evaluate import find_model
from sb3_flow.zoo.runs import Run, latest_run_id, written_whole

PACKAGES = ("sb3-flow", "stable-baselines3", "rl_zoo3", "torch", "gymnasium", "numpy")
VIDEO = "replay.mp4"
#: Their names in a run, and in a repository
STATISTICS = ("vecnormalize.pkl", "vec_normalize.pkl")
METRICS = "train_eval_metrics.zip"


def package_run(
    model_path: Path, folder: Path, evaluation: dict[str, Any], repo_id: str, video: Path | None, license_name: str
) -> None:
    """
    Write the repository of a run.

    :param model_path: Model of the run
    :param folder: Folder of the repository
    :param evaluation: What ``evaluate`` returned for the model
    :param repo_id: Name of the repository, ORGANIZATION/NAME
    :param video: Video of the agent, if there is one
    :param license_name: Licence of the model, by the name that the hub has for it
    """
    run = Run(model_path.parent)
    parameters = run.folder / run.env_name
    with written_whole(folder) as unfinished:
        shutil.copy(model_path, unfinished / ModelName(run.algo, run.env_name).filename)
        for file in ("args.yml", "config.yml"):
            # (who published it is not for everyone to know)
            (unfinished / file).write_text((parameters / file).read_text().replace(str(Path.home()), "~"))
        (unfinished / "env_kwargs.yml").write_text(yaml.safe_dump(run.args["env_kwargs"] or {}))
        if (parameters / STATISTICS[0]).is_file():
            shutil.copy(parameters / STATISTICS[0], unfinished / STATISTICS[1])
        with zipfile.ZipFile(unfinished / METRICS, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted([*run.folder.glob("*.monitor.csv"), *run.folder.glob("evaluations.npz")]):
                archive.write(path, path.name)
        if video is not None:
            shutil.copy(video, unfinished / VIDEO)
        # (without the path of the model, which is of this machine)
        results = {name: value for name, value in evaluation.items() if name != "model"}
        (unfinished / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        model_card(run, evaluation, repo_id, video is not None, license_name).save(unfinished / "README.md")


def model_card(run: Run, evaluation: dict[str, Any], repo_id: str, has_video: bool, license_name: str) -> ModelCard:
    """
    :param run: The run
    :param evaluation: What ``evaluate`` returned for its model
    :param repo_id: Name of the repository, ORGANIZATION/NAME
    :param has_video: Whether the repository has a video
    :param license_name: Licence of the model
    :return: algorithm, task, result with interval, commands, hyperparameters, versions
    """
    algorithm, (organization, name) = ALGOS[run.algo].__name__, repo_id.split("/")
    low, high = evaluation["mean_return_interval"]
    mean, std = evaluation["mean_return"], evaluation["std_return"]
    data = ModelCardData(
        license=license_name,
        library_name="stable-baselines3",
        tags=[run.env, "deep-reinforcement-learning", "reinforcement-learning", "sb3-flow", "flow-matching"],
        model_name=algorithm,
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning", task_name="reinforcement-learning", dataset_type=run.env,
                dataset_name=run.env, metric_type="mean_reward", metric_value=f"{mean:.2f} +/- {std:.2f}",
            )
        ],
    )  # fmt: skip
    other_name = "" if name == ModelName(run.algo, run.env_name) else f" -name {name}"
    agent = f"--algo {run.algo} --env {run.env}"
    success = "" if evaluation["success_rate"] is None else f", success rate {100 * evaluation['success_rate']:.0f} %"
    content = f"""---
{data.to_yaml()}
---

# {algorithm} on {run.env}

A flow policy, trained with [Stable-Baselines3](https://github.com/DLR-RM/stable-baselines3) and sb3-flow.

**Result**: {mean:.2f} ± {std:.2f} (95 % interval of the mean: {low:.2f} to {high:.2f}){success};
{evaluation['n_eval_episodes']} episodes, {'deterministic' if evaluation['deterministic'] else 'sampled'} actions, after \
{evaluation['num_timesteps']:,} timesteps. All returns are in `results.json`.
{f'{chr(10)}<video src="{VIDEO}" controls></video>{chr(10)}' if has_video else ''}
## Use

```bash
pip install "sb3-flow[zoo]"
# A model is a pickle, which can run any code
TRUST_REMOTE_CODE=True sb3-flow load-from-hub {agent} -orga {organization}{other_name}
sb3-flow enjoy {agent}
```

## Train

```bash
{training_command(run)}
```

Hyperparameters:

```python
{pformat(run.config, sort_dicts=False)}
```

Versions: {', '.join(f'{package} {version(package)}' for package in PACKAGES)}.
"""
    return ModelCard(content)


def training_command(run: Run) -> str:
    """
    :param run: The run
    :return: the command that trains it, with what was not left to defaults
    """
    words = [
        "sb3-flow",
        "train",
        "--algo",
        run.algo,
        "--env",
        run.env,
        "--seed",
        str(run.args["seed"]),
        "-n",
        str(run.n_timesteps),
    ]
    if run.args.get("vec_env", "dummy") != "dummy":
        words += ["--vec-env", run.args["vec_env"]]
    for option, name in (("--env-kwargs", "env_kwargs"), ("-params", "hyperparams")):
        if run.args.get(name):
            words += [option, *(f"{key}:{value!r}" for key, value in run.args[name].items())]
    return shlex.join(words)


def upload(folder: Path, repo_id: str, message: str) -> str:
    """
    :param folder: Folder of a repository
    :param repo_id: Name of the repository, ORGANIZATION/NAME
    :param message: Commit message
    :return: address of the repository, which is created if there is none
    """
    with user_input(f"argument -orga/--organization: {repo_id}"):
        api = HfApi()
        url = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(url)


def unpack_run(
    algo: str, env: str, folder: str, get: Callable[[str], str | None], exp_id: int = 0, force: bool = False
) -> Path:
    """
    Make a run of a repository.

    :param algo: Name of the algorithm
    :param env: Environment id
    :param folder: Log folder
    :param get: Gets a file of the repository by its name, None if there is no such file
    :param exp_id: Number of the run, 0 for that after the latest
    :param force: Whether a run that has this number is replaced
    :return: folder of the run
    :raises InputError: if a file is missing, is that of another algorithm or environment, or there is a run already
    """
    env_name = EnvironmentName(env)
    exp_id = exp_id or latest_run_id(Path(folder) / algo, env_name) + 1
    run_folder = Path(folder) / algo / f"{env_name}_{int(exp_id)}"
    if run_folder.exists() and not force:
        raise InputError(f"argument --exp-id: {run_folder} is there already, --force replaces it")
    names = {
        "args.yml": f"{env_name}/args.yml",
        "config.yml": f"{env_name}/config.yml",
        STATISTICS[1]: f"{env_name}/{STATISTICS[0]}",
        METRICS: METRICS,
        # (last: only then it is a run)
        ModelName(algo, env_name).filename: f"{env_name}.zip",
    }
    files = {name: get(name) for name in names}
    for name in (ModelName(algo, env_name).filename, "args.yml", "config.yml"):
        if files[name] is None:
            raise InputError(f"the repository has no {name}: expected that of {algo} on {env}")
    with written_whole(Path(folder) / algo) as unfinished:
        new = unfinished / run_folder.name
        (new / env_name).mkdir(parents=True)
        for name, target in names.items():
            source = files[name]
            if source is not None:
                shutil.copy(source, new / target)
        if (new / METRICS).is_file():
            with zipfile.ZipFile(new / METRICS) as archive:
                archive.extractall(new)
            (new / METRICS).unlink()
        found = Run(new)
        if (found.algo, found.env) != (algo, env):
            raise InputError(f"the repository has {found.algo} on {found.env}, expected {algo} on {env}")
        if run_folder.exists():
            shutil.rmtree(run_folder)
    find_model(algo, env, folder, int(exp_id))
    return run_folder
