"""Models by path: found, or refused at once by one clear line."""

import time

import pytest
import torch

from suites.models import load_model, load_tokenizer
from suites.suite import ModelSource


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder_is_loaded_in_its_dtype(world_folder, tiny_world, dtype):
    model = load_model(ModelSource(str(world_folder / "model"), dtype), "cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config.hidden_size == tiny_world.hidden_size
    assert not model.training


def test_a_tokenizer_without_padding_pads_with_eos(world_folder, tmp_path):
    source = ModelSource(str(world_folder / "model"))
    tokenizer = load_tokenizer(source)
    assert tokenizer.pad_token == "<pad>"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((world_folder / "model" / "config.json").read_text())
    assert load_tokenizer(ModelSource(str(tmp_path))).pad_token == "</s>"


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
