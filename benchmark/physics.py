"""What a step of physics costs: `python -m benchmark.physics`, CPU time of one core.

64 robots are driven by action noise, on Perlin hills and on a plane. With noise, the wheels slip and MuJoCo's solver
needs more Newton iterations.
"""

import time

import gymnasium as gym
import mujoco
import numpy as np

import ballbot_env  # noqa: F401  registers Ballbot-v0

ROBOTS, FRAME_SKIP, ACTIONS = 64, 4, 250


def measure(terrain: str, noise: float) -> tuple[float, float]:
    """CPU time of a step, µs, and the solver's iterations, means over robots that are reset when they fall."""
    envs = gym.make_vec("Ballbot-v0", ROBOTS, frame_skip=FRAME_SKIP, cameras=False, terrain=terrain, num_threads=1)
    rng, seconds, iterations = np.random.default_rng(0), 0.0, []
    model, data = envs.unwrapped.model, mujoco.MjData(envs.unwrapped.model)
    batch = envs.unwrapped.batch
    envs.reset(seed=0)
    for k in range(ACTIONS):
        actions = np.clip(noise * rng.normal(size=(ROBOTS, 3)), -1, 1).astype(np.float32)
        state = batch.state[k % ROBOTS].copy()
        started = time.process_time()
        envs.step(actions)
        seconds += time.process_time() - started
        mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        data.ctrl[:3] = -10 * actions[k % ROBOTS]
        for _ in range(FRAME_SKIP):
            mujoco.mj_step(model, data)
            iterations.append(data.solver_niter[0])
    return 1e6 * seconds / (ACTIONS * ROBOTS * FRAME_SKIP), float(np.mean(iterations))


if __name__ == "__main__":
    print("| ground | action noise | a step, µs | Newton iterations |\n| --- | --- | --- | --- |")
    for terrain in ("perlin", "flat"):
        for noise in (0.0, 0.6):
            print("| {} | {} | {:.1f} | {:.1f} |".format(terrain, noise, *measure(terrain, noise)))
