"""Which quantisation configs can be read, and why others cannot."""

from __future__ import annotations

import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.checkpoint_format import GPTQ_V1, GPTQ_V2, PACK_QUANTIZED, checkpoint_format
from tests.quantised_folders import compressed_config, gptq_config, scheme

ONLINE = {
    "config_groups": {"R4": {"type": "hadamard", "apply": [{"location": "input", "targets": ["re:.*down_proj"]}]}}
}
FOLDED = {"config_groups": {"R1": {"apply": [{"location": "weight_output"}, {"location": "weight_input"}]}}}


def test_what_can_be_read():
    for config, layout, sizes in [
        (gptq_config(128), GPTQ_V1, (128,)),
        (gptq_config(checkpoint_format="gptq_v2"), GPTQ_V2, (32,)),
        (gptq_config(format="gptq_v2"), GPTQ_V2, (32,)),
        (gptq_config(dynamic={"+:.*down_proj": {"group_size": 64}, "-:lm_head": {}}), GPTQ_V1, (32, 64)),
        (compressed_config(), PACK_QUANTIZED, (32,)),
        (compressed_config(scheme(8), scheme(4, group_size=128)), PACK_QUANTIZED, (32, 128)),
        (compressed_config(scheme(actorder="weight"), transform_config=FOLDED), PACK_QUANTIZED, (32,)),
    ]:
        found = checkpoint_format(config, where="config.json")
        assert (found.layout, found.group_sizes) == (layout, sizes)


def test_what_may_need_an_order():
    assert checkpoint_format(gptq_config(desc_act=True), where="").needs_order
    assert not checkpoint_format(gptq_config(), where="").needs_order
    grouped = compressed_config()
    grouped["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    assert checkpoint_format(grouped, where="").needs_order


def test_what_is_left_behind_is_said():
    plain = checkpoint_format(compressed_config(), where="")
    whole = checkpoint_format(compressed_config(scheme(8), kv_cache_scheme={"num_bits": 8}), where="")
    assert plain.notes == ()
    assert [note.split(" is ")[0] for note in whole.notes] == [
        "its activation quantisation",
        "its KV cache quantisation",
    ]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "awq", "bits": 4}, "cannot be taken over, expected compressed-tensors or gptq, got awq"),
        ({"quant_method": "bitsandbytes"}, "got bitsandbytes"),
        ({"quant_method": "fp8"}, "got fp8"),
        ({"bits": 4}, "got unknown"),
        (gptq_config(bits=8), "bits cannot be taken over, expected 4, got 8"),
        (gptq_config(sym=False), "sym cannot be taken over, expected True, got False"),
        (gptq_config(group_size=-1), "scales are not in groups, expected a positive group_size, got -1"),
        (gptq_config(checkpoint_format="marlin"), "unknown GPTQ format, expected gptq or gptq_v2, got marlin"),
        (gptq_config(pack_dtype="int16"), "codes are packed otherwise, expected int32, got int16"),
        (gptq_config(dynamic={"+:.*down_proj": {"bits": 8}}), "bits cannot be taken over, expected 4, got 8"),
        (compressed_config(scheme(num_bits=8)), "weights: num_bits cannot be taken over, expected 4, got 8"),
        (compressed_config(scheme(symmetric=False)), "symmetric cannot be taken over, expected True, got False"),
        (compressed_config(scheme(type="float")), "weights: type cannot be taken over, expected int, got float"),
        (compressed_config(scheme(strategy="channel", group_size=None)), "strategy cannot be taken over"),
        (compressed_config(format="int-quantized"), "format cannot be taken over, expected pack-quantized"),
        (compressed_config(quantization_status="frozen"), "quantization_status cannot be taken over"),
        (compressed_config(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity format cannot be taken over"),
        (compressed_config(transform_config=ONLINE), "weights are stored for inputs that are transformed at run time"),
        (compressed_config(config_groups={}), "scales are not in groups"),
    ],
)
def test_what_cannot(config, match):
    with pytest.raises(HalfbyteError) as raised:
        checkpoint_format(config, where="config.json")
    assert match in str(raised.value)
    assert str(raised.value).startswith("config.json")
