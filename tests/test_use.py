"""What README and docs/ say on using policies and other libraries is run from their text; so is an installation."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import mujoco
import numpy as np
import onnxruntime
import pytest
import torch
import tyro
from stable_baselines3 import PPO
from test_policy import make_run

import ppo_ballbot as ppo
from ballbot_utils import export
from ballbot_utils.console import ProgressLine

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def block(page, first_words, **changes):
    """A page's first block of code after these words, its numbers changed to have less to do."""
    text = (ROOT / page).read_text()
    code = re.search(r"```\w+\n(.*?)```", text[text.index(first_words) :], re.DOTALL)[1]
    for old, new in changes.values():
        assert old in code
        code = code.replace(old, new)
    return code


@pytest.mark.parametrize("page, title", [("README.md", "## Use a policy"), ("docs/deployment.md", "## In Python")])
def test_load_policy(page, title, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block(page, title), names)
    assert names["action"].shape == (3,) and names["env"].unwrapped.metadata["render_fps"] == 125


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the policy.onnx of a random policy, which soon falls, and the output."""
    folder = tmp_path_factory.mktemp("exported")
    make_run(folder / "run", body_frame=True, norm_obs=True, depth_scale=5.0, frame_skip=2)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(export, "print_rank0", said.append)
        export.main(export.Args(folder / "run", folder / "policy.onnx"))
    return folder, said


@pytest.mark.parametrize("flags", [dict(depth_scale=5.0), dict(goal="command", cameras=False)])
def test_what_is_exported_acts_like_the_policy(tmp_path, flags):
    agent = make_run(tmp_path / "run", body_frame=True, norm_obs=True, **flags)
    task = {name: flags[name] for name in flags.keys() - {"depth_scale"}}
    obs, _ = gym.make_vec("Ballbot-v0", num_envs=5, num_threads=1, **task).reset(seed=1)
    with torch.no_grad():
        actions = export.Exported(agent)({key: torch.tensor(value) for key, value in obs.items()})
    np.testing.assert_allclose(actions, ppo.load_policy(tmp_path / "run")(obs), atol=1e-5)


@pytest.mark.slow
def test_onnx_file(exported, monkeypatch):
    folder, (line,) = exported
    assert 0 <= float(line.split()[-1]) <= 1e-5 and sorted(path.name for path in folder.iterdir()) == [
        "policy.onnx", "run"
    ]  # fmt: skip
    monkeypatch.chdir(folder)
    names = {}
    exec(block("docs/deployment.md", "needs no PyTorch:", fewer=("range(1000)", "range(30)")), names)
    session = names["session"]
    assert session.get_modelmeta().custom_metadata_map["actions_per_second"] == "250"
    policy, obs = ppo.load_policy(folder / "run"), names["robot"].observation_space.sample()
    assert {i.name for i in session.get_inputs()} == set(obs)
    for n in (1, 7):  # any batch; any heading and lean, also none
        samples = [names["robot"].observation_space.sample() for _ in range(n)]
        batch = {key: np.stack([sample[key] for sample in samples]) for key in obs}
        batch["orientation"] *= 0.1 * (np.arange(n)[:, None] > 0)
        (actions,) = session.run(None, batch)
        np.testing.assert_allclose(actions, policy(batch), atol=1e-5)


@pytest.mark.slow
def test_onnx_file_of_a_policy_that_follows_commands(tmp_path):
    make_run(tmp_path / "run", goal="command", body_frame=True, norm_obs=True, cameras=False, frame_skip=4)
    export.main(export.Args(tmp_path / "run", tmp_path / "policy.onnx"))  # which plays an episode by it
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    obs = gym.make_vec("Ballbot-v0", num_envs=5, cameras=False, goal="command").reset(seed=1)[0]
    assert {i.name for i in session.get_inputs()} == set(obs)
    np.testing.assert_allclose(session.run(None, obs)[0], ppo.load_policy(tmp_path / "run")(obs), atol=1e-5)


@pytest.mark.slow
def test_export_refuses(exported, tmp_path, monkeypatch):
    run = exported[0] / "run"

    def error(*args):
        with pytest.raises(SystemExit) as raised:
            export.main(export.Args(*args))
        return str(raised.value)

    assert "give a name ending in .onnx" in error(run, tmp_path / "policy.pt")
    assert "exists: give --overwrite" in error(run, exported[0] / "policy.onnx")
    assert "has no best.pt" in error(tmp_path, tmp_path / "policy.onnx")
    monkeypatch.setattr(export, "save", lambda agent, space, metadata, path: path.write_text("half"))
    monkeypatch.setattr(export, "largest_difference", lambda *args: (2e-5, 10))
    assert "actions differ from PyTorch's by 2.0e-05" in error(run, tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_stable_baselines3(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(
        block(
            "docs/libraries.md",
            "## Stable-Baselines3",
            steps=("2048", "32"),
            batch=("256", "32"),
            total=("1_000_000", "32"),
        ),
        names,
    )
    extractors = names["model"].policy.features_extractor.extractors
    for key in ("depth_0", "depth_1"):
        assert type(extractors[key]).__name__ == "NatureCNN"
        assert any(p.grad is not None and p.grad.any() for p in extractors[key].parameters())
    assert (tmp_path / "ballbot_sb3.zip").exists()


def run(command, folder, **environment):
    """The output of a command of bash in a folder; `python` in it is this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = dict(os.environ, PATH=path, PYTHONPATH=str(ROOT), **environment)
    done = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_rl_zoo(tmp_path):
    (tmp_path / "ballbot.yml").write_text(block("docs/libraries.md", "## RL Zoo"))
    command = re.search(r"`(python -m rl_zoo3.train .*?)`", (ROOT / "docs/libraries.md").read_text())[1]
    command += " --hyperparams n_envs:1 n_steps:16 batch_size:16 --n-timesteps 32 --eval-freq -1 --num-threads 1"
    assert re.search(r"total_timesteps *\| 32 ", run(command, tmp_path))
    model = PPO.load(next(tmp_path.glob("logs/ppo/*/Ballbot-v0.zip")))
    assert model.gamma == 0.996 and type(model.policy.features_extractor.extractors["depth_0"]).__name__ == "NatureCNN"


@pytest.mark.slow
def test_cleanrl_wrappers():
    """The wrappers of CleanRL's ppo_continuous_action.py, with what docs/libraries.md changes in that script."""

    def make():
        env = gym.make("ballbot_env:Ballbot-v0", camera_size=16)
        env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.FlattenObservation(env))
        env = gym.wrappers.NormalizeObservation(gym.wrappers.ClipAction(env))
        env = gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), env.observation_space)
        env = gym.wrappers.NormalizeReward(env, gamma=0.99)
        return gym.wrappers.TransformReward(env, lambda reward: np.clip(reward, -10, 10))

    envs = gym.vector.SyncVectorEnv([make, make], autoreset_mode="SameStep")
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (2, 15 + 1 + 2 * 16 * 16)
    lengths = []
    for _ in range(800):
        obs, rewards, *_, infos = envs.step(np.full((2, 3), 5.0))  # beyond the bounds: ClipAction
        assert np.isfinite(obs).all() and np.isfinite(rewards).all()
        if "final_info" in infos:
            episode = infos["final_info"]["episode"]
            lengths += [episode["l"][i] for i in np.flatnonzero(infos["final_info"]["_episode"])]
    assert len(lengths) >= 2 and 30 < min(lengths) <= max(lengths) < 800
    assert all("ClipAction" in str(env) and "NormalizeReward" in str(env) for env in envs.envs)


@pytest.mark.slow
def test_wheel(tmp_path):
    """Installed from a wheel in a fresh environment, it is found from anywhere, with its assets."""
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "ballbot_utils", "assets",
                 *(path.name for path in ROOT.glob("*.py"))):  # fmt: skip
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    subprocess.run([*pip, "--python", venv / "bin" / "python", "install", "--no-deps", wheel], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = (
        "import gymnasium as gym, ppo_ballbot, ppo_ballbot_schedules, ppo_ballbot_gpu\n"
        "import ballbot_env, ballbot_env_warp\n"
        "from ballbot_utils.model import ASSETS\n"
        "env = gym.make('ballbot_env:Ballbot-v0')\n"
        "assert env.reset(seed=1)[0]['depth_0'].shape == (1, 64, 64)\n"
        "from ballbot_utils.checkpoints import load_encoder\n"
        "load_encoder('', ppo_ballbot.Agent(ppo_ballbot.Args()))\n"
        "print(ballbot_env.__file__, ASSETS, sep='\\n')"
    )
    where = dict(cwd=tmp_path, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, text=True)
    done = subprocess.run([venv / "bin" / "python", "-c", code], capture_output=True, **where)
    assert [line for line in done.stderr.splitlines() if not line.startswith("Warp ")] == []  # Warp misses a GPU
    assert all(line.startswith(str(packages)) for line in done.stdout.split()), done.stdout
    assert not (packages / "assets").exists()
    done = subprocess.run([venv / "bin" / "ballbot-evaluate", "--help"], stdout=subprocess.PIPE, **where)
    assert done.stdout.startswith("usage: ballbot-evaluate ")


FLAGS = ("--frame-skip 1 --no-cameras --num-envs 2 --num-steps 32 --minibatch-size 32 --total-timesteps 128 "
         "--final-eval-episodes 1 --run-name run").split()  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("program", [["ppo_ballbot.py", *FLAGS], ["-m", "ballbot_utils.diagnose", "--help"]])
def test_output_closed_early(program, tmp_path):
    """As by `| head`: no traceback."""
    end, start = os.pipe()
    os.close(end)
    program = [str(ROOT / word) if word.endswith(".py") else word for word in program]
    done = subprocess.run([sys.executable, *program], cwd=tmp_path, stdout=start, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    os.close(start)
    assert done.returncode in (1, os.EX_TEMPFAIL) and "Error" not in done.stderr


@pytest.mark.slow
def test_an_output_in_ascii():
    """Every program's --help, and a table, with escapes for letters such as ²."""
    code = (
        "import importlib, sys, tomllib\n"
        "programs = tomllib.load(open('pyproject.toml', 'rb'))['project']['scripts'].items()\n"
        "table = 'benchmark/command__1.pt --episodes 1 --horizon 20 --no-gap'\n"
        "for name, (module, _, function), flags in [\n"
        "    *((name, place.partition(':'), '--help') for name, place in programs),\n"
        "    ('ballbot-evaluate', ('ballbot_utils.evaluate', ':', 'cli'), table),\n"
        "]:\n"
        "    sys.argv = [name, *flags.split()]\n"
        "    try:\n"
        "        getattr(importlib.import_module(module), function)()\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, (name, end)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "100"})  # fmt: skip
    text = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr.decode()
    assert text.count("usage: ") == 14 and "effort (mean ||action||\\xb2)" in text


def test_a_dumb_terminal(monkeypatch):
    """It replaces no line in place."""
    main, terminal = os.openpty()
    with open(main), open(terminal, "w") as stream:
        for name in ("xterm", "dumb"):
            monkeypatch.setenv("TERM", name)
            with contextlib.redirect_stderr(stream):
                assert ProgressLine().is_terminal == (name == "xterm")
            with contextlib.redirect_stderr(None):
                assert not ProgressLine().is_terminal
    sources = [*ROOT.glob("*.py"), *ROOT.glob("ballbot_utils/*.py")]
    assert [source.name for source in sources if "isatty()" in source.read_text()] == ["console.py"]


def test_help_names_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "ballbot_utils" / "export.py"), "--help"])
    export.cli()
    assert capsys.readouterr().out.startswith("usage: python -m ballbot_utils.export ")


SHORT = ("--no-cameras --frame-skip 1 --num-envs 1 --num-steps 16 --minibatch-size 16 --total-timesteps 32 "
         "--eval-interval 16 --eval-episodes 1 --final-eval-episodes 1 --run-name run")  # fmt: skip


def error_without(module, flags, folder, monkeypatch):
    """What the script says to these flags where a module is missing. It leaves nothing behind."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ppo_ballbot.py", *SHORT.split(), *flags.split()])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as error:
        ppo.train(ppo.parse_args())
    assert not list(folder.iterdir())
    return str(error.value)


def test_track_needs_wandb(tmp_path, monkeypatch):
    error = error_without("wandb", "--track", tmp_path, monkeypatch)
    assert "--track needs Weights & Biases: pip install wandb" in error


@pytest.mark.slow
def test_track(tmp_path):
    """A real run of Weights & Biases, which keeps it on the disk."""
    command = f"python {ROOT / 'ppo_ballbot.py'} {SHORT} --track --wandb-project-name mine --wandb-entity us"
    run(command, tmp_path, WANDB_MODE="offline")
    (log,) = tmp_path.glob("runs/run/wandb/offline-run-*/run-run.wandb")
    for name in (b"mine", b"us", b"minibatch_size", b"eval/episodic_return", b"losses/policy_loss"):
        assert name in log.read_bytes(), name


def test_capture_video_needs_opengl(tmp_path, monkeypatch):
    def none(*args):
        raise RuntimeError("no OpenGL")

    monkeypatch.setattr(mujoco, "Renderer", none)
    monkeypatch.setenv("MUJOCO_GL", "here")
    error = error_without("no_module", "--capture-video", tmp_path, monkeypatch)
    assert "--capture-video: pictures need OpenGL, training does not" in error


@pytest.mark.slow
def test_capture_video(tmp_path, opengl):
    """A real video of each evaluation."""
    run(f"python {ROOT / 'ppo_ballbot.py'} {SHORT} --capture-video", tmp_path)
    videos = sorted(tmp_path.glob("runs/run/videos/*"))
    assert [video.name for video in videos] == ["16-episode-0.mp4", "32-episode-0.mp4"]
    for video in videos:
        with imageio.get_reader(video) as reader:
            first, fifth = reader.get_data(0), reader.get_data(4)
        assert first.std() > 10 and (first != fifth).any()


def commands():
    """(script or program, its flags) of each command in a block of code, or between backticks, of the documentation."""
    program = re.compile(
        r"(?:\w+=\S+ )?(?:(?:python|torchrun)\s.*?)?(?:(ppo_ballbot\w*)\.py|-m (ballbot_utils\.\w+))(?:\s+(.*)|$)"
    )
    found = {}
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "benchmark" / "README.md"):
        text = re.sub(r"<[^>]*>", "NAME", page.read_text()).replace("SEED", "1").replace("my_ppo.py", "ppo_ballbot.py")
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        code = re.sub(r"\\\n|\s#.*", " ", "\n".join(blocks)).splitlines()
        code += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for command in re.split("&&|;|\0", "\0".join(code)):
            match = program.match(" ".join(command.split()))
            if match and match[3]:  # without flags it is only a name
                found[match[1] or match[2], match[3]] = None
    return list(found)


class Parsed(BaseException):
    pass


@pytest.mark.parametrize("program, flags", commands())
def test_a_command_of_the_documentation_parses(program, flags, tmp_path, monkeypatch):
    """By the program's own parser, which a command of `tune` has twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "NAME").mkdir(parents=True)
    (tmp_path / "runs" / "NAME" / "config.json").write_text("{}")
    own, _, rest = flags.partition(" -- ")
    for module, words in ((program, own), ("ppo_ballbot", rest)):
        module = importlib.import_module(module)
        module = importlib.import_module(f"{module.__name__}.__main__") if hasattr(module, "__path__") else module
        monkeypatch.setattr(sys, "argv", [module.__file__, *words.split()])
        if hasattr(module, "parse_args"):
            "--help" in words or module.parse_args()
            continue
        with monkeypatch.context() as patch:
            parse = tyro.cli
            patch.setattr(tyro, "cli", lambda *args, **kwargs: raise_(Parsed(parse(*args, **kwargs))))  # noqa: B023
            with pytest.raises(Parsed):
                module.cli()


def raise_(error):
    raise error


def test_commands_of_the_documentation_are_found():
    programs = {program for program, _ in commands()}
    assert len(commands()) > 30 and {"ppo_ballbot", "ppo_ballbot_schedules", "ballbot_utils.tune"} <= programs
    assert ("ppo_ballbot", "--preset tuned --num-processes 4") in commands()


def test_requirements_of_the_documentation_exist():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*.py"), *ROOT.glob("ballbot_utils/**/*.py")]
    names = {name for page in pages for name in re.findall(r"requirements[\w-]*\.txt", page.read_text())}
    assert len(names) >= 6 and [name for name in names if not (ROOT / name).exists()] == []


def test_ci_runs_the_command_of_the_readme():
    *_, command = (ROOT / ".ci" / "run").read_text().splitlines()
    assert f"pip install -r requirements-dev.txt && {command}\n" in README
