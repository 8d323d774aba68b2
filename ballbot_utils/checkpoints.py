"""Checkpoints: files of `torch.save` that hold plain data. No code in a file is ever run.

A checkpoint names the script that trained it, and the SHA-256 of that script's text. Programs take three classes from
the script of that name in the working directory:

- `Args`, a dataclass: the flags. It derives from `flags.BaseArgs` unless it has all flags of ppo_ballbot.py.
- `Agent(args)`, a module: the networks. The export to ONNX calls `mean_action(obs)`, from a dict of tensors (n, ...)
  to actions (n, 3) in [-1, 1], unless the agent has the parts of ppo_ballbot.py's.
- `Policy(agent, args)`: a function, with its arguments as attributes. `policy(obs, deterministic, generators)` returns
  actions (n, 3), a float32 array in [-1, 1].
"""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import io
import os
import re
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ballbot_utils.console import exit_with_error, print_rank0
from ballbot_utils.flags import validate_types
from ballbot_utils.model import ASSETS

# Flags that a policy needs to run in the environment it was trained for. A checkpoint without other flags is accepted
REQUIRED_FLAGS = ("cameras", "hidden_size", "pi_layers", "vf_layers", "terrain", "terrain_seed", "eval_terrain_seed",
                  "wheel_damping", "frame_skip")  # fmt: skip
FORMER_VALUES = {"small_encoder": False}  # of flags that older checkpoints do not name
REMOVED_BUFFERS = {"value_moments", "value_count", "value_mean", "value_std"}  # of critics in earlier versions
INSTALLED_SCRIPTS = ("ppo_ballbot.py", "ppo_ballbot_schedules.py", "ppo_ballbot_gpu.py")


def save_checkpoint(path: Path, content: Any) -> None:
    """Replace a checkpoint in one step. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, buffer.getvalue())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step: a crash or a full disk leaves the previous one. Raises OSError."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint. Raises ValueError if the file is damaged, or OSError if it cannot be read.

    The file is a ZIP archive with a CRC-32 of each record. PyTorch does not check these: it gets a copy of what
    `zipfile` has checked.
    """
    if not path.is_file():  # reading a pipe may never end
        raise ValueError("is missing" if not path.exists() else "is no file")
    try:
        checked = io.BytesIO()
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:  # unpacked, it could fill the memory
                    raise ValueError
                copy.writestr(record.filename, archive.read(record))
        checked.seek(0)
        return torch.load(checked, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # many kinds
        raise ValueError("is damaged, or not a checkpoint, or contains code, which is never run") from None


def build_agent(content: dict, module: ModuleType) -> tuple[nn.Module, Any]:
    """The Agent with its weights, and the Args, of a checkpoint by a script's classes; ValueError if they mismatch."""
    settings = content["args"]
    known = vars(module.Args())
    missing = [name for name in REQUIRED_FLAGS if name in known and name not in settings]
    if missing:
        raise ValueError(f"has no {', '.join(missing)} in its args: it was trained by an incompatible version")
    settings = FORMER_VALUES | settings
    args = validate_types({name: value for name, value in settings.items() if name in known}, module.Args)
    try:
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            agent = module.Agent(args)
        removed = REMOVED_BUFFERS - agent.state_dict().keys()
        model = {name: value for name, value in content["model"].items() if name not in removed}
        agent.load_state_dict(model, assign=True)
        agent = module.Agent(args).float()  # whatever the default is
        agent.load_state_dict(model)
    except RuntimeError as error:
        raise ValueError(f"does not fit its flags: {str(error).splitlines()[-1].strip()}") from None
    return agent, args


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the state of an optimizer; raises an error if it does not fit the parameters or the settings."""
    saved, own = ([group | {"lr": 0.0} for group in each["param_groups"]] for each in (state, optimizer.state_dict()))
    if saved != own or not all(isinstance(group["lr"], float) for group in state["param_groups"]):
        raise ValueError("its optimizer has other settings")
    if len({tuple(moments) for moments in state["state"].values()}) > 1:
        raise ValueError("its optimizer's state is incomplete")
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():  # a copy has the right shape, type and strides
            moments[name] = torch.zeros_like(parameter.sum() if name == "step" else parameter).copy_(value)


def load_policy(path: Path, script: Path | None = None, module: ModuleType | None = None) -> tuple[Any, dict]:
    """The Policy in a checkpoint, or in the best.pt of a run's folder, and the checkpoint's content.

    Exits with one line if there is no policy. Classes come from the file `script`, from `module` if it is the script
    that trained the policy, or else from the script that the checkpoint names.
    """
    if path.is_dir():
        hint = "name its last.pt" if (path / "last.pt").exists() else "give a .pt file or runs/<run name>"
        path = path / "best.pt"
        if not path.exists():
            exit_with_error(f"{path.parent} has no best.pt (no evaluation yet?): {hint}")
    try:
        content = read_checkpoint(path)
        module = find_module(content, path, script, module)
        return module.Policy(*build_agent(content, module)), content
    except (ValueError, OSError) as error:
        problem = getattr(error, "strerror", None) or error
    except (KeyError, TypeError, AttributeError, IndexError):
        problem = "has no policy of this program"
    exit_with_error(f"{path} {problem}")


def load_encoder(encoder_path: str, agent: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the pretrained depth encoder by their names in `agent`, or exit with one line.

    Without a path they come from the file in assets/ for the encoder of `agent`.
    """
    path = ASSETS.parent / encoder_path if encoder_path else ASSETS / agent.encoder.pretrained
    try:
        weights = read_checkpoint(path)["encoder"]
        agent.encoder.load_state_dict(weights)  # checks names and shapes
        return {f"encoder.{name}": value for name, value in weights.items()}
    except (ValueError, OSError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        other = "is not a depth encoder for images of this size and this --[no-]small-encoder"
        problem = error if isinstance(error, ValueError) else other
    exit_with_error(f"{path} {problem}: restore it, create it by python -m ballbot_utils.pretrain_encoder, or train "
                    "one with --no-freeze-encoder")  # fmt: skip


# Scripts


@functools.cache
def describe_script(cls: type) -> dict[str, str]:
    """What a checkpoint says about the script that defines the Args `cls`, at the first call."""
    try:
        path = Path(inspect.getfile(cls))
        return {"script": path.name, "script_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except (OSError, TypeError):  # not defined in a file
        return {"script": "", "script_sha256": ""}


def find_script(name: Any) -> Path | None:
    """The file of a script that a checkpoint names: in the working directory, or installed with this program.

    A checkpoint can hold any name: no name leads out of the working directory, also not through a link.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+\.py", name):
        return None
    path = Path(name).resolve()
    if path.is_file() and path.is_relative_to(Path.cwd().resolve()):
        return path
    spec = importlib.util.find_spec(name[:-3]) if name in INSTALLED_SCRIPTS else None
    return Path(spec.origin) if spec else None


def import_script(path: Path) -> ModuleType:
    """The module of a script that defines Args, Agent and Policy; raises ValueError if it cannot be imported."""
    path = path.resolve()
    modules = (m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get("__file__") == str(path))
    module = next(modules, None)
    if module is None:
        name = f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"  # two files may have the same stem
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))  # for modules beside it
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise ValueError(f"needs {path}, which cannot be imported: {type(error).__name__}: {error}") from None
    missing = [name for name in ("Args", "Agent", "Policy") if not hasattr(module, name)]
    if missing:
        raise ValueError(f"needs a script with {' and '.join(missing)}, which {path} lacks")
    return module


def find_module(content: dict, path: Path, script: Path | None, module: ModuleType | None = None) -> ModuleType:
    """The module with the classes of the checkpoint `content`, read from `path`. See `load_policy`.

    Prints a warning if the text of the script has changed since the training.
    """
    own = describe_script(module.Args)["script"] if module else "ppo_ballbot.py"
    name = content.get("script", own)  # older checkpoints name no script
    if script or not module or name != own:
        found = script or find_script(name)
        if not found:
            raise ValueError(f"was trained by {name!r:.80}, which is no script in the working directory: put it there, "
                             "or give --script")  # fmt: skip
        module = import_script(found)
    now = describe_script(module.Args)
    if content.get("script_sha256", now["script_sha256"]) != now["script_sha256"]:
        changed = f"{now['script']} has changed since it trained"
        what = changed if name == now["script"] else f"{now['script']} did not train"
        print_rank0(f"warning: {what} {path}", file=sys.stderr)
    return module
