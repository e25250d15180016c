"""Datasets, and motion capture."""

from pathlib import Path

from sb3_flow.zoo.arguments import Parser
from sb3_flow.zoo.errors import user_input


def datasets() -> None:
    """Print what is in an offline dataset (info), or get the motion capture clips of HumanoidTracking (mocap)."""
    from sb3_flow.envs.tracking.clips import download
    from sb3_flow.offline.datasets import load_dataset
    from sb3_flow.offline.transitions import check_transitions

    parser = Parser(prog="sb3-flow datasets", description=datasets.__doc__)
    parser.add_argument("action", choices=["info", "mocap"])
    parser.add_argument(
        "spec",
        help="info: ogbench:NAME[@PATH], minari:NAMESPACE/NAME-vK, or an .hdf5, .npz or .pkl file. "
        "mocap: a folder for the clips, which SB3_FLOW_MOCAP then has to name (by default ~/.sb3_flow/mocap)",
        nargs="*",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="Load a pickle, which can run any code")
    args = parser.parse_args()
    if args.action == "mocap":
        if len(args.spec) > 1 or args.allow_pickle:
            parser.error("mocap takes a folder, and nothing else")
        with user_input("datasets mocap", RuntimeError, OSError):
            folder = download(*map(Path, args.spec))
        print(f"The clips are in {folder}, with what their authors have to say (NOTICE)")
        return
    if not args.spec:
        parser.error("argument spec: expected the name of a dataset, or a file")
    with user_input("argument spec"):
        transitions = load_dataset(args.spec, allow_pickle=args.allow_pickle)
        check_transitions(transitions)
    returns = transitions.episode_returns
    lines = [
        ("transitions", f"{len(transitions):,}"),
        ("episodes", f"{len(returns):,}, {int(transitions.dones.sum()):,} terminal transitions"),
        ("return", f"{returns.mean():.2f} ± {returns.std():.2f}, from {returns.min():.2f} to {returns.max():.2f}"),
        ("reward", f"from {transitions.rewards.min():.4g} to {transitions.rewards.max():.4g}"),
        (
            "actions",
            f"{transitions.actions.shape[1:]}, from {transitions.actions.min():.4g} to {transitions.actions.max():.4g}",
        ),
    ]
    for name, array in transitions.items():
        if name.startswith("observations"):
            lines.append((name, f"{array.shape[1:]} {array.dtype}, from {array.min():.4g} to {array.max():.4g}"))
    lines.append(("memory", f"{transitions.nbytes / 2**20:.1f} MiB"))
    for name, value in lines:
        print(f"{name + ':':14} {value}")
