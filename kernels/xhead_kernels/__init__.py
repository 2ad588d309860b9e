"""Triton kernels: one kernel and its launcher a file. Importing a kernel needs triton."""
