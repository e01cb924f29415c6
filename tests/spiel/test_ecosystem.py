"""SpIEL in the libraries that people train and evaluate with."""

import copy
import math

import peft
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

import spiel

IDS = torch.randint(3, 48, (4, 10), generator=torch.Generator().manual_seed(0))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(44))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradient_checkpointing(llama, adapt, use_reentrant, autocast):
    found = []
    for checkpointing in (False, True):
        model = adapt(llama(), task_type="CAUSAL_LM").train()
        if checkpointing:
            kwargs = {"use_reentrant": use_reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 14
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_torch_compile(llama, adapt):
    model = adapt(llama(num_hidden_layers=1), task_type="CAUSAL_LM")
    model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = spiel.SpielAdamW(model, lr=0.01)
    optimizer.zero_grad()
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(gradients(model), wanted)
    optimizer.step()
    torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_generate(llama, adapt):
    model = adapt(llama(), task_type="CAUSAL_LM", scale=1.0).eval()
    out = model.generate(input_ids=IDS[:, :4], max_new_tokens=6, do_sample=False)
    merged = model.merge_and_unload()
    assert torch.equal(
        out, merged.generate(input_ids=IDS[:, :4], max_new_tokens=6, do_sample=False)
    )


def test_transformers_own_adapters(llama, tmp_path):
    """`model.add_adapter`, without a PeftModel."""
    model = llama().eval()
    plain = model(input_ids=IDS).logits
    model.add_adapter(spiel.SpielConfig(density=0.1), "mine")
    for layer in spiel.model.spiel_layers(model)[1].values():
        layer.spiel_deltas["mine"].data.normal_()
    adapted = model(input_ids=IDS).logits
    assert not torch.allclose(adapted, plain)
    model.disable_adapters()
    assert torch.equal(model(input_ids=IDS).logits, plain)
    model.enable_adapters()
    assert torch.equal(model(input_ids=IDS).logits, adapted)
    model.save_pretrained(tmp_path)
    other = llama().eval()
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(other(input_ids=IDS).logits, adapted)


def train_with_trl(kind, model, rows, tokenizer, folder, lr, **arguments):
    """The losses of the steps of TRL's trainer of that kind, with SpIEL's callback."""
    trl = pytest.importorskip("trl")
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(folder),
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            **arguments,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[spiel.SpielCallback()],
        optimizers=(spiel.SpielAdamW(model, lr=lr), None),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trl_trains_with_the_callback(llama, adapt, tokenizer, tmp_path):
    model = adapt(
        llama(initializer_range=0.3),
        scale=0,
        task_type="CAUSAL_LM",
        reselection_steps=4,
        selection_accumulation_steps=2,
    )
    before = spiel.get_deltas(model)
    texts = [" ".join(f"w{(3 * i + j) % 44}" for i in range(8)) for j in range(16)]
    arguments = {"max_steps": 12, "per_device_train_batch_size": 8, "max_length": 16}
    losses = train_with_trl(
        "SFT", model, {"text": texts}, tokenizer, tmp_path, lr=0.05, **arguments
    )
    assert losses[-1] < 0.9 * losses[0]
    after = spiel.get_deltas(model)
    assert any(not torch.equal(before[name][0], after[name][0]) for name in before)


def test_trl_trains_away_from_a_copy_of_the_adapter(llama, adapt, tokenizer, tmp_path):
    model = adapt(llama(initializer_range=0.3), scale=0.2, task_type="CAUSAL_LM")
    pairs = {
        "prompt": ["w1 w2"] * 4,
        "chosen": [f" w{i} w3" for i in range(4)],
        "rejected": [f" w{i + 9} w7" for i in range(4)],
    }
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4}
    losses = train_with_trl("DPO", model, pairs, tokenizer, tmp_path, lr=0.01, **arguments)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # nothing is learned yet
    assert losses[-1] < losses[0]


def test_another_adapter_with_the_same_config_starts_afresh(llama, adapt):
    model = adapt(llama(), scale=0.2, task_type="CAUSAL_LM")
    model.add_adapter("another", model.peft_config["default"])
    assert not any(bool(deltas.any()) for _, deltas in spiel.get_deltas(model, "another").values())
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))  # nobody's copy
    assert not any(bool(deltas.any()) for _, deltas in spiel.get_deltas(model, "ref").values())


def test_lm_eval_loads_an_adapter_folder(llama, adapt, tokenizer, tmp_path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    base = llama().eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = adapt(base, task_type="CAUSAL_LM", scale=1.0).eval()
    model.save_pretrained(tmp_path / "adapter")
    kwargs = {"pretrained": str(tmp_path / "base"), "device": "cpu", "dtype": "float32"}
    requests = [
        Instance("loglikelihood", {}, (f"w1 w{i} w5", f" w{i + 9} w3"), i) for i in range(3)
    ]
    found = huggingface.HFLM(**kwargs, peft=str(tmp_path / "adapter")).loglikelihood(requests)
    plain = huggingface.HFLM(**kwargs).loglikelihood(requests)
    in_memory = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")
    expected = in_memory.loglikelihood(requests)
    for (one, _), (two, _), (three, _) in zip(found, expected, plain, strict=True):
        assert one == pytest.approx(two, abs=1e-5)
        assert abs(one - three) > 1e-3


def test_every_public_name_is_there():
    for name in spiel.__all__:
        assert getattr(spiel, name).__doc__
    assert peft.PeftType("SPIEL") == "SPIEL"


ROBERTA = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_labels": 2,
}
TASKS = {
    "SEQ_CLS": (RobertaForSequenceClassification, "classifier"),
    "TOKEN_CLS": (RobertaForTokenClassification, "classifier"),
    "QUESTION_ANS": (RobertaForQuestionAnswering, "qa_outputs"),
}


@pytest.mark.parametrize("task_type", TASKS)
@pytest.mark.parametrize("target_modules", [None, ["query"]])
def test_heads_of_tasks_are_trained_saved_and_unloaded(task_type, target_modules, tmp_path):
    model_class, head = TASKS[task_type]

    def base():
        torch.manual_seed(0)
        return model_class(RobertaConfig(**ROBERTA))

    config = spiel.SpielConfig(
        num_tunable_weights=60, task_type=task_type, target_modules=target_modules
    )
    model = peft.get_peft_model(base(), config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(f".{head}." in name for name in trained)
    assert not any(f".{head}." in name for name in trained if "spiel" in name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.eval()
    wanted = model(input_ids=IDS)[0]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=IDS)[0], wanted)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS)[0], wanted)
