"""`footprint`: time and memory in real shapes with random weights; no data, no download.

Other forms of the same are the command's own flags: `--quantize 4bit`, `--gradient-checkpointing`,
`--seq-len`, `--budget`.
"""

from __future__ import annotations

from suites.instruction import LLAMA_PROJECTIONS
from suites.methods import METHODS
from suites.sources import RANDOM_TOKENS
from suites.suite import Budget, DataSource, ModelSource, Recipe, Suite, Tuning

#: Suffix of the suite's name -> its shape in `suites.shapes`.
VARIANTS = {
    "": "Llama-2-7b",
    "_13b": "Llama-2-13b",
    "_3b": "Llama-3.2-3B",
    "_1b": "Llama-3.2-1B",
}


#: Two reselections of SpIEL, with a growth window before the second.
NUM_STEPS = 40


def footprint_suites() -> tuple[Suite, ...]:
    """One suite a shape: bfloat16, sequences of 2048; `small` and `tiny` are for CPUs, in fp32."""
    real = [
        _suite(suffix, shape, ModelSource(shape, shape_only=True), 2048, 64, "a cell takes hours")
        for suffix, shape in VARIANTS.items()
    ]
    small = ModelSource("small", "float32", shape_only=True)
    tiny = ModelSource("tiny", "float32", shape_only=True)
    return (
        *real,
        _suite("_small", "small", small, 256, 8, "", batch_size=4),
        _suite("_tiny", "tiny", tiny, 128, 8, ""),
    )


def _suite(
    suffix: str,
    shape: str,
    model: ModelSource,
    length: int,
    rank: int,
    cpu_note: str,
    batch_size: int = 1,
) -> Suite:
    return Suite(
        name=f"footprint{suffix}",
        description=f"time and memory in the shape of {shape}, random weights, no download",
        model=model,
        data=DataSource(RANDOM_TOKENS, max_length=length, num_examples=NUM_STEPS * batch_size),
        tasks=(),
        recipe=Recipe(num_steps=NUM_STEPS, batch_size=batch_size),
        budget=Budget(lora_rank=rank, target_modules=LLAMA_PROJECTIONS),
        # What is learnt is noise: a rate small enough to leave every method finite.
        tunings={name: Tuning(1e-6) for name, entry in METHODS.items() if entry.trains},
        seeds=(0,),
        cpu_note=cpu_note,
    )
