"""The optimizer's kernel against `SpielAdamW.update`.

On a GPU where there is one, else in Triton's interpreter, which tests/conftest.py chooses.
"""

import pytest
import torch

import spiel
from spiel.optim import MAX_AGE, _table

pytest.importorskip("triton")
from spiel.ops.triton_adamw import adamw_step

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
VALUES = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
NUM_DELTAS = 3001


def parameter_with_state(ages, state_dtype="float32"):
    """A parameter, its optimizer, and the optimizer's state with `ages`."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(NUM_DELTAS, device=DEVICE))
    optimizer = spiel.SpielAdamW([parameter], **VALUES, state_dtype=state_dtype)
    state = optimizer._state_of(parameter)
    state["age"] = ages
    return parameter, optimizer, state


def ages_of(kind):
    if kind == "one":
        return torch.ones((), dtype=torch.int16)
    ages = torch.randint(1, 400, (NUM_DELTAS,), dtype=torch.int16)
    ages[:5] = torch.tensor([1, 2, MAX_AGE - 1, MAX_AGE, MAX_AGE])
    return ages.to(DEVICE)


@pytest.mark.parametrize(
    ("state_dtype", "tolerance"),
    [
        ("float32", 1e-6),
        # The interpreter cuts bfloat16 off where hardware and torch round.
        ("bfloat16", 1e-5 if HAS_GPU else 2**-6),
    ],
)
@pytest.mark.parametrize("kind", ["one", "each"])
def test_steps_go_as_in_torch(kind, state_dtype, tolerance):
    parameter, optimizer, state = parameter_with_state(ages_of(kind), state_dtype)
    value, age = parameter.detach().clone(), state["age"].clone()
    m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    corrections = _table(*VALUES["betas"], age.device)
    for step in range(4):
        # Of one sign, so that no sum cancels and an error can be relative.
        gradient = (torch.rand(NUM_DELTAS, device=DEVICE) + 0.1) * 10.0 ** (step - 2)
        parameter.grad = gradient.clone()
        optimizer.step()
        adamw_step(value, gradient, m, v, age, corrections, **VALUES)
        close = {"rtol": tolerance, "atol": 0.0}
        torch.testing.assert_close(m, state["exp_avg"], **close)
        torch.testing.assert_close(v, state["exp_avg_sq"], **close)
        torch.testing.assert_close(value, parameter.detach(), rtol=tolerance, atol=tolerance)
        assert torch.equal(age, state["age"])
        assert age.dtype == torch.int16


def test_gradients_of_zero_and_of_both_signs():
    parameter, optimizer, state = parameter_with_state(ages_of("one"))
    value, age = parameter.detach().clone(), state["age"].clone()
    m, v = torch.zeros_like(value), torch.zeros_like(value)
    for _ in range(3):
        gradient = torch.randn(NUM_DELTAS, device=DEVICE).relu_() - 0.5
        gradient[::3] = 0
        parameter.grad = gradient.clone()
        optimizer.step()
        adamw_step(value, gradient, m, v, age, _table(*VALUES["betas"], age.device), **VALUES)
    torch.testing.assert_close(value, parameter.detach(), rtol=1e-6, atol=1e-6)
    assert (m[::3] == 0).all()


def test_no_deltas_only_grow_older():
    none, age = torch.zeros(0, device=DEVICE), torch.tensor(MAX_AGE - 1, dtype=torch.int16)
    table = _table(*VALUES["betas"], age.device)
    for _ in range(2):
        adamw_step(none, none, none, none, age, table, **VALUES)
    assert int(age) == MAX_AGE


def test_tensors_of_another_size_or_not_contiguous_are_refused():
    value, age = torch.zeros(4, device=DEVICE), torch.ones((), dtype=torch.int16)
    table = _table(*VALUES["betas"], age.device)
    for other in (torch.zeros(3, device=DEVICE), torch.zeros(8, device=DEVICE)[::2]):
        with pytest.raises(ValueError, match="all must be contiguous and alike"):
            adamw_step(value, other, value, value, age, table, **VALUES)
