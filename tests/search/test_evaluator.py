"""The KL evaluator is a pure function of the genome, and its shortcut gives the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import kl_per_token
from halfbyte.models.layers import layers_of, units_of
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.arithmetics import per_token
from halfbyte.quant.quant_linear import InputScheme, SharedInput, replace_linear_
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.reference import reference
from tests.tiny_models import FAMILIES

ALL = ("smooth", "r1", "r2", "online", "learned")
A4, A8 = range(2)  # a gene is the index of a format


def quantised(tiny, family, granularity="fused", rows=None):
    source = copy.deepcopy(tiny(family))
    tokens = torch.randint(source.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
    known = reference(source.model, source.family, tokens, device=source.device)
    expected = source.model(tokens).logits
    layers = layers_of(source.model, source.family)
    units = units_of(layers, source.family, granularity)
    shared, scheme = SharedInput(), InputScheme()
    for layer in layers:
        weight = round_to_nearest(source.model.get_submodule(layer.name).weight, 32)
        replace_linear_(source.model, layer.name, weight, shared, scheme)
    evaluator = KLEvaluator(source.model, source.family, units, tokens, known, rows=rows)
    return source, tokens, expected, units, evaluator


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_the_kl_of_whole_forward_passes(tiny, family):
    source, tokens, expected, units, evaluator = quantised(tiny, family)
    genome = tuple(A4 if index % 3 else A8 for index in range(len(units)))
    score = evaluator.score(genome)
    with torch.no_grad():
        logits = torch.cat([source.model(row.unsqueeze(0)).logits for row in tokens])
    direct = kl_per_token(expected.flatten(0, 1), logits.flatten(0, 1)).mean()
    assert score == pytest.approx(float(direct), rel=1e-3)
    assert score > 0


@pytest.mark.parametrize(("family", "transforms"), [("qwen3", ("r1",)), ("qwen2-tied", ALL), ("llama", ALL)])
def test_score_of_a_rotated_model_is_the_kl_of_whole_forward_passes(tiny, family, transforms):
    """R1 moves the final norm's scale into a head that reads a rotated stream."""
    source = copy.deepcopy(tiny(family))
    tokens = torch.randint(source.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
    norm = source.model.get_parameter(f"{source.family.final_norm}.weight").clone()
    known = reference(source.model, source.family, tokens, device=source.device)
    with torch.no_grad():
        expected = source.model(tokens).logits
    units = units_of(layers_of(source.model, source.family), source.family, "fused")
    prepare_(source, tokens, Recipe(transforms, group_size=32), device=source.device)
    rotated = known.for_rotated(norm)
    score = KLEvaluator(source.model, source.family, units, tokens, rotated).score((A4, A8) * (len(units) // 2))
    with torch.no_grad():
        logits = torch.cat([source.model(row.unsqueeze(0)).logits for row in tokens])
    direct = float(kl_per_token(expected.flatten(0, 1), logits.flatten(0, 1)).mean())
    assert score == pytest.approx(direct, abs=1e-4)
    assert 0.01 < score < 0.5


@pytest.mark.parametrize("granularity", ["fused", "layer"])
@pytest.mark.parametrize("rows", [1, 4])
def test_pure_whatever_else_is_measured(tiny, granularity, rows):
    """The same bits alone, in company, in another place of the batch and in another order."""
    _, _, _, units, _ = quantised(tiny, "qwen2", granularity)
    genomes = [(A8,) * len(units), (A4,) * len(units), (A4, A8) * (len(units) // 2)]
    orders = [genomes, genomes[::-1], [genomes[2]], [genomes[1], genomes[2], genomes[1]]]
    found = []
    for order in orders:
        _, _, _, _, evaluator = quantised(tiny, "qwen2", granularity, rows)
        losses = evaluator.losses(order)
        found.append({genome: values.tobytes() for genome, values in zip(order, losses, strict=True)})
    for known in found[1:]:
        assert all(found[0][genome] == values for genome, values in known.items())
    scores = [evaluator.score(genome) for genome in genomes]
    assert scores[0] < scores[2] < scores[1]


def test_part_of_the_text_is_part_of_the_losses(tiny):
    _, _, _, units, evaluator = quantised(tiny, "llama")
    genome = (A4,) * len(units)
    some = evaluator.losses([genome], [2])
    assert evaluator.tokens_run == 24
    assert (evaluator.losses([genome])[:, 2:] == some).all()
    assert evaluator.tokens_run == 3 * 24
    evaluator.losses([genome, genome])
    assert evaluator.tokens_run == 3 * 24  # what is known is not run again
    assert some.shape == (1, 1, 1)  # 24 tokens are one segment


def test_answers_that_are_not_finite_are_an_error(tiny):
    _, _, _, units, evaluator = quantised(tiny, "llama")
    evaluator.head.weight.fill_(float("nan"))
    with pytest.raises(HalfbyteError, match="NaN or Inf"):
        evaluator.score((A8,) * len(units))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_no_distance_to_itself(tiny, dtype):
    """Also in bf16, where rounded logits would show as KL."""
    model = copy.deepcopy(tiny("qwen2").model).to(dtype)
    family = tiny("qwen2").family
    tokens = torch.randint(tiny("qwen2").config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    known = reference(model, family, tokens, device=torch.device("cpu"))
    evaluator = KLEvaluator(model, family, [], tokens, known)
    assert abs(evaluator.score(())) < 2e-5


def test_one_at_a_time_equals_whole_evaluations(tiny):
    _, _, _, units, evaluator = quantised(tiny, "llama")
    quick = list(evaluator.one_at_a_time())
    assert evaluator.tokens_run == 3 * 24 * len(units) * 3 / 4  # two blocks: half of the genomes start at the second
    _, _, _, _, fresh = quantised(tiny, "llama")
    for index, score in enumerate(quick):
        genome = [A8] * len(units)
        genome[index] = A4
        assert fresh.score(tuple(genome)) == score


def test_shared_input_is_quantised_once(tiny, monkeypatch):
    _, _, _, units, evaluator = quantised(tiny, "llama")
    calls, real = [], per_token.fake_quantise_rows

    def counted(x, bits, **more):
        calls.append(bits)
        return real(x, bits, **more)

    monkeypatch.setattr(per_token, "fake_quantise_rows", counted)
    evaluator.score((A8,) * len(units))
    assert len(calls) == 3 * len(units)  # three windows, one quantisation per unit
