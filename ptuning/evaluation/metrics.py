"""BLEU-4 and ROUGE-1, -2, -L between a generated and a reference Chinese text, in percent.

Answers to `compute_metrics` of the official `main.py`: words by jieba, ROUGE F-measure as in rouge_chinese, BLEU
over characters with nltk's third smoothing method, every figure rounded to 4 digits. What differs: an empty or
symbol-only text scores 0, where the official script raises or credits a matching full stop; the longest common
subsequence of ROUGE-L is found by arithmetic on whole rows of bits, not cell by cell; many rows are scored by several
processes. Each of these runs this file as a program: it reads pairs of texts and writes their scores, as JSON.
"""

import json
import logging
import os
import subprocess
import sys
import warnings
from functools import cache

METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
ROWS_WORTH_A_WORKER = 400  # fewer are scored before another process has imported its libraries
MOST_WORKERS = 8


@cache
def _libraries():
    """jieba, the two modules of rouge_chinese, nltk's sentence_bleu, imported late: together they take over a second."""
    with warnings.catch_warnings():
        # Both packages contain escape sequences and imports that newer Pythons warn about.
        warnings.simplefilter("ignore")
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge, rouge_score
    jieba.setLogLevel(logging.ERROR)
    jieba.initialize()
    return jieba.lcut, Rouge(), rouge_score, sentence_bleu, SmoothingFunction().method3


def has_words(text: str) -> bool:
    """False for an empty text and for one of punctuation, spaces and symbols only."""
    return any(character.isalnum() for character in text)


def score(prediction: str, label: str) -> dict[str, float]:
    """`rouge-1`, `rouge-2`, `rouge-l`, `bleu-4` in percent, 4 digits; all 0 when either text has no word."""
    if not has_words(prediction) or not has_words(label):
        return dict.fromkeys(METRICS, 0.0)
    cut, rouge, rouge_score, sentence_bleu, smoothing = _libraries()
    # As Rouge.get_scores: it reads words separated by spaces, and sentences that it finds itself.
    sentences = [
        [" ".join(line.split()) for line in rouge.cut_sent(" ".join(cut(text))) if line] for text in (prediction, label)
    ]
    words, label_words = ([word for line in lines for word in line.split(" ")] for lines in sentences)
    common = lcs_length(words, label_words)
    fractions = {
        "rouge-1": rouge_score.rouge_n(*sentences, 1)["f"],
        "rouge-2": rouge_score.rouge_n(*sentences, 2)["f"],
        "rouge-l": rouge_score.f_r_p_rouge_n(len(words), len(label_words), common)["f"],
        "bleu-4": sentence_bleu([list(label)], list(prediction), smoothing_function=smoothing),
    }
    return {name: round(fraction * 100, 4) for name, fraction in fractions.items()}


def lcs_length(left: list, right: list) -> int:
    """Length of the longest common subsequence of two lists.

    By Hyyrö's bit-parallel algorithm ("Bit-Parallel LCS-length Computation Revisited", 2004): a row of the usual table
    is one integer, whose bit i is 0 where the row grows at left[i]; one addition carries through all of it.
    """
    places = {}  # item -> bits of the places where it stands in `left`
    for index, item in enumerate(left):
        places[item] = places.get(item, 0) | 1 << index
    ones = (1 << len(left)) - 1
    row = ones
    for item in right:
        matches = row & places.get(item, 0)
        row = (row + matches | row - matches) & ones
    return len(left) - row.bit_count()


def score_all(predictions: list[str], labels: list[str]) -> dict[str, float]:
    """Mean of each metric over all rows, and `empty_predictions`: how many predictions have no word.

    No row is left out; for no rows at all only the count is returned. ValueError when the lengths differ.
    """
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(labels)} labels")
    rows = _score_rows(list(zip(predictions, labels, strict=True)))
    means = {name: sum(row[name] for row in rows) / len(rows) for name in METRICS} if rows else {}
    return {**means, "empty_predictions": sum(not has_words(prediction) for prediction in predictions)}


def _score_rows(pairs: list[tuple[str, str]]) -> list[dict[str, float]]:
    """The score of each pair. This process takes a share of them, beside as many workers as are worth it."""
    shares = max(1, min(os.cpu_count() or 1, MOST_WORKERS, len(pairs) // ROWS_WORTH_A_WORKER))
    workers = []
    for number in range(1, shares):
        # Not multiprocessing: its processes would import main.py, and torch with it.
        worker = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        workers.append(worker)
        worker.stdin.write(json.dumps(pairs[number::shares]).encode())
        worker.stdin.close()
    rows = [{}] * len(pairs)
    rows[0::shares] = [score(*pair) for pair in pairs[0::shares]]
    for number, worker in enumerate(workers, start=1):
        output = worker.stdout.read()
        if worker.wait() == 0:
            rows[number::shares] = json.loads(output)
        else:  # killed, say, where memory is scarce
            rows[number::shares] = [score(*pair) for pair in pairs[number::shares]]
    return rows


def metric_table(metrics: dict[str, float]) -> str:
    """One line per metric, names and figures aligned."""
    figures = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in metrics.items()}
    name_width = max(map(len, figures), default=0)
    figure_width = max(map(len, figures.values()), default=0)
    return "\n".join(f"  {name:<{name_width}}  {figure:>{figure_width}}" for name, figure in figures.items())


if __name__ == "__main__":
    print(json.dumps([score(*pair) for pair in json.load(sys.stdin.buffer)]))
