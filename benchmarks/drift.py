"""
How the actions of a policy spread when there is nothing to learn: `python benchmarks/drift.py`

The rewards are noise, so that all actions are as good as each other. The policy gradient is zero on average, but for what
the ratio of FPO has in place of a likelihood: standard deviation of the raw actions, and size of their mean, after 0, 20, 40
and 60 rollouts of 16 x 128 steps. The results are left in benchmarks/results/drift.json.
"""

import argparse
import json
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from runs import ROOT, provenance
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_flow import FPO

RESULTS = ROOT / "benchmarks" / "results" / "drift.json"
NETS = dict(pi=[64, 64], vf=[64, 64])
ELBO: dict[str, Any] = dict(supervision="elbo", loss_reduction="sum", mc_sampling="stratified", clip_range=0.2)
SKIP = dict(net_arch=NETS, skip_connection=True)
SETTINGS: dict[str, tuple[type, dict[str, Any]]] = {
    "PPO": (PPO, dict(policy_kwargs=dict(net_arch=NETS, activation_fn=th.nn.SiLU))),
    "FPO": (FPO, dict(policy_kwargs=dict(net_arch=NETS))),
    "FPO, baseline actions": (FPO, dict(policy_kwargs=dict(net_arch=NETS), n_baseline_actions=2)),
    "FPO, elbo": (FPO, dict(policy_kwargs=dict(net_arch=NETS), **ELBO)),
    "FPO, elbo, skip connection": (FPO, dict(policy_kwargs=SKIP, **ELBO)),
    "FPO, elbo, skip connection, baseline actions": (FPO, dict(policy_kwargs=SKIP, n_baseline_actions=2, **ELBO)),
}


class NoiseRewards(gym.Env):
    """Observations and rewards are standard normal, whatever one does."""

    observation_space = spaces.Box(-np.inf, np.inf, (10,))
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.normal(size=10).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.np_random.normal(size=10).astype(np.float32), float(self.np_random.normal()), True, False, {}


class Spread(BaseCallback):
    """Standard deviation of the actions and root mean square of their mean, every so many rollouts."""

    def __init__(self, every: int = 20):
        super().__init__()
        self.every, self.n_rollouts, self.rows = every, 0, []  # type: ignore[var-annotated]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.n_rollouts % self.every == 0:
            obs = th.as_tensor(np.random.default_rng(0).normal(size=(200, 1, 10)), dtype=th.float32)
            with th.no_grad():
                # Raw actions, not yet squashed
                actions = self.model.policy._predict(obs.expand(-1, 200, -1).flatten(0, 1)).view(200, 200, 2)
            self.rows.append([actions.std(dim=1).mean().item(), actions.mean(dim=1).square().mean().sqrt().item()])
        self.n_rollouts += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    th.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, (algorithm, kwargs) in SETTINGS.items():
        rows = []
        for seed in args.seeds:
            spread = Spread()
            env = make_vec_env(NoiseRewards, 16, seed=seed)
            common = dict(n_steps=128, batch_size=256, n_epochs=10, learning_rate=4e-4, gamma=0.0, device="cpu", seed=seed)
            model = algorithm("MlpPolicy", env, **{**common, **kwargs})
            # The last rollout is one more, after the last update of interest
            model.learn(61 * 16 * 128, spread)
            rows.append(spread.rows)
        results[name] = rows
        std, mean = np.mean(rows, axis=0).T.round(2)
        print(f"{name:48s} std {std}  mean {mean}", flush=True)
    record = dict(command="python benchmarks/drift.py", seeds=args.seeds, results=results, **provenance())
    RESULTS.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
