"""Trained policies in files that other programs run."""

from sb3_flow.zoo.arguments import new_file
from sb3_flow.zoo.commands.common import check_env, trained_agent_parser
from sb3_flow.zoo.errors import user_input


def export() -> None:
    """Write a trained flow policy to one file that runs without this package."""
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    from sb3_flow.export import FORMATS, export_policy
    from sb3_flow.zoo.evaluate import load_run
    from sb3_flow.zoo.trained_agents import folder_with_run, output_folder

    parser = trained_agent_parser("sb3-flow export", export.__doc__)
    parser.set_defaults(algo="fpo", env="HalfCheetah-v5", device="cpu")
    parser.add_argument("--format", help="What runs it", choices=list(FORMATS), default="onnx")
    parser.add_argument("--deterministic", help="Act without noise, which is an input otherwise", action="store_true")
    parser.add_argument(
        "-o", "--output", help="File to write (default: in the folder of the run, if it is one's own)", type=new_file
    )
    args = parser.parse_args()
    check_env(args.env, args.gym_packages)
    args.folder = folder_with_run(args.algo, args.env, args.folder, args.exp_id != 0 or args.load_best)
    model, env, model_path = load_run(args.algo, args.env, args.folder, args.exp_id, args.load_best, args.seed, args.device)
    path = args.output or output_folder(model_path.parent) / f"{model_path.stem}{FORMATS[args.format]}"
    with user_input("argument --algo", ValueError):
        print(export_policy(model, path, args.format, args.deterministic, unwrap_vec_normalize(env)))
