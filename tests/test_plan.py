"""Plans on disk: round trips, and files that are damaged, foreign or malicious."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import sha256
from halfbyte.plan import Codes, LayerPlan, Plan, codes_path, load_codes, load_plan, save_codes, save_plan
from halfbyte.quant.balance import LowRank
from halfbyte.quant.quantisers.rtn import round_to_nearest

NAME, NORM = "model.layers.0.mlp.down_proj", "model.layers.0.input_layernorm.weight"


@pytest.fixture(params=[".pt", ".json"])
def saved(request, tmp_path):
    path = tmp_path / f"plan{request.param}"
    weight = round_to_nearest(torch.randn(8, 64), 32).pack()
    low_rank = LowRank(torch.randn(64, 4), torch.randn(4, 4))
    codes = Codes({NAME: weight}, {NORM: torch.randn(8)}, {NAME: low_rank}, {NAME: torch.rand(64)})
    save_codes(codes_path(path), codes)
    digest = sha256(codes_path(path))
    entry = LayerPlan(4, 8, 32, a4_clip=0.9, rank=4)
    plan = Plan(
        "demo",
        "abc",
        "gguf",
        "fused",
        {NAME: entry},
        0.75,
        0.74,
        ("smooth",),
        text={"name": "pydoc"},
        seed=3,
        codes_sha256=digest,
    )
    save_plan(path, plan)
    return path, plan, codes


def test_round_trip(saved):
    path, plan, codes = saved
    assert load_plan(path) == plan
    assert load_plan(path).hash == plan.hash
    found = load_codes(codes_path(path))
    parts = (found.weights, found.parameters, found.low_rank, found.channel_scales)
    assert [list(part) for part in parts] == [[NAME], [NORM], [NAME], [NAME]]
    assert torch.equal(found.weights[NAME].packed, codes.weights[NAME].packed)
    assert torch.equal(found.weights[NAME].scales, codes.weights[NAME].scales)
    assert torch.equal(found.weights[NAME].decode(), codes.weights[NAME].decode())
    assert torch.equal(found.parameters[NORM], codes.parameters[NORM])
    assert torch.equal(found.low_rank[NAME].basis, codes.low_rank[NAME].basis)
    assert torch.equal(found.low_rank[NAME].gain, codes.low_rank[NAME].gain)
    assert torch.equal(found.channel_scales[NAME], codes.channel_scales[NAME])


def test_a_plan_of_another_version_is_refused(saved):
    path, plan, *_ = saved
    other = path.with_name("other.json")
    other.write_text(json.dumps({**plan.to_dict(), "version": 1}))
    with pytest.raises(HalfbyteError, match="plan version is not readable, expected 2, got 1; make the plan again"):
        load_plan(other, with_codes=False)


def test_hash_is_of_the_choice(saved):
    plan = saved[1]
    assert replace(plan, seed=99).hash == plan.hash
    assert replace(plan, layers={NAME: LayerPlan(4, 4, 32)}).hash != plan.hash


def test_truncated(saved):
    path = saved[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(HalfbyteError, match="damaged"):
        load_plan(path)


def test_codes_of_another_plan(saved):
    path = saved[0]
    save_codes(codes_path(path), Codes({NAME: round_to_nearest(torch.randn(8, 64), 32).pack()}, {}, {}))
    with pytest.raises(HalfbyteError, match="codes file belongs to another plan"):
        load_plan(path)
    codes_path(path).unlink()
    with pytest.raises(HalfbyteError, match="codes file is missing"):
        load_plan(path)


def test_a_plan_with_other_layers_than_its_codes(saved):
    path, plan, _ = saved
    for layers in ({}, {**plan.layers, "model.layers.1.mlp.up_proj": plan.layers[NAME]}):
        save_plan(path, replace(plan, layers=layers))
        with pytest.raises(HalfbyteError, match=r"does not fit plan.safetensors, got model.layers.*proj in only one"):
            load_plan(path)


def test_truncated_codes(saved):
    codes = codes_path(saved[0])
    codes.write_bytes(codes.read_bytes()[:-10])
    with pytest.raises(HalfbyteError, match="truncated or corrupt"):
        load_codes(codes)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_malicious_plan_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "plan.pt"
    torch.save({"layers": Bomb(str(marker)), "version": 2}, path)
    with pytest.raises(HalfbyteError, match="refused"):
        load_plan(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", ["{}", "[1, 2]", '{"layers": {}, "version": 99}', '{"layers": {"a": 1}, "version": 2}']
)
def test_other_json_is_not_a_plan(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(HalfbyteError):
        load_plan(path)


def test_bits_out_of_range(saved):
    path, plan, *_ = saved
    data = plan.to_dict()
    data["layers"][NAME]["a_bits"] = 5
    other = path.with_name("other.json")
    other.write_text(json.dumps(data))
    with pytest.raises(HalfbyteError, match="a_bits: value error, expected 4, 8 or 16 bits, got 5"):
        load_plan(other, with_codes=False)


def test_full_disk_leaves_nothing(tmp_path):
    """A tiny file system is the honest way to fill a disk; /dev/full is the portable one."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    from halfbyte.core.files import whole_file

    target = tmp_path / "plan.pt"

    def fill() -> None:
        with whole_file(target) as partial:
            partial.symlink_to("/dev/full")
            partial.write_bytes(b"x" * 100_000)

    with pytest.raises(HalfbyteError, match="disk is full"):
        fill()
    assert list(tmp_path.iterdir()) == []
