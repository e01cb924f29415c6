"""Imports what every cell needs sooner or later, for the server process of `children`.

Where there is a GPU that is torch alone: bitsandbytes, which peft imports, asks CUDA about it, and
in a process that is forked after that CUDA does not work. torch counts GPUs without asking CUDA.

Importing makes some million objects and hardly any garbage, among which the garbage collector
looks over and over: it is off meanwhile, which saves a fifth of the time. Afterwards it leaves
these objects alone for good, here and in the processes forked from here, whose own collections are
then short and copy no memory.
"""

import atexit
import gc
from contextlib import suppress
from importlib import import_module

#: None of it may start threads.
LIBRARIES = (
    "suites.cell",
    "transformers.models.llama.modeling_llama",
    "peft",
    "spiel.ops.compiled",  # where numba is installed
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
)

gc.disable()
torch = import_module("torch")
for name in LIBRARIES if torch.cuda.device_count() == 0 else ():
    with suppress(ImportError):  # who needs it will say what is missing
        import_module(name)
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # for libraries that complain of what the end of a process leaves
