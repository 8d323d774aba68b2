"""Velocity commands: what `goal="command"` asks of the robots, and when it changes."""

import math

import numpy as np

from ballbot_utils.checks import check_value

MAX_COMMAND = 0.6  # m/s, fastest command that is sampled
STANDING_FRACTION = 0.2  # of the commands, to stand still
COMMAND_STEPS = 2000  # physics steps that a sampled command lasts
COMMAND_LIMIT = 2.0  # m/s, largest x or y of a command that is set


class Commands:
    """Commands of many robots: `velocities` (n, 2), m/s in the world, and the physics step of the episode, `due` (n,),
    after which the next one is sampled."""

    def __init__(self, num_envs: int) -> None:
        self.velocities = np.zeros((num_envs, 2))
        self.due = np.zeros(num_envs, int)

    def begin(self, i: int, rng: np.random.Generator) -> None:
        """Sample the first command of an episode of robot i, and when it ends, so that short episodes see changes."""
        self._sample(i, rng)
        self.due[i] = rng.integers(1, COMMAND_STEPS + 1)

    def advance(self, steps: np.ndarray, rngs: list[np.random.Generator], running: np.ndarray) -> None:
        """Sample the commands due after `steps` (n,) of an episode, for robots that are `running`, bool (n,)."""
        for i in np.flatnonzero((steps >= self.due) & running):
            self._sample(i, rngs[i])
            self.due[i] += COMMAND_STEPS

    def set(self, velocities: np.ndarray) -> None:
        """Replace the commands by `velocities` (n, 2), m/s, until the episodes end. ValueError above COMMAND_LIMIT."""
        check_value((np.abs(velocities) <= COMMAND_LIMIT).all(), "the velocity", velocities,
                       f"x and y from {-COMMAND_LIMIT:g} to {COMMAND_LIMIT:g} m/s")  # fmt: skip
        self.velocities[:], self.due[:] = velocities, np.iinfo(int).max

    def directions(self) -> np.ndarray:
        """Unit vectors (n, 2) along the commands, zeros for those to stand still."""
        return self.velocities / np.maximum(np.linalg.norm(self.velocities, axis=1, keepdims=True), 1e-9)

    def _sample(self, i, rng):
        kind, speed, turn = rng.random(3)
        speed = 0 if kind < STANDING_FRACTION else MAX_COMMAND * speed
        self.velocities[i] = speed * math.cos(2 * math.pi * turn), speed * math.sin(2 * math.pi * turn)
