"""The same function in several processes that can talk to one another, and what they say counted."""

import datetime
import multiprocessing
import os
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist

# One process imports what takes seconds, and all others are forked from it.
multiprocessing.set_forkserver_preload(["xhead.trainer", "tests.tiny"])

TIMEOUT = 60
"""Seconds that a process waits for the others in a collective."""


def in_processes(function, ranks, folder, *arguments):
    """`function(rank, *arguments)` in each of so many processes of one gloo group."""
    context = torch.multiprocessing.start_processes(
        _run, (function, ranks, str(folder), arguments), nprocs=ranks, join=False, start_method="forkserver"
    )
    assert context is not None
    while not context.join(timeout=120):
        pass


def _run(rank, function, ranks, folder, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Read by accelerate, which asks for an address even where the group is there already.
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **address}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    try:
        function(rank, *arguments)
        # A process that leaves while another still sends takes its threads away under it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_COLLECTIVES = ("all_reduce", GATHER, "all_gather_object", "broadcast")


@contextmanager
def counted():
    """The collectives asked for inside the block, by name: a list of (name, bytes of this process's part)."""
    calls = []

    def counting(name, collective):
        def call(*args, **kwargs):
            own = args[1] if name == GATHER else args[0]
            calls.append((name, own.nbytes if isinstance(own, torch.Tensor) else 0))
            return collective(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in _COLLECTIVES}):
        yield calls


def start(function, *arguments):
    """A process that runs `function(*arguments)`, forked from one that has imported what takes long."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["recipes.one_billion_word.train", "tests.tiny", "transformers.models.llama.modeling_llama"]
    )
    process = context.Process(target=_alone, args=(function, arguments))
    process.start()
    return process


def _alone(function, arguments):
    torch.set_num_threads(1)
    function(*arguments)


def in_forks(function, ranks, folder, *arguments):
    """As `in_processes`, started faster, and ended without taking the interpreter down."""
    processes = [start(_run, rank, function, ranks, str(folder), arguments) for rank in range(ranks)]
    try:
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
            process.join()
