import pytest

from bench import gpu, harness
from jattrib.core.errors import InvalidInputError


def row(case, other, ratio):
    return harness.Row(case, ratio, 1.0, other, ratio, "rows/s", "a card", {})


def test_verdicts_hold_the_worst_and_the_best_ratio_against_each_goal():
    rows = [
        row("resnet bfloat16: dense 512 x 4 to 4, ceiling", "a product of 8 x 8 bfloat16", 0.7),
        row("mlp: dense 512 x 4 to 4, ceiling", "a product of 8 x 8 bfloat16", 0.2),  # float32: no part of the goal
        row("mlp: sketch 512 x 4 to 4, ceiling", "a copy", 0.9),
        row("gpt: sketch 512 x 4 to 4, ceiling", "a copy", 0.5)._asdict(),
        row("k 4096, 256 columns: factor and solve", "jax.scipy.linalg.cho_solve", 0.8),
        row("k 1024, 256 columns: factor and solve", "jax.scipy.linalg.cho_solve", 5.0),
    ]
    assert gpu.verdicts(rows) == [
        "dense, of the bfloat16 matrix ceiling: met: 0.70 to 0.70, of 0.6 or more",
        "dense, beside fast_jl: not measured",
        "sketch, of the copy bandwidth: met in part: 0.50 to 0.90, of 0.8 or more",
        "sketch, beside dattri's SJLT: not measured",
        "kernel inverse, beside cuSOLVER: missed: 0.80 to 0.80, of 1 or more",
    ]


def test_without_a_card_it_says_what_to_do():
    with pytest.raises(InvalidInputError, match=r"(?s)computes on cpu.*a CUDA GPU.*cuda,peers.*--smoke"):
        gpu.require_card(smoke=False)
    assert gpu.require_card(smoke=True) == "cpu"


def test_the_smoke_plan_is_the_plan_of_a_card():
    assert list(gpu.plan(smoke=True)) == list(gpu.plan(smoke=False)) == ["matrix", "projection", "kernel_inverse"]


def test_matrices_are_compared_entry_by_entry(monkeypatch):
    monkeypatch.setattr(gpu, "dense_projection", broken(gpu.dense_projection))
    with pytest.raises(AssertionError, match="dense on cpu"):
        gpu.same_matrix("interpret")


def broken(project):
    """Flip a sign of what any backend but the reference makes."""

    def made(*args, backend, **kwargs):
        y = project(*args, backend="reference", **kwargs)
        return y if backend == "reference" else y.at[0, 0].multiply(-1)

    return made
