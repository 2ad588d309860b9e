"""Triton kernels: one kernel and its launcher a file. There are none yet, so every engine of `xhead` runs in plain PyTorch."""
