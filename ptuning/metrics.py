"""BLEU-4 and ROUGE-1, -2, -L between a generated and a reference Chinese text, in percent.

Answers to `compute_metrics` of the official `main.py`: words by jieba, ROUGE F-measure as in rouge_chinese, BLEU
over characters with nltk's third smoothing method, every figure rounded to 4 digits. What differs: an empty or
symbol-only text scores 0, where the official script raises or credits a matching full stop; many rows are
scored by several processes.
"""

import logging
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import cache

METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
# Below this many rows one process is done before others have imported their libraries.
ROWS_WORTH_WORKERS = 1000


@cache
def _libraries():
    """jieba, rouge_chinese's Rouge and nltk's sentence_bleu, imported late: together they take over a second."""
    with warnings.catch_warnings():
        # Both packages contain escape sequences and imports that newer Pythons warn about.
        warnings.simplefilter("ignore")
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    jieba.setLogLevel(logging.ERROR)
    jieba.initialize()
    return jieba.lcut, Rouge(), sentence_bleu, SmoothingFunction().method3


def has_words(text: str) -> bool:
    """False for an empty text and for one of punctuation, spaces and symbols only."""
    return any(character.isalnum() for character in text)


def score(prediction: str, label: str) -> dict[str, float]:
    """`rouge-1`, `rouge-2`, `rouge-l`, `bleu-4` in percent, 4 digits; all 0 when either text has no word."""
    if not has_words(prediction) or not has_words(label):
        return dict.fromkeys(METRICS, 0.0)
    cut, rouge, sentence_bleu, smoothing = _libraries()
    # ROUGE reads words separated by spaces.
    scores = rouge.get_scores(" ".join(cut(prediction)), " ".join(cut(label)))[0]
    fractions = {name: figures["f"] for name, figures in scores.items()}
    fractions["bleu-4"] = sentence_bleu([list(label)], list(prediction), smoothing_function=smoothing)
    return {name: round(fraction * 100, 4) for name, fraction in fractions.items()}


def score_all(predictions: list[str], labels: list[str]) -> dict[str, float]:
    """Mean of each metric over all rows, and `empty_predictions`: how many predictions have no word.

    No row is left out; for no rows at all only the count is returned. ValueError when the lengths differ.
    """
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(labels)} labels")
    cores = os.cpu_count() or 1
    if len(predictions) < ROWS_WORTH_WORKERS or cores == 1:
        rows = [score(*pair) for pair in zip(predictions, labels, strict=True)]
    else:
        # Spawned, not forked: the caller holds threads and perhaps a CUDA context.
        with ProcessPoolExecutor(min(cores, 8), multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(score, predictions, labels, chunksize=250))
    means = {name: sum(row[name] for row in rows) / len(rows) for name in METRICS} if rows else {}
    return {**means, "empty_predictions": sum(not has_words(prediction) for prediction in predictions)}


def metric_table(metrics: dict[str, float]) -> str:
    """One line per metric, names and figures aligned."""
    figures = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in metrics.items()}
    name_width = max(map(len, figures), default=0)
    figure_width = max(map(len, figures.values()), default=0)
    return "\n".join(f"  {name:<{name_width}}  {figure:>{figure_width}}" for name, figure in figures.items())
