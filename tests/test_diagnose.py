"""Diagnoses of short real runs that fail in each way, of curves made by hand, and errors on invalid input."""

import json
import shlex
import sys
from dataclasses import asdict

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

import ppo_ballbot as ppo
import ppo_ballbot_schedules as schedules
from ballbot_utils import diagnose
from ballbot_utils.checkpoints import save_checkpoint
from ballbot_utils.flags import config_json, format_flags, validate_args
from ballbot_utils.runs import prepare_run

# It learns in its 8 iterations; each run below breaks one thing
HEALTHY = dict(
    frame_skip=1, num_threads=1, cameras=False, terrain="flat", num_envs=32, num_steps=128, minibatch_size=1024,
    privileged_critic=False,
    hidden_size=32, pi_layers=2, vf_layers=2, total_timesteps=32_768, learning_rate=1e-3, clip_coef=0.2, norm_adv=True,
    norm_obs=True, init_log_std=-0.5, eval_interval=10**9, final_eval_episodes=1,
)  # fmt: skip
BROKEN = {
    "unstable": dict(learning_rate=0.3, clip_coef=10.0, target_kl=1e6, max_grad_norm=100.0),
    "KL too large": dict(learning_rate=0.05, target_kl=1e6, update_epochs=10),
    "value function lagging": dict(vf_coef=0.0, total_timesteps=90_112),
    "entropy collapse": dict(init_log_std=-4.0),
    "entropy growing": dict(init_log_std=0.0, ent_coef=1.0, learning_rate=3e-3),
    "KL too small": dict(learning_rate=1e-8),
    "overfitting": dict(terrain="perlin", total_timesteps=163_840, eval_interval=40_960, eval_episodes=8,
                        learning_rate=5e-4, gamma=0.998, gae_lambda=0.99, vf_coef=1.0,
                        target_kl=0.02, ent_coef=0.0),
    "slow learning": dict(learning_rate=1e-5, total_timesteps=98_304),
    "not learning": dict(learning_rate=1e-8, total_timesteps=262_144, num_envs=128, update_epochs=1,
                         minibatch_size=16_384),
}  # fmt: skip


def train_on_gentle_hills(args, num_envs, evaluation=False):
    """Environments whose evaluation terrain is so steep that training does not help there."""
    terrain = dict(terrain_seed=int(evaluation), terrain_amplitude=2.0 if evaluation else 0.02)
    return gym.make_vec("Ballbot-v0", num_envs=num_envs, cameras=False, num_threads=1, **terrain)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from a name in BROKEN, or "healthy", to the run's folder; the first call trains it."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name):
        path = folder / "runs" / name
        if not path.exists():
            torch.set_num_threads(1)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                if name == "overfitting":
                    patch.setattr(ppo, "make_envs", train_on_gentle_hills)
                ppo.train(ppo.Args(**HEALTHY | BROKEN.get(name, {}), run_name=name))
        return path

    return run


def names(run):
    return [name for name, _, _ in diagnose.diagnose(*diagnose.read_run(run))]


@pytest.mark.slow
def test_healthy_run(runs, capsys):
    assert names(runs("healthy")) == []
    capsys.readouterr()
    diagnose.main(diagnose.Args((runs("healthy"),)))
    out = capsys.readouterr().out
    assert "nothing is wrong so far" in out and "--preset" not in out


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_broken_run(runs, name, capsys, monkeypatch):
    if name == "slow learning":  # a twentieth of the rule's steps, to save time
        monkeypatch.setattr(diagnose, "PACE_STEPS", diagnose.PACE_STEPS // 20)
        monkeypatch.setattr(diagnose, "SLOW_PACE", diagnose.SLOW_PACE / 20)
    run = runs(name)
    findings = {found: (evidence, flags) for found, evidence, flags in diagnose.diagnose(*diagnose.read_run(run))}
    assert name in findings
    evidence, flags = findings[name]
    assert any(character.isdigit() for character in evidence) and flags
    # The command to paste is accepted
    capsys.readouterr()
    diagnose.main(diagnose.Args((run,)))
    lines = capsys.readouterr().out.splitlines()
    after = next(i for i, line in enumerate(lines) if line.startswith(f"  {name}: ")) + 1
    command = shlex.split(lines[after])
    assert command[:3] == ["python", "ppo_ballbot.py", "--config"] and command[3] == f"{run}/config.json"
    monkeypatch.setattr(sys, "argv", command[1:])
    args = ppo.parse_args()
    validate_args(args, world_size=2)
    before = vars(ppo.Args(**HEALTHY | BROKEN[name]))
    changed = {key for key, value in vars(args).items() if key not in ("config", "run_name") and value != before[key]}
    assert changed and len(changed) <= len(flags.split())


def line(first, last, start=0, end=3_000_000, num=300):
    """A straight curve (steps, values)."""
    return np.linspace(start, end, num), np.linspace(first, last, num)


def test_not_learning():
    assert "never more than" in diagnose.not_learning(*line(6.5, 6.9))
    assert diagnose.not_learning(*line(6.5, 6.9, end=200_000)) is None  # too early
    assert diagnose.not_learning(*line(6, 10)) is None
    # Iterations of 131,072 steps: the first is the start.
    assert diagnose.not_learning(*line(6.5, 6.9, start=131_072, num=20)).startswith("return 6.5 in the first 131,072")
    steps, values = line(6, 60)
    values[200:] = 5  # it learned and then failed: unstable, but not this
    assert diagnose.not_learning(steps, values) is None


def test_falls_that_come_back():
    steps = 500_000 * np.arange(1, 6)
    assert diagnose.falls_again(steps, np.array([1, 0.5, 0.125, 0.25, 0.375])) == (
        "12% of the episodes of the evaluation at 1,500,000 steps end in a fall, 38% at 2,500,000"
    )
    assert diagnose.falls_again(steps, np.array([1, 0, 0.5, 0.2, 0]))  # also if the last evaluation is good
    assert not diagnose.falls_again(steps, np.array([1, 0.5, 0.125, 0.25, 0.25]))
    assert not diagnose.falls_again(steps, np.array([1, 0.2, 0.9, 0.3, 0.5]))  # it has never stood
    assert not diagnose.falls_again(steps[:0], np.array([]))


def test_unstable():
    def falling(steps, returns):
        return diagnose.return_falling(*diagnose.smooth(steps, returns))

    steps, values = line(6, 75)
    assert falling(steps, values) is None
    values[200:] = 45  # from 51
    assert falling(steps, values) is None
    values[200:] = 30
    assert falling(steps, values) == "return 50.9 at 1,996,656 steps, 30.0 at 3,000,000: 41 % down"
    values[250:] = 60  # a dip that is over
    assert falling(steps, values) is None


def test_slow():
    assert "+3.0 in 1,000,000 steps" in diagnose.slow(*line(6, 15))
    assert diagnose.slow(*line(6, 60)) is None
    assert diagnose.slow(*line(85, 86)) is None  # it balances
    assert diagnose.slow(*line(6, 6, end=900_000)) is None  # too early


def test_overfitting():
    training = line(20, 80)
    steps = np.array([1_000_000, 2_000_000, 3_000_000])  # training: 40, 60, 80
    evidence = diagnose.overfitting(*training, steps, np.array([41, 40, 50]))
    assert evidence.endswith(": 60.0 and 40.0 at 2,000,000 steps, 80.0 and 50.0 at 3,000,000 steps")
    assert diagnose.overfitting(*training, steps, np.array([41, 60, 50])) is None  # a single one may be chance
    assert diagnose.overfitting(*training, steps[:1], np.array([5])) is None
    assert diagnose.overfitting(*training, np.array([]), np.array([])) is None


def test_entropy():
    assert "below 0.1 since 2," in diagnose.entropy_collapse(*line(0.6, 0.01), *line(300, 900))
    assert diagnose.entropy_collapse(*line(0.6, 0.01), *line(300, 3900)) is None  # it balances: no problem
    assert diagnose.entropy_collapse(*line(0.6, 0.2), *line(300, 900)) is None
    assert "1.3 at 3,000,000" in diagnose.entropy_growing(*line(1, 1.3))
    assert diagnose.entropy_growing(*line(1, 0.6)) is None
    assert diagnose.entropy_growing(*line(0.5, 0.9)) is None


def test_value_lagging():
    assert "explained variance 0.3 " in diagnose.value_lagging(*line(0.3, 0.3))
    assert diagnose.value_lagging(*line(-1, 0.99)) is None
    assert diagnose.value_lagging(*line(-1, -1, end=50_000)) is None  # too early


def test_kl():
    steps, kls = line(0.01, 0.01)
    assert diagnose.kl_large(steps, kls) is None and diagnose.kl_small(steps, kls) is None
    kls[100:104] = 0.06, 0.5, 0.07, 0.2
    assert diagnose.kl_large(steps, kls).startswith("KL above 0.05 in 4 of 300 iterations, first at 1,003,344 steps")
    kls[101:104] = 0.01  # one of 300 may be chance
    assert diagnose.kl_large(steps, kls) is None
    assert "median KL 0.0001" in diagnose.kl_small(*line(1e-4, 1e-4))
    assert diagnose.kl_small(*line(0.01, 0)) is None  # a learning rate that falls to 0


def test_every_finding_takes_short_and_empty_curves():
    for num in (0, 1, 2, 3):
        curve = line(1, 1, num=num)
        diagnose.diagnose({}, {tag: curve for tag in diagnose.TAGS})


def test_remedies():
    """Those of the guide's troubleshooting section that helped in benchmark/guide/, from its values."""
    remedies = diagnose.remedies(ppo.Args())
    for name in ("not learning", "slow learning", "KL too small"):
        assert remedies[name] == {"clip_coef": 0.1}
    assert diagnose.remedies(ppo.Args(clip_coef=0.1))["KL too small"] == {"learning_rate": 3e-4}
    low = diagnose.remedies(ppo.Args(learning_rate=1e-5))
    assert low["not learning"] == {"learning_rate": 1e-4, "clip_coef": 0.1}
    assert remedies["overfitting"] == {"weight_decay": 0.05, "ent_coef": 0.01, "hidden_size": 64}
    remedies = diagnose.remedies(ppo.Args(learning_rate=0.001, clip_coef=0.2))
    assert remedies["unstable"] == {"learning_rate": 0.0001, "clip_coef": 0.1}
    assert diagnose.remedies(ppo.Args(clip_coef=0.2))["unstable"] == {"clip_coef": 0.1}  # lower rates are only slower
    # Values at the end of their range
    assert diagnose.remedies(ppo.Args(learning_rate=0.001, clip_coef=0.3))["not learning"] == {}


def configurations():
    """Flags of both scripts, for which every remedy is tried."""
    small = "--no-cameras --hidden-size 64 --pi-layers 1 --vf-layers 1"
    odd = ("--num-envs 7 --num-steps 33 --minibatch-size 77 --total-timesteps 1200", "--num-envs 16 --num-processes 16",
           "--num-envs 30 --num-steps 100 --minibatch-size 1000 --num-processes 2", "--minibatch-size 1",
           "--num-envs 2 --num-steps 128 --update-epochs 1", "--vf-coef 0 --gamma 0",
           f"{small} --init-from policy.pt", f"{small} --init-from policy.pt --weight-decay 0 --max-episode-steps 500",
           "--terrain flat --init-log-std -3", "--max-episode-steps 500",
           "--total-timesteps 20480 --update-epochs 20")  # fmt: skip
    for script in (ppo, schedules):
        yield from ((script, f"--preset {preset}") for preset in ppo.PRESETS)
        yield script, ""
        yield from ((script, flags) for flags in odd)
    for kind in ("constant", "linear", "cosine", "kl"):
        for rate in ("-1", "1e-3", "1e-5"):
            yield schedules, f"--lr-schedule {kind} --learning-rate {rate} --ent-coef 0"
            yield schedules, f"--preset tuned --lr-schedule {kind} --learning-rate {rate}"


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", configurations())
def test_every_remedy_is_accepted_and_changes_something(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *words])
        return script.parse_args()

    args = parse(*flags.split())
    if args.init_from:
        policy = {"model": script.Agent(args).state_dict(), "args": asdict(args) | {"init_from": ""}, "global_step": 1}
        save_checkpoint(tmp_path / "policy.pt", policy)
    (tmp_path / "config.json").write_text(config_json(asdict(args)))
    before = vars(parse("--config", "config.json"))
    for name, remedy in diagnose.remedies(args).items():
        after = parse("--config", "config.json", *shlex.split(format_flags(remedy)))
        changed = {key for key, value in vars(after).items() if value != before[key]}
        assert changed == remedy.keys(), name
        prepare_run(after, 0.0, in_rank=True)


def test_findings_do_not_contradict_each_other():
    params = asdict(ppo.Args())
    curves = {tag: line(0, 0, num=0) for tag in diagnose.TAGS}
    curves |= {diagnose.RETURN: line(80, 80), diagnose.LENGTH: line(4000, 4000), diagnose.STD: line(1, 1.5)}
    curves |= {diagnose.EVAL_RETURN: line(20, 20), diagnose.EVAL_LENGTH: line(1000, 1000)}
    findings = {name: flags for name, _, flags in diagnose.diagnose(params, curves)}
    assert findings["entropy growing"] == "--ent-coef 0 --norm-adv"
    assert findings["overfitting"] == "--weight-decay 0.05 --hidden-size 64"  # without the guide's --ent-coef 0.01
    curves[diagnose.EVAL_RETURN] = line(60, 20)  # falling evaluations are the cause
    names = {name for name, *_ in diagnose.diagnose(params, curves)}
    assert "unstable" in names and "overfitting" not in names


def run_curves(returns, lengths, end=3_000_000):
    empty = np.empty(0), np.empty(0)
    steps = np.linspace(0, end, len(returns))
    return {diagnose.RETURN: (steps, np.array(returns, float)), diagnose.LENGTH: (steps, np.array(lengths, float)),
            diagnose.EVAL_RETURN: empty, diagnose.EVAL_LENGTH: empty}  # fmt: skip


def test_stop_rule():
    def judge(*curves, ended=False, found=False, evaluations_only=False):
        conditions, verdict = diagnose.stop_rule(curves, ended, found, evaluations_only)
        return [holds for holds, _ in conditions.values()], verdict

    flat, rising = np.r_[np.linspace(6, 102, 100), np.full(200, 102)], np.linspace(6, 105, 300)
    long, short = np.full(300, 3900), np.full(300, 900)
    good, poor = run_curves(flat, long), run_curves(flat / 2, short)
    assert diagnose.stalled_for(*good[diagnose.RETURN]) == pytest.approx(2e6, rel=0.05)
    assert judge(good, good, good) == ([True, True, True], "stop")
    assert judge(good) == ([True, False, True], "stop, and repeat it with other seeds, 3 to 5 in all")
    holds, verdict = judge(good, good, poor)
    assert holds == [True, False, False] and verdict.startswith("stop: more steps will not help")
    holds, verdict = judge(run_curves(rising, long))
    assert holds == [False, False, True] and verdict.endswith("it still improves")
    rising_low = run_curves(rising / 2, short)
    assert judge(rising_low) == ([False] * 3, "not yet: continue")
    assert judge(rising_low, ended=True)[1] == "not yet: --resume it with more --total-timesteps"
    assert "fix the findings" in judge(rising_low, found=True)[1]
    # If there is an evaluation, it counts
    evaluated = run_curves(flat - 5, long) | {diagnose.EVAL_RETURN: (np.array([3e6]), np.array([101.0])),
                                              diagnose.EVAL_LENGTH: (np.array([3e6]), np.array([3950.0]))}  # fmt: skip
    assert judge(evaluated)[0] == [True, False, True]
    falling = good | {diagnose.EVAL_RETURN: (np.array([3e6]), np.array([60.0])),
                   diagnose.EVAL_LENGTH: (np.array([3e6]), np.array([2300.0]))}  # fmt: skip
    assert judge(falling)[0] == [True, False, False]
    # With short training episodes or --init-from only evaluations count
    assert judge(good, evaluations_only=True)[0] == judge(evaluated, good, evaluations_only=True)[0] == [False] * 3
    assert judge(evaluated, evaluations_only=True)[0] == [False, False, True]
    steps = np.linspace(0, 3e6, 13)
    stalled = good | {diagnose.EVAL_RETURN: (steps, np.minimum(steps / 2e4, 60)),
                      diagnose.EVAL_LENGTH: (steps, np.full(13, 2000.0))}  # fmt: skip
    assert judge(stalled, evaluations_only=True)[0] == [True, False, False]
    assert judge(stalled, stalled, stalled, evaluations_only=True)[0] == [True, True, False]


def log(evaluations, falls=0.0, eval_length=3900.0, training=100.0, length=3900.0):
    """Curves of a run: its evaluations every 250,000 steps, and a straight training curve."""
    steps = np.arange(1, len(evaluations) + 1) * 250_000.0
    returns = training if isinstance(training, tuple) else (training, training)
    curves = {tag: line(0, 0, num=0) for tag in diagnose.TAGS}
    curves |= {diagnose.RETURN: line(*returns, end=steps[-1]), diagnose.LENGTH: line(length, length, end=steps[-1]),
               diagnose.KL: line(0.01, 0.01), diagnose.STD: line(0.5, 0.4)}  # fmt: skip
    for tag, value in zip((diagnose.EVAL_RETURN, diagnose.EVAL_LENGTH, diagnose.EVAL_FALLS),
                          (np.array(evaluations, float), eval_length, falls)):  # fmt: skip
        curves[tag] = steps, np.broadcast_to(value, len(steps))
    return curves


SHORT, GIVEN, FULL = {"max_episode_steps": 1000}, {"init_from": "runs/a"}, {}


def found(params, curves):
    return {name: (evidence, flags) for name, evidence, flags in diagnose.diagnose(params, curves)}


def test_a_run_that_meets_the_targets_is_never_bad():
    for params in (SHORT, GIVEN, FULL):
        assert found(params, log([107] * 12)) == {}
        worst = log([110, 30, 101], training=(110, 5), falls=1.0, eval_length=3001) | {
            diagnose.KL: line(0.5, 0.5), diagnose.STD: line(1, 1.5), diagnose.EXPLAINED: line(0, 0),
        }  # fmt: skip
        assert found(params, worst) == {}
        assert found(params, worst | {diagnose.EVAL_LENGTH: line(2999, 2999, num=3)})
    assert (
        found(FULL, log([107] * 12) | {diagnose.EVAL_RETURN: line(0, 0, num=0)} | {diagnose.RETURN: line(101, 101)})
        == {}
    )


def test_evaluations_judge_short_episodes_and_a_given_policy():
    for params in (SHORT, GIVEN):
        evidence, _ = found(params, log([20, 60, 76, 28]))["unstable"]
        assert evidence == "evaluations return 76.0 at 750,000 steps, 28.0 at 1,000,000: 63 % down"
        assert "unstable" not in found(params, log([20, 60, 76, 60]))  # this may be chance
        assert found(params, log([20, 60, 76, 28, 80, 85])) == {}  # a dip that is over
        flat = found(params, log([60, 61, 60, 59, 62, 60], training=90))
        evidence, flags = flat["not learning"]
        assert evidence == "evaluations return 60.0 at 250,000 steps and never more than 62.0 in 1,500,000"
        assert "--hidden-size" not in flags and "--init-log-std" not in flags
        assert "not learning" not in found(params, log([60, 61, 80, 90], training=90))
        assert found(params, log([90, 91, 90, 92])) == {}
        assert "slow learning" in found(params, log([60, 61, 60, 62, 61, 62], training=(5, 90)))
    for params in (SHORT, GIVEN, FULL):
        assert found(params, log([60, 70, 80, 90], training=(100, 60))) == {}  # falls by action noise alone
    assert "unstable" in found(FULL, log([20, 60, 76, 28], training=(20, 90)))
    assert "unstable" in found(FULL, log([90], training=(100, 60)))  # one evaluation is not enough


def test_falls_that_training_does_not_see():
    name = "falls in evaluations"
    evidence, flags = found(SHORT, log([70, 71, 70], falls=1.0, eval_length=2500, length=975))[name]
    assert evidence == ("all episodes of the last 2 evaluations end in a fall, and those of training last for 98% of "
                        "their limit")  # fmt: skip
    assert flags == "--max-episode-steps 4000"
    assert name in found(FULL, log([90, 91, 90], falls=1.0, eval_length=3000))
    assert name not in found(SHORT, log([20, 51, 89], falls=np.array([1, 1, 0.3]), length=975))
    assert name not in found(SHORT, log([20, 51], falls=1.0, length=975))  # it learns
    assert name not in found(FULL, log([20, 20], falls=1.0, training=20, length=1000))  # training falls too
    assert "unstable" in found(FULL, log([100, 90, 80, 70, 60], training=90))


@pytest.mark.slow
def test_seeds_are_judged_together(runs, tmp_path, capsys):
    logs = []
    for seed in (1, 2, 3):
        writer = SummaryWriter(tmp_path / f"seed{seed}")
        (tmp_path / f"seed{seed}" / "config.json").write_text(json.dumps({"seed": seed, "total_timesteps": 3_000_000}))
        for step in range(0, 3_000_001, 20_000):  # rises for 1e6 steps, and no more
            returns = min(6 + step / 10_000, 104 + seed)
            values = dict.fromkeys(diagnose.PPO_TAGS, 0.01) | {diagnose.RETURN: returns, diagnose.LENGTH: 3900}
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
        writer.close()
        logs.append(tmp_path / f"seed{seed}")
    diagnose.main(diagnose.Args((*logs, runs("healthy"))))
    out = capsys.readouterr().out
    assert out.count("nothing is wrong\n") == 3
    assert f"stop {logs[0]}, {logs[1]}, {logs[2]}? stop\n" in out and f"stop {runs('healthy')}? not yet" in out
    assert "[x] consistent across seeds: returns 105.0, 106.0, 107.0 at 3,000,000 steps\n" in out


def test_short_training_episodes_are_not_compared(tmp_path, capsys):
    for limit in (1000, 4000):
        writer = SummaryWriter(tmp_path / str(limit))
        (tmp_path / str(limit) / "config.json").write_text(json.dumps({"max_episode_steps": limit}))
        for step in (100_000, 200_000):
            values = dict.fromkeys(diagnose.PPO_TAGS, 0.01) | {diagnose.RETURN: 5, diagnose.LENGTH: 227}
            values |= {diagnose.EVAL_RETURN: 2, diagnose.EVAL_LENGTH: 228}
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
        writer.close()
    diagnose.main(diagnose.Args((tmp_path / "1000",)))
    out = capsys.readouterr().out
    assert "training episodes last 1000 steps, evaluations 4000" in out
    assert "overfitting" not in out
    diagnose.main(diagnose.Args((tmp_path / "4000",)))
    out = capsys.readouterr().out
    assert "training episodes last" not in out and "overfitting: return in training and evaluation: 5.0 and 2.0" in out


def test_resumed_log(tmp_path):
    # Stopped after 300 steps, resumed from 200: the first log is void from step 250 on
    for name, values in (("1", {100: 5, 200: 6, 300: 7}), ("2", {250: 8, 300: 9})):
        writer = SummaryWriter(tmp_path / "part")
        for step, value in values.items():
            writer.add_scalar(diagnose.KL, value, step)
        writer.close()
        next((tmp_path / "part").iterdir()).rename(tmp_path / f"events.out.tfevents.{name}")
    steps, values = diagnose.read_run(tmp_path)[1][diagnose.KL]
    assert steps.tolist() == [100, 200, 250, 300] and values.tolist() == [5, 6, 8, 9]


@pytest.mark.slow
def test_json(runs, tmp_path, capsys):
    run = runs("KL too small")
    capsys.readouterr()
    diagnose.main(diagnose.Args((run,), json="-"))
    report = json.loads(capsys.readouterr().out)
    diagnose.main(diagnose.Args((run,), json=str(tmp_path / "report.json")))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["runs"][str(run)]["steps"] == 32_768
    assert "KL too small" in [finding["name"] for finding in report["runs"][str(run)]["findings"]]
    assert [row["holds"] for row in report["stop"][0]["conditions"]] == [False] * 3
    with pytest.raises(SystemExit, match="exists: give --overwrite or another --json"):
        diagnose.main(diagnose.Args((run,), json=str(tmp_path / "report.json")))


def test_bad_input(tmp_path):
    empty, file, other, damaged = (tmp_path / name for name in ("empty", "file", "other", "damaged"))
    empty.mkdir()
    file.write_text("")
    writer = SummaryWriter(other)
    writer.add_scalar("loss", 1, 1)
    writer.close()
    damaged.mkdir()
    (damaged / "events.out.tfevents.1").write_bytes(b"nonsense" * 100)
    for runs, message in (
        ((), "no runs given"),
        ((tmp_path / "gone",), "gone does not exist"),
        ((file,), "file is not a folder"),
        ((empty,), "has no TensorBoard log"),
        ((other, other), "given twice"),
        ((other,), "no finished episode"),
        ((damaged,), "no finished episode"),
    ):
        with pytest.raises(SystemExit, match=message) as error:
            diagnose.main(diagnose.Args(runs))
        assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="there is no folder"):
        diagnose.main(diagnose.Args((other,), json=str(tmp_path / "nowhere" / "a.json")))
    assert tyro.cli(diagnose.Args, args=["runs/a", "runs/b"]).runs == tuple(map(type(tmp_path), ("runs/a", "runs/b")))
