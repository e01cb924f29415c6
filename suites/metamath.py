"""`metamath`: the protocol of peft's method_comparison/MetaMathQA, to stand beside its results.

Its data, lengths, steps, schedule, template, loss on the whole text and way of marking are kept.
What differs: batches are not sorted by length, and retention is the likelihood of general text.
Its dev split, on which rates are picked, are questions of GSM8K's train split, which MetaMathQA
rewords: so the pick may favour what memorises well.
"""

from __future__ import annotations

from suites.suite import Budget, DataSource, ModelSource, Recipe, Suite, Task, Tuning

WEIGHT_DECAY = 0.1


def _grid(*rates: float) -> tuple[Tuning, ...]:
    return tuple(Tuning(rate, WEIGHT_DECAY) for rate in rates)


#: Four trials each, around the rates of the published experiments.
GRIDS = {
    "full": _grid(5e-6, 1e-5, 2e-5, 4e-5),
    **dict.fromkeys(("lora", "rslora", "dora", "pissa", "miss"), _grid(5e-5, 1e-4, 3e-4, 1e-3)),
    "randlora": _grid(5e-5, 1e-4, 3e-4, 1e-3),
    "vera": _grid(3e-4, 1e-3, 3e-3, 1e-2),
    "ia3": _grid(3e-4, 1e-3, 5e-3, 1e-2),
    "prefix": _grid(3e-4, 1e-3, 5e-3, 1e-2),
    "ln_tuning": _grid(1e-4, 3e-4, 1e-3, 3e-3),
    **dict.fromkeys(("shira", "supertuning", "supra"), _grid(3e-5, 1e-4, 3e-4, 1e-3)),
    "spiel": _grid(1e-5, 3e-5, 1e-4, 3e-4),
    "spiel-ma": _grid(4e-4, 7e-4, 1e-3, 2e-3),
}


def metamath() -> Suite:
    return Suite(
        name="metamath",
        description="MetaMathQA -> GSM8K by the protocol of peft's method_comparison "
        "(Llama-3.2-3B); learning rates by --search",
        model=ModelSource("meta-llama/Llama-3.2-3B"),
        # 5000 steps of 4 see 20,000 rows, so a choice of 40,000 is as good as all 395,000. The
        # limit is theirs of 1300 characters for query and response, and 37 for the template.
        data=DataSource(
            "meta-math/MetaMathQA",
            max_length=768,
            prompt="Question: {query} Think step by step.\nAnswer:",
            completion="{response}",
            mask_prompt=False,
            num_examples=40_000,
            max_characters=1337,
        ),
        tasks=(
            Task("gsm8k_metamath", "acc,none", "target"),
            Task("general_text", "byte_likelihood,none", "retention"),
            Task("gsm8k_metamath_dev", "acc,none", "target", "dev"),
            Task("general_text_dev", "byte_likelihood,none", "retention", "dev"),
        ),
        recipe=Recipe(
            num_steps=5000,
            batch_size=4,
            lr_scheduler_type="cosine",
            warmup_ratio=0.1,
            max_grad_norm=1.0,
        ),
        # LoRA of rank 32 on the modules that peft targets in a Llama by default.
        budget=Budget(lora_rank=32, target_modules=("q_proj", "v_proj")),
        tunings={"full": Tuning(1e-5, WEIGHT_DECAY), "lora": Tuning(1e-4, WEIGHT_DECAY)},
        grids=GRIDS,
        eval_batch_size=50,
        cpu_note="a cell takes weeks",
    )
