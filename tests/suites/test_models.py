"""Models by path, by shape and in 4 bits: as they should be, or refused at once by one line."""

import dataclasses
import json
import time

import pytest
import torch

from suites.models import TULU_TEMPLATE, empty_model, load_model, load_tokenizer, weights_hash
from suites.shapes import SHAPES
from suites.sources import ModelSource
from tests.suites import hub_files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder_is_loaded_in_its_dtype(world_folder, tiny_world, dtype):
    model = load_model(ModelSource(str(world_folder / "model"), dtype), "cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config.hidden_size == tiny_world.hidden_size
    assert not model.training
    assert model(torch.tensor([[0, 1]])).past_key_values is None


def test_the_hash_of_weights_follows_every_value(world_folder):
    model = load_model(ModelSource(str(world_folder / "model")), "cpu")
    before = weights_hash(model)
    weight = model.lm_head.weight
    with torch.no_grad():
        kept, weight[0, 0] = weight[0, 0].clone(), 3.0
        assert weights_hash(model) != before
        weight[0, 0] = kept
    assert weights_hash(model) == before
    assert weights_hash(model.float()) != before


def test_the_hash_of_weights_tells_scales_and_takes_any_dtype():
    def hashed(*values, dtype=torch.float32):
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.tensor(values, dtype=dtype), requires_grad=False)
        return weights_hash(module)

    assert len({hashed(1.0, 1.0), hashed(2.0, 2.0), hashed(0.0, 0.0), hashed()}) == 4
    assert hashed(1.0, dtype=torch.float8_e4m3fn) != hashed(2.0, dtype=torch.float8_e4m3fn)


def test_a_tokenizer_without_padding_pads_with_eos(world_folder, tmp_path):
    source = ModelSource(str(world_folder / "model"))
    tokenizer = load_tokenizer(source)
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.chat_template == TULU_TEMPLATE
    tokenizer.pad_token = None
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((world_folder / "model" / "config.json").read_text())
    again = load_tokenizer(ModelSource(str(tmp_path)))
    assert again.pad_token == "</s>"
    assert again.chat_template == "{{ messages[0].content }}"


def test_a_broken_tokenizer_is_named(tmp_path):
    folder = hub_files.write_model(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nope"}}')
    with pytest.raises(ValueError, match="has no tokenizer that transformers can load"):
        load_tokenizer(ModelSource(str(folder)))


def test_a_hub_model_out_of_reach_is_named_quickly(monkeypatch, tmp_path):
    # A port that nobody listens on stands for a hub that cannot be reached.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"some-owner/some-model .* local model folder"):
        load_model(ModelSource("some-owner/some-model"), "cpu")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "a/b/c", ""])
def test_a_path_that_is_neither_is_refused(path):
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        load_model(ModelSource(path), "cpu")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"without config\.json"):
        load_tokenizer(ModelSource(str(tmp_path)))


def test_model_code_is_not_executed_unless_asked(tmp_path):
    folder = hub_files.write_model(tmp_path)
    config = (folder / "config.json").read_text().replace('"llama"', '"own"')
    names = '"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"'
    (folder / "config.json").write_text(config.replace("{", '{"auto_map": {' + names + "},", 1))
    (folder / "own.py").write_text("raise SystemExit('executed')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(ModelSource(str(folder)), "cpu")
    with pytest.raises(SystemExit, match="executed"):
        load_model(ModelSource(str(folder), trust_remote_code=True), "cpu")


def test_model_code_is_executed_for_the_shape_too_if_asked(tmp_path):
    folder = hub_files.write_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config |= {"model_type": "own", "architectures": ["Model"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    source = ModelSource(str(folder), trust_remote_code=True)
    shape = empty_model(source)
    assert shape.num_parameters() == load_model(source, "cpu").num_parameters()
    with pytest.raises(ValueError, match="trust_remote_code"):
        empty_model(dataclasses.replace(source, trust_remote_code=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hub_files.write_model(tmp_path_factory.mktemp("model"))


def four_bit(path, **options):
    pytest.importorskip("bitsandbytes")
    return load_model(ModelSource(str(path), "bfloat16", quantize="4bit", **options), "cpu")


def linears(model):
    from bitsandbytes.nn import Linear4bit

    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def test_4bit_weights_are_nf4_quantised_twice_and_compute_in_the_dtype(folder):
    model = four_bit(folder)
    found = linears(model)
    assert len(found) == 2 * 7  # every projection, and not the head
    for module in found.values():
        assert module.weight.quant_type == "nf4"
        assert module.weight.quant_state.nested
        assert module.compute_dtype == torch.bfloat16
    others = {p.dtype for p in model.parameters() if p.dtype != torch.uint8}
    assert others == {torch.bfloat16}
    assert model.is_loaded_in_4bit


def test_4bit_weights_stay_exact_after_an_evaluation(folder):
    """bitsandbytes would repack them in place on a CPU with bfloat16 instructions."""
    model = four_bit(folder)
    assert not any(module.support_avx512bf16_for_cpu for module in linears(model).values())
    before = {name: module.weight.data.clone() for name, module in linears(model).items()}
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        model(ids)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids).loss.backward()
    assert embedded.grad.abs().sum() > 0
    for name, module in linears(model).items():
        assert torch.equal(module.weight.data, before[name])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_as_many_weights_as_their_namesakes(name):
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    published = {
        "Llama-2-7b": 6_738_415_616,
        "Llama-2-13b": 13_015_864_320,
        "Llama-3.2-3B": 3_212_749_824,
        "Llama-3.2-1B": 1_235_814_400,
    }
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name]))
    model.tie_weights()
    assert model.num_parameters() == published.get(name, model.num_parameters())
    assert name in published or name in ("small", "tiny")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shape_is_filled_with_random_weights(dtype):
    torch.manual_seed(0)
    source = ModelSource("tiny", dtype, shape_only=True)
    model = load_model(source, "cpu")
    assert load_tokenizer(source) is None
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    projection = model.model.layers[0].mlp.up_proj.weight
    assert projection.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.model.norm.weight.unique().tolist() == [1.0]
    loss = model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss
    assert loss.item() == pytest.approx(6.24, abs=0.3)  # the logarithm of 512 words


def test_a_shape_is_what_from_config_would_make():
    """The same modules, dtypes and rotary frequencies as a model made the usual way."""
    from transformers import LlamaConfig, LlamaForCausalLM

    usual = LlamaForCausalLM(LlamaConfig(**SHAPES["tiny"]))
    model = load_model(ModelSource("tiny", "float32", shape_only=True), "cpu")
    model.load_state_dict(usual.state_dict())
    ids = torch.arange(50)[None]
    assert torch.equal(model(ids).logits, usual.eval()(ids).logits)


def test_a_shape_ties_what_its_config_ties(monkeypatch):
    monkeypatch.setitem(SHAPES, "tied", {**SHAPES["tiny"], "tie_word_embeddings": True})
    model = load_model(ModelSource("tied", "float32", shape_only=True), "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_shape_in_4_bits_has_the_modules_of_a_loaded_model(folder):
    loaded, made = four_bit(folder), four_bit(folder, shape_only=True)
    assert linears(made).keys() == linears(loaded).keys()
    for name, module in linears(made).items():
        own = linears(loaded)[name]
        assert module.weight.shape == own.weight.shape
        assert module.weight.quant_state.nested == own.weight.quant_state.nested
        assert module.compute_dtype == own.compute_dtype
        assert not module.support_avx512bf16_for_cpu
    assert made.num_parameters() == loaded.num_parameters()
    assert made.is_loaded_in_4bit
    assert made.is_quantized
    assert made(torch.arange(9)[None]).logits.isfinite().all()


def test_a_shape_in_4_bits_keeps_its_biases_as_they_are(monkeypatch):
    monkeypatch.setitem(SHAPES, "biased", {**SHAPES["tiny"], "attention_bias": True})
    made = four_bit("biased", shape_only=True)
    bias = made.model.layers[0].self_attn.q_proj.bias
    assert (bias.shape, bias.dtype) == ((128,), torch.bfloat16)
    assert made(torch.arange(9)[None]).logits.isfinite().all()


def test_the_values_are_checked():
    with pytest.raises(ValueError, match="quantize '8bit' is not one of 4bit"):
        ModelSource("m", quantize="8bit")
