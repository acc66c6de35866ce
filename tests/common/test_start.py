"""A program looks at its command, loads its libraries, then works."""

import gc

import pytest

from common.start import look_first, work


@pytest.fixture(autouse=True)
def collector():
    yield
    gc.enable()
    gc.unfreeze()
    gc.freeze()  # as conftest.py has left it


def test_the_collector_rests_while_the_libraries_load_and_works_again_after_it():
    seen = []
    look_first(lambda: seen.append(gc.isenabled()))
    seen.append(gc.isenabled())
    work(lambda: seen.append(gc.isenabled()))
    assert seen == [True, False, True]


def test_the_collector_passes_over_what_the_libraries_are():
    look_first(lambda: None)
    before = gc.get_freeze_count()
    library = [[]]
    work(lambda: None)
    assert gc.get_freeze_count() > before
    assert not any(found is library for found in gc.get_objects())


def test_a_mistake_ends_the_program_before_the_libraries_load():
    with pytest.raises(SystemExit) as end:
        look_first(exit, 2)
    assert end.value.code == 2
    assert gc.isenabled()
