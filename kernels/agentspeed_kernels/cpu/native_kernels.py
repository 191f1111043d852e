"""C kernels for a few rows in float32, as entries of the registry."""

from agentspeed_kernels.signature import KernelSpec

SPECS: tuple[KernelSpec, ...] = ()
