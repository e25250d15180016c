"""Trained agents as repositories of the Hugging Face Hub, without a network: a folder is one."""

import json
import re
import shlex
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')

import huggingface_hub
import huggingface_sb3
from command_line import sb3_flow_main
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from rl_zoo3.load_from_hub import download_from_hub

from sb3_flow.zoo.evaluate import load_run

PENDULUM = ["--algo", "fpo", "--env", "Pendulum-v1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with VecNormalize, its own hyperparameters and arguments of the environment, and its repository."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        sb3_flow_main(
            monkeypatch, "train", *PENDULUM, "-n", 256, "--seed", 3, "--eval-freq", 128, "--eval-episodes", 2,
            "--env-kwargs", "g:9.0", "-params", "n_envs:2", "n_steps:64", "batch_size:64", "normalize:True",
        )  # fmt: skip
        Path("logs/fpo/Pendulum-v1_1/videos").mkdir()
        Path("logs/fpo/Pendulum-v1_1/videos/a.mp4").write_bytes(b"a video")
        sb3_flow_main(monkeypatch, "push-to-hub", *PENDULUM, "-orga", "me", "-n", 3, "--dry-run")
    return folder


@pytest.fixture
def repository(trained, monkeypatch, tmp_path):
    """That of the run, both in the working directory."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    return Path("hub/fpo-Pendulum-v1")


def predictions(folder, exp_id):
    model, env, _ = load_run("fpo", "Pendulum-v1", folder, exp_id)
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert env.get_attr("unwrapped")[0].g == 9.0
    return model.predict(env.normalize_obs(observations), deterministic=True)[0]


def test_model_card(repository):
    """Algorithm, task, result with interval, commands, video, licence."""
    card = ModelCard.load(repository / "README.md")
    result = json.loads((repository / "results.json").read_text())
    assert card.data.license == "mit" and "sb3-flow" in card.data.tags and "model" not in result
    (evaluated,) = card.data.eval_results
    assert (evaluated.dataset_name, card.data.model_name) == ("Pendulum-v1", "FPO") and len(result["returns"]) == 3
    assert evaluated.metric_value == f"{result['mean_return']:.2f} +/- {result['std_return']:.2f}"
    low, high = result["mean_return_interval"]
    assert min(result["returns"]) <= low < result["mean_return"] < high <= max(result["returns"])
    assert f"(95 % interval of the mean: {low:.2f} to {high:.2f}); 3 episodes, deterministic" in card.text.replace("\n", " ")
    assert "sb3-flow load-from-hub --algo fpo --env Pendulum-v1 -orga me\n" in card.text
    assert '<video src="replay.mp4"' in card.text and (repository / "replay.mp4").read_bytes() == b"a video"


def test_training_command(repository, monkeypatch):
    """That of the card makes the same model again."""
    (command,) = re.findall(r"^sb3-flow train .*$", (repository / "README.md").read_text(), re.MULTILINE)
    before = load_run("fpo", "Pendulum-v1")[0].policy.parameters_to_vector()
    sb3_flow_main(monkeypatch, *shlex.split(command)[1:], "-f", "again", "--eval-freq", -1)
    assert np.array_equal(load_run("fpo", "Pendulum-v1", "again")[0].policy.parameters_to_vector(), before)


def test_load_from_a_folder(repository, monkeypatch):
    """It is the same run, after the latest."""
    load = ["load-from-hub", *PENDULUM, "--from-folder", repository]
    sb3_flow_main(monkeypatch, *load)
    assert np.array_equal(predictions("logs", 2), predictions("logs", 1))
    for name in ("0.monitor.csv", "evaluations.npz"):
        assert Path("logs/fpo/Pendulum-v1_2", name).read_bytes() == Path("logs/fpo/Pendulum-v1_1", name).read_bytes()
    # Not in the place of another, unless it is meant
    Path("logs/fpo/Pendulum-v1_2/note").touch()
    with pytest.raises(SystemExit, match="Pendulum-v1_2 is there already, --force replaces it"):
        sb3_flow_main(monkeypatch, *load, "--exp-id", 2)
    assert Path("logs/fpo/Pendulum-v1_2/note").exists()
    sb3_flow_main(monkeypatch, *load, "--exp-id", 2, "--force")
    assert not Path("logs/fpo/Pendulum-v1_2/note").exists()
    sb3_flow_main(monkeypatch, "evaluate", *PENDULUM, "-n", 1)


@pytest.fixture
def hub(repository, monkeypatch):
    """A hub whose repositories are folders."""
    repositories = Path("repositories")

    class HfApi:
        def create_repo(self, repo_id, exist_ok):
            assert exist_ok
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns, delete_patterns):
            (repositories / repo_id).mkdir(parents=True, exist_ok=True)
            for name in delete_patterns:
                (repositories / repo_id / name).unlink(missing_ok=True)
            for name in allow_patterns:
                shutil.copy(folder_path / name, repositories / repo_id)

    def hf_hub_download(repo_id, filename, **kwargs):
        path = repositories / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(f"there is no {filename}") if path.parent.is_dir() else ValueError("no such repository")
        return str(path)

    monkeypatch.setattr("sb3_flow.zoo.hub.HfApi", HfApi)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return repositories


def test_push_and_load(hub, monkeypatch, capsys):
    sb3_flow_main(monkeypatch, "push-to-hub", *PENDULUM, "-orga", "me", "-name", "mine", "-n", 2, "--license", "apache-2.0")
    assert "Published: https://hub/me/mine" in capsys.readouterr().out
    card = ModelCard.load(hub / "me/mine/README.md")
    assert card.data.license == "apache-2.0" and "-orga me -name mine\n" in card.text
    load = ["load-from-hub", *PENDULUM, "-orga", "me", "-name"]
    # A model is a pickle
    with pytest.raises(SystemExit, match=r"argument -orga/--organization: me/mine: .*TRUST_REMOTE_CODE"):
        sb3_flow_main(monkeypatch, *load, "mine")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    sb3_flow_main(monkeypatch, *load, "mine", "-f", "elsewhere")
    assert np.array_equal(predictions("elsewhere", 1), predictions("logs", 1))
    with pytest.raises(SystemExit, match="argument -orga/--organization: me/another: no such repository"):
        sb3_flow_main(monkeypatch, *load, "another")


def test_no_network(hub, monkeypatch):
    """Is not taken for a file that is not there."""

    def fails(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(SystemExit, match="me/fpo-Pendulum-v1: no network"):
        sb3_flow_main(monkeypatch, "load-from-hub", *PENDULUM, "-orga", "me")


def test_only_what_belongs_to_it_is_published(hub, monkeypatch):
    """Not what lies in its folder, and what an earlier one had is removed."""
    (Path("hub/mine")).mkdir()
    for name in ("secret.txt", "replay.mp4"):
        Path("hub/mine", name).touch()
    sb3_flow_main(monkeypatch, "push-to-hub", *PENDULUM, "-orga", "me", "-name", "mine", "-n", 2)
    assert (hub / "me/mine/replay.mp4").read_bytes() == b"a video" and not (hub / "me/mine/secret.txt").exists()
    shutil.rmtree("logs/fpo/Pendulum-v1_1/videos")
    sb3_flow_main(monkeypatch, "push-to-hub", *PENDULUM, "-orga", "me", "-name", "mine", "-n", 2)
    assert not (hub / "me/mine/replay.mp4").exists() and not Path("hub/mine/replay.mp4").exists()


def test_the_best_model(repository, monkeypatch):
    """With the statistics that it had, not those of the final one."""
    run = Path("logs/fpo/Pendulum-v1_1")
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")])
    normalization = VecNormalize.load(run / "best_model_vecnormalize.pkl", env)
    normalization.obs_rms.mean += 1
    normalization.save(run / "best_model_vecnormalize.pkl")
    sb3_flow_main(monkeypatch, "push-to-hub", *PENDULUM, "--load-best", "-n", 2, "--dry-run")
    assert (repository / "vec_normalize.pkl").read_bytes() == (run / "best_model_vecnormalize.pkl").read_bytes()


@pytest.mark.parametrize("file", ["fpo-Pendulum-v1.zip", "vec_normalize.pkl", "config.yml", "train_eval_metrics.zip"])
def test_damaged(repository, monkeypatch, file):
    """The run that was to be replaced is still there."""
    (repository / file).write_bytes(b"- damaged")
    with pytest.raises(SystemExit) as error:
        sb3_flow_main(
            monkeypatch, "load-from-hub", *PENDULUM, "--from-folder", repository, "--exp-id", 1, "--force"
        )  # fmt: skip
    assert error.value.code == 2 and ".unfinished" not in str(error.value)
    assert len(predictions("logs", 1)) == 5 and not Path("logs/fpo/Pendulum-v1_2").exists()


def test_what_a_command_cannot_say(repository, monkeypatch):
    """Is said."""
    params = ["n_envs:1", "n_steps:64", "batch_size:64", "policy_kwargs:dict(activation_fn=nn.ELU)"]
    Path("mine.yml").write_text(yaml.safe_dump({"Pendulum-v1": dict(n_timesteps=64, policy="MlpPolicy", gamma=0.5)}))
    sb3_flow_main(monkeypatch, "train", *PENDULUM, "-f", "mine", "-conf", "mine.yml", "--eval-freq", -1, "-params", *params)
    sb3_flow_main(monkeypatch, "push-to-hub", *PENDULUM, "-f", "mine", "-n", 2, "--dry-run")
    text = (repository / "README.md").read_text()
    assert "# With the hyperparameters below, -params policy_kwargs\nsb3-flow train" in text and "'gamma': 0.5" in text


def test_rl_zoo3_takes_it(hub, repository, monkeypatch):
    """What it knows of a repository is there."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    shutil.copytree(repository, hub / "me" / repository.name)
    download_from_hub("fpo", huggingface_sb3.EnvironmentName("Pendulum-v1"), 0, "zoo", "me")
    assert np.array_equal(predictions("zoo", 1), predictions("logs", 1))


def test_what_is_no_repository(repository, monkeypatch):
    """One line each, and nothing is left."""
    load = ["load-from-hub", "--from-folder", repository, "-f", "new"]
    with pytest.raises(SystemExit, match=r"the repository has no fpo-Hopper-v5\.zip: expected that of fpo on Hopper-v5"):
        sb3_flow_main(monkeypatch, *load, "--algo", "fpo", "--env", "Hopper-v5")
    shutil.copy(repository / "fpo-Pendulum-v1.zip", repository / "fpo-Hopper-v5.zip")
    with pytest.raises(SystemExit, match="the repository has fpo on Pendulum-v1, expected fpo on Hopper-v5"):
        sb3_flow_main(monkeypatch, *load, "--algo", "fpo", "--env", "Hopper-v5")
    (repository / "args.yml").write_text(yaml.safe_dump([1]))
    with pytest.raises(SystemExit, match="cannot be read"):
        sb3_flow_main(monkeypatch, *load, *PENDULUM)
    assert not [path for path in Path("new").rglob("*") if path.is_file()]
    for args, message in [
        (["push-to-hub", *PENDULUM], "argument -orga/--organization: expected the organization or user"),
        (["push-to-hub", *PENDULUM, "-orga", "a/b"], "argument -orga/--organization: found 'a/b'"),
        (["push-to-hub", *PENDULUM, "--dry-run", "--video", "missing.mp4"], "argument --video: found 'missing.mp4'"),
        (["push-to-hub", *PENDULUM, "--dry-run", "-n", "1"], "argument -n/--n-eval-episodes: found 1"),
        (["load-from-hub", *PENDULUM], "argument -orga/--organization: expected either"),
        (["load-from-hub", *PENDULUM, "-orga", "me", "--from-folder", repository], "expected either"),
        (["load-from-hub", *PENDULUM, "--from-folder", "logs"], "argument --from-folder: found 'logs'"),
        (["load-from-hub", *PENDULUM, "-orga", "me", "--force"], "argument --force: expected with --exp-id"),
        (["load-from-hub", *PENDULUM, "--from-folder", repository, "-name", "x"], "argument -name/--repo-name: expected"),
        (["push-to-hub", *PENDULUM, "--dry-run", "-name", "a..b"], "argument -name/--repo-name: found 'a..b'"),
        (["push-to-hub", *PENDULUM, "--dry-run", "-o", "logs/fpo/Pendulum-v1_1/0.monitor.csv"], "argument -o/--output-folder"),
    ]:
        with pytest.raises(SystemExit, match=re.escape(message)):
            sb3_flow_main(monkeypatch, *args)
