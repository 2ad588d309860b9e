"""A function in several processes that share a gloo process group."""

import multiprocessing
import os

import torch
import torch.distributed as dist

# One process imports what takes seconds, and all others are forked from it.
multiprocessing.set_forkserver_preload(["xhead.trainer", "tests.tiny"])


def in_processes(function, count, folder, *given):
    """`function(rank, *given)` in each of `count` processes; what raises in one of them raises here."""
    context = torch.multiprocessing.start_processes(
        _run, (function, count, str(folder), *given), nprocs=count, join=False, start_method="forkserver"
    )
    assert context is not None
    while not context.join(timeout=120):
        pass


def _run(rank, function, count, folder, *given):
    # Read by accelerate, which asks for an address even where the group is there already.
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), **address}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        function(rank, *given)
        # A process that leaves while another still sends takes its threads away under it.
        dist.barrier()
    finally:
        dist.destroy_process_group()
