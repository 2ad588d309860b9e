"""How many bytes PyTorch's operators hold at a time."""

import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While entered, what the results of operators hold after each of them; views count once, inputs not at all."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {}  # address of a storage -> (its weak reference, its number)
        self.sizes = []  # by number
        self.moments = []  # the numbers alive after each operator
        self.inputs = {storage_address(t) for t in inputs if t is not None}

    def __enter__(self):
        gc.collect()
        gc.freeze()  # so that the collections to come are quick
        return super().__enter__()

    def __exit__(self, *arguments):
        gc.unfreeze()
        return super().__exit__(*arguments)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self._meet(tensor)
        gc.collect()  # triton's interpreter leaves cycles, which hold the arguments of its kernels
        self.known = {address: entry for address, entry in self.known.items() if not entry[0].expired()}
        self.moments.append(frozenset(number for _, number in self.known.values()))
        return out

    def _meet(self, tensor):
        address = storage_address(tensor)
        if address not in self.inputs and (address not in self.known or self.known[address][0].expired()):
            self.known[address] = StorageWeakRef(tensor.untyped_storage()), len(self.sizes)
            self.sizes.append(tensor.untyped_storage().nbytes())

    def peak(self, *results):
        """Most bytes held at a time beside the results."""
        left_out = {self.known[storage_address(t)][1] for t in results if storage_address(t) in self.known}
        return max(sum(self.sizes[number] for number in alive - left_out) for alive in self.moments)


def storage_address(tensor):
    return tensor.untyped_storage()._cdata


def uncounted(function):
    """A product of half precision as a GPU makes it, without converted copies of its operands."""

    def call(*arguments):
        with _disable_current_modes():
            function(*arguments)

    return call
