"""Kernels in Triton, and one in Gluon for Hopper: importing this package imports neither."""
