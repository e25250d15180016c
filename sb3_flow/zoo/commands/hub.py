"""Trained agents on the Hugging Face Hub."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from sb3_flow.zoo.arguments import Parser, integer, new_folder, wrong
from sb3_flow.zoo.commands.common import check_env, trained_agent_parser
from sb3_flow.zoo.errors import InputError


def _name(text: str) -> str:
    """Type of the name of an organization or a repository, as the hub has them."""
    if not re.fullmatch(r"\w([\w.-]{0,94}\w)?", text, re.ASCII) or "--" in text or ".." in text:
        raise wrong(text, "letters, digits, and single '-', '_' and '.' between them")
    return text


def _video(text: str) -> Path:
    """Type of a video to read."""
    if Path(text).suffix != ".mp4" or not Path(text).is_file():
        raise wrong(text, "an .mp4 file")
    return Path(text)


def _folder_of_repository(text: str) -> Path:
    """Type of a folder that is a repository."""
    if not (Path(text) / "config.yml").is_file():
        raise wrong(text, "a folder with the files of a repository (config.yml, ...)")
    return Path(text)


def _add_repository(parser: Parser) -> None:
    parser.add_argument("-orga", "--organization", help="Organization or user of the hub", type=_name)
    parser.add_argument("-name", "--repo-name", help="Name of the repository (default: ALGO-ENV)", type=_name)


def push_to_hub() -> None:
    """Evaluate a trained agent and publish it on the Hugging Face Hub, with a model card."""
    from huggingface_sb3 import EnvironmentName, ModelName

    from sb3_flow.zoo.evaluate import evaluate, find_model
    from sb3_flow.zoo.hub import create_repository, package_run, upload
    from sb3_flow.zoo.trained_agents import folder_with_run

    parser = trained_agent_parser("sb3-flow push-to-hub", push_to_hub.__doc__)
    _add_repository(parser)
    parser.add_argument("-m", "--commit-message", help="Commit message", default="A trained agent")
    parser.add_argument("-n", "--n-eval-episodes", help="Number of episodes", default=20, type=integer(2))
    parser.add_argument(
        "--video", help="Video (default: the latest that record-video has left in the run, if any)", type=_video
    )
    parser.add_argument("--license", help="Licence of the model, as the hub calls it", default="mit", type=_name)
    parser.add_argument("-o", "--output-folder", help="Where the repository is written", default="hub", type=new_folder)
    parser.add_argument("--dry-run", action="store_true", help="Write the repository, but do not publish it")
    args = parser.parse_args()
    if args.organization is None and not args.dry_run:
        raise InputError("argument -orga/--organization: expected the organization or user to publish it for (or --dry-run)")
    check_env(args.env, args.gym_packages)
    name = args.repo_name or ModelName(args.algo, EnvironmentName(args.env))
    repo_id = f"{args.organization or 'ORGANIZATION'}/{name}"
    args.folder = folder_with_run(args.algo, args.env, args.folder, args.exp_id != 0 or args.load_best)
    which = dict(algo=args.algo, env=args.env, folder=args.folder, exp_id=args.exp_id, load_best=args.load_best)
    model_path = find_model(**which)
    videos = (model_path.parent / "videos").glob("*.mp4")
    video = args.video or max(videos, key=lambda path: path.stat().st_mtime, default=None)
    repository = Path(args.output_folder) / name
    try:
        new_folder(str(repository))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"argument -o/--output-folder: {error}") from error
    url = None if args.dry_run else create_repository(repo_id)
    evaluation = evaluate(**which, n_eval_episodes=args.n_eval_episodes, seed=args.seed, device=args.device)
    names = package_run(model_path, repository, evaluation, repo_id, video, args.license)
    print(f"{repository}: {', '.join(names)}")
    if url is None:
        print(f"Not published (--dry-run). sb3-flow load-from-hub --from-folder {repository} takes it")
    else:
        upload(repository, names, repo_id, args.commit_message)
        print(f"Published: {url}")


def load_from_hub() -> None:
    """Get a trained agent from the Hugging Face Hub: a run in the log folder."""
    from huggingface_sb3 import EnvironmentName, ModelName
    from rl_zoo3.utils import ALGOS

    from sb3_flow.zoo.hub import unpack_run

    parser = Parser(prog="sb3-flow load-from-hub", description=load_from_hub.__doc__)
    parser.add_argument("--algo", help="RL Algorithm", default="fpo", choices=list(ALGOS))
    parser.add_argument("--env", help="environment ID", required=True)
    parser.add_argument("--gym-packages", help="Packages to import, for their environments", nargs="+", default=[])
    _add_repository(parser)
    parser.add_argument("--from-folder", help="Folder with the files of a repository, instead", type=_folder_of_repository)
    parser.add_argument("-f", "--folder", help="Log folder", default="logs", type=new_folder)
    parser.add_argument("--exp-id", help="Number of the run (default: 0: after the latest)", default=0, type=integer(0))
    parser.add_argument("--force", action="store_true", help="Replace the run that has this number")
    args = parser.parse_args()
    if (args.organization is None) == (args.from_folder is None):
        raise InputError("argument -orga/--organization: expected either an organization or user of the hub, or --from-folder")
    if args.from_folder is not None and args.repo_name is not None:
        raise InputError("argument -name/--repo-name: expected without --from-folder, which is the repository")
    if args.force and args.exp_id == 0:
        raise InputError("argument --force: expected with --exp-id, the number of the run to replace")
    check_env(args.env, args.gym_packages)
    repo_id = f"{args.organization}/{args.repo_name or ModelName(args.algo, EnvironmentName(args.env))}"
    get = _downloads(repo_id) if args.from_folder is None else _reads(args.from_folder)
    print(unpack_run(args.algo, args.env, args.folder, get, args.exp_id, args.force))


def _reads(folder: Path) -> Callable[[str], str | None]:
    return lambda name: str(folder / name) if (folder / name).is_file() else None


def _downloads(repo_id: str) -> Callable[[str], str | None]:
    import huggingface_sb3
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from sb3_flow.zoo.errors import user_input

    def get(name: str) -> str | None:
        with user_input(f"argument -orga/--organization: {repo_id}"):
            try:
                return huggingface_sb3.load_from_hub(repo_id, name)
            except LocalEntryNotFoundError:
                # (it was not found out, as there is no network)
                raise
            except EntryNotFoundError:
                return None

    return get
