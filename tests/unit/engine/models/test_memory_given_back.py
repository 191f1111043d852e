"""What a load frees goes back to the machine, and what steps free afterwards stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.memory import zeros_on_demand
from agentspeed_engine.serve.tuning import MALLOC

SCRIPT = """
import torch
from pathlib import Path
from agentspeed_engine.models.memory import given_back

def resident():
    return 1024 * int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines()
                           if line.startswith("VmRSS:")))

def left():
    "MB that stay of 64 MB that were written and freed below what stays."
    before = resident()
    written = torch.ones(16 << 20)
    above = torch.ones(1 << 10)
    del written
    return (resident() - before) >> 20, above

with given_back():
    during, _ = left()
after, _ = left()
print(during, after)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_freed_memory_goes_back_in_a_load_and_stays_afterwards() -> None:
    said = subprocess.check_output([sys.executable, "-c", SCRIPT], env={**os.environ, **MALLOC}, text=True)
    during, after = map(int, said.split())
    assert during < 8
    assert after > 56


def test_more_addresses_than_a_process_may_have_are_refused_with_the_ways_out() -> None:
    with pytest.raises(EngineFault, match=r"cannot have \d+ MB of memory more: .*ulimit -v") as refused:
        zeros_on_demand((1 << 60,), torch.uint8)

    assert refused.value.code == "out_of_memory"
