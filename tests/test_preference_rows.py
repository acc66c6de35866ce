"""The pairs that benchmarks/preference.py writes: what is preferred in them, and that nothing else is in the way."""

import json

import pytest
from benchmarks.preference import make_pairs

ROW = {"content": "类型#裙*颜色#红色", "summary": "显瘦的裙子，红色衬肤色，很百搭，出门就穿。"}


@pytest.fixture
def pairs(tmp_path):
    """The pairs of ROW and of a row that gives none."""

    def of(**settings):
        rows = [ROW, {"content": "类型#裙", "summary": "裙子。"}]
        file = tmp_path / "train.json"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return [(pair["chosen"], pair["rejected"]) for pair in make_pairs(file, **settings)]

    return of


def test_the_colour_is_named_in_the_chosen_answer_alone(pairs):
    assert pairs() == [(ROW["summary"], "显瘦的裙子，很百搭，出门就穿。")]
    assert not pairs(length=6)  # it is named later


def test_the_short_answer_is_the_first_clause_of_the_other_and_both_end_in_a_full_stop(pairs):
    assert pairs(prefer="short") == [("显瘦的裙子。", "显瘦的裙子，红色衬肤色，很百搭。")]
    assert not pairs(prefer="short", length=10)  # the other is longer
