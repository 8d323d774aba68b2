"""The search space: parse --space, reject values that the script rejects, and list its combinations."""

import contextlib
import io
import itertools
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ballbot_utils.checkpoints import import_script
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.flags import ineffective_flags, validate_args

# The guide's typical ranges. It gives two for the clip range, 0.01 to 0.05 and 0.1 to 0.3, and single values for some
# flags; num_envs 8 and 16 are ours, between its 4, 10 and 32. Its n_steps are physics steps, ours actions of four.
SPACE = (
    "learning-rate=1e-5:1e-3:log", "clip-coef=0.01:0.3:log", "num-steps=128,256,512,1024", "update-epochs=3:10",
    "minibatch-size=64,128,256,512", "ent-coef=0.0001:0.01:log", "vf-coef=0.5:2", "norm-adv=false,true",
    "hidden-size=64,128,256,512", "weight-decay=0:0.1", "num-envs=4,8,10,16,32",
)  # fmt: skip
SIZES = ("num_steps", "num_envs", "minibatch_size")  # only combinations that divide
# Where a run lies, how long it is and how it is evaluated is the same in all trials.
NOT_TUNED = ("exp_name run_name preset config resume seed total_timesteps terrain eval_terrain_seed wheel_damping "
             "randomization env_kwargs reward eval_interval eval_episodes final_eval_episodes").split()  # fmt: skip
MAX_COMBINATIONS = 10_000  # above this, a combination may repeat

Spec = tuple | list  # (low, high, log) or a list of choices


@dataclass
class Space:
    """What trials vary, and every flag that they share."""

    base: dict[str, Any]  # every flag of the script
    specs: dict[str, Spec]  # of each parameter
    options: dict[str, dict[str, dict]] = field(default_factory=dict)  # of labels: {parameter: {label: {flag: value}}}

    def settings(self, params: dict[str, Any]) -> dict[str, Any]:
        """Every flag of a trial with these parameters."""
        chosen = {}
        for name, value in params.items():
            chosen |= self.options[name][value] if name in self.options else {name.replace("-", "_"): value}
        return self.base | chosen

    def parameters(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The parameters of a trial with these flags, unless they lie outside the space."""
        params = {}
        for name, spec in self.specs.items():
            value = settings.get(name.replace("-", "_"))
            if name in self.options:
                value = next((key for key, flags in self.options[name].items() if settings | flags == settings), None)
            if spec[0] <= value <= spec[1] if isinstance(spec, tuple) else value in spec:
                params[name] = value
        return params

    def combinations(self) -> list[dict[str, Any]] | None:
        """All combinations; None if there are more than MAX_COMBINATIONS, or a range that is not of linear integers."""
        lists = []
        for spec in self.specs.values():
            if isinstance(spec, tuple) and (isinstance(spec[0], float) or spec[2]):
                return None
            lists.append(range(spec[0], spec[1] + 1) if isinstance(spec, tuple) else spec)
        if math.prod(map(len, lists)) <= MAX_COMBINATIONS:
            return [dict(zip(self.specs, values)) for values in itertools.product(*lists)]


def load_script(script: Path, flags: list[str]) -> tuple[ModuleType, dict[str, Any]]:
    """The script's module, and every flag as its own parser reads the words after `--`."""
    check_argument(script.is_file() and script.suffix == ".py", f"--script {script} does not exist, or is no .py file")
    argv, output = sys.argv, io.StringIO()
    try:
        module = import_script(script)
    except ValueError as error:
        exit_with_error(f"--script {error}")
    sys.argv = [str(script), *flags]
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            settings = asdict(module.parse_args())
    except SystemExit as error:
        text = error.code if isinstance(error.code, str) else re.sub(r"[^ -~]+|-{3,}", " ", output.getvalue())
        exit_with_error(f"{script.name} rejects the flags after --: {' '.join(text.removeprefix('error: ').split())}")
    finally:
        sys.argv = argv
    named = settings["resume"] or settings["run_name"]
    check_argument(not named, "trials have their own run names: give no --run-name or --resume after --")
    return module, settings


def find_error(module: ModuleType, settings: dict[str, Any]) -> str | None:
    """Why the script would not run with these flags, or None."""
    try:
        check = getattr(module, "check", validate_args)  # a script may have its own
        check(module.Args(**settings), settings["num_processes"])
    except SystemExit as error:
        return str(error.code).removeprefix("error: ")


def parse_value(word: str, kind: type, text: str) -> bool | int | float | str:
    """A value in --space `text`, of the flag's type."""
    try:
        value = {"true": True, "false": False}[word.strip()] if kind is bool else kind(word.strip())
    except (ValueError, KeyError):
        names = {bool: "neither true nor false", int: "no whole number", float: "no number", dict: "no value to try"}
        exit_with_error(f"--space {text}: {word.strip()!r} is {names[kind]}")
    check_argument(kind is str or math.isfinite(value), f"--space {text}: {word} is not finite")
    return value


def parse_space(texts: Iterable[str], module: ModuleType) -> dict[str, Spec]:
    """Texts `name=low:high[:log]`, `name=a,b` or `name=value` to {name: (low, high, log) or list of values}.

    Names joined by + share their value. Exits with a one-line error on a bad text.
    """
    default, space, seen = asdict(module.Args()), {}, set()
    for text in texts:
        key, _, values = text.partition("=")
        names = key.replace("-", "_").split("+")
        for name in names:
            flag = name.replace("_", "-")
            check_argument(name in default, f"--space {text}: {Path(module.__file__).name} has no flag --{flag}")
            check_argument(name not in NOT_TUNED, f"--space {text}: not for tuning; give it after --, for all trials")
            check_argument(name not in seen, f"--space {text}: {flag} is given twice")
            seen.add(name)
        check_argument(
            values.strip(), f"--space {text}: give name=low:high, name=low:high:log, name=a,b,c or name=value"
        )
        kind = type(default[names[0]])
        if ":" in values and kind in (int, float):
            words = values.split(":")
            log = words[2:] == ["log"]
            check_argument(len(words) == 2 or log, f"--space {text}: a range is low:high or low:high:log")
            low, high = (parse_value(word, kind, text) for word in words[:2])
            check_argument(low < high, f"--space {text}: the range is empty")
            check_argument(low > 0 or not log, f"--space {text}: a logarithmic range starts above 0")
            spec = (low, high, log)
            if names[0] in SIZES:  # doubled from the low end: other sizes would hardly divide
                check_argument(low > 0, f"--space {text}: give sizes of 1 or more")
                spec = [low * 2**i for i in range(int(math.log2(high / low)) + 1)]
        else:
            spec = list(dict.fromkeys(parse_value(word, kind, text) for word in values.split(",")))
        space["+".join(names)] = spec
    return space


def ends(spec: Spec) -> Spec:
    """The values of a spec to check: all choices, or both ends of a range."""
    return spec[:2] if isinstance(spec, tuple) else spec


def fixed_values(specs: dict[str, Spec]) -> dict[str, Any]:
    """The flags that have a single value."""
    return {name: spec[0] for key, spec in specs.items() if len(spec) == 1 for name in key.split("+")}


def build_space(specs: dict[str, Spec], module: ModuleType, base: dict[str, Any]) -> Space:
    """The space of what varies, on top of the flags `base`; exits with a one-line error on a value the script rejects.

    If not all combinations of sizes divide, the sizes become one parameter whose choices are those combinations.
    """
    all_specs, sizes = specs, {name: specs[name] for name in SIZES if name in specs}
    base = base | fixed_values(specs)
    combinations = [dict(zip(sizes, values)) for values in itertools.product(*sizes.values())]
    errors = [find_error(module, base | sizes_tried) for sizes_tried in combinations]
    good = [sizes_tried for sizes_tried, error in zip(combinations, errors) if not error]
    check_argument(good, f"--space leaves no possible trial: {errors[-1]}")
    checked = base | good[0]
    base |= good[0] if len(good) == 1 else {}
    specs = {key: spec for key, spec in specs.items() if key not in sizes}
    for key, spec in specs.items():
        for value in ends(spec):
            error = find_error(module, checked | dict.fromkeys(key.split("+"), value))
            check_argument(not error, f"--space {key.replace('_', '-')}: {error}")
    if not hasattr(module, "check"):  # a flag without effect; another parameter may give it one
        tried = [checked, *(checked | dict.fromkeys(key.split("+"), value) for key, spec in all_specs.items()
                         for value in ends(spec))]  # fmt: skip
        useless = [ineffective_flags(module.Args(**settings)) for settings in tried]
        for name in (name for key in all_specs for name in key.split("+")):
            check_argument(not all(name in reasons for reasons in useless),
                 f"--space {name.replace('_', '-')} has no effect {useless[0].get(name)}")  # fmt: skip
    varied = {key.replace("_", "-"): spec for key, spec in specs.items() if len(spec) > 1}
    options = {key: {str(value): dict.fromkeys(key.replace("-", "_").split("+"), value) for value in spec}
               for key, spec in varied.items() if "+" in key}  # fmt: skip
    several = {name: values for name, values in sizes.items() if len(values) > 1}
    if len(good) == len(combinations):
        varied |= {name.replace("_", "-"): values for name, values in several.items()}
    elif len(good) > 1:
        key = ", ".join(several).replace("_", "-")
        options[key] = {", ".join(str(chosen[name]) for name in several): chosen for chosen in good}
        print(f"{key}: the {len(good)} combinations that divide are one parameter")
    check_argument(varied or options, "--space has nothing that varies: give a range or several values")
    return Space(base, varied | {key: list(labels) for key, labels in options.items()}, options)


def on_grid(specs: dict[str, Spec], points: int) -> dict[str, list]:
    """The specs with `points` values for each range."""

    def values(low, high, log):
        even = (np.geomspace if log else np.linspace)(low, high, points)
        integer = isinstance(low, int)
        return list(dict.fromkeys(even.round().astype(int).tolist() if integer else (float(f"{x:.3g}") for x in even)))

    return {key: values(*spec) if isinstance(spec, tuple) else spec for key, spec in specs.items()}
