"""Child processes are forked from one that has loaded the libraries, once and for all of them."""

import gc
import sys

from suites import children


def look(connection):
    from suites.libraries import LIBRARIES  # here: it keeps the collector from what is loaded

    connection.send([name for name in LIBRARIES if name not in sys.modules])
    connection.send((gc.isenabled(), gc.get_freeze_count() > 100_000))


def test_a_child_has_the_libraries_and_does_not_look_for_garbage_among_them(tmp_path):
    heard = []
    chosen = children.context(tmp_path / "libraries.log")
    assert children.run_child(chosen, look, [()], heard.append) == 0
    assert heard == [[], (True, True)]
