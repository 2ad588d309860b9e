"""`roll_call`: when a collective fails, find out which process is missing.

A backend says that a connection was lost or that time ran out, and not whose. The processes that are left can tell:
each writes into the store that the process group was made with, and the one that does not is named.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_KEY = "xhead/roll_call/{}"
_WAITING = "waiting"


class MissingRanksError(RuntimeError):
    """A collective failed, and the message names the ranks that are missing.

    Attributes:
        ranks: their global ranks, ascending; empty where all have answered.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()):
        super().__init__(message)
        self.ranks = ranks


@contextmanager
def roll_call(group: Any = None, seconds: float = 60.0) -> Iterator[None]:
    """Collectives inside the block that fail name the processes that are missing.

    To be entered by all processes of the group, around training: `with xhead.roll_call(): trainer.train()`. It costs
    nothing until something fails. A process whose own error ends the block leaves it for the others to read. Without a
    process group it does nothing.

    Args:
        group: the processes to call; None is the default group.
        seconds: how long to wait for their answers. A process that is busy for longer, or learns of the failure later,
            counts as missing: with more than two processes over gloo some may learn of it by the time-out of their
            collective alone, so `seconds` should not be less than that.

    Raises:
        MissingRanksError: where a collective failed, which is the error's cause. All other errors pass as they are.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    try:
        yield
    except MissingRanksError:
        raise
    except BaseException as error:
        if not dist.is_available() or not dist.is_initialized():
            raise
        if not _is_of_a_collective(error):
            _tell(f"ended by {type(error).__name__}: {error}")
            raise
        raise _call(error, group, seconds) from error


def _is_of_a_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    # gloo raises plain RuntimeErrors, which say where in its sources they come from.
    return isinstance(error, RuntimeError) and ("gloo/" in str(error) or "pair closure" in str(error))


def _tell(what: str) -> bool:
    """Whether the store took it: it is gone where the process that kept it is."""
    try:
        _get_default_store().set(_KEY.format(dist.get_rank()), what)
    except RuntimeError:
        return False
    return True


def _call(error: BaseException, group: Any, seconds: float) -> MissingRanksError:
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    said: dict[int, str] = {}
    ended: dict[int, str] = {}
    reached = _tell(_WAITING)
    until = time.monotonic() + seconds
    while reached and not ended and len(said) < len(ranks) and time.monotonic() < until:
        try:
            said.update(_answers([rank for rank in ranks if rank not in said]))
        except RuntimeError:
            reached = False
        ended = {rank: what for rank, what in said.items() if what != _WAITING}
        time.sleep(0.05)
    own = f"rank {dist.get_rank()}: a collective of {len(ranks)} processes failed"
    if not reached:
        return MissingRanksError(
            f"{own}, and the store they meet at cannot be reached either: the process that keeps it (rank 0, unless a "
            "launcher does) is missing"
        )
    if ended:
        return MissingRanksError(f"{own}: " + "; ".join(f"rank {rank} was {ended[rank]}" for rank in sorted(ended)))
    missing = tuple(rank for rank in ranks if rank not in said)
    if not missing:
        return MissingRanksError(f"{own}, and all of them have said so: none is missing")
    names = ", ".join(map(str, missing))
    return MissingRanksError(
        f"{own}: rank {names} is missing, dead or stuck, without an answer in {seconds:g} s", missing
    )


def _answers(ranks: list[int]) -> dict[int, str]:
    store = _get_default_store()
    keys = {rank: _KEY.format(rank) for rank in ranks}
    return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
