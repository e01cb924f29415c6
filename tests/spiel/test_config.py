"""SpielConfig: what it refuses, and that it comes back from a file as it went."""

import dataclasses
import json

import peft
import pytest

import spiel


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"growth": "rigged"}, "growth 'rigged' is unknown, must be one of ag, rigl, ma, sm3"),
        ({"reselection_rate_policy": "step"}, "must be one of linear, cosine"),
        ({"delta_dtype": "int8"}, "delta_dtype 'int8' is unknown, must be one of float32"),
        ({"density": 0.0}, r"density must be a number in \(0, 1\], got 0.0"),
        ({"density": -0.1}, r"density must be a number in \(0, 1\]"),
        ({"density": 1.1}, r"density must be a number in \(0, 1\]"),
        ({"density": float("nan")}, r"density must be a number in \(0, 1\]"),
        ({"num_tunable_weights": 0}, "must be an integer of at least 1, got 0"),
        ({"density": True}, "density must be a number in .* got True"),
        ({"density": "auto"}, "density must be a number in .* got 'auto'"),
        ({"num_tunable_weights": 1.5}, "must be an integer of at least 1, got 1.5"),
        ({"num_deltas": {"a": -1}}, "must be integers of at least 0, got -1 for a"),
        ({"density": 0.1, "num_tunable_weights": 5}, "not both"),
        ({"selection_accumulation_steps": 20}, r"less than reselection_steps \(20\).*got 20"),
        ({"selection_accumulation_steps": 0}, "must be at least 1.*got 0"),
        ({"initial_reselection_rate": 1.5}, r"must be in \[0, 1\], got 1.5"),
        ({"initial_reselection_rate": "a"}, r"must be in \[0, 1\], got 'a'"),
        ({"reselection_steps": 20.5}, "reselection_steps must be an integer, got 20.5"),
        ({"selection_accumulation_steps": "5"}, "steps must be an integer, got '5'"),
        ({"modules_to_save": "lm_head"}, "must be a list of names, got the string 'lm_head'"),
        ({"layers_pattern": "layers"}, "no meaning without layers_to_transform"),
        (
            {"layers_to_transform": [0], "target_modules": ".*q_proj"},
            "layers_to_transform cannot narrow a regex.*'.*q_proj'",
        ),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        spiel.SpielConfig(**values)


@pytest.mark.parametrize(("alias", "growth"), [("rigl", "ag"), ("sm3", "ma"), ("ag", "ag")])
def test_aliases_of_growth(alias, growth):
    assert spiel.SpielConfig(growth=alias).growth == growth


def test_whole_numbers_may_be_floats():
    config = spiel.SpielConfig(reselection_steps=30.0)
    assert type(config.reselection_steps) is int and config.reselection_steps == 30


def test_defaults_are_those_of_the_paper():
    config = spiel.SpielConfig()
    assert (config.reselection_steps, config.selection_accumulation_steps) == (20, 5)
    assert (config.initial_reselection_rate, config.reselection_rate_policy) == (0.2, "linear")
    assert (config.growth, config.delta_dtype) == ("ag", "float32")


@pytest.mark.parametrize(
    "values",
    [
        {"growth": "ma", "density": 0.02, "target_modules": ["q_proj", "v_proj"]},
        {"num_tunable_weights": 500, "exclude_modules": ["lm_head"], "delta_dtype": "bfloat16"},
        {"target_modules": r".*\.1\..*_proj", "modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1], "layers_pattern": "layers", "task_type": "CAUSAL_LM"},
    ],
)
def test_a_config_comes_back_as_it_went(llama, tmp_path, values):
    model = peft.get_peft_model(llama(), spiel.SpielConfig(**values))
    config = model.peft_config["default"]
    assert config.num_deltas
    assert config.weight_shapes.keys() == config.num_deltas.keys()
    config.save_pretrained(tmp_path)
    for config_class in (peft.PeftConfig, spiel.SpielConfig):
        loaded = config_class.from_pretrained(tmp_path)
        assert type(loaded) is spiel.SpielConfig
        assert loaded == config


def test_num_deltas_given_by_hand_are_saved_with_the_shapes(two_layers):
    config = spiel.SpielConfig(num_deltas={"first": 3, "second": 4})
    model = peft.get_peft_model(two_layers(), config)
    config = model.peft_config["default"]
    assert config.to_dict()["weight_shapes"] == {"first": [16, 12], "second": [6, 16]}


def test_a_config_is_written_the_same_way_every_time(tmp_path):
    """Sets have an order that changes from process to process."""
    names = [f"m{i}" for i in range(9)]
    config = spiel.SpielConfig(target_modules=names, exclude_modules={"b", "a", "c"})
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == names
    assert saved["exclude_modules"] == ["a", "b", "c"]


def test_injection_leaves_the_callers_config_alone(two_layers):
    config = spiel.SpielConfig(density=0.1)
    model = peft.get_peft_model(two_layers(), config)
    model.add_adapter("other", dataclasses.replace(config, density=0.02))
    model.add_adapter("third", config)
    assert config.num_deltas is None
    assert config.target_modules is None
    totals = [sum(c.num_deltas.values()) for c in model.peft_config.values()]
    assert totals == [30, 6, 30]  # of 310 parameters, rounded down for each module


def test_a_target_list_without_names_is_refused(two_layers):
    with pytest.raises(ValueError, match="names no module; leave it out for all"):
        peft.get_peft_model(two_layers(), spiel.SpielConfig(density=0.1, target_modules=[]))
