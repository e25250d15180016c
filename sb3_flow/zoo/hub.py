"""
Runs as repositories of the Hugging Face Hub, of the files that rl-zoo3 has in its own (its ``load_from_hub`` takes them too),
with a model card.
"""

import ast
import fnmatch
import json
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from pprint import pformat
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_sb3 import EnvironmentName, ModelName
from rl_zoo3.utils import ALGOS

import sb3_flow
from sb3_flow.zoo import FLOW_ALGOS, default_conf_file
from sb3_flow.zoo.errors import InputError, user_input
from sb3_flow.zoo.evaluate import find_model
from sb3_flow.zoo.runs import Run, SavedModel, latest_run_id, written_whole

PACKAGES = ("stable-baselines3", "rl_zoo3", "torch", "gymnasium", "numpy")
VIDEO = "replay.mp4"
#: Their names in a run, and in a repository
STATISTICS = ("vecnormalize.pkl", "vec_normalize.pkl")
METRICS = "train_eval_metrics.zip"
#: What is in that
LOGS = ("*monitor.csv", "evaluations.npz")
#: Options that name places on the machine of the training, and what a repository has for them
PLACES: dict[str, Any] = dict(conf_file=None, log_folder="logs", tensorboard_log="", optimization_log_path=None, storage=None)


def package_run(
    model_path: Path, folder: Path, evaluation: dict[str, Any], repo_id: str, video: Path | None, license_name: str
) -> list[str]:
    """
    Write the repository of a run. Files of an earlier one that this one does not have are removed.

    :param model_path: Model of the run
    :param folder: Folder of the repository
    :param evaluation: What ``evaluate`` returned for the model
    :param repo_id: Name of the repository, ORGANIZATION/NAME
    :param video: Video of the agent, if there is one
    :param license_name: Licence of the model, by the name that the hub has for it
    :return: names of its files
    """
    run = Run(model_path.parent)
    parameters, statistics = run.folder / run.env_name, SavedModel.of(model_path, run.env_name).statistics
    with written_whole(folder) as unfinished:
        shutil.copy(model_path, unfinished / ModelName(run.algo, run.env_name).filename)
        (unfinished / "args.yml").write_text(yaml.dump({**run.args, **PLACES}))
        shutil.copy(parameters / "config.yml", unfinished)
        (unfinished / "env_kwargs.yml").write_text(yaml.dump(run.args["env_kwargs"] or {}))
        if statistics.is_file():
            shutil.copy(statistics, unfinished / STATISTICS[1])
        with zipfile.ZipFile(unfinished / METRICS, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(path for pattern in LOGS for path in run.folder.glob(pattern)):
                archive.write(path, path.name)
        if video is not None:
            shutil.copy(video, unfinished / VIDEO)
        # (without the path of the model, which is of this machine)
        results = {name: value for name, value in evaluation.items() if name != "model"}
        (unfinished / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        model_card(run, evaluation, repo_id, video is not None, license_name).save(unfinished / "README.md")
        names = sorted(path.name for path in unfinished.iterdir())
        for name in {VIDEO, STATISTICS[1]} - set(names):
            (folder / name).unlink(missing_ok=True)
    return names


def model_card(run: Run, evaluation: dict[str, Any], repo_id: str, has_video: bool, license_name: str) -> ModelCard:
    """
    :param run: The run
    :param evaluation: What ``evaluate`` returned for its model
    :param repo_id: Name of the repository, ORGANIZATION/NAME
    :param has_video: Whether the repository has a video
    :param license_name: Licence of the model
    :return: algorithm, task, result with interval, commands, hyperparameters, versions
    """
    algorithm, (organization, name), is_flow = ALGOS[run.algo].__name__, repo_id.split("/"), run.algo in FLOW_ALGOS
    low, high = evaluation["mean_return_interval"]
    mean, std = evaluation["mean_return"], evaluation["std_return"]
    data = ModelCardData(
        license=license_name,
        library_name="stable-baselines3",
        tags=[run.env, "deep-reinforcement-learning", "reinforcement-learning", "sb3-flow", *["flow-matching"] * is_flow],
        model_name=algorithm,
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning", task_name="reinforcement-learning", dataset_type=run.env,
                dataset_name=run.env, metric_type="mean_reward", metric_value=f"{mean:.2f} +/- {std:.2f}",
            )
        ],
    )  # fmt: skip
    other_name = "" if name == ModelName(run.algo, run.env_name) else f" -name {name}"
    kind = "A flow policy" if is_flow else "An agent"
    packages = " ".join(["", "--gym-packages", *run.args["gym_packages"]]) if run.args.get("gym_packages") else ""
    agent = f"--algo {run.algo} --env {run.env}{packages}"
    success = "" if evaluation["success_rate"] is None else f", success rate {100 * evaluation['success_rate']:.0f} %"
    content = f"""---
{data.to_yaml()}
---

# {algorithm} on {run.env}

{kind}, trained with [Stable-Baselines3](https://github.com/DLR-RM/stable-baselines3) and sb3-flow.

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

Versions: sb3-flow {sb3_flow.__version__}, {', '.join(f'{package} {version(package)}' for package in PACKAGES)}.
"""
    return ModelCard(content)


def training_command(run: Run) -> str:
    """
    :param run: The run
    :return: the command that trains it, as far as it can be written down: a comment tells what cannot
    """
    args = run.args
    words = f"sb3-flow train --algo {run.algo} --env {run.env} --seed {args['seed']} -n {run.n_timesteps}".split()
    if args.get("vec_env", "dummy") != "dummy":
        words += ["--vec-env", args["vec_env"]]
    if args.get("gym_packages"):
        words += ["--gym-packages", *args["gym_packages"]]
    missing = ["another model to begin with"] if args.get("trained_agent") else []
    conf_file = default_conf_file(run.algo) if run.algo in FLOW_ALGOS else None
    if args.get("trial_id") is not None or args.get("conf_file") != conf_file:
        missing.append("the hyperparameters below")
    for option, name in (("--env-kwargs", "env_kwargs"), ("-params", "hyperparams")):
        given = args.get(name) or {}
        plain = {key: value for key, value in given.items() if _is_literal(value)}
        words += [option, *(f"{key}:{value!r}" for key, value in plain.items())] if plain else []
        missing += [f"{option} {key}" for key in given if key not in plain]
    return (f"# With {', '.join(missing)}\n" if missing else "") + shlex.join(words)


def _is_literal(value: Any) -> bool:
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        return False


def create_repository(repo_id: str) -> str:
    """
    :param repo_id: Name of the repository, ORGANIZATION/NAME
    :return: its address
    :raises InputError: if it may not be written
    """
    with user_input(f"argument -orga/--organization: {repo_id}"):
        return str(HfApi().create_repo(repo_id, exist_ok=True))


def upload(folder: Path, names: list[str], repo_id: str, message: str) -> None:
    """
    :param folder: Folder of a repository
    :param names: Its files: others that are there are not published
    :param repo_id: Name of the repository, ORGANIZATION/NAME
    :param message: Commit message
    """
    with user_input(f"argument -orga/--organization: {repo_id}"):
        HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            allow_patterns=names,
            delete_patterns=[name for name in (VIDEO, STATISTICS[1]) if name not in names],
        )


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
    Path(folder).mkdir(parents=True, exist_ok=True)
    with written_whole(Path(folder)) as unfinished:
        new = unfinished / algo / run_folder.name
        (new / env_name).mkdir(parents=True)
        for name, target in names.items():
            source = files[name]
            if source is not None:
                shutil.copy(source, new / target)
        if (new / METRICS).is_file():
            with user_input(f"{METRICS} of the repository"), zipfile.ZipFile(new / METRICS) as archive:
                archive.extractall(
                    new, [name for name in archive.namelist() if any(fnmatch.fnmatch(name, log) for log in LOGS)]
                )
            (new / METRICS).unlink()
        # All that is wrong with it, before it is in the place of another
        with _of_the_repository(new):
            found = Run(new)
            if (found.algo, found.env) != (algo, env):
                raise InputError(f"the repository has {found.algo} on {found.env}, expected {algo} on {env}")
            find_model(algo, env, str(unfinished), int(exp_id))
        if run_folder.exists():
            shutil.rmtree(run_folder)
    return run_folder


@contextmanager
def _of_the_repository(folder: Path) -> Iterator[None]:
    """Errors about a folder that will not be there are about the repository."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(folder), "the repository")) from error
