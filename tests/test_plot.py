"""Learning curves from small logs with known values, numbers by hand, and errors on invalid input."""

import json
import sys
import time

import numpy as np
import pytest
import tyro
from torch.utils.tensorboard import SummaryWriter

from ballbot_utils import plot

RETURN, LENGTH = "charts/episodic_return_mean100", "charts/episodic_length_mean100"
EVAL_RETURN, EVAL_LENGTH = "eval/episodic_return", "eval/episodic_length"


def write_log(folder, scalars, name="events.out.tfevents.1", **flags):
    """config.json, if there are flags, and an event file of scalars, {tag: [(step, minutes, value)]}."""
    writer = SummaryWriter(folder)
    if flags:
        (folder / "config.json").write_text(json.dumps(flags))
    start = time.time()
    for tag, points in scalars.items():
        for step, minutes, value in points:
            writer.add_scalar(tag, value, step, walltime=start + 60 * minutes)
    writer.close()
    newest = max(folder.glob("events.*"), key=lambda file: int(file.name.rpartition(".")[2]))
    newest.rename(folder / name)
    return folder


def write_run(folder, returns, **flags):
    """A run with one training mean every 100 steps and minute, lengths of 10 times the return, and two evaluations."""
    training = [(100 * (i + 1), i + 1, value) for i, value in enumerate(returns)]
    evaluation = [(100, 1, 50), (300, 3, 60)]
    scalars = {
        RETURN: training,
        LENGTH: [(step, minutes, 10 * value) for step, minutes, value in training],
        EVAL_RETURN: evaluation,
        EVAL_LENGTH: [(step, minutes, 10 * value) for step, minutes, value in evaluation],
    }
    return write_log(folder, scalars, **flags)


def test_common_grid_by_hand():
    a = np.array([0, 10]), np.array([0, 2]), np.array([0, 10])
    b = np.array([5, 10, 20]), np.array([3, 6, 8]), np.array([1, 2, 4])
    steps, minutes, values = plot.common_grid([a, b], num=3)
    assert steps.tolist() == [5, 7.5, 10]  # both have values from 5 to 10
    assert values.tolist() == [[5, 7.5, 10], [1, 1.5, 2]]
    assert minutes.tolist() == [(1 + 3) / 2, (1.5 + 4.5) / 2, (2 + 6) / 2]
    one_point = np.array([5]), np.array([1]), np.array([7])
    steps, _, values = plot.common_grid([a, one_point])
    assert (steps.tolist(), values.tolist()) == ([5], [[5], [7]])
    late = np.array([11]), np.array([1]), np.array([7])
    steps, minutes, values = plot.common_grid([a, late])
    assert steps.shape == minutes.shape == (0,) and values.shape == (2, 0)


def test_median_and_band_by_hand():
    few = np.array([[1.0, 9], [2, 8], [6, 1]])
    assert plot.median_and_band(few).tolist() == [[2, 8], [1, 1], [6, 9]]  # the range
    five = np.array([[1.0], [2], [3], [4], [100]])
    assert plot.median_and_band(five).tolist() == [[3], [2], [4]]  # the quartiles


def test_evaluations_by_hand():
    a = np.array([100, 200]), np.array([1, 2]), np.array([10, 20])
    b = np.array([100, 150, 200, 300]), np.array([3, 4, 6, 9]), np.array([30, 35, 40, 50])
    steps, minutes, values = plot.common_evaluations([a, b])
    assert steps.tolist() == [100, 200] and minutes.tolist() == [2, 4]
    assert values.tolist() == [[10, 20], [30, 40]]
    nothing = (np.empty(0),) * 3
    assert [x.shape for x in plot.common_evaluations([a, nothing])] == [(0,), (0,), (2, 0)]


def test_groups_and_flags():
    runs = [
        {"run_name": "a", "seed": 1, "clip_coef": 0.2, "norm_adv": True, "gamma": 0.99},
        {"run_name": "b", "seed": 1, "clip_coef": 0.1, "norm_adv": False, "gamma": 0.99},
        {"run_name": "c", "seed": 2, "gamma": 0.99, "clip_coef": 0.2, "norm_adv": True},
    ]
    assert plot.group_runs(runs) == [[0, 2], [1]]
    assert plot.differing_flags(runs[:2]) == [["--clip-coef 0.2", "--norm-adv"], ["--clip-coef 0.1", "--no-norm-adv"]]
    assert plot.differing_flags([runs[0], runs[2]]) == [[], []]
    pushed = [{"randomization": {}}, {"randomization": {"push": 1.0, "mass": 0.1}}]
    assert plot.differing_flags(pushed) == [["--randomization"], ["--randomization push 1 mass 0.1"]]


def test_read(tmp_path):
    scalars = {
        RETURN: [(100, 1, 5), (200, 2, float("nan")), (300, 3, 7)],
        EVAL_RETURN: [(300, 3, 50), (300, 4, 60)],  # at the end: the last evaluation counts
    }
    run = write_log(tmp_path / "run", scalars, seed=3)
    flags, curves = plot.read_run(run)
    assert flags == {"seed": 3, "run_name": "run"}
    steps, minutes, values = curves[RETURN]
    assert steps.tolist() == [100, 300] and values.tolist() == [5, 7]  # without the NaN
    assert minutes == pytest.approx([1, 3], abs=0.02)
    assert curves[EVAL_RETURN][0].tolist() == [300] and curves[EVAL_RETURN][2].tolist() == [60]
    assert [x.shape for x in curves[LENGTH]] == [(0,)] * 3


def test_evaluations_come_from_metrics(tmp_path):
    run = write_run(tmp_path / "run", [10, 20, 30], seed=1)
    rows = [
        ("evaluation", 100, 60, 1 / 3),
        ("evaluation", 300, 180, 70),
        ("final", 300, 240, 80),
        ("best", 100, 300, 5),
    ]
    names = ("kind", "global_step", "seconds", "episodic_return")
    lines = [json.dumps(dict(zip(names, row)) | {"episodic_length": 4000.0}) for row in rows]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n{")  # the last line is incomplete
    _, curves = plot.read_run(run)
    assert [x.tolist() for x in curves[EVAL_RETURN]] == [[100, 300], [1, 4], [1 / 3, 80]]  # with full precision
    assert curves[EVAL_LENGTH][2].tolist() == [4000, 4000] and curves[RETURN][2].tolist() == [10, 20, 30]


@pytest.mark.slow
def test_short_training_episodes_are_shown_as_logged(tmp_path, capsys):
    for name, limit, num_notes in (("a", 1000, 1), ("b", 4000, 0)):
        run = write_run(tmp_path / name, [25, 26], max_episode_steps=limit)
        assert plot.read_run(run)[1][RETURN][2].tolist() == [25, 26]
        plot.main(plot.Args((run,), tmp_path / f"{name}.png"))
        note = "note: training episodes last 1000 steps, evaluations 4000: "
        assert capsys.readouterr().out.count(note) == num_notes


def test_read_resumed(tmp_path):
    # Stopped after 300 steps and 3 minutes, resumed from 200 steps: a minute later it is at 300 again.
    run = write_log(tmp_path / "run", {RETURN: [(100, 1, 5), (200, 2, 6), (300, 3, 7)]}, seed=1)
    write_log(run, {RETURN: [(300, 1, 8), (400, 2, 9)]}, name="events.out.tfevents.2", seed=1)
    steps, minutes, values = plot.read_run(run)[1][RETURN]
    assert steps.tolist() == [100, 200, 300, 400] and values.tolist() == [5, 6, 8, 9]
    assert minutes == pytest.approx([1, 2, 4, 5], abs=0.02)


def test_read_while_written(tmp_path):
    run = write_log(tmp_path / "run", {RETURN: [(100, 1, 5), (200, 2, 6)]}, seed=1)
    file = run / "events.out.tfevents.1"
    file.write_bytes(file.read_bytes()[:-10])  # the last record is incomplete
    assert plot.read_run(run)[1][RETURN][2].tolist() == [5]


def test_files_and_report(tmp_path, capsys):
    runs = (
        write_run(tmp_path / "a1", [10, 20, 30], seed=1, clip_coef=0.2),
        write_run(tmp_path / "a2", [20, 30, 40], seed=2, clip_coef=0.2),
        write_run(tmp_path / "a3", [90, 80], seed=3, clip_coef=0.2),
        write_run(tmp_path / "b1", [-5], seed=1, clip_coef=0.1),
        write_log(tmp_path / "begun", {}, seed=2, clip_coef=0.1),
    )
    output = tmp_path / "curves.svg"
    plot.main(plot.Args(runs, output))
    printed = capsys.readouterr().out
    assert f"note: {tmp_path / 'begun'} is left out" in printed
    assert "--clip-coef 0.2\n" in printed and "--clip-coef 0.1\n" in printed
    assert "episode return at 200 steps, 2.0 minutes: 30.0 (20.0 to 80.0)" in printed
    assert "episode length (steps) at 100 steps, 1.0 minutes: -50.0\n" in printed
    assert "note: the line ends with the shortest run" in printed and "200 steps, the longest has 300" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    svg = output.read_bytes()
    assert b"<svg" in svg and svg.rstrip().endswith(b"</svg>")

    with pytest.raises(SystemExit, match="exists: give --overwrite"):
        plot.main(plot.Args(runs, output))
    plot.main(plot.Args(runs, output, overwrite=True))
    assert output.read_bytes() == svg


def test_figure(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", [10 * seed, 10 * seed + 10], seed=seed) for seed in (1, 2, 4)]
    curves = [plot.read_run(run)[1] for run in runs]
    axes = np.reshape(plot.draw_figure([curves, curves[:1]], ["all", "first"]).axes, (2, 2))
    for column, end in ((0, 200), (1, 2)):
        line, band = axes[0, column].lines[0], axes[0, column].collections[0].get_paths()[0].vertices
        assert (line.get_xdata()[-1], line.get_ydata()[-1]) == pytest.approx((end, 30), abs=0.02)
        assert (band[:, 1].min(), band[:, 1].max()) == (10, 50)
    for row, target, near in ((0, 100, True), (1, 3000, False)):
        for ax in axes[row]:
            assert any(list(line.get_ydata()) == [target, target] for line in ax.lines) == near
            assert ax.get_ylim()[0] == 0 and (ax.get_ylim()[1] >= target) == near


@pytest.mark.slow
def test_labels(tmp_path, capsys):
    many = {f"flag_{i}": 1 for i in range(plot.MAX_FLAGS + 1)}
    runs = (
        write_run(tmp_path / "a", [1, 2], seed=1, **many),
        write_run(tmp_path / "b", [3, 4], seed=1, **dict.fromkeys(many, 2)),
    )
    plot.main(plot.Args(runs, tmp_path / "many.png"))
    printed = capsys.readouterr().out
    assert (
        "a --flag-0 1 --flag-1 1" in printed and "b --flag-0 2 --flag-1 2" in printed
    )  # too many for a legend: it has names
    words = [*map(str, runs), "--labels", "slow", "fast", "--output", str(tmp_path / "given.png")]
    plot.main(tyro.cli(plot.Args, args=words))
    assert b"slow" in (tmp_path / "given.svg").read_bytes()  # in a comment beside the outlines of the letters
    with pytest.raises(SystemExit, match="1 --labels for 2 groups, whose first runs are a, b"):
        plot.main(plot.Args(runs, tmp_path / "one.png", labels=("slow",)))


def test_bad_input(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [1], seed=1)
    (tmp_path / "empty").mkdir()
    other = write_log(tmp_path / "other", {RETURN: [(1, 1, 1)], LENGTH: [(1, 1, 1)]})
    begun = write_log(tmp_path / "begun", {}, seed=1)
    good = tmp_path / "curves.png"
    for runs, output, message in (
        ((), good, "no runs given"),
        ((tmp_path / "none",), good, "none does not exist"),
        ((run / "events.out.tfevents.1",), good, "is not a folder"),
        ((tmp_path / "empty",), good, "empty has no TensorBoard log"),
        ((run, tmp_path / "run" / ".." / "run"), good, "is given twice"),
        ((run,), tmp_path / "curves.pdf", "ending in .png or .svg"),
        ((run,), tmp_path / "none" / "curves.png", "there is no folder"),
        ((other,), good, "has no valid config.json"),
        ((begun,), good, "nothing to plot"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_:
            plot.main(plot.Args(runs, output))
        assert str(exit_.value).startswith("error: ") and message in str(exit_.value)
        assert "\n" not in str(exit_.value)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements-tune\.txt"):
        plot.main(plot.Args((run,), tmp_path / "curves.png"))
    assert not list(tmp_path.glob("curves.*"))


def test_short_runs_fill_the_figure():
    steps = np.linspace(1e4, 1e5, 20)
    run = {tag: (steps, steps / 1e5, np.linspace(8, 16, 20)) for tag in plot.TAGS}
    axes = plot.draw_figure([[run]], ["short"], lqr=101.6).axes
    for ax in axes:
        assert ax.get_ylim()[1] < 20
    texts = [text.get_text() for ax in axes for text in ax.texts]
    assert sorted(texts) == ["↑ LQR: 101.6", "↑ target\n> 100", "↑ target\n> 3000"]
