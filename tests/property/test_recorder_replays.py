"""Any history of verbs, acknowledgements and deaths, recorded and replayed: the same state after every input."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.digest import digests
from agentspeed_engine.serve.recording import SUFFIX, RecordingOrder, Tape
from agentspeed_engine.serve.replay import Replay
from tests.property.test_kv_ownership import CORES, IDS, VOCABULARY, Ownership
from tests.support.fake_device import FakeDevice


class Recorded(Ownership):
    """The histories of the ownership test, through a recorded core. A digest is noted after every step."""

    @initialize(core=CORES, content=st.booleans(), poison=st.sampled_from([None, 5]))
    def start(self, core: Core, content: bool, poison: int | None) -> None:  # type: ignore[override]
        self.inner = core
        self.folder = Path(tempfile.mkdtemp(prefix="agentspeed-recorder-"))
        order = RecordingOrder(folder=self.folder, most_bytes=1 << 20, content=content, every=1)
        self.tape = Tape(self.inner, order, began=0.0)
        self.core = self.tape.core  # type: ignore[assignment]
        self.device = FakeDevice(core.config.page_tokens, VOCABULARY, poison)
        self.logs, self.running, self.flights, self.orders = {}, set(), [], []
        self.now, self.request, self.asked = 0.0, 0, {}

    @rule()
    def the_loop_comes_round(self) -> None:
        self.tape.flush()

    @rule()
    def a_segment_begins(self) -> None:
        self.tape.flush()
        self.tape.begin_segment()

    @rule(pick=st.integers(0, 30), seconds=st.floats(0, 5), tool=st.sampled_from(["", "search", "build"]))
    def a_tool_is_named(self, pick: int, seconds: float, tool: str) -> None:
        self.send(wire.Expect(request=self.fresh(), branch=self.pick(pick), seconds=seconds, tool=tool))

    @rule(ids=st.lists(st.integers(0, 9), max_size=30), broken=st.booleans())
    def ids_that_are_refused(self, ids: list[int], broken: bool) -> None:
        self.send(wire.Append(request=self.fresh(), branch=self.pick(0), ids=b"\0" if broken else pack_ids(ids)))

    @rule(tenant=st.sampled_from(["a", "b", "a\0b"]), private=st.booleans(), ids=IDS)
    def a_tenant_opens(self, tenant: str, private: bool, ids: list[int]) -> None:
        self.send(wire.Open(request=self.fresh(), ids=pack_ids(ids), private=private, tenant=tenant))

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        try:
            self.a_segment_begins()
            assert self.core.drop_link(LinkId(9), self.now) == []
            self.tape.close()
            for path in (self.tape.path, *self.tape.path.glob(f"*{SUFFIX}")):
                replay = Replay(path)
                for _ in replay.steps():
                    pass
                assert (replay.notes, replay.broke) == ([], "")
                if path.is_dir():
                    assert digests(replay.core.world) == digests(self.inner.world)
                    replay.core.check()
        finally:
            shutil.rmtree(self.folder)


TestRecorded = Recorded.TestCase
TestRecorded.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
