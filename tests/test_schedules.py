"""ppo_ballbot_schedules.py is ppo_ballbot.py but for what its schedules change."""

import difflib
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_ballbot as plain
import ppo_ballbot_schedules as schedules
from ballbot_utils.flags import validate_args as check

SMALL = dict(
    frame_skip=1, norm_obs=False, privileged_critic=False,
    num_processes=1, num_threads=1, cameras=False, num_envs=4, num_steps=32, minibatch_size=64, total_timesteps=1280,
    final_eval_episodes=2,
)  # fmt: skip
CONSTANT = dict(clip_schedule="constant", ent_schedule="constant")


def test_values_by_hand():
    def along(*schedule):
        return [schedules.scheduled(*schedule, p) for p in (1, 0.5, 0)]

    assert along("constant", 3.0, 1.0) == [3, 3, 3]
    assert along("linear", 3.0, 1.0) == [3, 2, 1]
    assert along("cosine", 3.0, 1.0) == pytest.approx([3, 2, 1])
    assert schedules.scheduled("cosine", 1.0, 0.0, 0.75) == pytest.approx(0.853553, abs=1e-6)
    defaults = schedules.Args()
    for p in (1, 0.8, 0.3, 0):
        assert schedules.scheduled("linear", defaults.clip_coef, defaults.clip_end, p) == pytest.approx(0.03 * p + 0.01)
        assert schedules.scheduled("linear", defaults.ent_coef, defaults.ent_end, p) == pytest.approx(0.01 * p)
        assert schedules.learning_rate_at(defaults, p) == plain.learning_rate_at(plain.Args(), p)
    # Either flag works alone
    assert schedules.learning_rate_at(schedules.Args(lr_schedule="cosine"), 1) == 3e-4
    assert schedules.learning_rate_at(schedules.Args(learning_rate=1e-3), 0.2) == 1e-3


def test_kl_adaptation_by_hand():
    assert schedules.adapt_to_kl(3e-4, 0.021, 0.01) == pytest.approx(2e-4)
    assert schedules.adapt_to_kl(3e-4, 0.004, 0.01) == pytest.approx(4.5e-4)
    assert schedules.adapt_to_kl(3e-4, 0.006, 0.01) == schedules.adapt_to_kl(3e-4, 0.019, 0.01) == 3e-4
    assert schedules.adapt_to_kl(1e-5, 1.0, 0.01) == 1e-5
    assert schedules.adapt_to_kl(1e-2, 0.0, 0.01) == 1e-2
    # From outside its bounds it never moves against its direction
    assert schedules.adapt_to_kl(2e-2, 0.0, 0.01) == 2e-2
    assert schedules.adapt_to_kl(5e-6, 1.0, 0.01) == 5e-6
    assert schedules.adapt_to_kl(3e-2, 1.0, 0.01) == pytest.approx(2e-2)
    assert schedules.adapt_to_kl(4e-6, 0.0, 0.01) == pytest.approx(6e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rate, schedule",
    [
        (dict(), dict()),
        (dict(learning_rate=3e-4), dict(learning_rate=3e-4, lr_schedule="constant")),
        (
            dict(learning_rate=3e-4, anneal_lr=True, norm_adv=True),
            dict(learning_rate=3e-4, lr_schedule="linear", norm_adv=True),
        ),
    ],
)
def test_equal_to_the_plain_script_when_the_schedules_are(rate, schedule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain.train(plain.Args(**SMALL, **rate, run_name="plain"))
    same = dict(clip_coef=plain.Args().clip_coef, ent_coef=plain.Args().ent_coef, **CONSTANT)
    schedules.train(schedules.Args(**SMALL, **schedule, **same, run_name="same"))
    schedules.train(schedules.Args(**SMALL, **schedule, run_name="scheduled"))
    models = {name: torch.load(f"runs/{name}/last.pt", weights_only=True)["model"] for name in
              ("plain", "same", "scheduled")}  # fmt: skip
    assert all(torch.equal(value, models["same"][key]) for key, value in models["plain"].items())
    assert not all(torch.equal(value, models["scheduled"][key]) for key, value in models["plain"].items())
    losses = [[e.value for e in EventAccumulator(f"runs/{name}").Reload().Scalars("losses/policy_loss")] for name in
              ("plain", "same")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 10


def test_values_in_force_are_logged_and_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = schedules.Args(**SMALL, run_name="run", learning_rate=1e-3, lr_schedule="kl", target_kl=1e-4)
    log = EventAccumulator(str(schedules.train(args))).Reload()

    def values(tag):
        return [event.value for event in log.Scalars(tag)]

    assert values("charts/clip_coef") == pytest.approx([0.01 + 0.03 * (1 - i / 10) for i in range(10)])
    assert values("charts/ent_coef") == pytest.approx([0.01 * (1 - i / 10) for i in range(10)])
    rates, kl = values("charts/learning_rate"), values("losses/approx_kl")
    expected = [1e-3]
    for divergence in kl[:-1]:
        expected.append(schedules.adapt_to_kl(expected[-1], divergence, 1e-4))
    assert rates == pytest.approx(expected, rel=1e-5) and len(set(rates)) > 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lr_schedule="step"), "--lr-schedule is step: give 'guide', 'constant', 'linear', 'cosine' or 'kl'"),
        (dict(ent_schedule="kl"), "--ent-schedule is kl: give 'constant', 'linear' or 'cosine'"),
        (dict(learning_rate=-2.0), "--learning-rate is -2.0: give -1 for the schedule, or a positive constant"),
        (dict(clip_end=0.0), "--clip-end is 0.0: give more than 0"),
        (dict(ent_end=-1.0), "--ent-end is -1.0"),
    ],
)
def test_bad_schedules_end_in_one_line(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(message)):
        schedules.train(replace(schedules.Args(**SMALL), **changes))
    assert not list(tmp_path.iterdir())


def test_presets_are_the_plain_script_s():
    names = {field.name for field in fields(plain.Args)} & {field.name for field in fields(schedules.Args)}
    for preset, settings in schedules.PRESETS.items():
        ours, theirs = schedules.Args(**settings), plain.Args(**plain.PRESETS[preset])
        check(ours, world_size=2)
        assert {name: getattr(ours, name) for name in names - {"exp_name"}} == {
            name: getattr(theirs, name) for name in names - {"exp_name"}
        }
        assert (ours.clip_schedule, ours.ent_schedule) == ("constant", "constant")
        for p in (1, 0.5, 0.2):
            assert schedules.learning_rate_at(ours, p) == plain.learning_rate_at(theirs, p)


def test_the_difference_is_short():
    texts = [Path(script.__file__).read_text().splitlines() for script in (plain, schedules)]
    changed = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert len(changed) < 80
