"""Imports what every cell needs sooner or later, for the server process of `children`.

Importing makes some million objects and hardly any garbage, among which the garbage collector
looks over and over: it is off meanwhile, which saves a fifth of the time. Afterwards it leaves
these objects alone for good, here and in the processes forked from here, whose own collections are
then short and copy no memory.
"""

import atexit
import gc
from contextlib import suppress
from importlib import import_module

#: None of it may start threads or touch a GPU.
LIBRARIES = (
    "suites.cell",
    "transformers.models.llama.modeling_llama",
    "peft",
    "spiel.ops.compiled",  # where numba is installed
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
)

gc.disable()
for name in LIBRARIES:
    with suppress(ImportError):  # who needs it will say what is missing
        import_module(name)
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # for libraries that complain of what the end of a process leaves
