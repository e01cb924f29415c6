"""SpIEL inside transformers' Trainer: it trains, and it survives being killed."""

from types import SimpleNamespace

import peft
import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import spiel

STEPS = 14


class Tokens(Dataset):
    """Sentences whose next token is always the last one plus three."""

    def __len__(self):
        return 64

    def __getitem__(self, item):
        tokens = (torch.arange(8) * 3 + item) % 40
        return {"input_ids": tokens, "labels": tokens}


class Killed(Exception):  # noqa: N818 (it stands for a signal)
    pass


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def make_trainer(folder, growth="ag", kill_at=None, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,
    )
    spiel_config = spiel.SpielConfig(
        growth=growth,
        num_tunable_weights=1000,
        reselection_steps=5,
        selection_accumulation_steps=3,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(LlamaForCausalLM(config), spiel_config)
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
    }
    optimizer = {"ag": spiel.SpielAdamW, "ma": spiel.SpielSM3}[growth](model, lr=0.02)
    return Trainer(
        model=model,
        args=TrainingArguments(**{**arguments, **changes}),
        train_dataset=Tokens(),
        callbacks=[spiel.SpielCallback(), Kill(kill_at)],
        optimizers=(optimizer, None),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module", params=["ag", "ma"])
def unbroken(request, tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("run"), request.param, save_strategy="no")
    trainer.train()
    return request.param, losses(trainer), spiel.get_deltas(trainer.model)


@pytest.mark.parametrize(
    "kill_at", [2, 3, 6, 8]
)  # in the first window, at its end, between, in one
def test_a_killed_run_goes_on_as_if_it_never_stopped(unbroken, kill_at, tmp_path):
    growth, expected_losses, expected = unbroken
    with pytest.raises(Killed):
        make_trainer(tmp_path, growth, kill_at).train()
    trainer = make_trainer(tmp_path, growth)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == expected_losses
    for name, (indices, values) in spiel.get_deltas(trainer.model).items():
        assert torch.equal(indices, expected[name][0])
        assert torch.equal(values, expected[name][1])


def test_resuming_without_the_state_of_the_reselection_is_refused(tmp_path):
    with pytest.raises(Killed):
        make_trainer(tmp_path, kill_at=4).train()
    checkpoint = tmp_path / "checkpoint-4" / "optimizer.pt"
    state = torch.load(checkpoint, weights_only=True)
    del state["reselector"]
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match=r"resumes at step 4, but .* none of the reselection"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_resuming_without_the_optimizer_names_the_likely_cause(tmp_path):
    with pytest.raises(Killed):
        make_trainer(tmp_path, kill_at=4, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"save_only_model=True"):
        make_trainer(tmp_path, save_only_model=True).train(resume_from_checkpoint=True)


def test_a_run_that_skipped_a_step_is_resumed(tmp_path):
    trainer = make_trainer(tmp_path, kill_at=6)
    step = trainer.optimizer.step
    skipped = [2]  # as fp16 training does after an overflow

    def sometimes(*args, **kwargs):
        skipped[0] -= 1
        return None if skipped[0] == 0 else step(*args, **kwargs)

    trainer.optimizer.step = sometimes
    with pytest.raises(Killed):
        trainer.train()
    trainer = make_trainer(tmp_path)
    close = spiel.Reselector.close
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spiel.Reselector, "close", lambda own: (steps.append(own.t), close(own)))
        trainer.train(resume_from_checkpoint=True)
    assert steps == [STEPS - 1]


def test_an_optimizer_serves_a_second_training(tmp_path):
    first = make_trainer(tmp_path, save_strategy="no")
    first.train()
    optimizer = getattr(first.optimizer, "optimizer", first.optimizer)
    assert "reselector" not in optimizer.state_dict()
    second = Trainer(
        model=first.model,
        args=first.args,
        train_dataset=Tokens(),
        callbacks=[spiel.SpielCallback()],
        optimizers=(optimizer, None),
    )
    second.train()
    assert len(losses(second)) == STEPS


def test_of_several_active_adapters_the_named_one_is_trained(tmp_path):
    trainer = make_trainer(tmp_path)
    model = trainer.model
    model.add_adapter("other", spiel.SpielConfig(num_tunable_weights=50))
    model.base_model.set_adapter(["default", "other"])
    callback = spiel.SpielCallback("other")
    trainer.remove_callback(spiel.SpielCallback)
    trainer.add_callback(callback)
    trainer.optimizer = spiel.SpielAdamW(model, lr=0.01)
    before = {name: spiel.get_deltas(model, name) for name in ("default", "other")}
    trainer.train()
    for name, changes in {"default": False, "other": True}.items():
        after = spiel.get_deltas(model, name)
        same = [torch.equal(own[0], after[key][0]) for key, own in before[name].items()]
        assert all(same) is not changes


@pytest.mark.parametrize(("has_stepped", "told"), [(True, ["step"]), (False, ["skip_step"])])
def test_the_reselector_is_told_of_each_step_and_of_each_that_was_skipped(has_stepped, told):
    calls, callback = [], spiel.SpielCallback()
    callback.reselector = SimpleNamespace(
        optimizer_has_stepped=has_stepped,
        step=lambda: calls.append("step"),
        skip_step=lambda: calls.append("skip_step"),
    )
    callback.on_step_end(None, None, None)
    assert calls == told


def test_a_training_that_failed_or_ended_leaves_no_reselector_behind(tmp_path):
    trainer = make_trainer(tmp_path, kill_at=4, save_strategy="no")
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    before = len(optimizer._optimizer_step_pre_hooks)
    with pytest.raises(Killed):
        trainer.train()
    trainer.remove_callback(Kill)
    trainer.train()
    assert len(optimizer._optimizer_step_pre_hooks) == before
