"""Which transforms help: the model stays, what is nearly unquantised loses nearly nothing, less is done again."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.models.modules import linear
from halfbyte.prepare import screen
from halfbyte.prepare.candidates import menus_of
from halfbyte.prepare.screen import VARIANTS, WITH_R1, screened
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.reference import reference

CPU = torch.device("cpu")


def run(source, mean_bits, **more):
    draw = torch.Generator().manual_seed(0)
    calib, judged = (torch.randint(source.config.vocab_size, (count, 32), generator=draw) for count in (4, 2))
    known = reference(source.model, source.family, judged, device=CPU)
    menus = menus_of(source, 4.8)
    found = screened(source, calib, judged, known, menus, mean_bits, "rtn", device=CPU, **more)
    return found, KLEvaluator(source.model, source.family, [], judged, known).score(())


@pytest.mark.parametrize(("family", "variants"), [("qwen2", VARIANTS + WITH_R1), ("llama-tied", VARIANTS)])
def test_every_variant_is_the_same_model_but_for_rounding(tiny, family, variants):
    """Eight bits lose little in all of them, four bits lose more; afterwards the model is as it was."""
    source = copy.deepcopy(tiny(family))
    before = copy.deepcopy(source.model.state_dict())
    fine, itself = run(source, 8.5)
    assert list(fine) == [",".join(names) for names in variants]
    assert all(0 < loss < 2e-3 for loss in fine.values()), fine
    assert abs(itself) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    coarse, _ = run(source, 4.5)
    assert all(coarse[name] > 5 * loss for name, loss in fine.items())


def test_r1_helps_where_channels_of_the_stream_stand_out(tiny):
    """A reader's columns that differ in size are spread evenly by R1, and by nothing else that is on offer."""
    source = copy.deepcopy(tiny("llama"))
    for index in range(source.config.num_hidden_layers):
        for norm, readers in source.family.norm_readers:
            block = source.model.get_submodule(f"{source.family.blocks}.{index}")
            scales = torch.randn(source.config.hidden_size, generator=torch.Generator().manual_seed(index)).exp()
            for reader in readers:
                linear(block, reader).weight.data *= scales
            block.get_submodule(norm).weight.data /= 10 * scales
    found, _ = run(source, 4.5)
    assert found["r1"] < found[""]


def test_what_another_variant_rounded_is_not_rounded_again(tiny, monkeypatch):
    """R2 changes v and o alone; behind plain norms smooth leaves q, k and gate alone."""
    done, encode_ = [], screen.encode_

    def counted(jobs, *more, **named):
        done.append(jobs[0].where)
        encode_(jobs, *more, **named)

    monkeypatch.setattr(screen, "encode_", counted)
    source = tiny("llama")
    found, _ = run(source, 4.5, keep_on=CPU)
    parts = [name.rpartition(".")[2] for name in done]
    times = {part: parts.count(part) / source.config.num_hidden_layers for part in set(parts)}
    assert times["v_proj"] > 6  # of 8 variants; no scales may be the best ones
    assert 2 <= times["q_proj"] <= 3  # as it is, smooth, R1
    assert 2 <= times["gate_proj"] <= 3
    assert 2 <= times["up_proj"] <= times["down_proj"] <= 4
    assert len(found) == 8
