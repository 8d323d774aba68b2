"""What the README says on using policies and the environment elsewhere is run from its text; so is an installation."""

import importlib.machinery
import os
import re
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch
from test_policy import make_run

import ballbot_runs
import ppo_ballbot as ppo
from ballbot_utils import common, export

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def block(first_words, **changes):
    """The README's first block of code after these words, its numbers changed to have less to do."""
    code = re.search(r"```\w+\n(.*?)```", README[README.index(first_words) :], re.DOTALL)[1]
    for old, new in changes.values():
        assert old in code
        code = code.replace(old, new)
    return code


def test_load_policy(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block("## Use a policy"), names)
    assert names["action"].shape == (3,) and names["env"].unwrapped.metadata["render_fps"] == 125


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a policy.onnx of an untrained policy, which soon falls, and what was said."""
    folder = tmp_path_factory.mktemp("exported")
    make_run(folder / "run", body_frame=True, norm_obs=True, depth_scale=5.0, frame_skip=2)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(export, "print", said.append, raising=False)
        export.main(export.Args(folder / "run", folder / "policy.onnx"))
    return folder, said


def test_onnx_file(exported, monkeypatch):
    folder, (line,) = exported
    assert 0 <= float(line.split()[-1]) <= 1e-5 and sorted(path.name for path in folder.iterdir()) == [
        "policy.onnx", "run"
    ]  # fmt: skip
    monkeypatch.chdir(folder)
    names = {}
    exec(block("The policy needs no PyTorch then", fewer=("range(1000)", "range(30)")), names)
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


def test_onnx_file_of_a_policy_that_follows_commands(tmp_path):
    make_run(tmp_path / "run", goal="command", body_frame=True, norm_obs=True, cameras=False, frame_skip=4)
    export.main(export.Args(tmp_path / "run", tmp_path / "policy.onnx"))  # which plays an episode by it
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    obs = gym.make_vec("Ballbot-v0", num_envs=5, cameras=False, goal="command").reset(seed=1)[0]
    assert {i.name for i in session.get_inputs()} == set(obs)
    np.testing.assert_allclose(session.run(None, obs)[0], ppo.load_policy(tmp_path / "run")(obs), atol=1e-5)


def test_export_refuses(exported, tmp_path, monkeypatch):
    run = exported[0] / "run"

    def error(*args):
        with pytest.raises(SystemExit) as raised:
            export.main(export.Args(*args))
        return str(raised.value)

    assert "give one ending in .onnx" in error(run, tmp_path / "policy.pt")
    assert "exists: give --overwrite" in error(run, exported[0] / "policy.onnx")
    assert "has no best.pt" in error(tmp_path, tmp_path / "policy.onnx")
    monkeypatch.setattr(export, "save", lambda agent, space, metadata, path: path.write_text("half"))
    monkeypatch.setattr(export, "largest_difference", lambda *args: (2e-5, 10))
    assert "actions differ from PyTorch's by 2.0e-05" in error(run, tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


def test_stable_baselines3(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("**Stable-Baselines3.**", steps=("2048", "32"), batch=("256", "32"), total=("1_000_000", "32")), names)
    extractors = names["model"].policy.features_extractor.extractors
    for key in ("depth_0", "depth_1"):
        assert type(extractors[key]).__name__ == "NatureCNN"
        assert any(p.grad is not None and p.grad.any() for p in extractors[key].parameters())
    assert (tmp_path / "ballbot_sb3.zip").exists()


def test_rl_zoo():
    """Its file, as rl_zoo3 reads it: what it does not know goes to the algorithm."""
    import yaml
    from stable_baselines3 import PPO

    settings = yaml.safe_load(block("**RL Zoo**"))["Ballbot-v0"]
    settings["policy_kwargs"] = eval(settings["policy_kwargs"])
    assert settings.pop("n_timesteps") == 1e6 and settings.pop("n_envs") == 4
    model = PPO(env=gym.make("ballbot_env:Ballbot-v0", frame_skip=4), **settings | {"n_steps": 16, "batch_size": 16})
    model.learn(16)
    assert type(model.policy.features_extractor.extractors["depth_0"]).__name__ == "NatureCNN"


def test_cleanrl(tmp_path):
    """CleanRL's wrappers and its reading of ended episodes, in a script with the lines that are changed."""
    *change, train = block("**CleanRL.**").splitlines()
    script = tmp_path / "ppo_continuous_action.py"
    script.write_text("""
import gymnasium as gym, numpy as np
def thunk(name):
    env = gym.wrappers.FlattenObservation(gym.make(name))
    env = gym.wrappers.NormalizeObservation(gym.wrappers.ClipAction(gym.wrappers.RecordEpisodeStatistics(env)))
    env = gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10))
    return gym.wrappers.NormalizeReward(env)
def run(args, lengths):
    envs = gym.vector.SyncVectorEnv(
        [lambda: thunk(args.env_id) for i in range(args.num_envs)]
    )
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (2, 8208)
    while not lengths:
            obs, _, _, _, infos = envs.step(np.zeros((2, 3), np.float32))

            if "final_info" in infos:
                for info in infos["final_info"]:
                    if info and "episode" in info:
                        lengths.append(info["episode"]["l"])
""")
    subprocess.run(["bash", "-c", "\n".join(change)], cwd=tmp_path, check=True)
    names, lengths = {}, []
    exec(script.read_text(), names)
    name = train.split()[train.split().index("--env-id") + 1]
    names["run"](types.SimpleNamespace(env_id=name, num_envs=2), lengths)
    assert 100 < min(lengths) <= max(lengths) < 4000


def test_wheel(tmp_path):
    """Installed from a wheel in a fresh environment, it is found from anywhere, with its assets."""
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "ballbot_env.py", "ballbot_runs.py",
                 "ppo_ballbot.py", "ppo_ballbot_schedules.py", "ballbot_utils", "assets"):  # fmt: skip
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    subprocess.run([*pip, "--python", venv / "bin" / "python", "install", "--no-deps", wheel], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = (
        "import gymnasium as gym, ppo_ballbot, ballbot_env\n"
        "from ballbot_utils.model import ASSETS\n"
        "env = gym.make('ballbot_env:Ballbot-v0')\n"
        "assert env.reset(seed=1)[0]['depth_0'].shape == (1, 64, 64)\n"
        "path = ASSETS.parent / ppo_ballbot.Args.encoder_path\n"
        "ppo_ballbot.ballbot_runs.load_encoder(path, ppo_ballbot.DepthEncoder())\n"
        "print(ballbot_env.__file__, ASSETS, sep='\\n')"
    )
    where = dict(cwd=tmp_path, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, text=True)
    done = subprocess.run([venv / "bin" / "python", "-c", code], capture_output=True, **where)
    assert not done.stderr
    assert all(line.startswith(str(packages)) for line in done.stdout.split()), done.stdout
    assert not (packages / "assets").exists()
    done = subprocess.run([venv / "bin" / "ballbot-evaluate", "--help"], stdout=subprocess.PIPE, **where)
    assert done.stdout.startswith("usage: ballbot-evaluate ")


FLAGS = ("--frame-skip 1 --no-cameras --num-envs 2 --num-steps 32 --minibatch-size 32 --total-timesteps 128 "
         "--final-eval-episodes 1 --run-name run").split()  # fmt: skip


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


def test_an_output_in_ascii():
    """Every program's --help, and a table, with codes in place of letters such as ²."""
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
    assert text.count("usage: ") == 12 and "effort (mean ||action||\\xb2)" in text


def test_a_dumb_terminal(monkeypatch):
    """It replaces no line in place."""
    main, terminal = os.openpty()
    with open(main), open(terminal, "w") as stream:
        for name in ("xterm", "dumb"):
            monkeypatch.setenv("TERM", name)
            assert ballbot_runs.is_terminal(stream) == (name == "xterm")
            assert not ballbot_runs.is_terminal(None)
    sources = [*ROOT.glob("*.py"), *ROOT.glob("ballbot_utils/*.py")]
    assert [source.name for source in sources if "isatty()" in source.read_text()] == ["ballbot_runs.py"]


def test_help_names_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "ballbot_utils" / "export.py"), "--help"])
    with pytest.raises(SystemExit):
        export.cli()
    assert capsys.readouterr().out.startswith("usage: python -m ballbot_utils.export ")


def test_track(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ppo.Args(run_name="run", track=True, wandb_entity="us", cameras=False, frame_skip=1, num_envs=1,
                    num_steps=16, minibatch_size=16, total_timesteps=16, final_eval_episodes=1)  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="--track needs Weights & Biases: pip install wandb"):
        ppo.train(args)
    assert not list(tmp_path.iterdir())
    calls, wandb = [], types.ModuleType("wandb")
    wandb.init, wandb.finish = lambda **kwargs: calls.append(kwargs), lambda: calls.append("finish")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    ppo.train(args)
    init, finish = calls
    assert (init["project"], init["entity"], init["id"], finish) == ("ballbot", "us", "run", "finish")
    assert init["sync_tensorboard"] and init["config"]["num_steps"] == 16


def test_capture_video(tmp_path, monkeypatch):
    from ballbot_utils import watch

    monkeypatch.chdir(tmp_path)
    args = ppo.Args(run_name="run", capture_video=True, cameras=False, frame_skip=1, num_envs=1, num_steps=16,
                    minibatch_size=16, total_timesteps=32, eval_interval=16, eval_episodes=1,
                    final_eval_episodes=1)  # fmt: skip

    def none(*args):
        raise RuntimeError("no OpenGL")

    monkeypatch.setenv("MUJOCO_GL", "here")
    monkeypatch.setattr(watch.mujoco, "Renderer", none)
    with pytest.raises(SystemExit, match="--capture-video needs OpenGL, which does not start"):
        ppo.train(args)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(watch, "check_video", lambda path, flag: None)
    films = []
    monkeypatch.setattr(watch, "video", lambda policy, flags, task: films.append((flags.video, task["terrain_seed"])))
    ppo.train(args)
    assert films == [(Path(f"runs/run/videos/{steps}.mp4"), 1_000_000) for steps in (16, 32)]
    assert common.Conditions.seed == 1_000_000 and torch.get_num_threads() == 1
