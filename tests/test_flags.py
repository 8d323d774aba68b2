"""A flag without effect is an error, unless it comes from a preset or a config file."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import ppo_ballbot as ppo
import ppo_ballbot_schedules as schedules
from ballbot_utils.checkpoints import save_checkpoint
from ballbot_utils.flags import config_json, validate_args
from ballbot_utils.runs import prepare_run
from ballbot_utils.tune.space import build_space, parse_space


@pytest.fixture
def parse(monkeypatch):
    def parse(flags, script=ppo):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
        return script.parse_args()

    return parse


BOTH = """
--terrain flat | --terrain-seed 5
--terrain flat | --terrain-amplitude 0.2
--terrain flat | --eval-terrain-seed 7
--terrain flat | --no-privileged-critic
--no-cameras | --depth-scale 0.5
--no-cameras | --no-freeze-encoder
--no-cameras | --encoder-path e.pt
--no-freeze-encoder | --encoder-path e.pt
--init-from runs/a | --encoder-path e.pt
--init-from runs/a | --init-log-std -1
--preset tuned --init-from runs/a | --init-log-std 0
--gamma 0 | --gae-lambda 0.9
--vf-coef 0 | --clip-vloss
--update-epochs 1 | --target-kl 0.1
--update-epochs 1 --num-envs 2 --num-steps 128 | --clip-coef 0.2
--total-timesteps 100000 | --eval-episodes 3
| --wandb-project-name mine
| --wandb-entity us
| --no-torch-deterministic
"""
SCHEDULES = """
| --lr-end 1e-5
--lr-schedule constant | --lr-end 1e-5
--lr-schedule kl | --lr-end 1e-5
--clip-schedule constant | --clip-end 0.02
--ent-schedule constant | --ent-end 0.02
--preset tuned | --clip-end 0.02
--preset tuned | --ent-schedule linear
--preset tuned | --lr-schedule guide
"""


def cases():
    for scripts, lines in (((ppo, schedules), BOTH), ((schedules,), SCHEDULES)):
        for script in scripts:
            yield from ([script, *map(str.strip, line.split("|"))] for line in lines.strip().splitlines())


@pytest.mark.parametrize("script, others, flag", cases())
def test_a_flag_without_effect_is_a_one_line_error(script, others, flag, parse):
    parse(others, script)  # alone they are fine
    with pytest.raises(SystemExit, match=f"^error: {flag.split()[0].replace('--no-', '--')} has no effect ") as error:
        parse(f"{others} {flag}", script)
    assert "\n" not in str(error.value) and str(error.value).endswith(": leave it out")


def test_flags_that_others_give_an_effect_are_accepted(parse):
    for flags in ("--lr-schedule linear --lr-end 1e-5", "--lr-schedule kl --update-epochs 1 --target-kl 0.01",
                  "--preset tuned --clip-schedule linear --clip-end 0.02", "--lr-schedule constant"):  # fmt: skip
        parse(flags, schedules)
    for flags in ("--track --wandb-entity us", "--init-from runs/a --terrain flat --privileged-critic",
                  "--eval-interval 100000 --total-timesteps 100000 --eval-episodes 3"):  # fmt: skip
        parse(flags)


@pytest.mark.parametrize("script", (ppo, schedules))
@pytest.mark.parametrize("preset", ppo.PRESETS)
@pytest.mark.parametrize("flags", ("--no-cameras", "--goal command", "--terrain flat", "--init-from runs/a",
                                   "--no-freeze-encoder", "--update-epochs 1", "--eval-interval 10000000"))  # fmt: skip
def test_presets_and_config_files_go_with_any_flag(script, preset, flags, parse, tmp_path):
    """What a preset says of a flag without effect is no error, nor is a config file of such a run."""
    args = parse(f"--preset {preset} {flags}", script)
    validate_args(args, world_size=2)
    config = tmp_path / "config.json"
    config.write_text(config_json(vars(args)))
    again = parse(f"--config {config}", script)
    validate_args(again, world_size=2)
    assert vars(again) == vars(args) | {"config": str(config)}
    old = json.loads(config.read_text()) | {"terrain": "flat", "terrain_seed": 5, "wandb_entity": "us"}
    config.write_text(json.dumps(old))
    validate_args(parse(f"--config {config}", script), world_size=2)


def test_on_flat_ground_a_preset_s_randomization_has_no_hills(parse):
    hills = ppo.PRESETS["robust"]["randomization"]
    assert parse("--preset robust --terrain flat").randomization == {
        name: value for name, value in hills.items() if name != "terrain_amplitude"
    }
    assert hills["terrain_amplitude"] and parse("--preset robust").randomization == hills
    given = parse("--preset robust --terrain flat --randomization mass 0.1 terrain_amplitude 0.5")
    with pytest.raises(SystemExit, match="means nothing on terrain"):
        validate_args(given)


def test_torchrun_and_gpus_set_the_number_of_processes(parse, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit, match="--num-processes has no effect here, as torchrun starts 4 processes"):
        parse("--num-processes 2")
    parse("--num-processes 4")
    parse("--preset tuned")  # which has 2
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="--num-processes has no effect above the number of GPUs, 1"):
        parse("--cuda --num-processes 2")
    with pytest.raises(SystemExit, match="--torch-threads has no effect with --cuda"):
        parse("--cuda --torch-threads 2")
    parse("--preset tuned --cuda")


def test_a_study_over_a_flag_without_effect_is_an_error():
    def study(*space, **changes):
        base = vars(replace(schedules.Args(), **changes))
        return build_space(parse_space(space, schedules), schedules, base)

    with pytest.raises(SystemExit, match="--space init-log-std has no effect with --init-from"):
        study("init-log-std=-1,-0.5,0", "gamma=0.99,0.995", init_from="runs/a")
    with pytest.raises(SystemExit, match="--space lr-end has no effect with --lr-schedule guide"):
        study("lr-end=0:1e-5")
    study("lr-end=0:1e-5", "lr-schedule=constant,linear")  # half of its trials have one


def test_a_policy_without_cameras_has_any_depth_scale(tmp_path, monkeypatch, parse):
    """--depth-scale has no effect without cameras: --init-from does not ask for it."""
    monkeypatch.chdir(tmp_path)
    small = "--no-cameras --hidden-size 8 --pi-layers 1 --vf-layers 1"
    agent_args = parse(f"--preset tuned {small}")
    content = {"model": ppo.Agent(agent_args).state_dict(), "args": vars(agent_args), "global_step": 1}
    save_checkpoint(tmp_path / "a.pt", content)
    flags = "--init-from a.pt --norm-obs --body-frame --privileged-critic --run-name b"
    args = parse(f"{small} {flags}")
    assert args.depth_scale != agent_args.depth_scale
    assert prepare_run(args, 0.0, in_rank=True).weights.keys() == content["model"].keys()
