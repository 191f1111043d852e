"""Kernels behind pure selection: each op has one definition, any number of implementations, and a row in the conformance suite."""
