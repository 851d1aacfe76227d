"""A plan from an earlier version still means what it meant."""

from __future__ import annotations

import copy
import json

import torch
from safetensors.torch import save_file

from halfbyte.core.files import sha256
from halfbyte.models.layers import layers_of
from halfbyte.plan import codes_path, load_codes, load_plan
from halfbyte.prepare.simulation import become_simulation_, load_for_plan, plan_bits
from halfbyte.quant.int4 import pack_int4
from halfbyte.quant.quant_linear import InputScheme, SharedInput, replace_linear_, set_activation_bits_
from halfbyte.quant.quantisers.rtn import round_to_nearest


def test_a_plan_of_version_1_is_simulated(tiny, tmp_path):
    """Codes and a folded norm, symmetric activations; no word about ranges, rotations or ranks."""
    source = copy.deepcopy(tiny("qwen2"))
    tensors, entries, shared = {}, {}, SharedInput()
    norm = source.model.get_submodule("model.layers.0.input_layernorm").weight
    with torch.no_grad():
        norm.mul_(1.5)
    tensors["model.layers.0.input_layernorm.weight"] = norm.clone()
    for index, layer in enumerate(layers_of(source.model, source.family)):
        coded = round_to_nearest(source.model.get_submodule(layer.name).weight, 64)
        tensors |= {f"{layer.name}.codes": pack_int4(coded.codes), f"{layer.name}.scales": coded.scales}
        entries[layer.name] = {
            "w_bits": 4,
            "a_bits": 4 + 4 * (index % 2),
            "group_size": 64,
            "a_symmetric": True,
            "note": "",
        }
        replace_linear_(source.model, layer.name, coded, shared, InputScheme(symmetric=True))
    set_activation_bits_(source.model, {name: entry["a_bits"] for name, entry in entries.items()})

    path = tmp_path / "old.json"
    save_file(tensors, codes_path(path), metadata={"format": "halfbyte.codes.v1"})
    old = {
        "model_id": source.origin.model_id,
        "fingerprint": source.fingerprint,
        "target": "gguf",
        "granularity": "layer",
        "layers": entries,
        "budget_asked": 0.75,
        "budget_reached": 0.75,
        "transforms": ["smooth"],
        "weights": "rtn",
        "text": {"name": "pydoc"},
        "search": {},
        "seed": 0,
        "versions": {},
        "codes_sha256": sha256(codes_path(path)),
        "version": 2,
    }
    path.write_text(json.dumps(old))

    plan = load_plan(path)
    fresh = load_for_plan(plan, None, device="cpu", dtype="fp32")
    become_simulation_(fresh, load_codes(codes_path(path)), plan.layers)
    set_activation_bits_(fresh.model, plan_bits(plan))
    ids = torch.randint(800, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(fresh.model(ids).logits, source.model(ids).logits)
