"""
Agents of the FQL authors' code (https://github.com/seohongpark/fql), a checkout of which must be on the path. As a script it
does gradient steps for throughput.py: a line on stdin asks for some, a line on stdout is the end.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np


def create_agent(
    name: str, net_arch: Sequence[int], data: dict[str, np.ndarray], batch_size: int = 256, alpha: float = 300.0, seed: int = 0
) -> Any:
    """
    :param name: "fql", "ifql", ...
    :param net_arch: Sizes of the layers of all networks
    :param data: With observations and actions of the shapes that it is for
    :param batch_size: Minibatch size
    :param alpha: Weight of the distillation ("fql" only)
    :param seed: Seed of its weights and noise
    :return: the agent
    """
    module = importlib.import_module(f"agents.{name}")
    config = module.get_config()
    config["actor_hidden_dims"] = config["value_hidden_dims"] = tuple(net_arch)
    config["batch_size"] = batch_size
    if name == "fql":
        config["alpha"] = alpha
    return getattr(module, f"{name.upper()}Agent").create(seed, data["observations"][:1], data["actions"][:1], config)


def main() -> None:
    import jax

    name, net_arch, n_updates, batch_size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rng = np.random.default_rng(0)
    n, obs_dim, action_dim = 20_000, 28, 5
    data = dict(
        observations=rng.standard_normal((n, obs_dim), np.float32),
        next_observations=rng.standard_normal((n, obs_dim), np.float32),
        actions=rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        rewards=rng.standard_normal(n, np.float32),
        masks=np.ones(n, np.float32),
    )
    agent = create_agent(name, net_arch, data, batch_size)
    for _ in sys.stdin:
        for _ in range(n_updates):
            rows = rng.integers(n, size=batch_size)
            agent, info = agent.update({name: array[rows] for name, array in data.items()})
        jax.block_until_ready(info)
        print("done", flush=True)


if __name__ == "__main__":
    main()
