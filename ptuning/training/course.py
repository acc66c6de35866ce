"""The course of a run: from its first step, or from the checkpoint that it goes on from, to its end.

Answers to the part of the official `main.py` that calls `trainer.train()`. It differs in that a run that has come to its
end already is told so, and that a signal ends one with its own status.
"""

from common.failure import leave
from common.messages import silent
from common.reports import close_reports
from data.description import describe_training
from training.results import describe_end, describe_trainable, write_missing_results, write_training_results
from training.resume import describe_differences, release_run
from training.schedule import describe_steps
from training.signals import describe_stop


def train_to_end(
    trainer, model, data, data_args, session, record: dict, resume_from: str | None, at_end=silent
) -> None:
    """Train `model` on data.train; write the run's results and say where they are. `at_end()` is called before that.

    `record` is that of begin_run. Where a signal ends the run, it ends the program.
    """
    args, say = trainer.args, trainer.say
    if resume_from and (differences := describe_differences(session.saved.get("training") or {}, record)):
        say(differences)
    if resume_from and (reason := trainer.why_finished(resume_from)):
        say(reason)
        write_missing_results(trainer, model, resume_from, len(data.train))
        return
    say(describe_training(data.train, trainer.processing_class, skipped=data.train_skipped, **session.limits))
    say(describe_steps(args, len(data.train)))
    say(describe_trainable(model))
    result = trainer.train(resume_from_checkpoint=resume_from)
    if not trainer.stop.agreed or trainer.state.global_step >= trainer.state.max_steps:
        write_training_results(trainer, model, result.metrics, len(data.train))
        at_end()
        say(describe_end(trainer.state, args, data_args.validation_file))
    if trainer.stop.agreed:
        close_reports(trainer)
        leave(128 + trainer.stop.agreed, describe_stop(trainer.stop.agreed, trainer.state, args))
    release_run(args.output_dir)
