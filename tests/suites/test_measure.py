"""The meter against costs that are known beforehand."""

import time

import psutil
import pytest
import torch
from transformers import TrainerCallback

from suites import measure
from suites.steps import StepMeter

MIB = 2**20


class Layer(torch.nn.Module):
    """relu(x @ W): autograd keeps x for W's gradient, W for x's, and the relu's output."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 16, bias=False)
        self.dropout = torch.nn.Dropout(0.0)

    def forward(self, x):
        return torch.relu(self.dropout(self.linear(x)))


def test_saved_for_backward_counts_activations_only():
    # x (4, 8) and relu's output (4, 16), both fp32; W is the model's own.
    saved = measure.saved_for_backward_bytes(Layer(), {"x": torch.ones(4, 8)})
    assert saved == 4 * 8 * 4 + 4 * 16 * 4


def test_saved_for_backward_counts_a_storage_once():
    class Twice(Layer):
        def forward(self, x):
            return self.linear(x) + self.linear(x)

    assert measure.saved_for_backward_bytes(Twice(), {"x": torch.ones(4, 8)}) == 4 * 8 * 4


def test_saved_for_backward_sees_a_copied_weight():
    class Copying(Layer):
        def forward(self, x):
            return x.requires_grad_() @ (self.linear.weight * 1.0).T

    saved = measure.saved_for_backward_bytes(Copying(), {"x": torch.ones(4, 8)})
    assert saved >= 8 * 16 * 4


def test_probe_changes_nothing():
    model = Layer().eval()
    model.dropout.p = 0.5
    before = torch.get_rng_state()
    measure.saved_for_backward_bytes(model, {"x": torch.ones(4, 8)})
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert model.linear.weight.grad is None


def test_optimizer_state_of_adamw_is_two_moments_and_a_step():
    weight = torch.nn.Parameter(torch.ones(10, 10))
    optimizer = torch.optim.AdamW([weight])
    assert measure.optimizer_state_bytes(optimizer) == 0
    weight.sum().backward()
    optimizer.step()
    assert measure.optimizer_state_bytes(optimizer) == 2 * 100 * 4 + 4


def test_an_artifact_that_there_is_no_room_for_is_not_measured(tmp_path):
    def write(folder):
        (folder / "a").write_bytes(b"12")
        raise OSError(28, "No space left on device")

    assert measure.artifact_bytes(write, None) is None
    kept = tmp_path / "kept"
    assert measure.artifact_bytes(write, kept) is None
    assert not any(tmp_path.iterdir())
    kept.mkdir()
    (kept / "former").write_bytes(b"1")
    assert measure.artifact_bytes(write, kept) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "former"]


def test_artifact_bytes_counts_every_file(tmp_path):
    def write(folder):
        (folder / "deep").mkdir()
        (folder / "a").write_bytes(b"12345")
        (folder / "deep" / "b").write_bytes(b"123")

    assert measure.artifact_bytes(write, None) == 8
    (tmp_path / "kept" / "former").mkdir(parents=True)
    assert measure.artifact_bytes(write, tmp_path / "kept") == 8
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"a", "deep"}


@pytest.mark.parametrize("peak", [measure._resident_peak, measure._SampledPeak])
def test_peak_sees_what_was_freed_again(peak):
    measured = peak()
    held = torch.ones(64 * MIB // 4)
    time.sleep(0.05)
    del held
    with_spike, _ = measured.read(0)
    without, _ = peak().read(0)
    assert with_spike - without > 48 * MIB


def test_phases_are_told_timed_and_kept_after_a_failure():
    told = []
    meter = measure.Meter("cpu", told.append)

    def fail():
        with meter.phase("load"):
            time.sleep(0.02)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert told == ["load"]
    assert 0.02 <= meter.phases["load"].seconds < 5
    assert meter.phases["load"].peak_bytes >= 0


class Slow(TrainerCallback):
    """A method whose callbacks take 10 ms at the end of every step."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.01)


def run_steps(meter, callbacks, num_steps):
    """The Trainer's events, in its order, around steps of 5 ms."""
    callbacks = [meter.opening, *callbacks, meter.closing]
    for _ in range(num_steps):
        for event in ("on_step_begin", None, "on_pre_optimizer_step", "on_step_end"):
            if event is None:
                time.sleep(0.005)
                continue
            for callback in callbacks:
                getattr(callback, event)(None, None, None)
        time.sleep(0.02)  # logging, outside the step


def test_steps_include_the_methods_callbacks_and_nothing_after():
    meter = StepMeter("cpu")
    run_steps(meter, [Slow()], 3)
    assert len(meter.step_seconds) == len(meter.callback_seconds) == 3
    for step, callback in zip(meter.step_seconds, meter.callback_seconds, strict=True):
        assert 0.010 <= callback < step
        assert 0.015 <= step < 0.035


def test_no_callbacks_cost_next_to_nothing():
    meter = StepMeter("cpu")
    run_steps(meter, [], 3)
    assert max(meter.callback_seconds) < 0.002


def test_what_the_process_held_before_is_no_peak():
    meter = measure.Meter("cpu", lambda phase: None)
    with meter.phase("idle"):
        pass
    assert meter.phases["idle"].peak_bytes < 32 * MIB
    resident = psutil.Process().memory_info().rss
    assert measure._resident_peak().read(0)[0] == pytest.approx(resident, rel=0.01)
