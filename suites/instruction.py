"""The suites of the SpIEL paper (arXiv 2401.16405, section 4): instruction tuning of Llama 2.

Model, data, recipe, budget and grids are the paper's and its code's (github.com/ducdauge/sft-llm).
The paper's LoRA, of alpha 16 and dropout 0.1, is `lora-paper`; `lora` has alpha 2r and no dropout.
Retention is ours: the paper measures none.
"""

from __future__ import annotations

from suites.suite import Budget, DataSource, ModelSource, Recipe, Suite, Task, Tuning

LLAMA_PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)

MMLU = Task("mmlu", "acc,none", "target", num_fewshot=5)

RETENTION = Task("general_text", "byte_likelihood,none", "retention")

#: Learning rates are picked on MMLU's validation split, as in the paper.
DEV = (
    Task("mmlu", "acc,none", "target", "dev", num_fewshot=5, data_split="validation"),
    Task("general_text_dev", "byte_likelihood,none", "retention", "dev"),
)

PAPER_TASKS = (
    MMLU,
    Task("gsm8k_cot", "exact_match,flexible-extract", "target", num_fewshot=8),
    Task("bbh_cot_fewshot", "exact_match,get-answer", "target", num_fewshot=3),
    Task("tydiqa_goldp", "f1,none", "target", num_fewshot=1),
    Task("humaneval", "pass@1,create_test", "target", runs_code=True),
    RETENTION,
    *DEV,
)

#: Rows are in Tulu's format; the two epochs of the paper are given in steps of 128 rows.
FLAN_V2 = DataSource("ostapeno/tulu_v2_flan_v2_subset", num_examples=50_000)
FLAN_V2_STEPS = 781
GPT4_ALPACA = DataSource(
    "vicgalle/alpaca-gpt4",
    prompt="<|user|>\n{instruction}\n{input}\n<|assistant|>\n",
    completion="{output}",
)
GPT4_ALPACA_STEPS = 812
TULU_V2 = DataSource("allenai/tulu-v2-sft-mixture")
TULU_V2_STEPS = 5096


def _grid(weight_decay: float, *rates: float) -> tuple[Tuning, ...]:
    return tuple(Tuning(rate, weight_decay) for rate in rates)


#: Four trials each. SpIEL, LoRA, (IA)3 and prefix tuning: the paper's rates, at one weight decay
#: for SpIEL, the one its authors' final evaluations name. The others: ours, around the rates that
#: their own papers or peft's examples use.
GRIDS = {
    "full": _grid(0.0, 8e-5, 4e-5, 2e-5, 1e-5),
    **dict.fromkeys(
        ("lora", "rslora", "dora", "pissa", "miss"), _grid(0.0, 1e-4, 3e-5, 1e-5, 3e-6)
    ),
    "randlora": _grid(0.0, 1e-3, 3e-4, 1e-4, 3e-5),
    "vera": _grid(0.0, 1e-2, 3e-3, 1e-3, 3e-4),
    "ia3": _grid(0.0, 3e-4, 1e-4, 3e-5, 1e-5),
    "prefix": _grid(0.0, 3e-1, 1e-1, 3e-2, 1e-2),
    "ln_tuning": _grid(0.0, 1e-3, 3e-4, 1e-4, 3e-5),
    **dict.fromkeys(("shira", "supertuning", "supra"), _grid(0.0, 3e-4, 1e-4, 3e-5, 1e-5)),
    "spiel": _grid(30.0, 1e-4, 3e-5, 1e-5, 3e-6),
    "spiel-ma": _grid(30.0, 2e-3, 1e-3, 7e-4, 4e-4),
}

#: Where no search was run: full and SpIEL as the paper's code has them, LoRA at the rate that
#: peft's method_comparison uses. `--search` finds a pick for every method that has a grid.
TUNINGS = {"full": Tuning(2e-5), "lora": Tuning(1e-4), "spiel": Tuning(1e-5, 30.0)}


def instruction_suites() -> tuple[Suite, ...]:
    """Every suite of the paper, on Llama-2-7B, and on 13B under a name ending in `_13b`."""
    rows = (
        ("mmlu_flan", "Flan v2 -> MMLU", FLAN_V2, FLAN_V2_STEPS, (MMLU, RETENTION, *DEV)),
        ("flan_v2", "Flan v2 -> the paper's tasks", FLAN_V2, FLAN_V2_STEPS, PAPER_TASKS),
        ("gpt4_alpaca", "GPT4-Alpaca -> the same", GPT4_ALPACA, GPT4_ALPACA_STEPS, PAPER_TASKS),
        ("tulu_v2", "Tulu v2 -> the same", TULU_V2, TULU_V2_STEPS, PAPER_TASKS),
    )
    return tuple(
        _suite(name + suffix, f"{text} (Llama-2-{size})", size, data, num_steps, tasks)
        for size, suffix in (("7b", ""), ("13b", "_13b"))
        for name, text, data, num_steps, tasks in rows
    )


def _suite(
    name: str,
    description: str,
    size: str,
    data: DataSource,
    num_steps: int,
    tasks: tuple[Task, ...],
) -> Suite:
    return Suite(
        name=name,
        description=f"{description}; learning rates by --search",
        model=ModelSource(f"meta-llama/Llama-2-{size}-hf"),
        data=data,
        tasks=tasks,
        recipe=Recipe(num_steps=num_steps, batch_size=1, gradient_accumulation_steps=128),
        budget=Budget(lora_rank=64, target_modules=LLAMA_PROJECTIONS),
        tunings=TUNINGS,
        grids=GRIDS,
        eval_batch_size=8,
        cpu_note="a cell takes weeks",
    )
