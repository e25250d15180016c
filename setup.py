from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

extras = {
    # dm_control 1.0.50 does not load on mujoco 4
    "mujoco": ["gymnasium[mujoco]", "mujoco>=3.17,<4"],
    "dmc": ["shimmy[dm-control]>=2.0.1,<3", "dm_control<=1.0.50", "mujoco>=3.17,<4"],
    # Motion capture: its clips come with `sb3-flow datasets mocap`
    "tracking": ["dm_control<=1.0.50", "mujoco>=3.17,<4"],
    "box2d": ["gymnasium[box2d]"],
    # Elsewhere there is no wheel, or one that is too old, and everything else works
    "envpool": [
        "envpool>=1.2.5,<2; python_version >= '3.11' and (sys_platform != 'darwin' or platform_machine == 'arm64')",
    ],
    # rl-zoo3 needs requests for its hub, which huggingface_hub no longer brings, pandas at the end of an optimisation, plotly
    # for its figures, and moviepy and pygame for videos
    "zoo": [
        "rl_zoo3>=2.9.0,<3",
        "requests",
        "optuna>=4.9",
        "filelock",
        "pandas",
        "plotly",
        "tqdm",
        "rich",
        "moviepy",
        "pygame-ce",
    ],
    # A search of several machines
    "postgresql": ["psycopg[binary]>=3"],
    "solvers": ["torchdiffeq"],
    "offline": ["ogbench>=1.2,<2", "minari[hdf5]>=0.5.4", "h5py", "pillow"],
    # A policy as a file of ONNX
    "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
    "plots": ["matplotlib", "rl_zoo3[plots]>=2.9.0,<3"],
    "docs": ["sphinx>=7", "furo", "sphinx-mathjax-offline", "sphinx-design"],
    "tests": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "sybil",
        "papermill",
        "ipykernel",
        "ruff",
        "black",
        "mypy",
        "tensorboard",
    ],
}
extras["all"] = sorted({requirement for name in extras for requirement in extras[name]})

setup(
    name="sb3-flow",
    version=(here / "sb3_flow" / "version.txt").read_text().strip(),
    description="Flow-matching policies for Stable-Baselines3: FPO and FQL.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The sb3-flow developers",
    license="MIT",
    keywords="reinforcement-learning flow-matching stable-baselines3 pytorch robotics",
    # Hyperparameters and trained agents stay at the top of the checkout, and are installed inside the package
    packages=[*find_packages(include=["sb3_flow", "sb3_flow.*"]), "sb3_flow.hyperparams", "sb3_flow.trained_agents"],
    package_dir={"sb3_flow.hyperparams": "hyperparams", "sb3_flow.trained_agents": "trained_agents"},
    package_data={
        "sb3_flow": ["py.typed", "version.txt"],
        "sb3_flow.hyperparams": ["*.yml"],
        "sb3_flow.trained_agents": ["**/*"],
    },
    python_requires=">=3.10",
    install_requires=["stable-baselines3>=2.9.0,<3", "torch>=2.8,<3", "gymnasium>=1.0,<2", "numpy>=1.24"],
    extras_require=extras,
    entry_points={"console_scripts": ["sb3-flow = sb3_flow.zoo.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
