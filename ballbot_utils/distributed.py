"""Ranks: processes that train together. Each has its share of the environments and of every minibatch.

They are started by `spawn_ranks` on one machine, or by torchrun on many. One process is rank 0 of 1.
"""

import functools
import logging
import os
import platform
import signal
import tempfile
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


class SharedMemory:
    """Memory that the ranks of one machine share, for means of tensors.

    A mean takes 0.2 ms. Gloo sends tensors through sockets by threads of its own; a rank often waits 4 ms for these.
    Odd and even rounds have separate buffers: no rank writes to one that another still reads.
    """

    SIZE = 2**20  # numbers that a tensor may have

    def __init__(self) -> None:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            path = gather_objects(file.name)[0]
            memory = torch.from_file(path, shared=True, size=world_size() * (16 + 2 * self.SIZE))
            counts, buffers = memory.split([world_size() * 16, world_size() * 2 * self.SIZE])
            self.counts = counts.view(torch.int64)[::8].numpy()  # of the rounds that each rank has written
            self.buffers = buffers.view(2, world_size(), self.SIZE)
            gather_objects(None)  # all ranks have opened the file: its name can go

    def mean(self, tensor: torch.Tensor) -> None:
        """Replace a float32 tensor by its mean over all ranks."""
        round = self.counts[rank()] + 1
        parts = self.buffers[round % 2, :, : tensor.numel()]
        parts[rank()] = tensor.flatten()
        self.counts[rank()] = round
        while (self.counts < round).any():
            os.sched_yield()
        tensor.copy_(parts.mean(0).view_as(tensor))


shared_memory: SharedMemory | None = None  # set by `init_distributed` where all ranks are on one machine


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks, in place."""
    if not dist.is_initialized():
        return tensor
    if shared_memory is not None and tensor.numel() <= SharedMemory.SIZE:
        shared_memory.mean(tensor)
    else:
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
        # Other processors than x86 may reorder what a rank writes
        global shared_memory
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(num_processes)
        shareable = one_machine and platform.machine() == "x86_64" and os.path.isdir("/dev/shm") and not cuda
        shared_memory = SharedMemory() if shareable else None


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
