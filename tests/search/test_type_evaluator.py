"""KL of mixtures of ggml types: a pure function of the genome, equal to whole forward passes of what was encoded."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.evaluate.quality import kl_per_token
from halfbyte.models.modules import is_tied, linear
from halfbyte.prepare.candidates import encode_candidates_, menus_of
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.ggml.inputs import InputRounding
from halfbyte.quant.ggml.types import decode_tensor
from halfbyte.search import reference as reference_module
from halfbyte.search import type_evaluator
from halfbyte.search.reference import reference
from halfbyte.search.type_evaluator import ORIGINAL, MixedTypes, TypeEvaluator
from tests.tiny_models import FAMILIES

CPU = torch.device("cpu")
FOLDED = ("smooth", "r2")
ROTATED = ("smooth", "r1", "r2")


@pytest.fixture
def mixed(tiny, tmp_path):
    def make(family, transforms=FOLDED, dtype=torch.float32):
        source = copy.deepcopy(tiny(family))
        source.model.to(dtype)
        tokens = torch.randint(source.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = source.model(tokens).logits
        head = linear(source.model, source.family.head).weight
        known = reference(source.model, source.family, tokens, device=CPU)
        menus = menus_of(source, 4.8)
        recipe = Recipe(transforms, "rtn", group_size=32, scale_bits=8)
        made = encode_candidates_(source, tokens, recipe, menus, tmp_path, device=CPU)
        types = MixedTypes(source.model, source.family, menus, made.encoded, CPU)
        return source, tokens, expected, types, TypeEvaluator(types, tokens, known, rows=2, head=head), made

    return make


def some_genome(types, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return tuple(int(torch.randint(len(menu.types), (), generator=draw)) for menu in types.matrices)


@pytest.mark.parametrize(("family", "transforms"), [*((family, FOLDED) for family in FAMILIES), ("qwen2", ROTATED)])
def test_score_is_the_kl_of_whole_forward_passes(mixed, family, transforms):
    """Embedding and head included: a tied head is another matrix for the reference's probabilities too."""
    source, tokens, expected, types, evaluator, made = mixed(family, transforms)
    for genome in (some_genome(types), (0,) * len(types.matrices)):
        score = evaluator.score(genome)
        tied = is_tied(source.model, source.family)
        for menu, gene in zip(types.matrices, genome, strict=True):
            weight = decode_tensor(made.encoded.rows(menu.name, menu.types[gene]), menu.types[gene])
            linear(source.model, menu.name).weight = torch.nn.Parameter(weight)
            if tied and menu.name == source.family.embedding:
                linear(source.model, source.family.head).weight = linear(source.model, menu.name).weight
        head = types.matrices[types.head].types[genome[types.head]]
        rounding = InputRounding(linear(source.model, source.family.head), head)  # those in blocks have theirs
        with torch.no_grad():
            logits = source.model(tokens).logits
        rounding.handle.remove()
        direct = kl_per_token(expected.flatten(0, 1), logits.flatten(0, 1)).mean()
        assert score == pytest.approx(float(direct), rel=1e-3)
        assert score > 0
        types.load(types.original)


@pytest.mark.parametrize("family", ["qwen2", "llama-tied"])
def test_scores_do_not_depend_on_company(mixed, family):
    *_, types, evaluator, _ = mixed(family)
    genomes = [some_genome(types, seed) for seed in range(3)]
    alone = {genome: evaluator.losses([genome]) for genome in genomes}
    evaluator.forget()
    together = evaluator.losses(genomes[::-1])
    for genome, losses in zip(genomes[::-1], together, strict=True):
        assert (losses == alone[genome][0]).all()


@pytest.mark.parametrize("family", ["qwen2", "llama-tied"])
def test_one_matrix_at_a_time_is_the_score_of_the_whole(mixed, family):
    *_, types, evaluator, _ = mixed(family)
    found = dict(evaluator.each_alone([0] * len(types.matrices)))
    assert sorted(found) == list(range(len(types.matrices)))
    evaluator.forget()
    for at, loss in found.items():
        genome = [ORIGINAL] * len(types.matrices)
        genome[at] = 0
        assert evaluator.score(tuple(genome)) == pytest.approx(loss, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(
    ("family", "transforms"),
    [("qwen3", FOLDED), ("llama-tied", FOLDED), ("qwen2", ROTATED), ("llama", ("r1",)), ("llama", ("smooth", "r1"))],
)
def test_the_unquantised_model_keeps_its_function(mixed, family, transforms):
    source, tokens, expected, types, evaluator, _ = mixed(family, transforms)
    assert abs(evaluator.score(types.original)) < 1e-5
    with torch.no_grad():
        logits = source.model(tokens).logits
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "llama-tied"])
def test_packed_scores_are_those_of_decoded_weights_to_the_last_bit(mixed, monkeypatch, family, dtype):
    monkeypatch.setattr(type_evaluator, "SIDE_BY_SIDE", 5)
    monkeypatch.setattr(reference_module, "CHUNK_ROWS", 100)  # of the head, at once
    source, tokens, _, types, evaluator, made = mixed(family, dtype=dtype)
    model = copy.deepcopy(source.model)
    packed = MixedTypes(model, source.family, types.matrices, made.encoded, CPU, packed=True)
    on_device = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    assert on_device < 0.01 * sum(menu.rows * menu.columns for menu in types.matrices)
    assert is_tied(model, source.family) == is_tied(source.model, source.family)
    other = TypeEvaluator(packed, tokens, evaluator.reference, rows=2)
    genomes = [some_genome(types, seed) for seed in range(3)]
    assert (evaluator.losses(genomes) == other.losses(genomes)).all()
    alone = [(evaluator, types), (other, packed)]
    found = [list(one.each_alone([0] * len(known.matrices))) for one, known in alone]
    assert found[0] == found[1]
    assert (evaluator.losses([types.original]) == other.losses([types.original])).all()


def test_rows_that_stay_on_the_device_are_read_once(mixed, monkeypatch):
    """Where there is room, as on a large GPU."""
    _, _, _, types, evaluator, made = mixed("qwen2")
    genomes = [some_genome(types, seed) for seed in range(3)]
    expected = evaluator.losses(genomes)
    monkeypatch.setattr(types, "_keeps", True)
    for _ in range(2):
        types.load(types.original)
        evaluator.forget()
        assert (evaluator.losses(genomes) == expected).all()
        monkeypatch.setattr(made.encoded, "rows", None)  # would fail
