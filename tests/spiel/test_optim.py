import copy
import pickle

import pytest
import torch

import spiel
from spiel import adamw, optim
from spiel.reselection import Exchange

STATE_DTYPES = ["float32", "bfloat16", "8bit"]


def parameter_with_gradient(values, gradient):
    parameter = torch.nn.Parameter(torch.tensor(values))
    parameter.grad = torch.tensor(gradient)
    return parameter


def test_adamw_with_one_age_and_no_eps_is_torchs_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    optimizers = [
        spiel.SpielAdamW([ours], lr=0.1, eps=0.0),
        torch.optim.AdamW([theirs], lr=0.1, eps=0.0, weight_decay=0.0),
    ]
    for _ in range(20):
        ours.grad = torch.randn(300)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_eps_stands_before_bias_correction_and_decay_after_the_update():
    parameter = parameter_with_gradient([1.0], [0.5])
    optimizer = spiel.SpielAdamW([parameter], lr=0.1, eps=0.3, weight_decay=2.0)
    optimizer.step()
    m, v = 0.1 * 0.5, 0.001 * 0.25
    step = 0.1 * m / ((v**0.5 + 0.3) * (1 - 0.9) / (1 - 0.999) ** 0.5)
    assert parameter.item() == pytest.approx((1.0 - step) * (1 - 0.1 * 2.0), rel=1e-5)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_every_weight_has_its_own_age_after_a_reselection(state_dtype):
    parameter = parameter_with_gradient([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
    optimizer = spiel.SpielAdamW([parameter], lr=0.01, state_dtype=state_dtype)
    for _ in range(7):
        optimizer.step()
    change = Exchange(torch.tensor([4, 5, 6]), torch.tensor([2, 0, 1]), torch.tensor([1]))
    seeds = torch.tensor([0.4])
    optimizer.reselect(parameter, change, seeds, seeds.square(), num_steps=5)
    state = optimizer.state[parameter]
    assert state["age"].tolist() == [8, 5, 8]
    assert state["age"].dtype == torch.int16
    if state_dtype == "float32":
        expected = [0.3 * (1 - 0.9**7), 0.4 * (1 - 0.9**5), 0.2 * (1 - 0.9**7)]
        assert state["exp_avg"].tolist() == pytest.approx(expected, rel=1e-5)
        assert state["exp_avg_sq"][1].item() == pytest.approx(0.16 * (1 - 0.999**5), rel=1e-4)
    optimizer.step()
    assert state["age"].tolist() == [9, 6, 9]


def test_ages_saturate_and_do_not_overflow():
    parameter = parameter_with_gradient([1.0], [0.1])
    optimizer = spiel.SpielAdamW([parameter], lr=1e-3)
    optimizer.step()
    optimizer.state[parameter]["age"].fill_(adamw.MAX_AGE)
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[parameter]["age"].item() == adamw.MAX_AGE


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_updating_many_together_is_updating_each_alone(state_dtype, monkeypatch):
    monkeypatch.setattr(optim, "BUNCH", 100)  # some bunches of several, one of a single large one
    torch.manual_seed(0)

    def parameters():
        sizes = [30, 300, 0, 60, 7, 41]
        dtypes = [torch.float32, torch.float32, torch.float32, torch.bfloat16] + 2 * [torch.float32]
        return [
            torch.nn.Parameter(torch.zeros(n, dtype=dtype))
            for n, dtype in zip(sizes, dtypes, strict=True)
        ]

    together, alone = parameters(), parameters()
    options = {"lr": 0.01, "weight_decay": 0.1, "state_dtype": state_dtype}
    one = spiel.SpielAdamW(together, **options)
    each = [spiel.SpielAdamW([parameter], **options) for parameter in alone]
    for step in range(4):
        for own, other in zip(together, alone, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
            if step == 1 and len(own) in (30, 7):  # of these the ages differ from here on
                ages = torch.arange(1, len(own) + 1, dtype=torch.int16)
                one.state[own]["age"] = ages
                each[[id(p) for p in together].index(id(own))].state[other]["age"] = ages.clone()
        one.step()
        for optimizer in each:
            optimizer.step()
    for own, other in zip(together, alone, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_every_state_dtype_converges(state_dtype):
    torch.manual_seed(0)
    target = torch.randn(1000)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = spiel.SpielAdamW([parameter], lr=0.03, state_dtype=state_dtype)
    for _ in range(300):
        optimizer.zero_grad()
        (parameter - target).square().sum().backward()
        optimizer.step()
    assert (parameter - target).abs().mean() < 0.02
    assert optimizer.state[parameter]["age"].item() == 301


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_state_bytes_per_weight_are_as_documented(state_dtype):
    parameter = torch.nn.Parameter(torch.zeros(4096))
    optimizer = spiel.SpielAdamW([parameter], state_dtype=state_dtype)
    parameter.grad = torch.ones(4096)
    optimizer.step()
    same = Exchange(torch.arange(4096), torch.arange(4096), torch.tensor([7]))
    optimizer.reselect(parameter, same, torch.ones(1), torch.ones(1), 5)
    moments = {"float32": 8, "bfloat16": 4, "8bit": 2 + 2 / 64}[state_dtype]
    size = sum(value.nbytes for value in optimizer.state[parameter].values())
    assert size / 4096 == moments + 2


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_loaded_optimizer_goes_on_bit_for_bit(state_dtype):
    torch.manual_seed(0)
    gradients = torch.randn(8, 500)
    runs = []
    for resumes in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(500))
        optimizer = spiel.SpielAdamW([parameter], lr=0.1, state_dtype=state_dtype)
        for step, gradient in enumerate(gradients):
            parameter.grad = gradient.clone()
            optimizer.step()
            if step == 2:
                grown = torch.arange(0, 500, 3)
                change = Exchange(torch.arange(500), torch.arange(500), grown)
                seed = gradient[grown]
                optimizer.reselect(parameter, change, seed, seed.square(), 2)
            if resumes and step == 4:
                saved = optimizer.state_dict()
                optimizer = spiel.SpielAdamW([parameter], lr=0.1, state_dtype=state_dtype)
                optimizer.load_state_dict(saved)
                assert optimizer.state[parameter]["age"].dtype == torch.int16
        runs.append(parameter.detach().clone())
    assert torch.equal(*runs)


def test_sm3_on_deltas_raises_rows_and_columns_to_the_largest_u():
    import peft

    base = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    config = spiel.SpielConfig(growth="ma", num_tunable_weights=3, target_modules=["0"])
    model = peft.get_peft_model(base, config)
    spiel.set_support(model, {"0": torch.tensor([0, 2, 3])})
    optimizer = spiel.SpielSM3(model, lr=1.0, eps=0.0)
    (parameter,) = (p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])  # at (0, 0), (0, 2) and (1, 0)
    optimizer.step()
    row, col = optimizer.momenta(parameter)
    assert row.tolist() == [4.0, 9.0]
    assert col.tolist() == [9.0, 0.0, 4.0]
    assert parameter.tolist() == [-1.0, -1.0, -1.0]
    parameter.grad = torch.tensor([1.0, 0.0, 0.0])
    optimizer.step()  # u = min(4, 9) + 1
    assert parameter[0].item() == pytest.approx(-1 - 5**-0.5)
    assert row.tolist() == [5.0, 9.0]


def test_sm3_momentum_of_replaced_slots_is_forgotten():
    parameter = parameter_with_gradient([1.0, 2.0], [0.1, 0.2])
    optimizer = spiel.SpielSM3([parameter], lr=0.1, momentum=0.9)
    optimizer.step()
    kept = optimizer.state[parameter]["momentum"][1].item()
    change = Exchange(torch.tensor([1, 2]), torch.tensor([1, 0]), torch.tensor([1]))
    optimizer.reselect(parameter, change)
    assert optimizer.state[parameter]["momentum"].tolist() == [kept, 0.0]


@pytest.mark.parametrize("optimizer", [spiel.SpielAdamW, spiel.SpielSM3])
def test_parameters_that_are_no_deltas_train_too(optimizer):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    x, y = torch.randn(50, 4), torch.randn(50, 3)
    optimizer = optimizer(layer, lr=0.05)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must each be in"),
        ({"state_dtype": "int4"}, "'int4' must be one of float32, bfloat16, 8bit"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        spiel.SpielAdamW([torch.nn.Parameter(torch.zeros(1))], **values)


def stepped(optimizer, **options):
    optimizer = optimizer([parameter_with_gradient([1.0] * 300, [0.1] * 300)], **options)
    optimizer.step()
    return optimizer


def test_state_of_another_dtype_is_refused():
    for saved in STATE_DTYPES:
        state = stepped(spiel.SpielAdamW, state_dtype=saved).state_dict()
        for own in STATE_DTYPES:
            optimizer = stepped(spiel.SpielAdamW, state_dtype=own)
            if own == saved:
                optimizer.load_state_dict(state)
                continue
            with pytest.raises(ValueError, match=f"state_dtype {saved}, but .* has {own}"):
                optimizer.load_state_dict(state)


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD, spiel.SpielSM3])
def test_state_of_another_optimizer_is_refused(other):
    optimizer = stepped(spiel.SpielAdamW)
    with pytest.raises(ValueError, match=r"of another optimizer: it lacks .*state_dtype"):
        optimizer.load_state_dict(stepped(other).state_dict())
    optimizer.step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("optimizer", [spiel.SpielAdamW, spiel.SpielSM3])
def test_a_copy_goes_on_as_the_original(optimizer, duplicate):
    original = stepped(optimizer)
    twin = duplicate(original)
    twin.load_state_dict(twin.state_dict())
    parameters = [o.param_groups[0]["params"][0] for o in (original, twin)]
    for own, parameter in zip((original, twin), parameters, strict=True):
        parameter.grad = torch.full((300,), 0.2)
        own.step()
    assert torch.equal(*parameters)


def test_bias_correction_is_kept_for_few_betas():
    parameter = parameter_with_gradient([1.0], [0.1])
    optimizer = spiel.SpielAdamW([parameter])
    for step in range(20):
        optimizer.param_groups[0]["betas"] = (0.9 - step / 100, 0.999)
        optimizer.step()
    assert adamw._table.cache_info().currsize <= 8


def test_sm3_accumulators_are_fp32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = spiel.SpielSM3([torch.nn.Parameter(torch.ones(3, 2))])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    (state,) = optimizer.state.values()
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_sm3s_momentum_is_that_of_updates_not_of_steps():
    p = parameter_with_gradient([1.0], [2.0])
    optimizer = spiel.SpielSM3([p], lr=0.1, eps=0.0, momentum=0.9)
    optimizer.step()
    assert p.item() == pytest.approx(1 - 0.1 * 0.1)
    p.grad = torch.tensor([0.0])
    optimizer.step()
    assert p.item() == pytest.approx(0.99 - 0.1 * 0.09)


def test_sm3s_decay_is_scaled_by_the_rate():
    p = parameter_with_gradient([1.0], [0.0])
    spiel.SpielSM3([p], lr=0.1, weight_decay=2.0).step()
    assert p.item() == pytest.approx(0.8)


def test_sm3_of_a_matrix_takes_the_smaller_of_row_and_column():
    w = parameter_with_gradient([[0.0, 0.0]] * 2, [[1.0, 2.0], [3.0, 4.0]])
    optimizer = spiel.SpielSM3([w], lr=1.0, eps=0.0)
    optimizer.step()
    before, w.grad = w[0, 1].item(), torch.ones(2, 2)
    optimizer.step()  # its row has seen 4 at most, its column 16
    assert w[0, 1].item() - before == pytest.approx(-((4 + 1) ** -0.5))


def test_sm3s_eps_does_not_add_up():
    p = parameter_with_gradient([0.0], [0.0])
    optimizer = spiel.SpielSM3([p], eps=1.0)
    optimizer.step()
    assert optimizer.state[p]["entries"].tolist() == [0.0]
