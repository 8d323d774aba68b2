"""Export a trained policy to ONNX: `python -m ballbot_utils.export runs/a policy.onnx`.

The file contains the whole policy, with normalization and depth encoder. Its inputs are the observation's keys, float32
with a leading axis of any length; its output `action` is (n, 3) in [-1, 1]. It has no state: every action needs the
frames. Its metadata give the rate of actions. Before it is saved, the ONNX policy is checked against PyTorch for one
episode.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro

from ballbot_env import BallbotVectorEnv
from ballbot_utils.common import (
    EvalSettings,
    eval_task,
    load,
    progress,
    require_packages,
    require_writable,
    run_program,
    write,
)
from ballbot_utils.console import check_argument, print_rank0
from ballbot_utils.model import CAMERAS, TIMESTEP
from ballbot_utils.observations import to_body_frame

TOLERANCE = 1e-5  # largest difference of an action in [-1, 1]


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]
    """a checkpoint (.pt file), or the folder of a run, for its best.pt"""
    output: tyro.conf.Positional[Path]
    """file to write, .onnx"""
    overwrite: bool = False
    """replace a file that exists"""
    script: Path | None = None
    """the script that trained it; default: the checkpoint names its script, in the working directory"""


class Exported(torch.nn.Module):
    """What `Policy` computes, from an observation's arrays to actions, in operations that ONNX has."""

    def __init__(self, agent: torch.nn.Module) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        agent = self.agent
        if hasattr(agent, "mean_action"):
            return agent.mean_action(obs)
        seen = obs | to_body_frame(obs) if agent.body_frame else obs
        depth = obs["vel"][:, :0]
        if agent.encoder is not None:
            depth = torch.cat([agent.encoder(obs[name]) for name in CAMERAS], 1) * agent.depth_scale
        features = agent.features(torch.cat([seen[key] for key in agent.keys], 1), depth)
        return agent.actor(features).clamp(-1, 1)


def save(agent: torch.nn.Module, space: gym.spaces.Dict, metadata: dict[str, str], path: Path) -> None:
    """Write the ONNX file of an agent that observes `space`, with `metadata`, a dict of strings."""
    keys = list(space)
    example = {key: torch.zeros(2, *space[key].shape) for key in keys}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about packages that are not needed
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            Exported(agent).eval(), kwargs={"obs": example}, input_names=keys, output_names=["action"],
            dynamic_shapes={"obs": {key: {0: torch.export.Dim("n")} for key in keys}}, verbose=False,
        )  # fmt: skip
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def largest_difference(path: Path, policy: Any, envs: BallbotVectorEnv) -> tuple[float, int]:
    """Run an episode by `policy`; the largest difference of ONNX Runtime's actions, and the number of actions."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    worst, steps, done = 0.0, 0, False
    obs, _ = envs.reset(seed=EvalSettings.seed)
    while not done:
        actions = policy(obs)
        worst = max(
            worst, float(np.abs(session.run(["action"], {name: obs[name] for name in names})[0] - actions).max())
        )
        obs, _, terminations, truncations, _ = envs.step(actions)
        done, steps = terminations[0] or truncations[0], steps + 1
        progress(f"checking: action {steps:,}", steps / envs.max_episode_steps)
    return worst, steps


def main(args: Args) -> None:
    """Write the file, check it, and print the largest difference."""
    require_writable("output", args.output, args.overwrite, ".onnx")
    require_packages("exporting", "onnxruntime", "onnxscript", requirements="requirements-export.txt")
    torch.set_num_threads(1)
    policy, steps = load(args.checkpoint, args.script)
    task = eval_task(EvalSettings(), policy.args, args.checkpoint)
    envs = gym.make_vec("Ballbot-v0", num_envs=1, num_threads=1, copy=False, **task)
    metadata = {
        "run": str(args.checkpoint),
        "steps_trained": str(steps),
        "actions_per_second": f"{1 / (TIMESTEP * envs.frame_skip):g}",
        "frame_skip": str(envs.frame_skip),
        "timestep": f"{TIMESTEP:g}",
        "action": "in [-1, 1], clipped; the torque on wheel i is -10 N·m times action[i]",
    }

    def save_checked(part):
        save(policy.agent, envs.single_observation_space, metadata, part)
        worst, actions = largest_difference(part, policy, envs)
        check_argument(
            worst <= TOLERANCE, f"{args.output} is not written: actions differ from PyTorch's by {worst:.1e}"
        )
        print_rank0(f"wrote {args.output}: {actions:,} actions of an episode differ from PyTorch's by at most "
                    f"{worst:.1e}")  # fmt: skip

    write(args.output, save_checked)


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
