"""The changes that CONTRIBUTING.md describes are made in a copy of the repository, in the stated places, and work."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ENV = "import gymnasium as gym, numpy as np, ballbot_env\n"
STEP = "envs.reset(seed=1); obs, reward, _, _, infos = envs.step(np.ones((2, 3), np.float32))\n"
TRAIN = ("ppo_ballbot.py --num-envs 2 --num-steps 32 --minibatch-size 32 --total-timesteps 256 --final-eval-episodes 1 "
         "--hidden-size 8 --run-name run")  # fmt: skip

# By change: (file, text, its replacement) for each place, and a program that fails without the change
CHANGES = {
    "a reward term": (
        [("ballbot_env.py", '        "reward_healthy":', '        "reward_test": 7.0 * active.sum(1),\n'
          '        "reward_healthy":')],
        ENV + 'envs = gym.make_vec("Ballbot-v0", num_envs=2, cameras=False)\n' + STEP
        + 'assert (infos["reward_test"] == 7).all() and (reward > 6).all()',
    ),
    "an observation": (
        [("ballbot_utils/observations.py", '        "actions": Observation(',
          '        "test": Observation((2,), -1, 1, "", lambda envs: np.full((envs.num_envs, 2), 0.5)),\n'
          '        "actions": Observation(')],
        ENV + 'envs = gym.make_vec("Ballbot-v0", num_envs=2, cameras=False)\n' + STEP
        + 'assert (obs["test"] == 0.5).all() and envs.observation_space.contains(obs)\n'
        "import ppo_ballbot; assert ppo_ballbot.Agent(ppo_ballbot.Args(cameras=False)).num_proprio == 17",
    ),
    "a kind of terrain": (
        [("ballbot_utils/terrain.py", "# Kind to its function.",
          "def plane_terrain(x, y, angle=5.0):\n    return np.tan(np.radians(angle)) * x\n\n\n# Kind to its function."),
         ("ballbot_utils/terrain.py", '    "flat": None,', '    "plane": plane_terrain, "flat": None,')],
        ENV + 'envs = gym.make_vec("Ballbot-v0", num_envs=2, terrain="plane:angle=6")\n' + STEP
        + "assert (abs(envs.slopes()[:, 0] - 0.1) < 0.02).all()",
    ),
    "a camera": (
        [("assets/ballbot.xml", '<camera name="depth_0"', '<camera name="depth_2" pos="0 0.17 -0.06" fovy="90"/>\n'
          '      <camera name="depth_0"'),
         ("ballbot_utils/model.py", '("depth_0", "depth_1")', '("depth_0", "depth_1", "depth_2")')],
        ENV + 'envs = gym.make_vec("Ballbot-v0", num_envs=2)\n' + STEP
        + 'assert obs["depth_2"].shape == (2, 1, 64, 64)\n'
        "import ppo_ballbot; assert ppo_ballbot.Agent(ppo_ballbot.Args()).num_depth == 60",
    ),
    "a randomization": (
        [("ballbot_utils/randomization.py", '    "latency": Parameter(',
          '    "armature": Parameter(\n        0, 1, "a share from 0 to 1", sample_factor,\n'
          '        fields=lambda model: [("dof_armature", model.joint("wheel_0").dofadr[0])],\n    ),\n'
          '    "latency": Parameter(')],
        ENV + 'envs = gym.make_vec("Ballbot-v0", num_envs=2, cameras=False, randomization={"armature": 0.5})\n' + STEP
        + 'assert len(set(infos["randomization"]["armature"])) == 2',
    ),
    "a preset": (
        [("ppo_ballbot.py", "PRESETS = {", 'PRESETS = {\n    "small": dict(hidden_size=16),')],
        "import sys, ppo_ballbot; sys.argv = ['ppo_ballbot.py', '--preset', 'small']\n"
        "assert ppo_ballbot.parse_args().hidden_size == 16",
    ),
    "a flag": (
        [("ppo_ballbot.py", "    gae_lambda: Share", "    test: Share = 0.25  # a test\n    gae_lambda: Share")],
        "import sys, ppo_ballbot; sys.argv = ['ppo_ballbot.py', '--test', '0.5']\n"
        "args = ppo_ballbot.parse_args(); assert args.test == 0.5; args.test = 2.0\n"
        "from ballbot_utils.flags import validate_args\n"
        "try: validate_args(args)\nexcept SystemExit as error: assert '--test is 2.0' in str(error)\n"
        "else: assert False",
    ),
}  # fmt: skip


@pytest.fixture
def copy(tmp_path):
    for name in ("ballbot_utils", "assets"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for name in ("ballbot_env.py", "ppo_ballbot.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_change(change, copy):
    places, program = CHANGES[change]
    before = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert before.returncode, "works without the change"
    for file, text, replacement in places:
        source = (copy / file).read_text()
        assert source.count(text) == 1, f"{text!r} is in {file} {source.count(text)} times"
        (copy / file).write_text(source.replace(text, replacement))
    after = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert after.returncode == 0, after.stderr


@pytest.mark.slow
def test_the_examples_of_the_book_work(copy):
    """The reward term and the observation of docs/customizing.md."""
    page = (REPOSITORY / "docs" / "customizing.md").read_text()
    reward, observation = re.findall(r"```python\n( {8}.*?\n)```", page)
    for file, place, line in (
        ("ballbot_env.py", '        "reward_healthy":', reward),
        ("ballbot_utils/observations.py", '        "actions": Observation(', observation),
    ):
        source = (copy / file).read_text()
        assert source.count(place) == 1
        (copy / file).write_text(source.replace(place, line + place))
    program = ENV + 'envs = gym.make_vec("Ballbot-v0", num_envs=2, cameras=False, frame_skip=4)\n' + STEP + (
        'assert (infos["reward_sideways"] <= 0).all() and infos["reward_sideways"].any()\n'
        'assert (obs["base_height"] > 0.1).all() and envs.observation_space.contains(obs)'
    )  # fmt: skip
    output = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr


@pytest.mark.slow
def test_changes_train_together(copy):
    """All changes but the camera's, which needs another encoder."""
    for change in CHANGES.keys() - {"a camera"}:
        for file, text, replacement in CHANGES[change][0]:
            path = copy / file
            path.write_text(path.read_text().replace(text, replacement))
    flags = "--preset small --terrain plane:angle=3 --randomization armature 0.5 --test 0.5"
    command = [sys.executable, *TRAIN.replace("--hidden-size 8", flags).split()]
    output = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
