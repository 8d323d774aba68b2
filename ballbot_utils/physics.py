"""The physics of many robots, stepped together by `mujoco.batch`, with names for the parts of MuJoCo's state."""

import math
from typing import NamedTuple

import mujoco
import mujoco.batch
import numpy as np

from ballbot_utils.geometry import heading_then_tilt, rotation_matrix
from ballbot_utils.model import BALL_START, BASE_START, MAX_TORQUE

# MuJoCo's warnings end the episode and are printed. No MUJOCO_LOG.TXT is written in the working directory.
_log = mujoco.MjLogConfig.get()
_log.logto_file = False
_log.set()


class StateColumns(NamedTuple):
    """Which columns of MuJoCo's qpos and qvel are what."""

    pose: slice  # of qpos: the base's position and quaternion
    ball: slice  # of qpos: the ball's centre
    velocity: slice  # of qvel: the base's velocity
    angular_velocity: slice  # of qvel, in the base's frame
    ball_velocity: slice  # of qvel
    wheels: slice  # of qvel: the speeds about the axles


def state_columns(model: mujoco.MjModel) -> StateColumns:
    """The columns in states of the robot's model."""
    base, ball = model.joint("base"), model.joint("ball")
    place, ball_place, start, ball_start = base.qposadr[0], ball.qposadr[0], base.dofadr[0], ball.dofadr[0]
    wheels = [model.joint(f"wheel_{i}").dofadr[0] for i in range(3)]
    return StateColumns(
        slice(place, place + 7), slice(ball_place, ball_place + 3), slice(start, start + 3),
        slice(start + 3, start + 6), slice(ball_start, ball_start + 3),
        slice(wheels[0], wheels[2] + 1, wheels[1] - wheels[0]),
    )  # fmt: skip


class Robots:
    """Robots of one model. All arrays below are live views: what is written to them is the robots' state.

    Of the base: `position` (n, 3), m, `quaternion` (n, 4), w first, `velocities` (n, 3), m/s, `angular_velocities`
    (n, 3), rad/s in its own frame, and `forces` (n, 3), N, on its centre of mass. `ball_position` (n, 3), m, is the
    ball's centre, and `wheel_speeds` (n, 3), rad/s, are about the axles. All but `angular_velocities` are in the
    world's frame. `substep_position` (n, frame_skip, 3) and `substep_quaternion` (n, frame_skip, 4) hold the base's
    pose after each physics step of the last action.
    """

    def __init__(self, model: mujoco.MjModel, num_robots: int, num_threads: int, frame_skip: int) -> None:
        self.batch = mujoco.batch.Batch(model, num_robots, num_threads)
        self._frame_skip = frame_skip
        columns = state_columns(model)
        qpos, qvel = self.batch.bind("qpos"), self.batch.bind("qvel")
        self.position, self.quaternion = qpos[:, columns.pose][:, :3], qpos[:, columns.pose][:, 3:]
        self.ball_position = qpos[:, columns.ball]
        self.velocities, self.angular_velocities = qvel[:, columns.velocity], qvel[:, columns.angular_velocity]
        self.wheel_speeds = qvel[:, columns.wheels]
        self._planar_velocities = [self.velocities[:, :2], qvel[:, columns.ball_velocity][:, :2]]
        self._planar_columns = np.array([columns.velocity.start, columns.velocity.start + 1])
        self.forces = self.batch.bind("xfrc_applied")[:, model.body("base").id, :3]
        self._motors = self.batch.bind("ctrl")[:, :3]
        self._warnings = self.batch.warning[:, :, 1]
        self._start_state = self.batch.state[0].copy()
        # After each physics step of an action: (n, frame_skip, ...)
        self._substep_states = {
            name: np.empty((num_robots, frame_skip, size)) for name, size in (("qpos", model.nq), ("qvel", model.nv))
        }
        self.substep_position = self._substep_states["qpos"][:, :, columns.pose][:, :, :3]
        self.substep_quaternion = self._substep_states["qpos"][:, :, columns.pose][:, :, 3:]

    def start(self, i: int, x: float, y: float, ground: float) -> None:
        """Let robot i stand upright and still at (x, y), m, just above ground of height `ground`, m."""
        self.batch.state[i] = self._start_state
        self.batch.warning[i] = 0
        self.position[i] = x, y, ground + BASE_START
        self.ball_position[i] = x, y, ground + BALL_START

    def move(self, ids: np.ndarray, heading: np.ndarray, tilt: np.ndarray, velocity: np.ndarray) -> None:
        """Turn upright robots `ids` (n,) by `heading` (n,), then by `tilt` (n, 2) about their balls' centres, rad.

        Base and ball get the `velocity` (n, 2), m/s.
        """
        self.quaternion[ids] = quaternion = heading_then_tilt(heading, tilt)
        self.position[ids] += (BASE_START - BALL_START) * (rotation_matrix(quaternion)[:, :, 2] - [0, 0, 1])
        for planar in self._planar_velocities:
            planar[ids] = velocity

    def step(self, actions: np.ndarray, controls: np.ndarray | None = None) -> np.ndarray:
        """Hold actions (n, 3) for `frame_skip` physics steps. Returns the indices of robots whose physics failed.

        It fails with a warning or error of MuJoCo, or where state or action is not finite. The robot is then put into
        its initial state. `controls` (n, frame_skip, nu), N·m, take the place of the actions' if given.
        """
        np.multiply(actions, -MAX_TORQUE, out=self._motors)
        failed = np.zeros(len(actions), bool)
        try:
            self.batch.rollout(self._frame_skip, control=controls, record=("qpos", "qvel"), out=self._substep_states)
        except mujoco.batch.SimulationError as error:
            failed[error.ids] = True
        state = self.batch.state
        if np.count_nonzero(self._warnings) or not math.isfinite(state.sum() + actions.sum()):
            failed |= self._warnings.any(1) | ~np.isfinite(state).all(1) | ~np.isfinite(actions).all(1)
        ids = np.flatnonzero(failed)
        if len(ids):
            state[ids] = self._start_state
            for name, states in self._substep_states.items():
                states[ids] = getattr(self.batch, name)[ids, None]
        return ids

    def rewind(self, num_substeps: np.ndarray) -> None:
        """Go back to the states after the first `num_substeps` (n,) physics steps of the action."""
        early = np.flatnonzero(num_substeps < self._frame_skip)
        for name, states in self._substep_states.items() if len(early) else ():
            getattr(self.batch, name)[early] = states[early, num_substeps[early] - 1]

    def substep_velocity(self) -> np.ndarray:
        """The base's velocity along x and y after each physics step of the action: (n, frame_skip, 2), m/s."""
        return self._substep_states["qvel"][:, :, self._planar_columns]
