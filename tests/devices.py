"""The devices that a test runs on: the CPU, and a GPU where one can be used."""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU can be used here (on one, set TRITON_INTERPRET=0)")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
