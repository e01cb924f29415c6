"""Which modules are adapted, what each one gets of the budget, and what is refused."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import spiel
from spiel.budget import count_parameters, share_out
from spiel.model import spiel_layers


def targets(model):
    return set(spiel_layers(model)[1])


def names(*parts, layers=(0, 1)):
    kinds = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn"}
    kinds |= {"o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
    parts = parts or tuple(kinds)
    return {f"model.layers.{i}.{kinds[part]}.{part}" for i in layers for part in parts}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, names()),
        ({"target_modules": "all-linear"}, names()),
        ({"target_modules": "All-Linear"}, names()),
        ({"target_modules": ["q_proj", "v_proj"]}, names("q_proj", "v_proj")),
        ({"target_modules": r".*\.1\..*(q|v)_proj"}, names("q_proj", "v_proj", layers=(1,))),
        ({"exclude_modules": ["q_proj"]}, names() - names("q_proj")),
        ({"exclude_modules": r".*mlp.*"}, {name for name in names() if "mlp" not in name}),
        ({"layers_to_transform": 1}, names(layers=(1,))),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, names(layers=(0,))),
        (
            {"target_modules": ["up_proj"], "layers_to_transform": [1]},
            names("up_proj", layers=(1,)),
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, names("q_proj") | {"lm_head"}),
        ({"modules_to_save": ["mlp"]}, {name for name in names() if "mlp" not in name}),
    ],
)
def test_targets(llama, adapt, values, expected):
    model = adapt(llama(), num_tunable_weights=300, **values)
    assert targets(model) == expected
    assert model.peft_config["default"].num_deltas.keys() == expected
    ids = torch.randint(3, 48, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in spiel_layers(model)[1].values():
        assert layer.spiel_deltas["default"].grad is not None


@pytest.mark.parametrize("first", ["all-linear", ["q_proj"], r".*mlp\.\w+_proj"])
def test_a_second_adapter_on_all_linear_modules(llama, adapt, first):
    model = adapt(llama(), target_modules=first, num_tunable_weights=300)
    model.add_adapter("other", spiel.SpielConfig(target_modules="all-linear", density=0.2))
    assert set(spiel_layers(model, "other")[1]) == names()
    assert model.peft_config["other"].num_deltas.keys() == names()
    assert not any("spiel" in name for name in model.peft_config["other"].target_modules)
    regex = spiel.SpielConfig(target_modules=r".*layers\.0\..*_proj", density=0.1)
    model.add_adapter("third", regex)
    assert set(spiel_layers(model, "third")[1]) == names(layers=(0,))


def test_density_is_of_all_parameters_and_the_same_for_a_later_adapter(llama, adapt):
    base = llama()
    total = sum(p.numel() for p in base.parameters())
    model = adapt(base, density=0.05, modules_to_save=["lm_head"])
    assert count_parameters(model.base_model.model) == total
    first = model.peft_config["default"].num_deltas
    assert int(0.05 * total) - len(first) <= sum(first.values()) <= int(0.05 * total)
    model.add_adapter("other", spiel.SpielConfig(density=0.05))
    assert model.peft_config["other"].num_deltas == first


def test_the_budget_is_shared_out_by_size():
    shapes = {"a": (10, 10), "b": (10, 20), "c": (1, 1)}
    assert share_out(100, shapes) == {"a": 33, "b": 66, "c": 0}
    assert share_out(301, shapes) == {"a": 100, "b": 200, "c": 1}
    with pytest.raises(ValueError, match="budget of 302 deltas is more than the 301 targeted"):
        share_out(302, shapes)
    with pytest.raises(ValueError, match="budget of 1 deltas is too small to be spread over 3"):
        share_out(1, shapes)


def test_a_budget_above_the_targeted_weights_is_refused(two_layers, adapt):
    with pytest.raises(ValueError, match="lower density or num_tunable_weights, or target more"):
        adapt(two_layers(), density=1.0)


def test_a_weight_may_be_adapted_whole(two_layers, adapt):
    model = adapt(two_layers(), num_tunable_weights=12 * 16 + 16 * 6)
    for _, (indices, values) in spiel.get_deltas(model).items():
        assert torch.equal(indices, torch.arange(len(values), dtype=torch.int32))


def test_no_targeted_module_is_refused(two_layers, adapt):
    with pytest.raises(ValueError, match="not found in the base model"):
        adapt(two_layers(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"All modules were excluded|No modules were targeted"):
        adapt(two_layers(), exclude_modules=["first", "second"])
    with pytest.raises(ValueError, match=r"no layer is one of layers_to_transform \[7\]"):
        adapt(two_layers(), layers_to_transform=[7])


class Unsupported(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(8, 8)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def linear8bit():
    return pytest.importorskip("bitsandbytes").nn.Linear8bitLt(8, 8)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: nn.Embedding(8, 8), "Embedding"),
        (lambda: nn.Conv2d(8, 8, 3), "Conv2d"),
        (lambda: nn.LayerNorm(8), "LayerNorm"),
        (lambda: nn.MultiheadAttention(8, 2), "MultiheadAttention"),
        (lambda: Scaled(8, 8), "Scaled"),
        (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "ParametrizedLinear"),
        (lambda: nn.Linear(8, 8).to(torch.float8_e4m3fn), "Linear"),
        (linear8bit, "Linear8bitLt"),
        (
            lambda: peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), LORA).base_model.model[0],
            "Linear",
        ),
    ],
)
def test_unsupported_layers_are_refused_by_name(adapt, make, kind):
    with pytest.raises(TypeError, match=f"cannot adapt layer, a .*{kind}: .*leave this module out"):
        adapt(Unsupported(make()), target_modules=["layer"])


LORA = peft.LoraConfig(r=2, target_modules=["0"])


class Coded(torch.Tensor):
    """Stands for quantised tensors of classes of their own, which say that they are floats."""


def test_a_weight_of_a_class_of_its_own_is_refused(adapt):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.Tensor._make_subclass(Coded, torch.zeros(8, 8)))
    with pytest.raises(TypeError, match="cannot adapt layer"):
        adapt(Unsupported(layer), target_modules=["layer"])


def test_all_linear_leaves_out_what_cannot_be_adapted(adapt):
    with pytest.warns(
        UserWarning, match=r"cannot adapt 1 of the 2 modules .* leaves .* out: layer$"
    ):
        model = adapt(Unsupported(Scaled(8, 8)), target_modules="all-linear")
    assert targets(model) == {"head"}
    with pytest.raises(TypeError, match="cannot adapt 0"):
        adapt(nn.Sequential(Scaled(8, 8)), target_modules="all-linear")


def test_a_model_of_fused_experts_is_told_how_few_weights_have_the_budget():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_local_experts": 8}
    config = MixtralConfig(vocab_size=40, num_hidden_layers=1, num_attention_heads=2, **sizes)
    base = MixtralForCausalLM(config)
    k = int(0.01 * count_parameters(base))
    with pytest.warns(UserWarning, match="fused experts") as told:
        model = peft.get_peft_model(base, spiel.SpielConfig())
    (message,) = [str(each.message) for each in told if "fused experts" in str(each.message)]
    adapted = sum(layer.numel for layer in spiel_layers(model)[1].values())
    assert "mlp.experts.gate_up_proj" in message
    assert f"budget of {k} deltas is {k / adapted:.1%} of the weights that it adapts" in message


def test_the_projection_inside_torchs_attention_is_refused(adapt):
    """Attention reads its weight without calling it, so its deltas would get no gradient."""
    with pytest.raises(TypeError, match=r"cannot adapt layer\.out_proj"):
        adapt(Unsupported(nn.MultiheadAttention(8, 2)), target_modules=["out_proj"])


def test_a_shared_weight_is_refused(llama, adapt, two_layers):
    with pytest.raises(ValueError, match=r"weight of lm_head is shared .*embed_tokens.*untie"):
        adapt(llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    assert targets(adapt(llama(tie_word_embeddings=True))) == names()
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight.data = base[0].weight.data  # two Parameters, one memory
    with pytest.raises(ValueError, match=r"weight of 0 is shared \(0.weight, 1.weight\)"):
        adapt(base)


def test_num_deltas_must_be_of_the_targeted_modules(two_layers):
    for num_deltas, message in [
        ({"first": 3}, "num_deltas has no entry for the targeted module second"),
        ({"first": 3, "second": 2, "third": 1}, "num_deltas names third"),
        ({"first": 3, "second": 97}, "second: num_deltas 97 is not between 0 and .* 96"),
    ]:
        config = spiel.SpielConfig(num_deltas=num_deltas)
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(two_layers(), config)


def test_gpt2_with_conv1d_and_biases(adapt, dense):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    base = GPT2LMHeadModel(config).eval()
    deltas_of = spiel.get_deltas(model := adapt(base, scale=0.3).eval())
    assert {name.rpartition(".")[2] for name in deltas_of} == {"c_attn", "c_proj", "c_fc"}
    reference = dense(model.unload(), deltas_of)
    model = adapt(base, scale=0.3).eval()
    ids = torch.randint(3, 48, (2, 9))
    loss, expected = (m(input_ids=ids, labels=ids).loss for m in (model, reference))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, layer in spiel_layers(model)[1].items():
        indices = layer.spiel_indices["default"].long()
        assert torch.equal(layer.spiel_indices["default"], deltas_of[name][0])
        wanted = reference.get_submodule(name).weight.grad.reshape(-1)[indices]
        torch.testing.assert_close(layer.spiel_deltas["default"].grad, wanted)


def test_get_deltas_gives_copies_and_set_support_restarts(two_layers, adapt):
    model = adapt(two_layers())
    deltas = spiel.get_deltas(model)
    deltas["first"][1].zero_()
    assert spiel.get_deltas(model)["first"][1].abs().sum() > 0
    k = len(deltas["first"][0])
    spiel.set_support(model, {"first": torch.arange(k)})
    indices, values = spiel.get_deltas(model, "default")["first"]
    assert indices.tolist() == list(range(k))
    assert values.tolist() == [0.0] * k
    assert spiel.get_deltas(model)["second"][1].abs().sum() > 0
    for support, message in [
        ({"third": torch.arange(k)}, "no SpIEL module 'third'; there are first, second"),
        ({"first": torch.arange(k + 1)}, f"first: expected {k} indices, got {k + 1}"),
        ({"first": torch.arange(k).flip(0)}, "first: indices are unsorted"),
        ({"first": torch.zeros(k, dtype=torch.int64)}, "first: indices are duplicated"),
        ({"first": torch.arange(k) + 12 * 16}, "first: index .* is out of range"),
        ({"first": torch.arange(k).float()}, "first: indices must be a 1-D integer tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            spiel.set_support(model, support)


def test_which_adapter_is_meant_must_be_clear(two_layers, adapt):
    model = adapt(two_layers())
    model.add_adapter("other", spiel.SpielConfig(density=0.1))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"several adapters are active \(default, other\)"):
        spiel.get_deltas(model)
    with pytest.raises(ValueError, match="no SpIEL adapter 'third'; it has: default, other"):
        spiel.get_deltas(model, "third")
    with pytest.raises(ValueError, match="no active SpIEL adapter; it has: none"):
        spiel.get_deltas(two_layers())


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_set_support_refuses_merged_adapters(two_layers, adapt, adapter):
    model = adapt(two_layers())
    model.add_adapter("other", spiel.SpielConfig(density=0.1))
    x = torch.ones(1, 12)
    out = model(x)
    model.merge_adapter()
    support = {name: indices for name, (indices, _) in spiel.get_deltas(model, adapter).items()}
    with pytest.raises(RuntimeError, match="unmerge first"):
        spiel.set_support(model, support, adapter)
    assert torch.equal(model(x), out)


def test_a_refused_set_support_changes_nothing(two_layers, adapt):
    model = adapt(two_layers())
    before = spiel.get_deltas(model)
    support = {"first": before["first"][0], "second": before["second"][0].flip(0)}
    with pytest.raises(ValueError, match="second: indices are unsorted"):
        spiel.set_support(model, support)
    assert torch.equal(spiel.get_deltas(model)["first"][1], before["first"][1])


def test_set_support_wants_tensors(two_layers, adapt):
    model = adapt(two_layers())
    indices = spiel.get_deltas(model)["first"][0]
    for wrong, kind in ((indices.tolist(), "list"), (indices.numpy(), "ndarray")):
        with pytest.raises(TypeError, match=f"first: indices must be a tensor .* got {kind}"):
            spiel.set_support(model, {"first": wrong})


def test_two_adapted_models_in_one_are_told_apart(two_layers, adapt):
    both = nn.ModuleDict({"query": adapt(two_layers()), "document": adapt(two_layers())})
    optimizer = spiel.SpielAdamW(both)
    with pytest.raises(ValueError, match=r"4 layers have 2 names.*one by one"):
        spiel.Reselector(both, optimizer, 100)
    for model in both.values():
        assert len(spiel.Reselector(model, optimizer, 100).layers) == 2


def test_deltas_that_were_cast_from_outside_are_in_their_own_dtype_again(two_layers, adapt):
    model = adapt(two_layers())
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for deltas in (p for p in model.parameters() if p.requires_grad):
        deltas.data = deltas.data.to(torch.bfloat16)  # as TRL does on a quantised model
    with pytest.warns(UserWarning, match=r"cast the deltas to torch\.bfloat16"):
        spiel.Reselector(model, spiel.SpielAdamW(model), 100)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for deltas in (p for p in model.parameters() if p.requires_grad):
        deltas.data = deltas.data.to(torch.bfloat16)
    model.load_state_dict(saved)
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name
