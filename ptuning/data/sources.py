"""Which flag says where the rows of a split are. It loads no torch."""

from __future__ import annotations


def scores_answers(training_args) -> bool:
    """True for a run that compares answers with the responses of its rows."""
    return training_args.do_predict or training_args.do_eval or training_args.eval_with_generate


def check_columns(prompt_column: str | None, response_column: str | None, both: str) -> None:
    """ValueError where answers would be scored against their own prompts; `both` is how the user names the columns."""
    if prompt_column and prompt_column == response_column:
        raise ValueError(
            f"{both} are one column, {prompt_column!r}: the answers would be scored against the prompts. Name the "
            "column of the responses. With --do_predict the rows may be without it: they are answered, and not scored."
        )


FILES = {"train": "train_file", "eval": "validation_file", "predict": "test_file"}


def source_of(split: str, data_args, training_args) -> str | None:
    """The flag that says where the rows of a split are: dev_ratio, dataset, or that of its file; None without one."""
    if split == "eval" and data_args.dev_ratio:
        return "dev_ratio"
    if data_args.dataset and (split == "train" or not training_args.do_train):
        return "dataset"
    return FILES[split] if getattr(data_args, FILES[split]) else None


def check_mixture(data_args) -> None:
    """Raise ValueError where the flags of data sets contradict each other."""
    ratios = split_ratios(data_args.mix_ratios)
    names = [name for name in (data_args.dataset or "").split(",") if name.strip()]
    if ratios and not names:
        raise ValueError(f"--mix_ratios {data_args.mix_ratios} mixes data sets: name them with --dataset a,b.")
    if ratios and len(ratios) != len(names):
        raise ValueError(
            f"--mix_ratios {data_args.mix_ratios} has {len(ratios)} numbers for {len(names)} data sets "
            f"(--dataset {data_args.dataset}); give one for each."
        )
    if not 0 <= data_args.dev_ratio < 1:
        raise ValueError(f"--dev_ratio {data_args.dev_ratio}: expected a share from 0 up to 1, such as 0.05.")
    if data_args.dev_ratio and data_args.validation_file:
        raise ValueError(
            f"--dev_ratio {data_args.dev_ratio} and --validation_file {data_args.validation_file} both name dev rows; "
            "leave one of them out."
        )
    if data_args.dev_ratio and not (data_args.dataset or data_args.train_file):
        raise ValueError("--dev_ratio needs --train_file or --dataset, whose rows it divides.")
    if data_args.split != "train" and not names:
        raise ValueError(f"--split {data_args.split} is of data sets of a hub: a data file has one split, train.")


def split_ratios(text):
    """[0.7, 0.3] of "0.7,0.3", None of None. ValueError for anything but positive numbers."""
    if text is None:
        return None
    try:
        ratios = [float(word) for word in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio < float("inf") for ratio in ratios):
        raise ValueError(f"--mix_ratios {text}: expected a positive number for each data set, such as 0.7,0.3.")
    return ratios
