"""Engine options: every number is checked by its name, and a pool too small for one turn never starts (rule L1)."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.serve.in_thread import EngineThread
from agentspeed_engine.serve.options import EngineOptions, build, options_from, parse_options
from agentspeed_kernels.registry import standard
from tests.support.engine_client import Front

NANO = str(Path(__file__).resolve().parents[4] / "agentspeed" / "models" / "nano")
NUMBERS = [
    field.name for field in msgspec.structs.fields(EngineOptions)
    if any(str(kind) in str(field.type) for kind in ("int", "float")) and "Literal" not in str(field.type)
]  # fmt: skip


def refusal(**options: Any) -> EngineFault:
    with pytest.raises(EngineFault) as caught:
        build(EngineOptions(**({"model": "noop:64:0"} | options)))
    return caught.value


# ---- the pool (L1) ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("pages", "page_tokens", "context"), [(64, 64, 4096), (4, 16, 64), (1, 16, 1), (65, 64, 4097)])
def test_a_pool_one_page_short_of_a_turn_of_the_context_limit_is_refused(
    pages: int, page_tokens: int, context: int
) -> None:
    fault = refusal(pages=pages, page_tokens=page_tokens, context_limit=context)
    assert fault.code == "bad_options"
    assert f"needs {-(-context // page_tokens) + 1}" in fault.message and "L1" in fault.message
    core = build(
        EngineOptions(
            model="noop:64:0", pages=-(-context // page_tokens) + 1, page_tokens=page_tokens, context_limit=context
        )
    ).core
    assert core.firm_budget() == 0


def test_a_pool_of_one_page_carries_no_turn() -> None:
    fault = refusal(pages=1)
    assert fault.code == "bad_options" and "needs 2 (rule L1)" in fault.message


@pytest.mark.parametrize(("options", "limit"), [
    ({"pages": 2}, 64), ({"pages": 64}, 63 * 64), ({"pages": 64, "firm_pages": 10}, 53 * 64), ({"pages": 5000}, 65_536),
])  # fmt: skip
def test_a_context_limit_that_is_left_out_is_what_fits(options: dict[str, int], limit: int) -> None:
    core = build(EngineOptions(model="noop:64:0", **options)).core
    core.check()
    assert core.context_limit == limit


def test_firm_leases_cannot_take_the_pages_of_a_turn() -> None:
    assert "firm" in refusal(pages=64, firm_pages=63).message
    assert "firm" in refusal(pages=66, firm_pages=2, context_limit=4096).message


def test_the_welcome_tells_a_firm_budget_of_no_page_as_none() -> None:
    engine = EngineThread(EngineOptions(model="noop:64:0", pages=65, context_limit=4096))
    with engine.connect() as link:
        assert Front(link).welcome.limits["firm_pages"] == 0
    engine.close()


# ---- numbers ------------------------------------------------------------------------------------------------------
def test_the_list_of_numbers_is_the_options_own() -> None:
    assert {"pages", "max_lease_seconds", "tenant_pages", "idle_seconds", "max_links"} <= set(NUMBERS)
    assert "record" not in NUMBERS and "dtype" not in NUMBERS


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 10**400, math.nan, math.inf, -math.inf, True, "1,5"])
def test_a_number_without_sense_is_refused_by_its_name(name: str, value: object) -> None:
    with pytest.raises(EngineFault, match=name) as fault:
        parse_options(json.dumps({"model": "noop:64:0", name: value}))
    assert fault.value.code == "bad_options"
    assert fault.value.remedy
    if value is not True:
        with pytest.raises(EngineFault, match=name):
            options_from({"model": "noop:64:0", name: str(value)})


@pytest.mark.parametrize(("given", "told", "remedy"), [
    ({"record_bytes": 1}, "record_bytes is 1.", "Give 65536 or more."),
    ({"threads": 5000}, "threads is 5000.", "Give 1 to 1024."),
    ({"ticket_deadline": 0}, "ticket_deadline is 0.0.", "Give a finite number of seconds above 0."),
    ({"pages": "x"}, "pages is 'x'.", "Give a whole number or None."),
    ({"record_content": 1}, "record_content is 1.", "Give true or false."),
    ({"dtype": "x"}, "dtype is 'x'.", "Give one of auto, float32, float64, bfloat16."),
    ({"pagse": 3}, "there is no option `pagse`.", "Do you mean `pages`?"),
    ({"policy": None}, "policy is None.", "Give a text."),
])  # fmt: skip
def test_a_wrong_option_is_told_with_its_own_range_in_plain_words(
    given: dict[str, Any], told: str, remedy: str
) -> None:
    with pytest.raises(EngineFault) as fault:
        parse_options(json.dumps({"model": "noop:64:0"} | given))
    assert (fault.value.message, fault.value.remedy) == (f"The engine options are wrong: {told}", remedy)


@pytest.mark.parametrize(("text", "told"), [
    ("{", "no JSON: Expecting"), ("[]", "no JSON object"), ("{}", "no `model`"),
])  # fmt: skip
def test_options_that_are_no_object_with_a_model_are_refused(text: str, told: str) -> None:
    with pytest.raises(EngineFault, match=told):
        parse_options(text)


@pytest.mark.parametrize("name", ["max_lease_seconds", "tenant_pages", "tenant_sessions", "max_links", "host_slots"])
def test_options_that_were_made_in_python_are_checked_too(name: str) -> None:
    assert f"{name} is -1" in refusal(**{name: -1}).message


@pytest.mark.parametrize("name", ["max_lease_seconds", "ticket_deadline", "tenant_pages", "tenant_sessions"])
def test_a_core_refuses_a_limit_that_is_none(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(EngineFault, match=f"{name} is {value}"):
            CoreConfig(pages=10, context_limit=64, vocab_size=64, **{name: value}).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [
    {"pages": 10**15}, {"host_slots": 10**15}, {"page_tokens": 10**15}, {"model": "noop:64:0", "host_slots": 10**15},
])  # fmt: skip
def test_more_memory_than_the_machine_has_is_refused_at_once(options: dict[str, Any]) -> None:
    fault = refusal(**({"model": NANO} | options))
    assert fault.code == "bad_options" and not fault.retryable
    assert all(name in fault.message + fault.remedy for name in options if name != "model")


@pytest.mark.parametrize("model", ["noop:0:0", f"noop:{10**12}:0", "noop:64:-1", "noop:64:1e300", "noop:64:nan"])
def test_a_model_without_weights_needs_a_vocabulary_and_a_step_time(model: str) -> None:
    assert "vocabulary or step time" in refusal(model=model).message


@pytest.mark.parametrize("options", [{"idle_seconds": 1e9}, {"max_lease_seconds": 1e300, "ticket_deadline": 1e300}])
def test_an_engine_can_wait_for_longer_than_a_selector(options: dict[str, float]) -> None:
    engine = EngineThread(EngineOptions(model="noop:64:0", pages=80, **options))
    with engine.connect() as link:
        front = Front(link)
        branch = front.open([3])
        assert front.generate(branch, max_tokens=2).ids == [4, 5]
        _ = front.ask(wire.Expect(request=front.number(), branch=branch, seconds=1e12, keep="firm"), wire.LeaseAnswer)
        time.sleep(0.1)
    time.sleep(0.2)  # without a session
    with engine.connect() as link:
        assert Front(link).counts()["links"] == 1
    engine.close()


def test_a_model_by_chance_needs_its_configuration_only(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text((Path(__file__).parents[4] / "bench/models/tiny-qwen3-moe.json").read_text())
    for model in (f"random:{path}", f"random:{tmp_path}"):
        built = build(EngineOptions(model=model, pages=8, page_tokens=16, threads=1))
        assert built.core.vocab_size == built.vocabulary.vocab_size == 512
    fault = refusal(model=f"random:{tmp_path / 'nothing'}")
    assert fault.code == "bad_config" and "nothing is not a folder" in fault.message


def test_an_engine_does_not_start_with_kernels_that_cannot_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSPEED_KERNELS", "foo")
    wrong = refusal(model=NANO, pages=64)
    assert wrong.code == "bad_options"
    assert "AGENTSPEED_KERNELS is wrong: 'foo'" in wrong.message and "op=name to force one" in wrong.remedy
    monkeypatch.setenv(
        "AGENTSPEED_KERNELS", ",".join(f"-rms_norm/{one.name}" for one in standard().candidates("rms_norm"))
    )
    none = refusal(model=NANO, pages=64)
    assert none.code == "bad_options"
    assert "no kernel for rms_norm" in none.message and "exclude fewer kernels" in none.remedy


@pytest.mark.parametrize(
    ("options", "turns"),
    [({}, 32), ({"host_slots": 8}, 1), ({"host_slots": 8, "turns_in_place": 5}, 5), ({"turns_in_place": 1}, 1)],
)
def test_sessions_keep_their_places_where_no_host_tier_keeps_their_rows(options: dict[str, int], turns: int) -> None:
    built = build(options_from({"model": "noop:64:0", "pages": 64, **options}))

    assert built.core.turns_in_place == turns
