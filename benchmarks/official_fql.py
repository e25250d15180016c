"""
Gradient steps of an agent of the FQL authors' code, for throughput.py: a line on stdin asks for some, a line on stdout is
the end.
"""

import importlib
import json
import sys

import jax
import numpy as np

name, net, n_updates, batch_size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
module = importlib.import_module(f"agents.{name}")
config = module.get_config()
config["actor_hidden_dims"] = config["value_hidden_dims"] = tuple(net)
config["batch_size"] = batch_size
if name == "fql":
    config["alpha"] = 300.0
rng = np.random.default_rng(0)
n, obs_dim, action_dim = 20_000, 28, 5
data = dict(
    observations=rng.standard_normal((n, obs_dim), np.float32),
    next_observations=rng.standard_normal((n, obs_dim), np.float32),
    actions=rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
    rewards=rng.standard_normal(n, np.float32),
    masks=np.ones(n, np.float32),
)
agent = getattr(module, f"{name.upper()}Agent").create(0, data["observations"][:1], data["actions"][:1], config)
for _ in sys.stdin:
    for _ in range(n_updates):
        rows = rng.integers(n, size=batch_size)
        agent, info = agent.update({name: array[rows] for name, array in data.items()})
    jax.block_until_ready(info)
    print("done", flush=True)
