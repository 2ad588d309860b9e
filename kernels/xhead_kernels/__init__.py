"""Triton kernels: one kernel and its launcher a file.

There are none yet: every engine of `xhead` runs in plain PyTorch.
"""
