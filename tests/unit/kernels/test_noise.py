"""Numbers that are kept for later cases are those that the seed gives."""

from __future__ import annotations

import pytest
import torch

from agentspeed_kernels.testing import noise


@pytest.mark.parametrize("most", [noise.MOST_BYTES, 0])
def test_numbers_are_the_generators_whichever_of_them_were_drawn_before(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "MOST_BYTES", most)
    for shapes in ([(3, 5), (40,)], [(3, 5), (40,), (2, 2)], [(3, 5), (41,), (2, 2)], [(3, 5), (40,), (7,)]):
        plain, kept = torch.Generator().manual_seed(11), noise.Noise(11)
        for shape in shapes:
            wanted = torch.randn(*shape, generator=plain, dtype=torch.float64)
            assert torch.equal(kept.normal(*shape), wanted)
            wanted = torch.rand(*shape, generator=plain, dtype=torch.float64)
            assert torch.equal(kept.uniform(*shape), wanted)
