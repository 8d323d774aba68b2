"""A checkpoint names its script, and every program takes the policy's classes from that script."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ballbot_env
import ppo_ballbot as ppo
import ppo_ballbot_schedules as schedules
from ballbot_utils import common, evaluate
from ballbot_utils.checkpoints import build_agent, import_script, read_checkpoint, save_checkpoint

ROOT = Path(ppo.__file__).resolve().parent
LEAKY, TANH = "F.leaky_relu_(torch.addmm(bias, x, weight))", "torch.tanh(torch.addmm(bias, x, weight))"


def train(module, **flags):
    """A short run."""
    args = module.Args(num_threads=1, cameras=False, terrain="flat", hidden_size=8, pi_layers=2, vf_layers=1,
                       frame_skip=4, num_envs=2, num_steps=32, minibatch_size=32, total_timesteps=256,
                       final_eval_episodes=2, learning_rate=1e-2, clip_coef=0.2)  # fmt: skip
    return module.train(replace(args, **flags))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with my-ppo.py, a copy whose networks differ, and a run of it; and the copy's module."""
    folder = tmp_path_factory.mktemp("copy")
    (folder / "my-ppo.py").write_text((ROOT / "ppo_ballbot.py").read_text().replace(LEAKY, TANH))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        copy = import_script(folder / "my-ppo.py")
        train(copy, run_name="mine")
    return folder, copy


@pytest.fixture
def copy(trained, monkeypatch):
    """The copy's module, in its folder; the script's text is restored afterwards."""
    folder, module = trained
    monkeypatch.chdir(folder)
    text = (folder / "my-ppo.py").read_text()
    yield module
    (folder / "my-ppo.py").write_text(text)


def error_of(function, *args, **kwargs):
    with pytest.raises(SystemExit) as raised:
        function(*args, **kwargs)
    message = str(raised.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_a_run_names_its_script(copy, monkeypatch):
    digest = hashlib.sha256(Path("my-ppo.py").read_bytes()).hexdigest()
    config = json.loads(Path("runs/mine/config.json").read_text())
    for content in (config, *(read_checkpoint(Path("runs/mine", name)) for name in ("last.pt", "best.pt"))):
        assert (content["script"], content["script_sha256"]) == ("my-ppo.py", digest)
    monkeypatch.setattr(sys, "argv", "ppo_ballbot.py --config runs/mine/config.json".split())
    assert ppo.parse_args().hidden_size == 8


def test_programs_use_the_networks_of_a_changed_copy(copy, capsys):
    evaluate.main(evaluate.Args(checkpoints=(Path("runs/mine"),), episodes=2, gap=False, num_threads=1, json="-"))
    captured = capsys.readouterr()
    (result,) = json.loads(captured.out)
    own = read_checkpoint(Path("runs/mine/best.pt"))["eval"]  # by the copy
    assert result["summary"]["return"]["mean"] == own["episodic_return"] and "warning" not in captured.err

    obs = ballbot_env.BallbotEnv("flat", cameras=False).reset(seed=0)[0] | {"vel": np.float32([1, -1, 0])}
    agent, args = build_agent(read_checkpoint(Path("runs/mine/last.pt")), copy)
    right, wrong = copy.Policy(agent, args)(obs), ppo.Agent(args)
    wrong.load_state_dict(agent.state_dict())
    assert not np.allclose(ppo.Policy(wrong, args)(obs), right, atol=1e-3)
    last = Path("runs/mine/last.pt")
    for policy in (common.load(last)[0], ppo.load_policy(last), schedules.load_policy(last), copy.load_policy(last)):
        assert type(policy) is copy.Policy and np.array_equal(policy(obs), right)


def test_a_script_that_changed_or_is_missing(copy, capsys, tmp_path, monkeypatch):
    script, best = Path("my-ppo.py"), Path("runs/mine/best.pt").resolve()
    common.load(best)
    assert not capsys.readouterr().err
    script.write_text(script.read_text() + "\n# changed\n")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, copy.__name__)  # as in another process, which imports the new text
        common.load(best)
    assert capsys.readouterr().err == f"warning: my-ppo.py has changed since it trained {best}\n"
    assert "error: --script is no.py: there is no such file" == error_of(common.load, best, Path("no.py"))
    monkeypatch.chdir(tmp_path)
    missing = f"error: {best} was trained by 'my-ppo.py', which is no script in the working directory: put it there, or"
    assert error_of(common.load, best) == error_of(ppo.load_policy, best) == f"{missing} give --script"
    assert type(common.load(best, best.parents[2] / "my-ppo.py")[0]) is copy.Policy
    for text, problem in (("1 +", "cannot be imported: SyntaxError"), ("x = 1", "Args and Agent and Policy, which")):
        Path("my-ppo.py").write_text(text)
        assert problem in error_of(common.load, best)


def test_checkpoints_of_the_installed_scripts(copy, capsys):
    folder = train(schedules, run_name="schedules")
    assert type(common.load(folder)[0]) is schedules.Policy is type(ppo.load_policy(folder))
    capsys.readouterr()
    for path in ROOT.glob("benchmark/*.pt"):  # they are older and name no script
        assert type(common.load(path)[0]) is ppo.Policy and type(copy.load_policy(path)) is copy.Policy
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../spy.py", "sub/spy.py", "{}/spy.py", "link.py", "spy", "a spy.py", "spy.py\n",
                                  "sub.spy.py", ".py", "", None, 3, ["spy.py"], b"spy.py"])  # fmt: skip
def test_a_checkpoint_imports_nothing_outside_the_working_directory(copy, name, tmp_path, monkeypatch):
    content, here = read_checkpoint(Path("runs/mine/best.pt")), tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    for folder in (tmp_path, here / "sub", here):
        for spy in ("spy.py", "a spy.py", "spy", "sub.spy.py", ".py")[: 1 if folder != here else None]:
            (folder / spy).write_text("import pathlib\npathlib.Path('ran').touch()\n")
    (here / "spy.py").unlink()
    (here / "link.py").symlink_to(tmp_path / "spy.py")
    monkeypatch.chdir(here)
    content["script"] = name.format(tmp_path) if isinstance(name, str) else name
    save_checkpoint(Path("p.pt"), content)
    for load in (common.load, ppo.load_policy):
        assert "is no script in the working directory" in error_of(load, Path("p.pt"))
    with pytest.raises(SystemExit):
        train(ppo, init_from="p.pt", run_name="run")
    assert not Path("ran").exists() and not Path("runs").exists()


@pytest.mark.slow
def test_runs_resume_by_their_own_script(copy, capsys):
    message = error_of(ppo.train, ppo.Args(resume="runs/mine"))
    assert message.endswith("last.pt was trained by 'my-ppo.py', not by ppo_ballbot.py: use that to --resume it")
    train(ppo, init_from="runs/mine", run_name="other")
    assert "warning: my-ppo.py trained runs/mine: its networks must be the same as here" in capsys.readouterr().out
    train(ppo, run_name="first")
    train(schedules, init_from="runs/first", run_name="second")  # its networks are the same
    capsys.readouterr()
    for changed in (False, True):  # as if the script had been edited since
        for name in ("last.pt", "best.pt") if changed else ():
            path = Path("runs/first", name)
            save_checkpoint(path, read_checkpoint(path) | {"script_sha256": "0"})
        train(ppo, init_from="runs/first", run_name=f"from_{changed}")
        ppo.train(ppo.Args(resume="runs/first", total_timesteps=768 if changed else 512))
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert warnings == [f"warning: ppo_ballbot.py has changed since it trained runs/first/{name}"
                            for name in ("best.pt", "last.pt") if changed]  # fmt: skip
    assert read_checkpoint(Path("runs/first/last.pt"))["script_sha256"] != "0"


def test_runs_of_version_0_1_0_resume(copy):
    """Their checkpoints name no script."""
    folder = train(copy, run_name="old")
    for name in ("last.pt", "best.pt"):
        content = read_checkpoint(folder / name)
        for part in (content, content.get("best") or {}):
            for key in ("script", "script_sha256"):
                part.pop(key, None)
        save_checkpoint(folder / name, content)
    copy.train(copy.Args(resume="runs/old", total_timesteps=512))
    assert type(common.load(folder)[0]) is copy.Policy
