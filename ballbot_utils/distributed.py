"""Ranks: processes that train together. Each has its share of the environments and of every minibatch.

They are started by `spawn_ranks` on one machine, or by torchrun on many. One process is rank 0 of 1.
"""

import functools
import logging
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ballbot_utils.console import one_line_errors


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks, in place."""
    if dist.is_initialized():
        work = dist.all_reduce(tensor, async_op=True)
        while not (tensor.is_cuda or work.is_completed()):  # faster than sleep and wake-up of a CPU
            os.sched_yield()
        work.wait()  # raises errors
        tensor /= world_size()
    return tensor


def gather_objects(thing: Any) -> list:
    """A list of each rank's object, in the order of ranks, on all ranks."""
    things = [thing] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


@functools.cache
def pin_to_core_share() -> int:
    """Keep this process and its threads on its rank's share of the machine's cores. Returns their number.

    The threads that send gradients then never wait for a core that another rank computes on.
    """
    rank, size = (int(os.environ.get(f"LOCAL_{name}", default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else range(os.cpu_count())
    share = cores[rank * len(cores) // size : (rank + 1) * len(cores) // size]
    if size <= len(cores) and isinstance(cores, list):
        os.sched_setaffinity(0, share)
    return max(1, len(share))


def init_distributed(num_processes: int, cuda: bool) -> None:
    """Connect to the other ranks, if there are any."""
    if "RANK" in os.environ:
        pin_to_core_share()  # threads that start later inherit it
        # After a restart, torchrun's store still has the addresses of the previous ranks: use a new prefix
        store, number, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=num_processes)


def must_spawn(args: Any) -> bool:
    """Whether this process has to start the ranks of a run, and is none itself."""
    return args.num_processes > 1 and "RANK" not in os.environ


def spawn_ranks(train: Callable, args: Any, started: float) -> None:
    """Start `args.num_processes` ranks on this machine and wait for them: each calls `train(args, started)`."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logging.getLogger(mp.spawn.__module__).setLevel(logging.ERROR)  # silences "Terminating process ..."
    resource_tracker.ensure_running()  # it must not start while SIGINT is blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until ranks can handle Ctrl-C
    ranks = mp.spawn(rank_main, (train, args, store.port, started), args.num_processes, join=False, daemon=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        while not ranks.join(grace_period=2):
            pass
    except mp.ProcessExitedException as error:
        if error.exit_code == -signal.SIGINT:
            raise KeyboardInterrupt from None
        if error.exit_code > 0:  # the rank has printed the reason
            raise SystemExit(error.exit_code) from None
        raise RuntimeError(str(error)) from None  # a signal


@one_line_errors()
def rank_main(rank, train, args, port, started):
    """The main function of a process that `spawn_ranks` starts."""
    for number in (signal.SIGINT, signal.SIGTERM):  # end at once: saves are atomic
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # sent as well when the parent process dies
    size = args.num_processes
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE=True)  # fmt: skip
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        train(args, started)
    except RuntimeError as error:
        if "gloo" in str(error):
            time.sleep(5)  # another rank has ended: the parent reports it, and ends this one
        raise
