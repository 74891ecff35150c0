"""Kernels with one virtue or one fault each, on which the compile checks are checked."""
