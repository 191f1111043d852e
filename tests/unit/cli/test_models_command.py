"""`agentspeed models` as its user meets it: what runs, what a model needs, and how its template is spoken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentspeed.cli.app import app
from agentspeed.cli.statuses import EXIT_REFUSED
from agentspeed.engine import NANO
from agentspeed_engine.models.catalog import describe, read_source
from agentspeed_engine.models.kept_weights import kept_weights
from agentspeed_engine.models.registry import supported_types
from agentspeed_kernels.platform import detect
from tests.support.chat_templates import FAMILIES
from tests.support.conversations import folder_of
from tests.support.paged import CONFIG

RUNNER = CliRunner()


def spoken_by(folder: Path, name: str, template: str | None = None) -> Path:
    """A folder without weights: a small model's configuration under a family's template."""
    family = FAMILIES[name]
    made = folder_of(folder / "m", template or family.template, family.controls, plain=family.plain, end=family.end)
    ends = json.loads((made / "config.json").read_text())
    _ = (made / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 2048} | ends))
    return made


def test_without_a_model_it_lists_every_type_that_runs() -> None:
    done = RUNNER.invoke(app, ["models"])
    assert done.exit_code == 0
    assert all(name in done.output for name in supported_types())


def test_a_model_is_told_by_what_it_is_and_what_it_needs_here() -> None:
    done = RUNNER.invoke(app, ["models", str(NANO), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["model_type"] == "deepseek_v3" and told["context_limit"] == 4096
    assert told["in_dtype"]["bfloat16"]["weight_bytes"] == 2 * told["parameters"]
    assert told["in_dtype"]["float32"]["context"] == 4096
    assert told["parameters"] < told["in_bytes"]["int8"]["weight_bytes"] < told["in_bytes"]["fp8"]["weight_bytes"]
    assert told["in_bytes"]["fp8"]["weight_bytes"] < told["in_dtype"]["bfloat16"]["weight_bytes"]
    wide = told["in_dtype"]["bfloat16"]["cache_bytes_per_token"]
    assert told["fp8_cache"]["cache_bytes_per_token"] < 0.8 * wide and not told["fp8_cache"]["refused"]
    assert "<tool_call>" in told["template"]["a call"]


def in_float32(folder: Path) -> dict[str, Any]:
    """What is told of a model in float32."""
    done = RUNNER.invoke(app, ["models", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.output)["in_dtype"]["float32"]
    return told


def test_weights_in_float32_are_counted_as_an_engine_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = kept_weights(read_source(NANO), "float32", detect())
    told = in_float32(NANO)
    assert told["matrices"] == (kept or "")
    assert told["weight_bytes"] == describe(NANO, dtype="float32", weights=kept).weight_bytes
    monkeypatch.setenv("AGENTSPEED_KERNELS", "linear=torch")
    assert in_float32(NANO)["weight_bytes"] == describe(NANO, dtype="float32").weight_bytes


def test_how_matrices_would_be_kept_is_told_where_only_the_configuration_is(tmp_path: Path) -> None:
    kept = kept_weights(read_source(NANO), "float32", detect())
    folder = spoken_by(tmp_path, "qwen 3")
    config = json.loads((folder / "config.json").read_text())
    for stored, matrices in (("float32", ""), ("bfloat16", kept or "")):
        _ = (folder / "config.json").write_text(json.dumps(config | {"dtype": stored}))
        assert in_float32(folder)["matrices"] == matrices


def test_kernels_are_chosen_for_the_matrices_that_an_engine_keeps() -> None:
    kept = kept_weights(read_source(NANO), "float32", detect())
    for dtype, matrices in (("float32", kept), ("float64", None)):
        done = RUNNER.invoke(app, ["kernels", str(NANO), "--dtype", dtype, "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.output)["weights"] == matrices


def test_a_quantisation_that_its_text_part_declares_is_how_a_model_is_stored(tmp_path: Path) -> None:
    folder = spoken_by(tmp_path, "qwen 3")
    config = json.loads((folder / "config.json").read_text())
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    nested = {"dtype": "bfloat16", "quantization_config": None, "text_config": {"quantization_config": blocks}}
    _ = (folder / "config.json").write_text(json.dumps(config | nested))
    done = RUNNER.invoke(app, ["models", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["stored"] == "fp8"


def test_what_reasoning_tools_and_calls_look_like_is_shown(tmp_path: Path) -> None:
    done = RUNNER.invoke(app, ["models", str(spoken_by(tmp_path, "glm 4.6"))])
    assert done.exit_code == 0, done.output
    assert "turned on and off by enable_thinking" in done.output
    assert "<tool_call>NAME\\n<arg_key>KEY</arg_key>\\n<arg_value>VALUE</arg_value>" in done.output


def test_what_does_not_run_is_refused_with_the_nearest_that_does(tmp_path: Path) -> None:
    _ = shutil.copytree(NANO, tmp_path / "m")
    _ = (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    done = RUNNER.invoke(app, ["models", str(tmp_path / "m")])
    assert done.exit_code == EXIT_REFUSED and "sliding-window" in done.output and "llama" in done.output


def test_a_model_that_cannot_be_talked_to_still_has_its_numbers(tmp_path: Path) -> None:
    folder = spoken_by(tmp_path, "qwen 3")
    (folder / "chat_template.jinja").unlink()
    done = RUNNER.invoke(app, ["models", str(folder)])
    assert done.exit_code == EXIT_REFUSED
    assert "no chat template" in done.output and "parameters" in done.output


def test_random_conversations_tell_whether_a_template_is_spoken_as_it_writes(tmp_path: Path) -> None:
    folder = str(spoken_by(tmp_path, "deepseek v2"))
    done = RUNNER.invoke(app, ["models", folder, "--check-template", "--conversations", "3"])
    assert done.exit_code == 0, done.output
    assert "no tools, a system text: 3 of 3" in done.output
    assert "tools, no system text: refused" in done.output and "does not show tools" in done.output


def test_a_template_that_rewrites_what_is_said_is_found_and_shown(tmp_path: Path) -> None:
    """Loading tries other words than these."""
    template = FAMILIES["llama 3"].template.replace("m.content | trim", "m.content | replace('日本', 'Nihon') | trim")
    folder = str(spoken_by(tmp_path, "llama 3", template))
    done = RUNNER.invoke(app, ["models", folder, "--check-template", "--conversations", "8"])
    assert done.exit_code == EXIT_REFUSED
    assert "theirs" in done.output and "Nihon" in done.output


@pytest.mark.parametrize("options", [["--revision", "main"]])
def test_a_folder_has_no_revision(options: list[str]) -> None:
    done = RUNNER.invoke(app, ["models", str(NANO), *options])
    assert done.exit_code == EXIT_REFUSED and "no revisions" in done.output
