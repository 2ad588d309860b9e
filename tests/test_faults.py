"""A process of several is killed, stopped or fails: the others end, and say which."""

import datetime
import json
import os
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import xhead
from tests.processes import start
from tests.tiny import tiny, tokens

LOST, STEP = 1, 2
"""Which process is lost, and in which step."""
TIMEOUT = 3


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


def _stopped():
    time.sleep(3600)


def _failed():
    raise ValueError("a document without words")


def _in_data_parallel():
    model = xhead.patch(tiny("LlamaForCausalLM"))
    return _loss_of(DistributedDataParallel(model))


def _in_shards():
    return _loss_of(fully_shard(xhead.patch(tiny("LlamaForCausalLM"))))


def _loss_of(model):
    return lambda step: model(**tokens(seed=dist.get_world_size() * step + dist.get_rank())).loss


def _with_shared_classes():
    start = 4 * dist.get_rank()
    vocabulary = xhead.Vocabulary(4 * dist.get_world_size(), start, start + 4)
    hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    return lambda step: xhead.linear_cross_entropy(hidden, weight, torch.arange(6), vocabulary=vocabulary)


def _train(rank, ranks, training, lose, seconds, folder, port):
    method = f"tcp://127.0.0.1:{port}" if port else f"file://{folder}/store"
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks, timeout=timeout)
    torch.manual_seed(0)
    loss_of = training()
    try:
        with xhead.roll_call(seconds=seconds):
            for step in range(10):
                if (rank, step) == (0 if port else LOST, STEP):
                    lost = time.time()
                    (folder / "lost").write_text(str(lost))
                    lose()
                loss_of(step).backward()
    except xhead.MissingRanksError as error:
        said = {"error": str(error), "ranks": error.ranks, "cause": str(error.__cause__), "time": time.time()}
        (folder / f"{rank}.json").write_text(json.dumps(said))
        os._exit(3)  # as after an error, and without the noise


def _survivors(ranks, training, lose, seconds, folder, port=None):
    """What each process but the lost one said, which has ended by itself."""
    lost = 0 if port else LOST
    processes = [start(_train, rank, ranks, training, lose, seconds, folder, port) for rank in range(ranks)]
    said = []
    try:
        for rank, process in enumerate(processes):
            if rank != lost:
                process.join(timeout=60)
                assert process.exitcode == 3, (rank, process.exitcode)
                said.append(json.loads((folder / f"{rank}.json").read_text()))
                said[-1]["seconds"] = said[-1]["time"] - float((folder / "lost").read_text())
        if lose is not _stopped:
            processes[lost].join(timeout=10)
        return said, processes[lost].exitcode
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("training", [_in_data_parallel, _in_shards, _with_shared_classes])
def test_a_killed_process_is_named(training, tmp_path):
    (said,), exitcode = _survivors(2, training, _killed, 1, tmp_path)
    assert exitcode == -signal.SIGKILL
    assert said["ranks"] == [LOST], said
    assert "rank 0: a collective of 2 processes failed: rank 1 is missing" in said["error"]
    assert "gloo" in said["cause"]
    assert said["seconds"] < TIMEOUT + 1


def test_of_several_processes_the_killed_one_is_named(tmp_path):
    """Some learn of it when their collective's time is up."""
    said, _ = _survivors(3, _in_data_parallel, _killed, TIMEOUT + 2, tmp_path)
    assert [each["ranks"] for each in said] == [[LOST]] * 2, said


def test_a_stopped_process_is_named_after_the_timeout(tmp_path):
    (said,), _ = _survivors(2, _in_data_parallel, _stopped, 1, tmp_path)
    assert said["ranks"] == [LOST]
    assert TIMEOUT - 1 < said["seconds"] < 2 * TIMEOUT + 1


def test_a_failed_process_leaves_its_error(tmp_path):
    said, exitcode = _survivors(3, _in_data_parallel, _failed, TIMEOUT + 2, tmp_path)
    assert exitcode == 1
    for each in said:
        assert each["ranks"] == []
        assert "rank 1 was ended by ValueError: a document without words" in each["error"]


def test_the_process_that_keeps_the_store_is_killed(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (said,), _ = _survivors(2, _in_data_parallel, _killed, 1, tmp_path, port)
    assert "the store they meet at cannot be reached either" in said["error"] or said["ranks"] == [0], said


def test_without_processes_errors_pass():
    with pytest.raises(KeyError, match="own"), xhead.roll_call():
        raise KeyError("own")
    with pytest.raises(ValueError, match="seconds must be positive, got 0"), xhead.roll_call(seconds=0):
        pass
