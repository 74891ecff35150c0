"""Triton kernels and their launchers, one module an op family, imported when an op first runs on a GPU."""
