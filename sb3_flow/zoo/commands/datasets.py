"""Offline datasets."""

from sb3_flow.zoo.arguments import Parser
from sb3_flow.zoo.errors import user_input


def datasets() -> None:
    """Print what is in an offline dataset: sb3-flow datasets info SPEC."""
    from sb3_flow.offline.datasets import load_dataset
    from sb3_flow.offline.transitions import check_transitions

    parser = Parser(prog="sb3-flow datasets", description=datasets.__doc__)
    parser.add_argument("action", choices=["info"])
    parser.add_argument(
        "spec", help="ogbench:NAME[@PATH], minari:NAMESPACE/NAME-vK, or an .hdf5, .npz or .pkl file", nargs="+"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="Load a pickle, which can run any code")
    args = parser.parse_args()
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
