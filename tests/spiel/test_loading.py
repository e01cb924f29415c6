"""Saving and loading adapters, whole models and copies of them."""

import copy
import io
import json
import pickle

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import spiel
from spiel.model import spiel_layers

FILE = "adapter_model.safetensors"


def assert_same_deltas(one, other, adapter="default"):
    one, other = spiel.get_deltas(one, adapter), spiel.get_deltas(other, adapter)
    assert one.keys() == other.keys()
    for name, (indices, values) in one.items():
        assert torch.equal(indices, other[name][0]), name
        assert indices.dtype == other[name][0].dtype == torch.int32
        assert torch.equal(values, other[name][1]), name


@pytest.fixture
def saved(llama, adapt, tmp_path):
    """A folder with a base model, one with an adapter of it, and the adapted model."""
    base = llama().eval()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = adapt(base, task_type="CAUSAL_LM").eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model


IDS = torch.arange(3, 15).view(2, 6)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_comes_back_bit_for_bit(saved, llama, low_cpu_mem_usage, is_trainable):
    folder, model = saved
    torch.manual_seed(9)  # the random support that injection begins with is another one
    loaded = peft.PeftModel.from_pretrained(
        llama().eval(),
        folder / "adapter",
        low_cpu_mem_usage=low_cpu_mem_usage,
        is_trainable=is_trainable,
    )
    assert_same_deltas(model, loaded)
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    trained = [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert bool(trained) == is_trainable
    assert all(".spiel_deltas." in name for name in trained)
    assert type(loaded.peft_config["default"]) is spiel.SpielConfig
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])


def test_auto_peft_model_finds_the_base_model(saved):
    folder, model = saved
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    assert_same_deltas(model, loaded)
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    assert torch.equal(type(merged).from_pretrained(folder / "merged")(IDS).logits, merged(IDS)[0])


def test_several_adapters_are_saved_and_loaded_each(saved, llama, fill):
    folder, model = saved
    values = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "num_tunable_weights": 90}
    model.add_adapter("other", spiel.SpielConfig(**values))
    fill(model, "other")
    model.save_pretrained(folder / "both")
    model.save_pretrained(folder / "one", selected_adapters=["other"])
    assert not (folder / "one" / FILE).exists()
    loaded = peft.PeftModel.from_pretrained(llama().eval(), folder / "both")
    result = loaded.load_adapter(folder / "both" / "other", "other")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "spiel" in key]
    assert loaded.active_adapters == ["default"]
    for adapter in ("default", "other"):
        assert_same_deltas(model, loaded, adapter)
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    loaded.delete_adapter("default")
    assert loaded.active_adapters == ["other"]
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert len(spiel_layers(loaded)[1]) == 2
    loaded.load_adapter(folder / "adapter", "default")
    assert_same_deltas(model, loaded)


def test_modules_to_save_come_along(llama, adapt, tmp_path):
    model = adapt(llama().eval(), modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    head = model.base_model.model.lm_head
    head.modules_to_save["default"].weight.data += 1
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "base_model.model.lm_head.modules_to_save.default.weight" in trained
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama().eval(), tmp_path)
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    with loaded.disable_adapter():
        assert torch.equal(loaded(IDS).logits, llama().eval()(IDS).logits)


def test_a_file_has_eight_bytes_for_each_delta_and_a_header(saved):
    folder, model = saved
    path = folder / "adapter" / FILE
    num_deltas = sum(model.peft_config["default"].num_deltas.values())
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    assert path.stat().st_size == 8 + header_bytes + 8 * num_deltas
    assert num_deltas == model.get_nb_trainable_parameters()[0]
    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
    layer = "base_model.model.model.layers.0.mlp.down_proj"
    assert names[:2] == [f"{layer}.spiel_deltas", f"{layer}.spiel_indices"]
    assert len(names) == 2 * len(spiel.get_deltas(model))


MODULE = "model.layers.1.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}."


def duplicate(tensors):
    tensors[KEY + "spiel_indices"][1] = tensors[KEY + "spiel_indices"][0]


def unsort(tensors):
    tensors[KEY + "spiel_indices"] = tensors[KEY + "spiel_indices"].flip(0).contiguous()


def set_index(value, dtype=torch.int32):
    def spoil(tensors):
        indices = tensors[KEY + "spiel_indices"].to(dtype)
        indices[-1] = value
        tensors[KEY + "spiel_indices"] = indices

    return spoil


def shorten(tensors):
    for kind in ("spiel_indices", "spiel_deltas"):
        tensors[KEY + kind] = tensors[KEY + kind][:-1].clone()


def set_value(value):
    def spoil(tensors):
        tensors[KEY + "spiel_deltas"][2] = value

    return spoil


FAULTS = [
    (duplicate, "indices are duplicated at position 1"),
    (unsort, "indices are unsorted"),
    (set_index(256), "index 256 is out of range, the weight has 256 entries"),
    (set_index(2**32, torch.int64), "index 4294967296 is out of range"),
    (set_index(255.0, torch.float32), "indices must be a 1-D integer tensor, got torch.float32"),
    (shorten, "expected 35 indices, got 34"),
    (set_value(float("nan")), "values contain NaN or infinity"),
    (set_value(float("-inf")), "values contain NaN or infinity"),
    (lambda tensors: tensors.pop(KEY + "spiel_indices"), "the state dict lacks the indices"),
    (lambda tensors: tensors.pop(KEY + "spiel_deltas"), "the state dict lacks the delta values"),
]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("spoil", "fault"), FAULTS)
def test_loading_refuses_and_names_module_and_fault(saved, llama, spoil, fault, low_cpu_mem_usage):
    path = saved[0] / "adapter" / FILE
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{MODULE} \(adapter 'default'\): .*{fault}"):
        peft.PeftModel.from_pretrained(llama(), path.parent, low_cpu_mem_usage=low_cpu_mem_usage)


def test_loading_on_another_base_model_is_refused(saved, llama):
    path = saved[0] / "adapter"
    with pytest.raises(ValueError, match=r"gate_proj: .*weight of shape \(24, 16\).*\(32, 16\)"):
        peft.PeftModel.from_pretrained(llama(intermediate_size=32), path)
    with pytest.raises(ValueError, match=r"num_deltas names model\.layers\.1\.\S+, which is no"):
        peft.PeftModel.from_pretrained(llama(num_hidden_layers=1), path)


def test_loading_a_state_dict_into_merged_weights_is_refused(two_layers, adapt):
    model = adapt(two_layers())
    state = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="first: unmerge its adapters before loading"):
        model.load_state_dict(state)
    model.unmerge_adapter()
    model.load_state_dict(state)


def test_the_whole_models_state_dict_holds_the_pretrained_weights(two_layers, adapt):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    x = torch.randn(3, 12)
    out = model(x)
    state = model.state_dict()
    for name in ("first", "second"):
        weight = state[f"base_model.model.{name}.base_layer.weight"]
        assert torch.equal(weight, base.get_submodule(name).weight)
    other = adapt(two_layers(seed=7), seed=8)
    other(x)  # its weights are live when they are overwritten
    other.load_state_dict(state)
    assert torch.equal(other(x), out)


def by_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("state", ["fresh", "live", "merged", "disabled", "loaded and merged"])
def test_copies_behave_as_their_original(two_layers, adapt, duplicate, state):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    x = torch.randn(3, 12)
    out = model(x).detach() if state != "fresh" else None
    if state.startswith("loaded"):
        model.load_state_dict(model.state_dict())
    if state.endswith("merged"):
        model.merge_adapter()
    if state == "disabled":
        model.base_model.disable_adapter_layers()
        out = base(x)
    copied = duplicate(model)
    out = model(x).detach() if out is None else out
    torch.testing.assert_close(copied(x), out, rtol=0, atol=1e-6)
    copied.base_model.enable_adapter_layers()
    copied.unmerge_adapter()
    copied(x).sum().backward()
    optimizer = spiel.SpielAdamW(copied, lr=0.1)
    optimizer.step()
    torch.testing.assert_close(model(x), out, rtol=0, atol=1e-6)  # not touched by the copy
    assert not torch.equal(copied(x), out)
    plain = copied.unload()
    for name, weight in base.named_parameters():
        assert torch.equal(plain.get_parameter(name), weight)


def test_a_copied_model_trains_with_sm3(two_layers, adapt):
    """SM3 must find the copy's layers, which the copied parameters know nothing of."""
    model = copy.deepcopy(adapt(two_layers(), growth="ma"))
    model(torch.randn(3, 12)).sum().backward()
    optimizer = spiel.SpielSM3(model)
    optimizer.step()
    layer = spiel_layers(model)[1]["first"]
    row, col = optimizer.momenta(layer.spiel_deltas["default"])
    assert (len(row), len(col)) == layer.shape


def test_the_saved_config_says_all_that_loading_needs(saved):
    config = json.loads((saved[0] / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SPIEL"
    assert config["num_deltas"][MODULE] == 35
    assert config["weight_shapes"][MODULE] == [16, 16]
