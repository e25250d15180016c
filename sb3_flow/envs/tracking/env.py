"""A humanoid that follows motion capture, in a bare MuJoCo loop over dm_control's CMU humanoid."""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_flow.common.checks import FINITE_POSITIVE, NOT_NEGATIVE, Range, to_bool, to_float, to_int
from sb3_flow.common.flow import check_choice
from sb3_flow.envs.tracking import CONDITIONINGS
from sb3_flow.envs.tracking.clips import Clip, find_file, load_clips

#: Seconds of a step of the physics, as dm_control has it
TIMESTEP = 0.005
#: Largest distance, in meters, of a body of a clip from where the humanoid has it
TOLERANCE = 0.02
HANDS = ("lhand", "rhand")
#: Weights of the reward's terms, and the factors of their errors, of PHC (https://arxiv.org/abs/2305.06456, its code)
REWARD_WEIGHTS = dict(position=0.5, rotation=0.3, velocity=0.1, angular_velocity=0.1)
REWARD_FACTORS = dict(position=100.0, rotation=10.0, velocity=0.1, angular_velocity=0.1)
#: Color of the reference in pictures, and how far it is to the side, in meters
GHOST_COLOR, GHOST_OFFSET = (0.6, 0.6, 0.6, 1.0), 1.0


class Humanoid(NamedTuple):
    """The compiled model, which all environments of a process share, and where its parts are."""

    model: Any
    #: Names and numbers of the bodies, the root first, and numbers of those whose positions clips have
    body_names: tuple[str, ...]
    bodies: np.ndarray
    recorded: np.ndarray
    #: Addresses of the joints, in the order of the CMU database, in the positions and velocities
    joint_positions: np.ndarray
    joint_velocities: np.ndarray
    #: Those of the actuators, in their order, among the joints, and their ranges, (n, 2)
    actuated: np.ndarray
    ranges: np.ndarray


class Bodies(NamedTuple):
    """States of bodies, in the frame of the world."""

    #: (..., n_bodies, 3)
    positions: np.ndarray
    #: Rotation matrices, (..., n_bodies, 3, 3)
    rotations: np.ndarray
    velocities: np.ndarray
    angular_velocities: np.ndarray


class References(NamedTuple):
    """The frames of all clips, one after the other."""

    names: tuple[str, ...]
    #: First frames of the clips, and the numbers of their frames
    starts: np.ndarray
    lengths: np.ndarray
    #: Steps of the physics from a frame to the next
    n_substeps: int
    #: In MuJoCo's order
    qpos: np.ndarray
    qvel: np.ndarray
    bodies: Bodies


@cache
def make_humanoid() -> Humanoid:
    """
    :return: dm_control's position-controlled CMU humanoid of 2020, on a floor
    :raises ImportError: if dm_control is not installed
    """
    try:
        import mujoco
        from dm_control import mjcf
        from dm_control.locomotion.arenas import floors
        from dm_control.locomotion.walkers import cmu_humanoid
    except ImportError as error:
        raise ImportError('Humanoid motion tracking needs dm_control: pip install "sb3-flow[tracking]"') from error
    arena, walker = floors.Floor(), cmu_humanoid.CMUHumanoidPositionControlledV2020()
    walker.create_root_joints(arena.attach(walker))
    physics = mjcf.Physics.from_mjcf_model(arena.mjcf_model)
    model = physics.model.ptr
    model.opt.timestep = TIMESTEP
    # A simulation that fails is to be seen, not to begin anew
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET

    def find_bodies(parts: Sequence[Any]) -> np.ndarray:
        return np.array([model.body(body.full_identifier).id for body in parts])

    # All but the nose, which has no mass
    bodies = [walker.root_body, *(body for body in walker.mocap_tracking_bodies if body.name != "face")]
    joints = [model.joint(joint.full_identifier) for joint in walker.mocap_joints]
    positions = np.array([joint.qposadr[0] for joint in joints])
    of_actuators = [model.joint(int(model.actuator_trnid[index, 0])) for index in range(model.nu)]
    return Humanoid(
        model,
        tuple(body.name for body in bodies),
        find_bodies(bodies),
        find_bodies(walker.mocap_tracking_bodies),
        positions,
        np.array([joint.dofadr[0] for joint in joints]),
        np.array([joint.qposadr[0] for joint in of_actuators]),
        np.array([joint.range for joint in of_actuators]),
    )


def set_state(humanoid: Humanoid, data: Any, qpos: np.ndarray, qvel: np.ndarray) -> None:
    """
    Put a humanoid somewhere.

    :param humanoid: The humanoid
    :param data: Its state
    :param qpos: Positions, (63,)
    :param qvel: Velocities, (62,)
    """
    import mujoco

    data.qpos, data.qvel = qpos, qvel
    # Actuators, which are filters, have come to rest where the joints are
    low, high = humanoid.ranges.T
    data.act = np.clip((2 * qpos[humanoid.actuated] - low - high) / (high - low), -1, 1)
    data.qacc_warmstart = 0
    mujoco.mj_forward(humanoid.model, data)


def states_of_bodies(humanoid: Humanoid, data: Any) -> Bodies:
    """
    :param humanoid: The humanoid
    :param data: Its state, whose kinematics are those of its positions and velocities
    :return: states of its bodies
    """
    bodies = humanoid.bodies
    positions, rotations = data.xpos[bodies], data.xmat[bodies].reshape(-1, 3, 3)
    # MuJoCo has the velocities at the center of mass of the whole
    angular_velocities, velocities = data.cvel[bodies, :3], data.cvel[bodies, 3:]
    arms = positions - data.subtree_com[humanoid.model.body_rootid[bodies[0]]]
    return Bodies(positions, rotations, velocities + _cross(angular_velocities, arms), angular_velocities)


def make_references(clips: Sequence[Clip]) -> References:
    """
    :param clips: Clips
    :return: what the humanoid is to follow
    :raises ValueError: if a clip is of another humanoid, or its frames are not a multiple of the time step apart
    """
    import mujoco

    humanoid = make_humanoid()
    n_substeps = {round(clip.dt / TIMESTEP) for clip in clips}
    for clip in clips:
        if abs(clip.dt / TIMESTEP - round(clip.dt / TIMESTEP)) > 1e-6 or len(n_substeps) > 1:
            raise ValueError(
                f"`clips`: all must have frames that are the same multiple of {TIMESTEP} s apart, {clip.name}: {clip.dt}"
            )
    data, states, all_bodies = mujoco.MjData(humanoid.model), [], []
    frames = np.concatenate([clip.positions for clip in clips]), np.concatenate([clip.velocities for clip in clips])
    qpos, qvel = (
        np.zeros((len(part), size)) for part, size in zip(frames, (humanoid.model.nq, humanoid.model.nv), strict=True)
    )
    qpos[:, :7], qvel[:, :6] = frames[0][:, :7], frames[1][:, :6]
    qpos[:, humanoid.joint_positions], qvel[:, humanoid.joint_velocities] = frames[0][:, 7:], frames[1][:, 6:]
    for data.qpos, data.qvel in zip(qpos, qvel, strict=True):
        _update_kinematics(humanoid.model, data)
        states.append(Bodies(*(part.copy() for part in states_of_bodies(humanoid, data))))
        all_bodies.append(data.xpos[humanoid.recorded].copy())
    lengths = np.array([len(clip.positions) for clip in clips])
    starts = np.cumsum(lengths) - lengths
    for clip, start in zip(clips, starts, strict=True):
        errors = np.linalg.norm(np.array(all_bodies[start : start + len(clip.positions)]) - clip.body_positions, axis=-1)
        if errors.max() > TOLERANCE:
            raise ValueError(
                f"`clips`: {clip.name} is of another humanoid: its bodies are up to {errors.max():.2f} m from those of "
                "dm_control's of 2020"
            )
    names = tuple(clip.name for clip in clips)
    bodies = Bodies(*(np.stack(parts) for parts in zip(*states, strict=True)))
    return References(names, starts, lengths, n_substeps.pop(), qpos, qvel, bodies)


@cache
def load_references(path: str, names: tuple[str, ...] | None) -> References:
    """
    :param path: File of clips
    :param names: Names of the clips, all of them if None
    :return: what the humanoid is to follow, which all environments of a process share
    """
    return make_references(load_clips(path, names))


def _update_kinematics(model: Any, data: Any) -> None:
    import mujoco

    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    mujoco.mj_comVel(model, data)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # (np.cross takes five times as long)
    x, y, z = a[..., 0], a[..., 1], a[..., 2]
    u, v, w = b[..., 0], b[..., 1], b[..., 2]
    return np.stack([y * w - z * v, z * u - x * w, x * v - y * u], axis=-1)


def heading(root_rotation: np.ndarray) -> np.ndarray:
    """
    :param root_rotation: Rotation matrix of the root, whose third axis is forward
    :return: rotation about the vertical that takes the world to where the root looks, (3, 3)
    """
    x, y = root_rotation[:2, 2]
    norm = max(np.hypot(x, y), 1e-8)
    return np.array([[x, -y, 0.0], [y, x, 0.0], [0.0, 0.0, norm]]) / norm


def rotation_angles(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """
    :param first: Rotation matrices, (..., 3, 3)
    :param second: Others, (..., 3, 3)
    :return: angles between them, in radians, (...,)
    """
    traces = np.einsum("...ij,...ij->...", first, second)
    return np.arccos(np.clip((traces - 1) / 2, -1, 1))


def squared_errors(bodies: Bodies, reference: Bodies) -> dict[str, float]:
    """
    :param bodies: States of bodies
    :param reference: What they should be
    :return: means over the bodies (and axes, but for rotations), as the reward of PHC takes them
    """
    return dict(
        position=float(np.square(bodies.positions - reference.positions).mean()),
        rotation=float(np.square(rotation_angles(bodies.rotations, reference.rotations)).mean()),
        velocity=float(np.square(bodies.velocities - reference.velocities).mean()),
        angular_velocity=float(np.square(bodies.angular_velocities - reference.angular_velocities).mean()),
    )


class HumanoidTrackingEnv(gym.Env):
    """
    A humanoid that follows motion capture, of which it sees all, or only a part.

    - **Observation**, in the frame of where the root looks: of the humanoid the height and rotation of the root, its velocity
      and angular velocity, the joints and their velocities, the positions of the bodies and the state of the actuators,
      (271,); and for each body of the reference, in each of the next frames, how far its position, rotation (the first two
      columns of its matrix), velocity and angular velocity are from those of the body now, (15,). Where only some bodies are
      seen, their positions are, (3,)
    - **Action**: targets of the position actuators of the 56 joints, in [-1, 1]: their ranges
    - **Reward**: :math:`\\sum_k w_k e^{-c_k \\epsilon_k}` of the mean squared errors :math:`\\epsilon_k` of positions,
      rotations, velocities and angular velocities of all bodies, at most 1: that of PHC (https://arxiv.org/abs/2305.06456),
      which FPO's experiment has, but for its cost of power
    - **Start**: at a random frame of a random clip (or ``reset(options=dict(clip="CMU_016_22", frame=0))``), in the state of
      the reference. Longer clips are chosen more often.
    - **End**: the episode terminates if the bodies are too far from the reference, on average, and is truncated at the end of
      the clip. ``info["mean_error"]`` is that distance in meters, and in the last step of an episode from the beginning of a
      clip ``info["is_success"]`` says whether it has come to its end.

    :param clips: "walk" for the 36 clips that ``sb3-flow datasets mocap`` gets, or names of some of them
    :param path: Another file of clips: of the same format, or dm_control's HDF5 of the clips of 2020. ``clips`` are then names
        of its clips, or "walk" for all
    :param conditioning: What is seen of the reference: "all", or the positions of "root_hands" or of the "root", as in FPO's
        experiment
    :param n_future: How many of the next frames are seen
    :param random_start: Whether episodes start at random frames of random clips, or at the first frames of one clip after the
        other
    :param max_error: Mean distance of the bodies from the reference at which an episode terminates, in meters
    :param reward_weights: Weights of the terms of the reward, by their names: "position", "rotation", "velocity" and
        "angular_velocity". The others are PHC's.
    :param reward_factors: Factors of their errors, likewise
    :param render_mode: "rgb_array", with the reference beside the humanoid
    :raises ValueError: if an argument is out of its range, or unknown, or a clip is of another humanoid
    :raises FileNotFoundError: if there are no clips
    :raises ImportError: if dm_control is not installed
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 33}  # noqa: RUF012 (as gymnasium declares it)

    def __init__(
        self,
        clips: str | Sequence[str] = "walk",
        path: str | os.PathLike[str] | None = None,
        conditioning: str = "all",
        n_future: int = 1,
        random_start: bool = True,
        max_error: float = 0.5,
        reward_weights: dict[str, float] | None = None,
        reward_factors: dict[str, float] | None = None,
        render_mode: str | None = None,
    ):
        import mujoco

        check_choice("conditioning", conditioning, list(CONDITIONINGS))
        if render_mode is not None:
            check_choice("render_mode", render_mode, self.metadata["render_modes"])
        self.n_future = to_int("n_future", n_future, at_least=1)
        self.random_start = to_bool("random_start", random_start)
        self.max_error = to_float("max_error", max_error, FINITE_POSITIVE)
        self.reward_weights = _with_defaults("reward_weights", reward_weights, REWARD_WEIGHTS, NOT_NEGATIVE)
        self.reward_factors = _with_defaults("reward_factors", reward_factors, REWARD_FACTORS, FINITE_POSITIVE)
        self.render_mode = render_mode
        names = _to_names(clips)
        self.humanoid = make_humanoid()
        self.references = load_references(str(find_file() if path is None else path), names)
        self.data = mujoco.MjData(self.humanoid.model)
        body_names = self.humanoid.body_names
        seen = dict(all=body_names, root_hands=("root", *HANDS), root=("root",))[conditioning]
        self.seen = np.array([body_names.index(name) for name in seen])
        self.sees_positions_only = conditioning != "all"
        self.clip, self.frame, self.first_frame = 0, 0, 0
        # The last clip whose turn it was, without a random start
        self._turn: int | None = None
        self._renderer: Any = None

        n_observed = 1 + 6 + 6 + 2 * len(self.humanoid.joint_positions) + 3 * (len(body_names) - 1) + self.humanoid.model.na
        n_observed += (3 if self.sees_positions_only else 15) * len(seen) * self.n_future
        self.observation_space = spaces.Box(-np.inf, np.inf, (n_observed,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (self.humanoid.model.nu,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._turn = None
        references, options = self.references, options or {}
        self.clip, self.frame = self._draw_start()
        for name in options:
            check_choice("options", name, ["clip", "frame"])
        if "frame" in options and "clip" not in options:
            raise ValueError("`options` must have the `clip` of the `frame`")
        if "clip" in options:
            if options["clip"] not in references.names:
                raise ValueError(f"`clip` must be one of {', '.join(references.names)}, it is {options['clip']!r}")
            self.clip, self.frame = references.names.index(options["clip"]), 0
        if "frame" in options:
            self.frame = to_int("frame", options["frame"], at_least=0)
            if self.frame > references.lengths[self.clip] - 2:
                raise ValueError(f"`frame` must be at most {references.lengths[self.clip] - 2}, it is {self.frame}")
        self.first_frame = self.frame
        row = references.starts[self.clip] + self.frame
        set_state(self.humanoid, self.data, references.qpos[row], references.qvel[row])
        return self._observe(states_of_bodies(self.humanoid, self.data)), self._info(0.0)

    def _draw_start(self) -> tuple[int, int]:
        """A clip, and a frame that is not its last one. Those that start at the beginning take turns."""
        n_starts = self.references.lengths - 1
        if not self.random_start:
            n_clips = len(n_starts)
            self._turn = int(self.np_random.integers(n_clips)) if self._turn is None else (self._turn + 1) % n_clips
            return self._turn, 0
        start = int(self.np_random.integers(n_starts.sum()))
        clip = int(np.searchsorted(np.cumsum(n_starts), start, side="right"))
        return clip, start - int(n_starts[:clip].sum())

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        import mujoco

        model, data = self.humanoid.model, self.data
        data.ctrl = np.clip(action, -1, 1)
        mujoco.mj_step(model, data, self.references.n_substeps)
        # (what it leaves is of the last step but one)
        _update_kinematics(model, data)
        self.frame += 1
        return self._result(states_of_bodies(self.humanoid, data))

    def _result(self, bodies: Bodies) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """What :meth:`step` returns of a humanoid that has come to the current frame."""
        reference = Bodies(*(part[self._row()] for part in self.references.bodies))
        errors = squared_errors(bodies, reference)
        reward = sum(
            weight * np.exp(-self.reward_factors[name] * errors[name]) for name, weight in self.reward_weights.items()
        )
        mean_error = float(np.linalg.norm(bodies.positions - reference.positions, axis=-1).mean())
        # (a simulation that has failed is not finite)
        terminated = not mean_error <= self.max_error
        truncated = not terminated and self.frame == self.references.lengths[self.clip] - 1
        info = self._info(mean_error)
        if (terminated or truncated) and self.first_frame == 0:
            info["is_success"] = truncated
        return self._observe(bodies), float(reward) if np.isfinite(reward) else 0.0, terminated, bool(truncated), info

    def _row(self, ahead: int = 0) -> int:
        """Row of the frame that is so many ahead, the last one of the clip beyond its end."""
        return int(self.references.starts[self.clip] + min(self.frame + ahead, self.references.lengths[self.clip] - 1))

    def _info(self, mean_error: float) -> dict[str, Any]:
        return dict(mean_error=mean_error, clip=self.references.names[self.clip], frame=self.frame)

    def _observe(self, bodies: Bodies) -> np.ndarray:
        humanoid, data = self.humanoid, self.data
        # Row vectors times it are in the frame of where the root looks
        frame = heading(bodies.rotations[0])
        root = bodies.positions[0]
        parts = [
            root[2:],
            (frame.T @ bodies.rotations[0])[:, :2],
            bodies.velocities[0] @ frame,
            bodies.angular_velocities[0] @ frame,
            data.qpos[humanoid.joint_positions],
            data.qvel[humanoid.joint_velocities],
            (bodies.positions[1:] - root) @ frame,
            data.act,
        ]
        now = Bodies(*(part[self.seen] for part in bodies))
        for ahead in range(1, self.n_future + 1):
            row = self._row(ahead)
            then = Bodies(*(part[row, self.seen] for part in self.references.bodies))
            parts.append((then.positions - now.positions) @ frame)
            if self.sees_positions_only:
                continue
            parts += [
                (frame.T @ (then.rotations @ now.rotations.swapaxes(-1, -2)) @ frame)[..., :2],
                (then.velocities - now.velocities) @ frame,
                (then.angular_velocities - now.angular_velocities) @ frame,
            ]
        return np.concatenate([part.ravel() for part in parts], dtype=np.float32)

    def render(self) -> np.ndarray | None:
        """:return: a picture of the humanoid, with the reference to its side, (480, 640, 3), None without a render mode"""
        if self.render_mode is None:
            return None
        import mujoco

        model = self.humanoid.model
        if self._renderer is None:
            self._renderer = mujoco.Renderer(model, 480, 640)
        ghost = mujoco.MjData(model)
        ghost.qpos = self.references.qpos[self._row()]
        mujoco.mj_kinematics(model, ghost)
        # Beside the root, seen from where the camera is
        camera, root = mujoco.MjvCamera(), self.data.xpos[self.humanoid.bodies[0]]
        camera.lookat, camera.distance, camera.azimuth, camera.elevation = root, 4.0, 135.0, -10.0
        ghost.geom_xpos[model.geom_bodyid > 0, 1] += GHOST_OFFSET
        scene = self._renderer.scene
        self._renderer.update_scene(self.data, camera)
        n_geoms = scene.ngeom
        mujoco.mjv_addGeoms(model, ghost, mujoco.MjvOption(), mujoco.MjvPerturb(), int(mujoco.mjtCatBit.mjCAT_DYNAMIC), scene)
        for geom in scene.geoms[n_geoms : scene.ngeom]:
            geom.rgba = GHOST_COLOR
        return self._renderer.render()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _to_names(clips: str | Sequence[str]) -> tuple[str, ...] | None:
    names = (clips,) if isinstance(clips, str) else clips
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'`clips` must be "walk", or names of clips, it is {clips!r}')
    return None if clips == "walk" else tuple(names)


def _with_defaults(name: str, given: dict[str, float] | None, defaults: dict[str, float], wanted: Range) -> dict[str, float]:
    for key in given or {}:
        check_choice(name, key, list(defaults))
    return {key: to_float(f"{name}: {key}", value, wanted) for key, value in {**defaults, **(given or {})}.items()}
