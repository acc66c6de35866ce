"""Metrics: equal to the official figures, and never a crash on what a model may write."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED

from evaluation import metrics
from evaluation.metrics import METRICS, metric_table, score, score_all

GOLDEN = SHARED / "golden" / "metrics.public.json"


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.is_file():
        pytest.skip(f"reference data of the official scripts is not here: {GOLDEN}")
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_every_row_scores_as_the_official_script_scores_it(golden):
    for pair in golden["pairs"]:
        expected = {name: pair[name] for name in METRICS}
        assert score(pair["predict"], pair["labels"]) == pytest.approx(expected, abs=1e-3)


def test_means_over_rows_equal_the_official_means(golden):
    pairs = golden["pairs"]
    result = score_all([pair["predict"] for pair in pairs], [pair["labels"] for pair in pairs])
    assert {name: result[name] for name in METRICS} == pytest.approx(golden["mean"], abs=1e-3)
    assert result["empty_predictions"] == 0


def test_rouge_equals_the_library_on_texts_with_odd_breaks_and_repeats():
    from rouge_chinese import Rouge

    cut = metrics._libraries()[0]
    generator = random.Random(0)
    for _ in range(200):
        prediction, label = (
            "衣" + "".join(generator.choices("衣服好看 的a1，。！？”…\n\t.", k=generator.randrange(40)))
            for _ in range(2)
        )
        official = Rouge().get_scores(" ".join(cut(prediction)), " ".join(cut(label)))[0]
        ours = score(prediction, label)
        for name, figures in official.items():
            assert ours[name] == round(figures["f"] * 100, 4), (name, prediction, label)


def test_identical_texts_score_100_and_texts_without_a_common_word_0():
    assert score("简约的白色外套十分百搭", "简约的白色外套十分百搭") == pytest.approx(
        dict.fromkeys(METRICS, 100.0), abs=1e-3
    )
    assert score("猫", "狗") == dict.fromkeys(METRICS, 0.0)


@pytest.mark.parametrize("text", ["", " ", "\n", "\u3000", ".", "。", "...", "！？", "“”", "、，；", "😀", "\t\n "])
def test_empty_or_symbol_only_text_scores_0_on_either_side(text):
    zero = dict.fromkeys(METRICS, 0.0)
    assert score(text, "简约的白色外套。") == zero
    assert score("简约的白色外套。", text) == zero
    assert score(text, text) == zero


def test_empty_predictions_are_counted_and_lower_the_mean():
    label = "简约的白色外套"
    result = score_all([label, "", "。"], [label] * 3)
    assert result["empty_predictions"] == 2
    assert result["rouge-1"] == pytest.approx(100 / 3, abs=1e-3)


def test_no_rows_give_no_means():
    assert score_all([], []) == {"empty_predictions": 0}


def test_different_numbers_of_predictions_and_labels_are_refused():
    with pytest.raises(ValueError, match="2 predictions .* 1 labels"):
        score_all(["a", "b"], ["a"])


MANY = (
    ["简约的白色外套", "蓝色的牛仔裤", "", "a b c", "\ud83d"] * 3,
    ["白色外套简约大方", "牛仔裤是蓝色的", "好", "a b d", "牛仔裤"] * 3,
)


def with_workers(monkeypatch):
    """Let three processes score even a few rows; the commands of those that were started."""
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(metrics, "ROWS_WORTH_A_WORKER", 2)
    monkeypatch.setattr(metrics.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(
        metrics.subprocess, "Popen", lambda command, **how: started.append(command) or start(command, **how)
    )
    return started


def test_worker_processes_give_the_same_means(monkeypatch):
    predictions, labels = MANY
    alone = score_all(predictions, labels)
    started = with_workers(monkeypatch)
    assert score_all(predictions, labels) == alone
    assert len(started) == 2


def test_the_rows_of_a_worker_that_dies_are_scored_all_the_same(monkeypatch):
    predictions, labels = MANY
    alone = score_all(predictions, labels)
    with_workers(monkeypatch)
    monkeypatch.setattr(metrics, "__file__", str(Path(metrics.__file__).with_name("no such file")))
    assert score_all(predictions, labels) == alone


@pytest.mark.parametrize("seed", range(3))
def test_the_longest_common_subsequence_is_that_of_the_usual_table(seed):
    from rouge_chinese.rouge_score import _len_lcs

    generator = random.Random(seed)
    for _ in range(100):
        left, right = (generator.choices("abcdef", k=generator.randrange(80)) for _ in range(2))
        assert metrics.lcs_length(left, right) == _len_lcs(left, right)


def test_scoring_prints_nothing():
    code = "from evaluation import metrics; metrics.score('简约的外套', '白色的外套')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(metrics.__file__).parents[1], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_importing_the_module_leaves_the_slow_libraries_alone():
    code = "import sys, evaluation.metrics; print([name for name in ('jieba', 'nltk', 'torch') if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(metrics.__file__).parents[1], capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]"


def test_table_aligns_names_and_figures():
    assert metric_table({"bleu-4": 7.736, "rouge-1": 29.511, "empty_predictions": 3}) == (
        "  bleu-4              7.7360\n  rouge-1            29.5110\n  empty_predictions        3"
    )
