"""Kernels of a cache in 8 bits: chosen for the ops that touch it, and for no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentspeed_kernels.cpu import cache_kernels, native_kernels
from agentspeed_kernels.ops import CACHE_OPS
from agentspeed_kernels.platform import Platform
from agentspeed_kernels.registry import Registry, standard
from agentspeed_kernels.selection import Kernels, NoKernel
from agentspeed_kernels.signature import Dtype, Widths

PLAIN = Platform(device="cpu", arch="x86_64", features=frozenset())
OF_ATTENTION = ("latent_append", "mla_rows", "mla_extend", "qkv_append", "gqa_rows", "gqa_extend")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_op_of_dense_attention_and_of_pages_has_a_portable_kernel_for_it(dtype: Dtype) -> None:
    ops = (*OF_ATTENTION, "mla_queries", "copy_rows", "gather_pages", "scatter_pages", "linear")
    kernels = Kernels(standard(), PLAIN, dtype, ops, cache="fp8")
    for op in ops:
        taken = kernels[op].choice(1).kernel.cache
        assert (taken == frozenset({"fp8"})) == (op in CACHE_OPS)


def test_without_it_no_kernel_of_it_is_chosen() -> None:
    kernels = Kernels(standard(), PLAIN, "float32", OF_ATTENTION)
    assert all(kernels[op].choice(1).kernel.cache is None for op in OF_ATTENTION)
    assert "cache in float32 are not taken" in kernels["mla_rows"].explain()[-1]


def test_an_op_that_nobody_wrote_for_it_is_refused_with_the_reason() -> None:
    with pytest.raises(NoKernel, match=r"no kernel for index_append .*torch: cache in fp8 are not taken"):
        Kernels(standard(), PLAIN, "float32", ("index_append",), cache="fp8")


def test_an_optional_op_without_a_kernel_is_left_out() -> None:
    few = Registry(spec for spec in standard() if spec.op != "mla_queries" or spec.cache is None)
    kernels = Kernels(few, PLAIN, "float32", ("mla_rows", "mla_queries"), cache="fp8", optional=("mla_queries",))
    assert kernels.has("mla_rows") and not kernels.has("mla_queries")


def test_heads_so_narrow_that_bytes_do_not_tell_their_number_are_refused() -> None:
    with pytest.raises(NoKernel, match="W is 16 or more, not 8"):
        Kernels(standard(), PLAIN, "float32", ("gqa_rows",), cache="fp8", sizes={"W": 8})


def test_a_kernel_of_bytes_takes_no_size_that_it_does_not_take_of_numbers() -> None:
    of_numbers = next(spec for spec in native_kernels.SPECS if spec.op == "gqa_rows")
    narrow = replace(of_numbers, sizes={"W": Widths(multiple=24, most=96), "G": Widths(most=8)})
    assert cache_kernels.for_bytes(narrow).sizes == {"W": Widths(multiple=24, least=16, most=96), "G": Widths(most=8)}
