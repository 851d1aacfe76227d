"""Loading: every family, units, and one clear line for whatever is wrong with a model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter

from halfbyte.core import environment as hub
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import sha256
from halfbyte.models import families
from halfbyte.models.gguf_file import open_source
from halfbyte.models.layers import layers_of, units_of
from halfbyte.models.loading import find, fingerprint, load
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.walk import prepare_
from tests.tiny_models import FAMILIES

CPU = torch.device("cpu")
IDS = torch.randint(800, (2, 24), generator=torch.Generator().manual_seed(0))


def load_fp32(folder):
    return load(find(str(folder)), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_units(tiny, family):
    source = tiny(family)
    layers = layers_of(source.model, source.family)
    linears = [m for n, m in source.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert len(layers) == len(linears) == 14
    fused = units_of(layers, source.family, "fused")
    assert [unit.name.rpartition(".")[2] for unit in fused[:4]] == ["q+k+v", "o", "gate+up", "down"]
    assert len(fused) == 8
    assert len(units_of(layers, source.family, "layer")) == 14
    assert sum(unit.macs for unit in fused) == sum(linear.weight.numel() for linear in linears)


def test_every_family_is_found_under_its_model_type():
    assert {"qwen2", "qwen3", "llama", "mistral"} <= set(families.FAMILIES)
    for name, family in families.FAMILIES.items():
        assert family.model_type.replace("_", "-") == name


def test_fingerprint_ignores_dtype_and_sees_weights(tiny_folder):
    folder = tiny_folder("qwen2")
    first = load_fp32(folder)
    half = load(find(str(folder)), device=CPU, dtype=torch.bfloat16)
    assert first.fingerprint == half.fingerprint
    with torch.no_grad():
        first.model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1.5)
    assert fingerprint(first.model) != half.fingerprint


def test_unknown_path_and_unreachable_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    for name in (str(tmp_path / "missing"), "no-such-model.gguf", "nobody/no-such-model-here"):
        with pytest.raises(HalfbyteError, match=r"no such model|model configuration cannot be read") as error:
            find(name)
        assert "\n" not in str(error.value)


def test_unknown_family(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(HalfbyteError, match=r"unknown model family, expected one of llama.*got 'gpt2'"):
        find(str(tmp_path))


def test_truncated_weights(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(HalfbyteError, match="weights cannot be read"):
        load_fp32(folder)


def test_missing_weights_are_not_made_up(tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HalfbyteError, match=r"missing.*layers\.1\.mlp\.up_proj"):
        load_fp32(folder)


def test_nan_is_refused_by_name(tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder("qwen2"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HalfbyteError, match=r"layers\.0\.self_attn\.k_proj\.bias: weights are not finite"):
        load_fp32(folder)


def test_corrupt_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(200)))
    with pytest.raises(HalfbyteError, match="truncated or corrupt"):
        find(str(path))
    path.write_bytes(b"not a model at all")
    with pytest.raises(HalfbyteError, match="not a GGUF file"):
        find(str(path))


def test_the_header_of_a_source_is_read_again_when_the_file_changes(tmp_path):
    path = tmp_path / "model.gguf"
    for size in (1, 2):
        writer = GGUFWriter(path, "llama")
        writer.add_array("some.list", [7] * size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        reader = open_source(path)
        assert reader is open_source(path)
        assert reader.fields["some.list"].contents() == [7] * size
    path.unlink()
    with pytest.raises(HalfbyteError, match="no such file"):
        open_source(path)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def mapped_files(tensor):
    """Files whose mapping holds the tensor's data."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux tells what is mapped")
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= tensor.data_ptr() < int(end, 16) and "/" in line:
            found.append(Path(line[line.index("/") :]).name)
    return found


def test_parameters_are_mapped_in_the_stored_dtype_and_copied_in_another(tiny_folder):
    folder = tiny_folder("qwen2-tied")
    for name, parameter in load_fp32(folder).model.named_parameters():
        assert mapped_files(parameter) == ["model.safetensors"], name
    for parameter in load(find(str(folder)), device=CPU, dtype=torch.bfloat16).model.parameters():
        assert mapped_files(parameter) == []


def test_shards_are_mapped_and_none_may_be_missing(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    whole = load_fp32(folder)
    whole.model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    for file in folder.glob("token*"):
        shutil.copy(file, tmp_path / "shards")
    shards = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    parts = load_fp32(tmp_path / "shards")
    assert parts.fingerprint == whole.fingerprint
    assert torch.equal(logits(parts.model), logits(whole.model))
    assert {name for value in parts.model.parameters() for name in mapped_files(value)} == set(shards)
    (tmp_path / "shards" / shards[1]).unlink()
    with pytest.raises(HalfbyteError, match="weights cannot be read"):
        load_fp32(tmp_path / "shards")


@pytest.mark.parametrize("family", ["qwen2", "qwen2-tied"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_mapped_model_is_rotated_and_its_file_is_not(tiny_folder, family, packed):
    """R1 writes to embedding, head and norms in place."""
    folder = tiny_folder(family)
    before = sha256(folder / "model.safetensors")
    mapped, copied = load_fp32(folder), load_fp32(folder)
    copied.model = copy.deepcopy(copied.model)
    assert mapped_files(mapped.model.model.embed_tokens.weight)
    assert not mapped_files(copied.model.model.embed_tokens.weight)
    recipe = Recipe(("smooth", "r1", "r2"), "rtn", group_size=32)
    for source in (mapped, copied):
        prepare_(source, IDS, recipe, device=CPU, packed=packed)
    assert torch.equal(logits(mapped.model), logits(copied.model))
    assert sha256(folder / "model.safetensors") == before


def test_the_demo_is_the_same_model_in_every_dtype():
    """Its channels are rescaled in fp32 whatever it is loaded in."""
    found = [load(find("demo"), device=torch.device("cpu"), dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].dtype == torch.bfloat16
