"""Kernels behind pure selection: each op has one definition and any number of implementations that conform to it."""
