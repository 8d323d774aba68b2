"""Tests of the robot in assets/ballbot.xml: masses, geometry, omniwheels, driving, agreement with the reference."""

import functools
from pathlib import Path
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest

from ballbot_utils import lqr

ROOT = Path(__file__).resolve().parents[1]
BALL_RADIUS, ROLLER_RADIUS = 0.09, 0.025  # m
WHEELS = range(3)


def load():
    return mujoco.MjSpec.from_file(str(ROOT / "assets" / "ballbot.xml"))


def turn_z(vector, degrees):
    """`vector` turned about z."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ vector


# Masses, geometry, contacts


def test_masses():
    """Masses in kg: those of the reference's model, each wheel split evenly between hub and roller."""
    model = load().compile()
    tower, ballast, arm = 23.6 * np.pi * 0.11**2 * 0.28, 400 * 0.2**3, 0.067
    assert model.body("base").mass == pytest.approx(tower + ballast + 2 * arm, abs=1e-6)
    assert model.body("ball").mass == pytest.approx(55 * 4 / 3 * np.pi * BALL_RADIUS**3, abs=1e-6)
    for i in WHEELS:
        assert model.body(f"wheel_{i}").mass == pytest.approx(0.0893 / 2, abs=1e-6)
        assert model.body(f"roller_{i}").mass == pytest.approx(0.0893 / 2, abs=1e-6)
    assert model.body("base").subtreemass == pytest.approx(3.853, abs=1e-3)


def test_start_pose_and_geometry():
    """Positions (m) and axes of wheels and cameras in the base frame, at the start pose."""
    model = load().compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(data.body("base").xpos, [0, 0, 0.24])
    np.testing.assert_allclose(data.body("base").xmat, np.eye(3).ravel())
    np.testing.assert_allclose(data.body("ball").xpos, [0, 0, 0.12])
    for i in WHEELS:
        centre = data.body("base").xpos + turn_z([-0.018, -0.08, -0.054], 120 * i)
        axle = turn_z([-0.15317, -0.69032, -0.70711], 120 * i)
        joint = model.joint(f"wheel_{i}")
        np.testing.assert_allclose(data.body(f"wheel_{i}").xpos, centre, atol=1e-9)
        np.testing.assert_allclose(data.body(f"roller_{i}").xpos, centre, atol=1e-9)
        np.testing.assert_allclose(data.xaxis[joint.id], axle, atol=1e-5)
        assert (joint.damping.item(), joint.armature.item()) == (0.4, 0.005)
        assert model.geom(f"roller_{i}").size[0] == ROLLER_RADIUS
    for i, side in enumerate((1, -1)):
        camera, frame = model.camera(f"depth_{i}"), data.cam_xmat[model.camera(f"depth_{i}").id].reshape(3, 3)
        np.testing.assert_allclose(data.cam_xpos[camera.id], [side * 0.17, -0.01, 0.24 - 0.06], atol=1e-9)
        np.testing.assert_allclose(-frame[:, 2], [-side * 0.5, 0, -0.866], atol=1e-4)  # where it looks
        np.testing.assert_allclose(frame[:, 0], [0.866, 0, -side * 0.5], atol=1e-4)  # the image's right
        assert camera.fovy == 90


def test_only_ball_and_ground_and_ball_and_rollers_touch():
    """Robot lying, ball inside the tower: still no other contacts."""
    model = load().compile()
    data = mujoco.MjData(model)
    allowed = {frozenset(pair) for pair in [("ball", "ground"), *(("ball", f"roller_{i}") for i in WHEELS)]}

    def touching():
        mujoco.mj_forward(model, data)
        return {frozenset(model.geom(g).name for g in contact.geom) for contact in data.contact}

    data.joint("ball").qpos[2] = 0.089
    data.joint("base").qpos[2] = 0.2205
    assert touching() == allowed
    data.joint("base").qpos[2] = 0
    assert touching() <= allowed
    data.joint("base").qpos[:7] = 0, 0, 0.05, np.sqrt(0.5), np.sqrt(0.5), 0, 0
    assert touching() <= allowed


def test_cameras_are_clear_of_the_robot():
    """Nothing visible (groups 0 to 2) lies within 5 mm of a depth camera."""
    spec = load()
    for i in range(2):
        lens = spec.body("base").add_geom(name=f"lens_{i}", size=[1e-4, 0, 0], group=5, mass=0)
        lens.pos = [[0.17, -0.01, -0.06], [-0.17, -0.01, -0.06]][i]
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    visible = np.flatnonzero(model.geom_group <= 2)
    for i in range(2):
        np.testing.assert_allclose(data.geom(f"lens_{i}").xpos, data.camera(f"depth_{i}").xpos, atol=1e-9)
        lens = model.geom(f"lens_{i}").id
        assert min(mujoco.mj_geomDistance(model, data, lens, g, 1.0, None) for g in visible) > 0.005


# The omniwheel


def not_upright(spec):
    """The robot before its rollers were fixed."""
    for i in WHEELS:
        spec.delete(spec.actuator(f"upright_{i}"))


def rigid_roller(spec):
    spec.delete(spec.joint("roller_0"))


def coupled_about_all_axes(spec):
    """Adds the couplings about the two axes across the axle."""
    for axis in (3, 4):
        gear = np.zeros(6)
        gear[axis] = 1
        coupling = spec.add_actuator(name=f"coupling_{axis}", target="roller_0", refsite="hub_0", gear=gear)
        coupling.trntype = mujoco.mjtTrn.mjTRN_SITE
        coupling.gaintype, coupling.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
        coupling.gainprm = np.zeros(10)
        coupling.biasprm = [0, 0, -50] + [0] * 7


def not_coupled(spec):
    spec.delete(spec.actuator("coupling_0"))


def spin_ball_against_wheel(change=None):
    """The ball spins at 5 rad/s against wheel 0 for 0.3 s. Base held, ball pressed to it, hub undamped.

    Returns two pairs (share of the ball's spin left, rim speed of the hub / surface speed of the ball): the
    first where the ball's surface moves along the axle, the second where it moves along the wheel's rim.
    """
    spec = load()
    axle = np.array([-0.15317, -0.69032, -0.70711])
    normal = np.array([-0.018, -0.08, -0.054 + 0.1305])  # from ball to wheel when the robot rests
    normal -= normal @ axle * axle
    normal /= np.linalg.norm(normal)
    across = np.cross(axle, normal)
    spec.delete(spec.joint("base"))
    spec.delete(spec.joint("ball"))
    ball = spec.body("ball")
    ball.pos = np.array([-0.018, -0.08, 0.24 - 0.054]) - (BALL_RADIUS + ROLLER_RADIUS) * normal
    ball.add_joint(name="press", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=normal)
    ball.add_joint(name="ball", type=mujoco.mjtJoint.mjJNT_BALL)
    spec.joint("wheel_0").damping = [0, 0, 0]
    spec.option.gravity = 100 * normal  # 17 N on the ball, as the robot's weight gives
    spec.geom("ground").contype = spec.geom("ground").conaffinity = 0
    for pair in list(spec.pairs)[1:]:
        spec.delete(pair)
    if change:
        change(spec)
    model = spec.compile()
    data = mujoco.MjData(model)
    results = []
    for axis in (across, axle):
        mujoco.mj_resetData(model, data)
        mujoco.mj_step(model, data, nstep=100)
        data.joint("ball").qvel = 5 * axis
        mujoco.mj_step(model, data, nstep=150)
        assert data.ncon == 1
        spin = data.joint("ball").qvel  # in the ball's frame, which has turned about this same axis
        hub = data.joint("wheel_0").qvel[0]
        results.append((spin @ axis / 5, abs(hub) * ROLLER_RADIUS / (np.linalg.norm(spin) * BALL_RADIUS)))
    return results


def test_wheel_is_free_along_its_axle_and_drives_along_its_rim():
    """The share of its spin that the ball keeps follows from the inertias (kg m²) of what it sets turning."""
    ball = 2 / 5 * 55 * 4 / 3 * np.pi * BALL_RADIUS**5
    roller = 2 / 5 * 0.0893 / 2 * ROLLER_RADIUS**2
    hub = 0.005  # the armature; the hub itself is a thousandth of it
    ratio = (BALL_RADIUS / ROLLER_RADIUS) ** 2
    (free, free_hub), (driven, driven_hub) = spin_ball_against_wheel()
    # Along the axle the ball turns the roller, nothing else, and nothing brakes the two.
    assert free == pytest.approx(ball / (ball + ratio * roller), rel=0.02)
    assert free_hub < 0.01
    # Along the rim the roller takes the hub with it, which weighs a hundred times more than the ball.
    assert driven == pytest.approx(ball / (ball + ratio * (roller + hub)), rel=0.1)
    assert driven_hub == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("change", [rigid_roller, coupled_about_all_axes])
def test_a_wheel_without_idlers_is_not_free(change):
    """Positive control: the ball is held when the roller sits rigidly or is coupled about every axis."""
    assert abs(spin_ball_against_wheel(change)[0][0]) < 0.1


def test_a_wheel_without_coupling_does_not_drive():
    """Positive control: the ball spins on and the hub stays at rest."""
    driven, driven_hub = spin_ball_against_wheel(not_coupled)[1]
    assert driven > 0.5 and driven_hub < 0.05


# The whole robot


def balance(steps, tilt, controlled=True):
    """PD control on flat ground from a `tilt` in rad. Returns tilt (°) and ball position (m) of each step.

    The law gives the torque on the ball (N m, base frame) which rolls it to where the tower leans and back to
    the start. A wheel with motor torque t turns the ball with -t * axle * (ball radius / roller radius), and
    three wheels together can give any torque.
    """
    model = load().compile()
    data = mujoco.MjData(model)
    base, ball = data.joint("base"), data.joint("ball")
    mujoco.mj_forward(model, data)
    axles = data.xaxis[[model.joint(f"wheel_{i}").id for i in WHEELS]].T.copy()  # one a column, base frame
    to_wheels = -np.linalg.inv(axles) * ROLLER_RADIUS / BALL_RADIUS
    # Lean the base about the ball's centre, towards a direction that is no wheel's.
    axis = np.array([np.cos(0.7), np.sin(0.7), 0])
    up = np.array([np.sin(tilt) * axis[1], -np.sin(tilt) * axis[0], np.cos(tilt)])
    base.qpos[:3] = ball.qpos[:3] + 0.12 * up
    base.qpos[3:] = [np.cos(tilt / 2), *np.sin(tilt / 2) * axis]
    mujoco.mj_forward(model, data)
    tilts, positions = [], []
    for _ in range(steps):
        rotation = data.body("base").xmat.reshape(3, 3)
        position, velocity = rotation.T @ ball.qpos[:3], rotation.T @ ball.qvel[:3]
        lean = np.array([rotation[2, 1], -rotation[2, 0]])  # rad, about the base's x and y
        wanted = 300 * lean + 10 * base.qvel[3:5]
        wanted += [-60 * (velocity[1] + position[1]), 60 * (velocity[0] + position[0])]
        if controlled:
            data.ctrl[:3] = np.clip(to_wheels @ [*wanted, 0], -10, 10)
        mujoco.mj_step(model, data)
        tilts.append(np.degrees(np.arccos(data.body("base").xmat[8])))
        positions.append(ball.qpos[:2].copy())
    return np.array(tilts), np.array(positions)


def test_pd_control_balances_for_10_s():
    tilts, positions = balance(5000, tilt=0.05)
    assert tilts.max() < 4 and tilts[2500:].max() < 1
    assert np.linalg.norm(positions, axis=1).max() < 0.15


def test_without_control_it_falls():
    tilts, _ = balance(500, tilt=0.05, controlled=False)
    assert tilts.max() > 20


@functools.cache
def driver():
    return lqr.design_regulator(wheel_damping=0.4)


def drive(speed, change=None, seconds=8):
    """The LQR drives along +y on level ground. Per action from 0.1 s on, each (n, 3), by wheel: the hub's speed, rad/s,
    the speed at which its roller moves as fast along the rim as the ball where they touch, and the slip, m/s, along the
    axle.
    """
    spec = load()
    if change:
        change(spec)
    model = spec.compile()
    data = mujoco.MjData(model)
    base, hubs = data.joint("base"), [data.joint(f"wheel_{i}") for i in WHEELS]
    act = lqr.regulator_factory(*driver(), (0.0, speed))(SimpleNamespace(num_envs=1))

    def velocity(body, point):
        """Of the body's material at `point`, in the world."""
        spin = np.zeros(6)
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_BODY, model.body(body).id, spin, 0)
        return spin[3:] + np.cross(spin[:3], point - data.body(body).xpos)

    rows = []
    for action in range(int(seconds / 0.004)):
        orientation = np.zeros(3)
        mujoco.mju_quat2Vel(orientation, base.qpos[3:], 1)
        obs = {"orientation": orientation[None], "angular_vel": base.qvel[None, 3:], "vel": base.qvel[None, :3]}
        data.ctrl[:3] = -10 * np.clip(act(obs)[0], -1, 1)
        mujoco.mj_step(model, data, nstep=lqr.FRAME_SKIP)
        mujoco.mj_forward(model, data)
        if data.body("base").xmat[8] < np.cos(np.radians(20)):
            break
        if action < 25:  # it drops, and its wheels are in the air
            continue
        row = []
        for i in WHEELS:
            contact = next(c for c in data.contact if model.geom(f"roller_{i}").id in c.geom)
            axle = data.xaxis[model.joint(f"wheel_{i}").id]
            rim = np.cross(axle, contact.frame[:3])
            rim /= np.linalg.norm(rim)
            ball, roller, mount = (velocity(body, contact.pos) for body in ("ball", f"roller_{i}", "base"))
            along_rim = np.cross(axle, contact.pos - data.body(f"roller_{i}").xpos) @ rim  # m/s at 1 rad/s
            slip = (ball - roller) @ np.cross(contact.frame[:3], rim)
            row.append((hubs[i].qvel[0], (ball - mount) @ rim / along_rim, slip))
        rows.append(row)
    return np.array(rows).transpose(2, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("speed", [0.2, 0.4, 0.6])
def test_wheels_do_not_slip_in_a_steady_drive(speed):
    hub, needed, slip = drive(speed)
    assert len(hub) == 8 / 0.004 - 25  # it did not fall
    assert np.abs(slip).max() < 0.05
    steady = slice(len(hub) // 2, None)
    np.testing.assert_allclose(hub[steady].mean(0), needed[steady].mean(0), rtol=0.1)
    assert np.abs(needed[steady].mean(0)).max() > 25 * speed  # it drives


@pytest.mark.slow
def test_rollers_that_may_spin_about_the_line_from_the_ball_drag_the_wheels_along():
    """Positive control: the defect that kept the robot from driving."""
    hub, needed, slip = drive(0.4, not_upright, seconds=3)
    assert np.abs(slip).max() > 0.5
    assert np.abs(hub[-100:].mean(0) / needed[-100:].mean(0) - 1).max() > 0.2


def energy_risen(torque):
    """By how much the energy (J) rises above its minimum so far as the robot falls, motors 1 and 2 at ∓torque (N m)."""
    spec = load()
    spec.option.enableflags |= mujoco.mjtEnableBit.mjENBL_ENERGY
    model = spec.compile()
    data, rng, risen = mujoco.MjData(model), np.random.default_rng(0), []
    for _ in range(4):
        mujoco.mj_resetData(model, data)
        mujoco.mj_step(model, data, nstep=100)
        for _ in range(100):
            data.ctrl[:3] = rng.uniform(-8, 8, 3)
            mujoco.mj_step(model, data, nstep=2)
        data.ctrl[:3] = 0, -torque, torque
        energies = []
        while data.body("base").xmat[8] > np.cos(np.radians(20)) and len(energies) < 1000:
            mujoco.mj_step(model, data)
            mujoco.mj_energyPos(model, data)
            mujoco.mj_energyVel(model, data)
            energies.append(data.energy.sum())
        risen.append(np.max(energies - np.minimum.accumulate(energies)))
    return max(risen)


def test_without_motor_torque_the_energy_never_rises():
    """But by what the soft contacts give back: they store some 0.2 J, most of it under the ball."""
    assert energy_risen(0) < 0.02
    assert energy_risen(0.5) > 0.05  # positive control


def onto_height_field(spec, cells=20):
    """Replace the plane by a height field of zeros."""
    half = cells / 2 * 10 / 292  # m; the reference's cells, and ours, are 10/292 m
    nodes = np.zeros((cells + 1, cells + 1))
    spec.add_hfield(name="flat", nrow=cells + 1, ncol=cells + 1, size=[half, half, 0.1, 0.1], userdata=nodes.ravel())
    spec.geom("ground").type = mujoco.mjtGeom.mjGEOM_HFIELD
    spec.geom("ground").hfieldname = "flat"


def reference_model(ground, change=None):
    """The robot with the reference's wheel damping, on a plane or on a height field of zeros, and settled data."""
    reference = np.load(ROOT / "tests" / "data" / "aligned_capsule_rk4.npz")
    spec = load()
    for i in WHEELS:
        spec.joint(f"wheel_{i}").damping = [0.8, 0, 0]
    if ground == "height field":
        onto_height_field(spec)
    if change:
        change(spec)
    model = spec.compile()
    assert model.opt.timestep == reference["timestep"]
    settled = mujoco.MjData(model)
    mujoco.mj_step(model, settled, nstep=int(reference["settle_steps"]))
    return model, settled, reference


def sideways(model, data):
    """The part across gravity (N, (2,)) of the normal forces between ground and ball."""
    total, force = np.zeros(3), np.zeros(6)
    for i, contact in enumerate(data.contact):
        if model.geom("ground").id in contact.geom:
            mujoco.mj_contactForce(model, data, i, force)
            total += force[0] * contact.frame[:3]
    return total[:2]


def errors_against_reference(change=None, ground="height field", with_forces_of_height_field=False):
    """Mean relative errors of the base's angular and linear velocity, as compared in x and y.

    tests/data/aligned_capsule_rk4.npz holds 8 trajectories of the reference's model with its patch emulated
    (capsule wheels, contact frames aligned with them), RK4, wheel damping 0.8: random `motor_torque` in N m,
    `base_linear_velocity` in m/s (world frame), `base_angular_velocity` in rad/s (body frame). Row k is the
    state after step k + 1; the start is the initial pose after `settle_steps` steps with zero torque.

    The reference stood on a height field of zeros, cells of 10/292 m, with the robot above a node.
    """
    model, settled, reference = reference_model(ground, change)
    bumpy, bumpy_settled, _ = reference_model("height field", change)
    data, bumpy_data = mujoco.MjData(model), mujoco.MjData(bumpy)
    errors = []
    for trajectory, torques in enumerate(reference["motor_torque"]):
        for m, d, start in ((model, data, settled), (bumpy, bumpy_data, bumpy_settled)):
            mujoco.mj_resetData(m, d)
            d.qpos, d.qvel = start.qpos, start.qvel
        linear, angular = [], []
        for torque in torques:
            if with_forces_of_height_field:
                bumpy_data.ctrl[:3] = torque
                mujoco.mj_step(bumpy, bumpy_data)
                data.xfrc_applied[model.body("ball").id, :2] = sideways(bumpy, bumpy_data)
            data.ctrl[:3] = torque
            mujoco.mj_step(model, data)
            linear.append(data.joint("base").qvel[:2].copy())
            angular.append(data.joint("base").qvel[3:5].copy())
        for ours, name in (angular, "base_angular_velocity"), (linear, "base_linear_velocity"):
            theirs = reference[name][trajectory, :, :2]
            errors.append(np.abs(ours - theirs).mean() / np.abs(theirs).mean())
    angular, linear = np.reshape(errors, (-1, 2)).mean(0)
    return angular, linear


def test_velocities_agree_with_the_reference():
    angular, linear = errors_against_reference()
    message = f"mean relative error of angular velocity {angular:.1%}, of linear velocity {linear:.1%}"
    print(message)
    assert angular < 0.05 and linear < 0.05, message


def test_what_differs_on_a_plane_is_what_the_height_field_pushes():
    """The linear velocities, of about 0.01 m/s, differ by 30 % on a plane: a ball on a height field, flat as it may be,
    touches neighbouring cells at tilted normals, and is pushed sideways by a hundredth of the weight on it. With these
    forces added the plane agrees as well."""
    assert errors_against_reference(ground="plane")[1] > 0.25
    assert max(errors_against_reference(ground="plane", with_forces_of_height_field=True)) < 0.05


def forces_on_a_rolling_ball(ground, speed=0.5, steps=200):
    """Mean forces (8, 2) on a ball that rolls freely in 8 directions, along and across them, in its weight."""
    spec = load()
    for part in [*spec.actuators, *spec.pairs, spec.body("base")]:
        spec.delete(part)
    if ground == "height field":
        onto_height_field(spec)
    model = spec.compile()
    settled, forces = mujoco.MjData(model), []
    settled.qpos[2] = BALL_RADIUS
    mujoco.mj_step(model, settled, nstep=300)
    for angle in np.radians(range(0, 360, 45)):
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        data = mujoco.MjData(model)
        data.qpos[:] = settled.qpos
        data.qvel[:2], data.qvel[3:5] = speed * along, speed / BALL_RADIUS * across
        mujoco.mj_step(model, data, nstep=steps)
        acceleration = (data.qvel[:2] - speed * along) / (steps * model.opt.timestep)
        forces.append(1.4 * acceleration @ np.stack([along, across], 1) / 9.81)  # 1.4: it spins up as well
    return np.array(forces)


def test_a_height_field_slows_a_rolling_ball_and_a_plane_does_not():
    assert np.abs(forces_on_a_rolling_ball("plane")).max() < 0.0002
    along, across = forces_on_a_rolling_ball("height field").T
    assert -0.015 < along.min() and along.max() < -0.005, along
    assert 0.003 < np.abs(across).max() < 0.008, across


def test_another_integrator_does_not_agree_with_the_reference():
    """Positive control: the comparison sees what implicitfast does to the wheels."""

    def implicitfast(spec):
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST

    assert min(errors_against_reference(implicitfast)) > 0.3
