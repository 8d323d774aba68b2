"""How ranks end, and a run on two machines: network namespaces with an address each, connected by a cable."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "ppo_ballbot.py"
FLAGS = (
    "--frame-skip 1 --num-envs 4 --num-steps 64 --minibatch-size 64 --total-timesteps 512 --eval-interval 256 "
    "--eval-episodes 3 --final-eval-episodes 3 --norm-obs --norm-adv --run-name run"
).split()


pytestmark = pytest.mark.slow

# Python's finalization aborts this program always; one with a gloo thread that waits for the GIL, sometimes
PROGRAM = """
import os, sys
sys.path.insert(0, {folder!r})
from ballbot_utils import console, distributed, runs
class Aborts:
    def __del__(self):
        os.abort()
class Args:
    resume, run_name, num_processes, cuda = "", "run", 2, False
def train(args, started=None):
    if "RANK" not in os.environ:
        return distributed.spawn_ranks(train, args, 0.0)
    distributed.init_distributed(args.num_processes, args.cuda)
    global aborts
    aborts = Aborts()
    sys.stdout.write("rank " + os.environ["RANK"] + " is done\\n")
    {end}
if __name__ == "__main__":
    runs.run_training(Args, train)
"""
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 --monitor-interval 0.1".split()


@pytest.mark.parametrize("launcher, end, code", [(TORCHRUN, "pass", 0), ([], "pass", 0),
                                                 (TORCHRUN, "console.exit_with_error('it is wrong')", 1)])  # fmt: skip
def test_a_rank_ends_with_its_code_and_all_output(launcher, end, code, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.format(folder=str(SCRIPT.parent), end=end))
    output = subprocess.run(
        [sys.executable, *launcher, "program.py"], cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert output.returncode == code, output.stderr
    assert sorted(output.stdout.splitlines()) == ["rank 0 is done", "rank 1 is done"]
    assert "SIGABRT" not in output.stderr and output.stderr.count("error: it is wrong") == code
    assert output.stderr == "" or code  # torchrun adds lines of its own to failures


MEANS = """
import sys
sys.path.insert(0, {folder!r})
import torch
from ballbot_utils import distributed
distributed.init_distributed(2, cuda=False)
memory, rank = distributed.shared_memory, distributed.rank()
torch.manual_seed(rank)
for number in range(300):  # ranks of different speeds
    tensor = torch.randn(7, 1 + number)
    shared, expected = tensor.clone(), tensor.clone()
    distributed.all_reduce_mean(shared)
    if number % 7 == 3 * rank:
        torch.randn(1000, 1000).sum()
    distributed.shared_memory = None
    distributed.all_reduce_mean(expected)
    distributed.shared_memory = memory
    assert torch.equal(shared, expected) and not torch.equal(shared, tensor), number
print("shared" if memory else "not shared")
"""


def test_means_in_shared_memory_are_those_of_gloo(tmp_path):
    (tmp_path / "program.py").write_text(MEANS.format(folder=str(SCRIPT.parent)))
    output = subprocess.run([sys.executable, *TORCHRUN, "program.py"], cwd=tmp_path, capture_output=True, text=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=120)  # fmt: skip
    assert output.stdout.count("shared") == 2 and "not" not in output.stdout, output.stderr


def ip(arguments):
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@pytest.fixture
def machines():
    """Names of two namespaces; their network devices have the same names, their addresses are 10.13.77.1 and .2."""
    names = [f"ballbot{uuid.uuid4().hex[:6]}{k}" for k in range(2)]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}")
        for k, name in enumerate(names):
            ip(f"-n {name} addr add 10.13.77.{k + 1}/24 dev {name}")
            ip(f"-n {name} link set {name} up")
            ip(f"-n {name} link set lo up")
        yield names
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root and network namespaces")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_learn_what_one_does(machines, tmp_path):
    subprocess.run(
        [sys.executable, SCRIPT, *FLAGS, "--num-processes", "2"], cwd=tmp_path, check=True, capture_output=True
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--master-addr", "10.13.77.1"]
    processes = []
    for k, name in enumerate(machines):
        folder = tmp_path / name
        folder.mkdir()
        command = ["ip", "netns", "exec", name, *torchrun, "--node-rank", str(k), SCRIPT, *FLAGS]
        environment = dict(os.environ, GLOO_SOCKET_IFNAME=name)
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE))
    for process in processes:
        error = process.communicate(timeout=120)[1].decode()
        assert process.returncode == 0, error
    one, two = (
        torch.load(folder / "runs" / "run" / "last.pt", weights_only=True)["model"]
        for folder in (tmp_path, tmp_path / machines[0])
    )
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not (tmp_path / machines[1] / "runs").exists()  # rank 0 alone logs and saves
