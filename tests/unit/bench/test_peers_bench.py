"""Engines are compared within a round, slow peers play once, and llama.cpp gets the weights as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.peers_gguf import Inconvertible, converted, write_gguf
from bench.peers_served import Completions, LlamaCompletion, token_bytes
from bench.peers_table import OURS, lines, plays_on, ratio
from bench.peers_workload import Case, Must, Played, cases
from tests.support.random_checkpoint import make_checkpoint, random_weights

TINY = json.loads((Path(__file__).parents[3] / "bench/models/tiny.json").read_text())


def no_figures(played: Played) -> dict[str, float]:
    raise AssertionError(played)


CASE = Case("case", "", False, (), no_figures, (Must("wall", 0.5),))


def walls(*seconds: float) -> dict[int, dict[str, float]]:
    return {number: {"wall": value} for number, value in enumerate(seconds)}


def test_a_ratio_is_taken_within_each_round_against_the_best_of_that_round() -> None:
    found = {OURS: walls(1, 2, 4), "one": walls(4, 4, 4), "other": walls(2, 8, 16)}

    reached = ratio("wall", "best peer", found)

    assert reached is not None
    assert (reached.low, reached.median, reached.high, reached.rounds) == (0.5, 0.5, 1.0, 3)


def test_more_tokens_a_second_are_better_and_the_best_peer_has_most() -> None:
    found = {name: {0: {"tokens_per_second": rate}} for name, rate in ((OURS, 30.0), ("one", 10.0), ("other", 20.0))}

    reached = ratio("tokens_per_second", "best peer", found)

    assert reached is not None
    assert reached.median == 1.5


def test_rounds_that_one_of_the_two_sat_out_do_not_count() -> None:
    found = {OURS: walls(1, 1, 1), "one": {1: {"wall": 4.0}}}

    reached = ratio("wall", "one", found)

    assert reached is not None
    assert (reached.median, reached.rounds) == (0.25, 1)
    assert ratio("wall", "other", found) is None


def test_a_much_slower_peer_plays_a_case_once() -> None:
    found = {OURS: walls(1), "best": walls(2), "near": walls(4), "far": walls(5), "absent": walls()}

    assert [plays_on(CASE, name, found) for name in found] == [True, True, True, False, False]


def test_where_no_peer_brought_anything_ours_plays_alone() -> None:
    found = {OURS: walls(1), "one": walls(), "other": walls()}

    assert [plays_on(CASE, name, found) for name in found] == [True, False, False]


def test_a_peer_that_a_bound_names_plays_on_however_slow_it_is() -> None:
    found = {OURS: walls(1), "best": walls(2), "far": walls(60)}

    assert plays_on(replace(CASE, must=(Must("wall", 0.5, "far"),)), "far", found)


def test_a_miss_is_printed_as_a_miss_and_nothing_is_judged_at_other_lengths() -> None:
    missed, reached = {OURS: walls(6), "one": walls(10)}, {OURS: walls(5), "one": walls(10)}

    assert "must <= 0.5: MISSED" in lines(CASE, missed, judged=True)[0]
    assert "must <= 0.5: reached" in lines(CASE, reached, judged=True)[0]
    assert "must" not in lines(CASE, missed, judged=False)[0]


def test_what_no_peer_has_played_is_told_as_not_measured() -> None:
    assert "must <= 0.5: not measured" in lines(CASE, {OURS: walls(6), "one": {}}, judged=True)[0]


def test_texts_are_new_in_every_round_and_the_work_is_the_same() -> None:
    one, other = cases(0.02, 0), cases(0.02, 1)

    assert all(
        mine.scripts != theirs.scripts or mine.prefix != theirs.prefix for mine, theirs in zip(one, other, strict=True)
    )
    assert [len(case.prefix) for case in one] == [len(case.prefix) for case in other]


def test_ids_are_read_as_each_server_says_them() -> None:
    assert Completions().ids_of({"choices": [{"text": "AB", "token_ids": [7, 8]}]}) == [7, 8]
    assert Completions().ids_of({"choices": [{"text": "AB"}]}) == [65, 66]
    assert LlamaCompletion().ids_of({"content": "AB", "tokens": [7, 8]}) == [7, 8]


def test_a_small_cache_is_as_small_for_latents_as_for_heads() -> None:
    grouped = {"num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 10}

    assert token_bytes(grouped) == 20_480
    assert token_bytes({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 8}) == 9216


def test_latents_are_cut_by_head_for_llama_cpp_and_every_other_matrix_keeps_its_bits() -> None:
    weights = random_weights(TINY, 0, torch.bfloat16)
    heads, keys, values = TINY["num_attention_heads"], TINY["qk_nope_head_dim"], TINY["v_head_dim"]

    tensors = dict(converted(weights, TINY))

    joined = torch.cat([tensors["blk.0.attn_k_b.weight"].transpose(1, 2), tensors["blk.0.attn_v_b.weight"]], 1)
    assert joined.shape == (heads, keys + values, TINY["kv_lora_rank"])
    assert joined.flatten(0, 1).equal(weights["model.layers.0.self_attn.kv_b_proj.weight"])
    assert tensors["token_embd.weight"].equal(weights["model.embed_tokens.weight"])
    assert tensors["output_norm.weight"].dtype == torch.float32
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(tensor.numel() for tensor in weights.values())


def test_a_gguf_file_says_what_it_holds_and_where(tmp_path: Path) -> None:
    folder = make_checkpoint(TINY, tmp_path / "tiny", dtype="bfloat16")

    write_gguf(folder, tmp_path / "tiny.gguf")

    data = (tmp_path / "tiny.gguf").read_bytes()
    assert data[:8] == b"GGUF\x03\x00\x00\x00"
    assert b"deepseek2.attention.kv_lora_rank" in data
    assert len(data) % 32 == 0


def test_a_model_that_has_no_names_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "other"}')

    with pytest.raises(Inconvertible, match="other is none of deepseek_v3, qwen3"):
        write_gguf(tmp_path, tmp_path / "model.gguf")
