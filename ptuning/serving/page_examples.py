"""The questions that an empty page offers: those of the run's own dev rows.

Answers to nothing in the official `web_demo.py`, which offers none.
"""

from pathlib import Path

from checkpoints.sidecar import read_sidecar
from data.rows import read_rows

EXAMPLES = (
    "类型#上衣*材质#牛仔布*颜色#白色*风格#简约*图案#刺绣*衣样式#外套*衣款式#破洞",
    "类型#裙*颜色#黑色*风格#性感*裙型#百褶*裙长#连衣裙",
    "类型#锅*颜色#白色*风格#北欧*功能#聚热*锅款式#炒锅",
)
LONGEST = 200  # characters of a question that is offered
LARGEST = 2**25  # bytes of a dev file that is read for this


def examples_of(checkpoint) -> list[str]:
    """Three questions from the dev rows beside a checkpoint's training rows, else EXAMPLES."""
    if not checkpoint:
        return list(EXAMPLES)
    saved = read_sidecar(checkpoint)
    trained_on = (saved.get("training") or {}).get("train_file")
    columns = [saved.get(f"{name}_column") for name in ("prompt", "messages")]
    for file in sorted(Path(trained_on).parent.glob("dev.*")) if isinstance(trained_on, str) else ():
        try:
            rows = read_rows(file) if file.stat().st_size <= LARGEST else ()
        except (OSError, ValueError):
            continue
        questions = dict.fromkeys(filter(None, (question_of(row, *columns) for row in rows)))
        if questions:
            return list(questions)[: len(EXAMPLES)]
    return list(EXAMPLES)


def question_of(row, prompt_column, messages_column):
    """The first question of a row; None for one that is too long to be offered."""
    text = row.get(prompt_column)
    if messages_column and isinstance(row.get(messages_column), list):
        said = [turn for turn in row[messages_column] if isinstance(turn, dict) and turn.get("role") == "user"]
        text = said[0].get("content") if said else None
    return text if isinstance(text, str) and 0 < len(text.strip()) <= LONGEST else None
