import numpy as np
import pytest
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env

from sb3_flow import FPO


def make_model(**kwargs):
    return FPO("MlpPolicy", make_vec_env("Pendulum-v1", 2), n_steps=128, batch_size=64, n_epochs=1, device="cpu", **kwargs)


def test_callbacks(tmp_path):
    checkpoint = CheckpointCallback(save_freq=200, save_path=str(tmp_path))
    evaluation = EvalCallback(
        make_vec_env("Pendulum-v1"), best_model_save_path=str(tmp_path), log_path=str(tmp_path), eval_freq=200, verbose=0,
        callback_on_new_best=StopTrainingOnRewardThreshold(reward_threshold=0, verbose=0),
    )  # fmt: skip
    every = EveryNTimesteps(300, CheckpointCallback(1, save_path=str(tmp_path), name_prefix="every"))
    model = make_model(tensorboard_log=str(tmp_path / "tb"))
    model.learn(600, callback=CallbackList([checkpoint, evaluation, every]), progress_bar=True)
    assert (tmp_path / "rl_model_400_steps.zip").is_file() and (tmp_path / "best_model.zip").is_file()
    assert len(list(tmp_path.glob("every_*"))) >= 2
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [400]
    assert len(list((tmp_path / "tb" / "FPO_1").glob("events.out.tfevents.*"))) == 1
    FPO.load(tmp_path / "rl_model_400_steps.zip")


def test_stop_training():
    model = make_model()
    model.learn(10_000, callback=StopTrainingOnMaxEpisodes(max_episodes=1))
    assert model.num_timesteps < 1000
    # A function is a callback too
    model.learn(1000, callback=lambda local_variables, global_variables: model.num_timesteps < 300)
    assert 250 < model.num_timesteps <= 512


def test_locals():
    """What callbacks of SB3 users find in `self.locals` during a rollout."""

    class CheckLocals(BaseCallback):
        def _on_step(self):
            assert {"actions", "clipped_actions", "values", "log_probs", "rewards", "dones", "infos"} <= set(self.locals)
            assert np.allclose(self.locals["clipped_actions"], 2 * np.clip(0.5 * self.locals["actions"], -1, 1), atol=1e-6)
            return True

    make_model().learn(256, callback=CheckLocals())


def test_interrupted_training_leaves_a_loadable_model(tmp_path):
    class Interrupt(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 300:
                raise KeyboardInterrupt
            return True

    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        model.learn(1000, callback=Interrupt())
    model.save(tmp_path / "model.zip")
    loaded = FPO.load(tmp_path / "model.zip", env=make_vec_env("Pendulum-v1", 2))
    loaded.learn(256, reset_num_timesteps=False)
    assert loaded.num_timesteps == 300 + 256
