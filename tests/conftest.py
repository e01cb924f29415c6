"""What several packages' tests share: one small embedded world, made once."""

import os

# Threads cost tiny models more than they save, a great deal more when other work shares the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU our kernels run in Triton's interpreter, which must be chosen before anything
# imports triton (torch alone does not).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from suites.embedded import build
from suites.world import World

#: Big enough to have every kind of fact, too small and too briefly trained to know any.
TINY = World(
    num_entities=32,
    num_clusters=9,
    num_relations=4,
    num_changed_relations=2,
    num_values=12,
    num_questions=20,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    pretraining_steps=4,
    pretraining_batch_size=8,
)


@pytest.fixture(scope="session")
def tiny_world():
    return TINY


@pytest.fixture(scope="session")
def world_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def world_folder(tiny_world, world_cache):
    """The folder of `tiny_world`; tests read it and leave it as it is."""
    return build(tiny_world, world_cache)


def pytest_collection_modifyitems(items):
    """The longest test first, so that in the end nobody waits for it alone."""
    items.sort(key=lambda item: "test_quickstart.py" not in item.nodeid)
