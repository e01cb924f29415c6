"""Methods by a file: `peft:path/to/adapter_config.json`."""

import json

import pytest

from suites.methods import METHODS, entry_of
from tests.baselines.llama import budget, make_llama, train


@pytest.fixture
def write(tmp_path):
    def write(values):
        path = tmp_path / "adapter_config.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return f"peft:{path}"

    return write


def prepared(entry, size="r4"):
    return entry.load().prepare(make_llama(), budget(size), 10)


def test_names_of_the_table_are_its_entries():
    assert entry_of("lora") is METHODS["lora"]


def test_a_file_is_a_method_of_its_own_size(write):
    entry = entry_of(write({"peft_type": "LOKR", "r": 4, "target_modules": ["q_proj"]}))
    contestant = prepared(entry)
    assert contestant.model.peft_config["default"].target_modules == {"q_proj"}
    losses = train(contestant)
    assert losses[-1] < losses[0]


def test_what_the_file_says_is_in_the_options(write):
    before = entry_of(write({"peft_type": "LORA", "r": 4}))
    after = entry_of(write({"peft_type": "LORA", "r": 5}))
    assert before.options["config"] == {"r": 4}
    assert before.options != after.options


def test_a_field_can_be_solved_and_targets_are_the_budgets(write):
    contestant = prepared(entry_of(write({"peft_type": "LOHA", "r": "budget"})), "r6")
    assert contestant.model.peft_config["default"].r == 3  # LoHa has two pairs of matrices
    assert contestant.num_trainable == budget("r6").num_weights(make_llama())


def test_knobs_that_are_no_rank_are_solved_too(write):
    contestant = prepared(entry_of(write({"peft_type": "FOURIERFT", "n_frequency": "budget"})))
    asked = budget("r4").num_weights(make_llama())
    assert contestant.num_trainable == pytest.approx(asked, rel=0.01)


def test_a_method_with_a_schedule_of_its_own_is_told_the_steps(write):
    config = {"peft_type": "ADALORA", "init_r": 4, "total_step": None, "tinit": 2, "tfinal": 3}
    contestant = prepared(entry_of(write(config)))
    assert contestant.model.peft_config["default"].total_step == 10
    assert len(contestant.callbacks) == 1


def test_what_peft_saved_can_be_read(write, tmp_path):
    prepared(METHODS["dora"], "r3").artifact(tmp_path / "kept")
    saved = json.loads((tmp_path / "kept" / "adapter_config.json").read_text())
    assert saved["inference_mode"] is True
    contestant = prepared(entry_of(write(saved)), "r3")
    assert contestant.num_trainable == prepared(METHODS["dora"], "r3").num_trainable


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "adapter_config.json is not JSON"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "is not JSON: NaN is no number"),
        ("[]", 'has no "peft_type"'),
        ({"r": 8}, 'has no "peft_type"'),
        ({"peft_type": "LARA"}, "peft_type 'LARA' is unknown to this peft, which has ADALORA, "),
        ({"peft_type": "LORA", "rank": 8}, "LORA has no option 'rank'; it has "),
        ({"peft_type": "SHIRA", "r": "budget", "mask_type": "budget"}, "only one field can be"),
        ({"peft_type": "SUPERTUNING", "sparsity": 3}, r"sparsity must be in \[0.0, 1.0\), got 3"),
        ({"peft_type": "LOHA", "r": "budgett"}, "r of LOHA must be a number, got 'budgett'"),
        ({"peft_type": "SPIEL"}, "for SPIEL use the methods spiel and spiel-ma"),
    ],
)
def test_broken_files_are_named(write, values, message):
    with pytest.raises(ValueError, match=message):
        entry_of(write(values))


def test_missing_files_and_names_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.json cannot be read: No such file"):
        entry_of(f"peft:{tmp_path / 'nowhere.json'}")
    match = "unknown method 'lara'; choose from lora, "
    with pytest.raises(ValueError, match=match):
        entry_of("lara")
