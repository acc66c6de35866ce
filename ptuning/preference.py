"""Training on preferences: a reward model, DPO or PPO on a frozen base, with a prefix or a LoRA adapter.

Answers to the workflows of ChatGLM-Efficient-Tuning's `--stage rm`, `dpo` and `ppo`. It is main.py's sister, which hands
over to it, with the same sections; what differs is in alignment/. One step of a reward model is in four files: this one,
data/batches.py, alignment/reward.py and chatglm2/modeling_chatglm.py.

    python ptuning/main.py --stage rm --do_train … (see train_preference.sh)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import set_seed
from transformers.utils import logging

from alignment.dpo import PreferenceObjective, with_reference
from alignment.ppo import PPO
from alignment.ppo_trainer import PolicyObjective, PPOTrainer
from alignment.reward import RewardObjective, check_reward_base, load_reward_model, write_scores
from alignment.rollouts import collate_prompts
from alignment.trainer import PairTrainer
from alignment.value_head import ValueHead, has_value_head, read_value_head
from arguments import check_complete
from checkpoint import generation_config, load_model
from common.messages import silent
from common.reports import close_reports, prepare_reports
from data.batches import collate_pairs
from data.encoding import encode_prompts
from data.examples import load_examples
from data.preferences import encode_pairs, load_pairs
from data.splits import check_data, check_fits, read_stage_splits
from training.course import train_to_end
from training.memory import largest_batch, memory_table, settle_batch
from training.precision import choose_products, describe_precision, set_precision
from training.progress import say_above_bar
from training.resume import begin_run, prepare_run
from training.stages import check_stage_of_run
from tuning.session import open_run, session_of
from tuning.swapping import start_of, turn_dropout_off


def main(model_args, data_args, training_args, notes):
    """Run the stage that the flags ask for; the arguments are what parse_arguments gives."""
    # ------------------------------------------------------------------ 1. Flags and seed
    stage = STAGES[training_args.stage]
    logging.set_verbosity_error()
    say = say_above_bar if training_args.process_index == 0 else silent
    for note in notes:
        say(note)
    prepare_reports(training_args)
    trains = training_args.do_train
    resume_from = prepare_run(model_args, training_args, say) if trains and not data_args.check_data else None
    set_seed(training_args.seed)

    # ------------------------------------------------------------------ 2. Session: what flags and checkpoint mean
    resumes = bool(resume_from)
    session = session_of(model_args, data_args, say, do_train=True, resumes=resumes)  # an adapter is never merged
    check_complete(model_args, data_args, training_args)
    check_stage_of_run(session, training_args.stage)

    # ------------------------------------------------------------------ 3. Base model: configuration and tokenizer
    shape = {**session.prefix_shape, "prefix_dropout": model_args.prefix_dropout}
    config, tokenizer = open_run(session, model_args, data_args, training_args, **shape)
    if training_args.reward_model and not data_args.check_data:
        check_reward_base(training_args.reward_model, session)

    # ------------------------------------------------------------------ 4. Data: file -> rows -> ids of pairs or prompts
    phases = {"encoding": time.time()}
    with training_args.main_process_first(desc="encoding"):
        how = {"encode": stage.encode, "load": stage.load}
        if data_args.check_data:
            return check_data(data_args, training_args, tokenizer, config.seq_length, say, **how)
        data = read_stage_splits(data_args, training_args, tokenizer, say, **how)
    for rows in filter(None, (data.train, data.dev)):
        check_fits(rows, config.seq_length, data_args)

    # ------------------------------------------------------------------ 5. Model: what is frozen, what trains
    dtype, reason = set_precision(training_args, session.method.name)
    say(describe_precision(dtype, reason, training_args))
    phases["loading"] = time.time()
    model = load_model(
        session.folder,
        config=config,
        dtype=dtype,
        device=training_args.device,
        quantization_bit=session.quantization_bit,
        quantization_backend=choose_products(training_args, model_args.quantization_backend),
    )
    say(f"Loaded {session.folder} in {time.time() - phases['loading']:.1f} s.")
    described = session.prepare(model)
    objective = stage.objective(model, session, training_args, resume_from, say)
    if trains:
        batch = largest_batch(model, data.train, data_args, training_args)
        settle_batch(model, batch, training_args, say)
        say(memory_table(model, **batch))
    if described and not resume_from:
        say(described + (" A new run starts with it, at step 0." if session.checkpoints and trains else ""))

    # ------------------------------------------------------------------ 6. Trainer
    # Only now: what is refused leaves no folder behind.
    record = begin_run(training_args, data_args, data, session.quantization_bit, say) if trains else None
    collate = partial(stage.collate, pad_token_id=tokenizer.pad_token_id)
    if training_args.dpo_cache:
        cached = {"reference": objective.reference, "collate": collate, "args": training_args}
        data.train, data.dev = (rows and with_reference(rows, model, **cached) for rows in (data.train, data.dev))
    room = {"max_new_tokens": data_args.max_target_length + 1}  # the end token included
    trainer = stage.trainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.dev,
        processing_class=tokenizer,
        data_collator=collate,
        generation_config=generation_config(tokenizer, config, max_length=sum(session.limits.values()) + 1, **room),
        objective=objective,
        sidecar=session.sidecar(model.fingerprint, training=record) | objective.remember(),
        say=say,
    )
    trainer.run_log.phases = phases

    # ------------------------------------------------------------------ 7. Train
    if trains:
        train_to_end(trainer, model, data, data_args, session, record, resume_from)

    # ------------------------------------------------------------------ 8. Evaluate and score
    if training_args.do_eval:
        metrics = trainer.evaluate(data.dev)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if data.prompts:
        write_scores(trainer, data.prompts["predict"][0], collate)
    trainer.run_log.end_training()
    close_reports(trainer)


# ---------------------------------------------------------------------- what main() leaves to functions


def reward_objective(model, session, training_args, resume_from, say):
    """Put a value head on the model: the checkpoint's, or a new one. Raises as read_value_head."""
    given = session.checkpoint
    if given and (has_value_head(given) or not training_args.do_train):
        head = read_value_head(given, model.config.hidden_size)
    else:
        head = ValueHead(model.config.hidden_size)
    model.value_head = head.to(model.device)
    return RewardObjective(model.value_head)


def begin_reference(model, session, say):
    """What trains, as it is now, to be the reference; from here on nothing is dropped."""
    if session.method.beside_model and not session.checkpoints:
        say(
            "The reference is a new prefix, of random numbers: --ptuning_checkpoint gives one that was tuned on answers."
        )
    turn_dropout_off(model)
    return start_of(model)


def preference_objective(model, session, training_args, resume_from, say):
    """Take what trains, as it is now, for the reference; or that of the run that goes on or is evaluated."""
    reference = begin_reference(model, session, say)
    objective = PreferenceObjective(reference, training_args.dpo_beta, training_args.dpo_label_smoothing)
    if resume_from or not training_args.do_train:
        objective.load(session.checkpoint)
    return objective


def policy_objective(model, session, training_args, resume_from, say):
    """Put a reward model beside the policy, and on it a value head that begins as the reward model's; the reference is
    as of preference_objective."""
    reference = begin_reference(model, session, say)
    merged = session.sidecar(model.fingerprint).get("merged_checkpoints", ())
    reward_model = load_reward_model(model, training_args.reward_model, merged)
    model.value_head = head = ValueHead(model.config.hidden_size).to(model.device)
    if not reward_model.head.before_norm:
        head.load_state_dict(reward_model.head.state_dict())
    objective = PolicyObjective(head, reference, reward_model, PPO(epochs=training_args.ppo_epochs))
    if resume_from or not training_args.do_train:
        objective.load(session.checkpoint)
    return objective


@dataclass(frozen=True)
class Stage:
    """What a stage does in its own way: its rows, what it trains for, and its trainer."""

    encode: Callable
    load: Callable
    collate: Callable
    objective: Callable
    trainer: type


PAIRS = {"encode": encode_pairs, "load": load_pairs, "collate": collate_pairs, "trainer": PairTrainer}
PROMPTS = {"encode": encode_prompts, "load": load_examples, "collate": collate_prompts, "trainer": PPOTrainer}
STAGES = {
    "rm": Stage(objective=reward_objective, **PAIRS),
    "dpo": Stage(objective=preference_objective, **PAIRS),
    "ppo": Stage(objective=policy_objective, **PROMPTS),
}
