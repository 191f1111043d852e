"""Conformance of kernels to their definitions, for this package's tests and for plugins."""
