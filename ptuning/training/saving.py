"""Which flags of the Trainer that touch checkpoints can be meant here. Needs no torch.

Answers to no official file. transformers refuses some of these only when the model is loaded, some with a KeyError
after the first dev loss, and some it lets pass without an effect.
"""

from evaluation.metrics import METRICS
from training.stages import FIGURES


def check_saving(training_args) -> None:
    """ValueError for flags of checkpoints that cannot be meant, or that would be without effect here."""
    if training_args.push_to_hub:
        raise ValueError(
            "--push_to_hub: this program uploads nothing. Leave the flag out; afterwards upload the checkpoint that you "
            f"want: hf upload <user>/<name> {training_args.output_dir}/checkpoint-<step>"
        )
    if training_args.eval_strategy == "no":
        if training_args.save_strategy == "best":
            raise ValueError(
                "--save_strategy best saves where the dev loss is lowest, so it needs one: give --eval_strategy steps "
                "and --validation_file or --dev_ratio."
            )
        if training_args.load_best_model_at_end:
            raise ValueError(
                "--load_best_model_at_end needs a dev loss: give --validation_file or --dev_ratio, and --eval_strategy as "
                "--save_strategy."
            )
        return
    metric = training_args.metric_for_best_model
    known = ["loss", *(METRICS if training_args.eval_with_generate else ()), *FIGURES.get(training_args.stage, ())]
    if metric is not None and metric.removeprefix("eval_") not in known:
        hint = " (--eval_with_generate gives it)" if metric.removeprefix("eval_") in METRICS else ""
        raise ValueError(f"--metric_for_best_model {metric}: expected {' or '.join(known)}{hint}.")
