"""C-Eval as the official repository measures it: the model reasons, then the likeliest of A, B, C and D counts.

Answers to the official `evaluation/evaluate_ceval.py`: its prompts, lengths and files. It differs in that rows are not
padded, and that what is no such file is said.
"""

from pathlib import Path

from chatglm2.generation import answer_prompts
from common.files import check_size
from common.text import parse_json
from evaluation.likelihoods import next_logits

CHOICES = "ABCD"
CONCLUSION = "\n综上所述，ABCD中正确的选项是："  # before the choice
MOST_PROMPT = 2048  # tokens; the end of a longer prompt is cut
MOST_REASONING = 512  # new tokens
MOST_BYTES = 2**26  # of a file


def read_subjects(folder: Path | str) -> dict[str, list[dict]]:
    """{name of a file: rows} of the published folder, or of its part `val`. Raises ValueError and FileNotFoundError."""
    folder = Path(folder)
    root = folder / "val" if (folder / "val").is_dir() else folder
    files = sorted(root.rglob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"--official_ceval {folder}: there is no .jsonl file in it. Expected the folder CEval that the official "
            "repository publishes, with val/<area>/<subject>.jsonl."
        )
    return {file.relative_to(root).with_suffix("").as_posix(): read_rows(file) for file in files}


def read_rows(file):
    """The rows of a file: inputs_pretokenized, and the label, from 0 to 3."""
    check_size(file, MOST_BYTES)
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error}).") from error
        known = isinstance(row, dict) and isinstance(row.get("inputs_pretokenized"), str)
        if not known or type(row.get("label")) is not int or not 0 <= row["label"] < len(CHOICES):
            raise ValueError(
                f"{file}, line {number}: expected inputs_pretokenized, a text, and label, a number from 0 to 3."
            )
        rows.append(row)
    return rows


def choice_tokens(tokenizer) -> list[int]:
    """The token that stands for each choice: its first, as official, or its last where all begin alike."""
    ids = [tokenizer.encode(choice, add_special_tokens=False) for choice in CHOICES]
    first, last = ([each[place] for each in ids] for place in (0, -1))
    return first if len(set(first)) == len(CHOICES) else last


def answer_choices(model, tokenizer, texts: list[str], batch_size: int, progress=None) -> list[int]:
    """The choice, from 0 to 3, that a model takes to be right in each question."""
    most = min(MOST_PROMPT, model.config.seq_length - 1)

    def prompts(questions):
        return [tokenizer.cut_prompt(tokenizer.encode_prompt(question), most) for question in questions]

    first = prompts(texts)
    room = min(MOST_REASONING, model.config.seq_length - min(map(len, first)))
    answers = answer_prompts(
        model,
        first,
        min(most + room, model.config.seq_length),
        max_answer=room,
        num_known=len(tokenizer),
        batch_size=batch_size,
        rows=range(len(first)),
        progress=progress,
    )
    concluded = [text + tokenizer.decode(ids) + CONCLUSION for text, ids in zip(texts, answers, strict=True)]
    return next_logits(model, prompts(concluded), choice_tokens(tokenizer)).argmax(-1).tolist()


def score_subjects(model, tokenizer, subjects: dict, batch_size: int, progress=None) -> dict[str, float]:
    """{subject: share of right choices}, and "all": that of all questions together."""
    questions = [(name, row) for name, rows in subjects.items() for row in rows]
    texts = [row["inputs_pretokenized"] for _, row in questions]
    chosen = answer_choices(model, tokenizer, texts, batch_size, progress)
    right = {name: [] for name in subjects}
    for (name, row), choice in zip(questions, chosen, strict=True):
        right[name].append(choice == row["label"])
    scores = {name: sum(each) / len(each) for name, each in right.items() if each}
    return {**scores, "all": sum(map(sum, right.values())) / len(questions)}
