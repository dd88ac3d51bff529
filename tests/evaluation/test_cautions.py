"""What the evaluator warns of beside its scores."""

import pytest

from carelm.evaluation.results import _cautions
from carelm.recipe_file import load_recipe


def measured(precision: str, device: str) -> dict:
    return {"precision": precision, "bits": None, "conditions": {"device": device}, "unused_generation_config": {}}


@pytest.mark.parametrize("precision, device, warned", [
    ("bf16", "NVIDIA H100 80GB HBM3", True),
    ("fp16", "Tesla T4", True),
    ("fp32", "Tesla T4", False),
    ("bf16", "CPU, 2 cores", False),
])  # fmt: skip
def test_16_bits_on_a_gpu_are_said_to_move_scores_where_nothing_differs(precision, device, warned):
    cautions = _cautions(load_recipe([], usage=""), {"base": measured(precision, device)}, pairs=0)
    assert any("base computed in 16 bits on a GPU" in caution for caution in cautions) == warned
