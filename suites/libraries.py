"""Imports what every cell needs sooner or later, for the server process of `children`.

Where a GPU's driver is installed that is torch alone: bitsandbytes, which peft imports, asks CUDA
for GPUs, and in a process that is forked after that CUDA does not work.

Importing makes some million objects and hardly any garbage, among which the garbage collector
looks over and over: it is off meanwhile, which saves a fifth of the time. Afterwards it leaves
these objects alone for good, here and in the processes forked from here, whose own collections are
then short and copy no memory.
"""

import atexit
import gc
from contextlib import suppress
from ctypes.util import find_library
from importlib import import_module
from pathlib import Path

#: None of it may start threads.
LIBRARIES = (
    "suites.cell",
    "transformers.models.llama.modeling_llama",
    "peft",
    "spiel.ops.compiled",  # where numba is installed
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
)

has_driver = find_library("cuda") is not None or Path("/dev/kfd").exists()
gc.disable()
for name in ("torch",) if has_driver else LIBRARIES:
    with suppress(ImportError):  # who needs it will say what is missing
        import_module(name)
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # for libraries that complain of what the end of a process leaves
