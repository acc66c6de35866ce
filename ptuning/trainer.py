"""Seq2SeqTrainer for a model of which a part trains.

Answers to the official `trainer.py` and `trainer_seq2seq.py`, and to the library's for everything else. It
differs in that a row's prediction does not depend on the rows that share its batch, that a step whose loss or
gradient is no finite number ends the run, and that a checkpoint is written completely or not at all and holds
everything that a resumed run needs to go on exactly like one that was never stopped.

The library says nothing of its private methods. These are overridden, here or in training/checkpointing.py; `since` is
the release of transformers whose method already has the parameters of 5.23. 5.17 is the oldest that requirements.txt
allows, 5.0 the oldest compared.

    method                          since  why
    _get_dataloader                 5.0    a row counts once in a loss, however many processes there are
    _get_train_sampler              5.0    the rows of a step are grouped by length
    _get_grad_norm                  5.17   a gradient that is no finite number is noticed before the optimizer's step
    _maybe_log_save_evaluate        5.0    a step is judged before anything of it is logged, evaluated or saved
    _determine_best_metric          5.0    only a step that is saved can be the best one
    _save_checkpoint                5.0    a checkpoint is written completely or not at all
    _save                           5.0    a checkpoint holds what was trained, in the official file set
    _load_rng_state                 5.0    each process goes on with its random numbers and losses, on other devices too
    _load_optimizer_and_scheduler   5.0    5.17 cannot load for several processes on a CPU; foreign states are refused
    _load_scaler                    5.0    a run in float16 may go on in another dtype
    _load_from_checkpoint           5.0    a checkpoint holds what was trained only
    _load_best_model                5.0    a checkpoint holds what was trained only
    _evaluate                       5.0    what a signal stops is saved before the dev loss is measured
    _finalize_training              5.17   the last step is saved, and the library deletes no checkpoint
"""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PredictionOutput, speed_metrics

from chatglm2.generation import answer_prompts
from chatglm2.official_recipe import OfficialAdamW, official_loss
from checkpoints.trainer_state import reading_known_keys
from common.failure import last_words
from common.files import STATE_FILE, write_text
from common.ranks import gather, on_first_rank
from data.batches import EvenBatches, RowOrder, WithBlankRow
from data.encoding import IGNORED_LABEL
from data.splits import seed_of_rows
from training.arguments import PrefixTrainingArguments  # noqa: F401 - named here by older training_args.bin
from training.checkpointing import CheckpointTrainer
from training.memory import explaining_out_of_memory, rows_that_fit
from training.progress import ShownProgress
from training.results import write_metrics
from training.run_log import RunLog, guard_callback
from training.shards import count_writers, divide_anew
from training.signals import StopOnSignal
from training.watch import RunWatch, StepWatch
from tuning.signature import sign_run

LOGGERS = tuple(INTEGRATION_TO_CALLBACK.values())  # TensorBoard's, wandb's, …
STEPS_GROUPED = 50  # whose rows --train_sampling_strategy group_by_length sorts by length; as transformers does


class PrefixTrainer(CheckpointTrainer):
    """Trains the prefix encoder of a ChatGLM model.

    `collate_prediction` makes batches of left-padded prompts for predict(), `data_collator` those of training
    and of the dev loss. `generation_config` holds `max_length`, the tokens of prompt and answer together.
    `sidecar` is written into every checkpoint; `say` prints a line, on the first process only. After train(),
    `stop.agreed` is the signal that ended it, or 0.
    """

    def __init__(self, *args, collate_prediction=None, generation_config=None, sidecar=None, say=print, **kwargs):
        super().__init__(*args, **kwargs)
        self.collate_prediction = collate_prediction
        self.generation_config = generation_config
        self.sidecar = sidecar or {}
        self.official = self.args.precision == "official"
        # The Trainer's own way of it would begin the run again, with another number of rows in a step.
        self.least_rows = 1 if self.args.auto_find_batch_size else self.args.given_batches[0]  # no batch is cut below
        self.args.auto_find_batch_size = False
        self.say = say
        if self.official:
            self.model.own_loss = official_loss
            self.model_accepts_loss_kwargs = False  # the mean of the batches' means
        # Every process has read the same frozen weights: only the prefix is synchronized, and its gradient summed.
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in self.model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)
        dtype = self.model.transformer.dtype_of_blocks
        run_watch = RunWatch(dtype=dtype, early_stopping=self.args.early_stopping, say=say)
        last_checkpoint = run_watch.last_checkpoint
        self.watch = StepWatch(dtype=dtype, loss_scaling=self.args.fp16, last_checkpoint=last_checkpoint, say=say)
        self.stop = StopOnSignal()
        self.run_log = RunLog(say, self.logged)
        self.progress = ShownProgress(shown=self.args.process_index == 0, bar=not self.args.disable_tqdm, say=say)
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        for callback in (run_watch, self.stop, self.run_log, self.progress):
            self.add_callback(callback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LOGGERS):
                guard_callback(callback, say)

    logged = ()  # what trainer_log.jsonl has beside losses and learning rate

    # ---- batches and steps

    def train(self, resume_from_checkpoint=None, **kwargs):
        self.rows_fed, self.batch_parts = 0, self.args.first_parts
        resumes_deepspeed = resume_from_checkpoint and self.is_deepspeed_enabled
        if resumes_deepspeed and count_writers(resume_from_checkpoint) != self.args.world_size:
            self.say(f"Dividing {resume_from_checkpoint} for {self.args.world_size} processes.")
            resume_from_checkpoint = on_first_rank(divide_anew, resume_from_checkpoint, self.args.output_dir)
            plugin = self.accelerator.state.deepspeed_plugin
            for config in (plugin.deepspeed_config, plugin.hf_ds_config.config):
                config["checkpoint"] = {"load_universal": True}
        last_words[:] = [self.run_log.end, self.progress.close]
        if self.args.should_save and not self.sharded:
            self.signature = sign_run(self.model, self.train_dataset, self.processing_class, self.sidecar, self.args)
        with reading_known_keys():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_dataloader(self, dataset, *args, sampler_fn=None, **kwargs):
        """The DataLoader of a dataset. For a loss, blank rows fill the batches up; no row is repeated."""
        if self.generating or self.official or self.args.world_size == 1 or self.args.dataloader_drop_last:
            return super()._get_dataloader(dataset, *args, sampler_fn=sampler_fn, **kwargs)
        loader = super()._get_dataloader(
            WithBlankRow(dataset), *args, sampler_fn=lambda _: sampler_fn(dataset), **kwargs
        )
        shard = loader.batch_sampler  # accelerate's: it deals the batches of another batch sampler out
        merged = self.args.merged_batches if kwargs.get("is_training") else 1
        shard.batch_sampler = EvenBatches(shard.batch_sampler, self.args.world_size, len(dataset), merged)
        shard.batch_size, shard.even_batches = None, False  # they are even, and the last ones may be shorter
        return loader

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy, (batch_size, batches_per_step) = self.args.train_sampling_strategy, self.args.given_batches
        batches_per_step *= self.args.world_size
        grouped = strategy == "group_by_length" or (strategy == "random" and batches_per_step > 1 and not self.official)
        if not grouped:
            return super()._get_train_sampler(train_dataset)
        return RowOrder(
            dataset["length"][:],
            batch_size=batch_size,
            batches_per_step=batches_per_step,
            num_processes=self.args.world_size,
            seed=seed_of_rows(self.args),
            # Not through set_epoch, which does not reach a sampler behind the wrappers of a resumed epoch.
            epoch=lambda: int(self.state.epoch or 0),
            window=STEPS_GROUPED if strategy == "group_by_length" else 1,
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        rows = inputs.pop("row")
        self.rows_fed += torch.count_nonzero(rows)  # without blank ones, 0; where the rows are, so a GPU does not wait
        loss = None
        while loss is None:
            loss = self._compute_batch(model, inputs, num_items_in_batch)
        self.watch.saw_batch(loss, rows)
        return loss

    rows_fed = 0  # to this process, by this call of train()
    batch_parts = 1  # a batch is computed in so many, one after the other

    def _compute_batch(self, model, inputs, num_items_in_batch):
        """Add the gradient of a batch to that of its step, and return its loss.

        None where it does not fit into memory and may be cut: with --auto_find_batch_size, or down to one of merged
        batches. The gradient is then as before, and this batch and all later ones have twice as many parts. Every
        part's loss is divided by the supervised tokens of the whole step, so a step is the same in any number of parts.
        """
        shape = tuple(inputs["input_ids"].shape)
        part_rows = -(-shape[0] // self.batch_parts)
        explained = explaining_out_of_memory(self.model, self.args, (part_rows, shape[-1]), training=True)
        if shape[0] <= self.least_rows:
            with explained:
                return super().training_step(model, inputs, num_items_in_batch)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        gradients = [None if weight.grad is None else weight.grad.clone() for weight in weights]
        starts = range(0, shape[0], part_rows)
        try:
            total = 0.0
            with explained:
                for start in starts:
                    part = {name: tensor[start : start + part_rows] for name, tensor in inputs.items()}
                    last = start == starts[-1]  # only with it are the gradients of the processes brought together
                    with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                        total = total + super().training_step(model, part, num_items_in_batch)
            return total
        except torch.OutOfMemoryError:
            if part_rows <= self.least_rows:
                raise
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        clear_device_cache(garbage_collection=True)
        self.batch_parts *= 2
        self.say(
            f"Out of memory with {part_rows} rows x {shape[-1]} tokens at step {self.state.global_step + 1}: from now on "
            f"{-(-shape[0] // self.batch_parts)} at a time, accumulated {self.batch_parts} times as often; a step keeps "
            "its rows."
        )
        return None

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)  # after the last batch of a step, before the optimizer
        if isinstance(grad_norm, DTensor):  # FSDP's, a sum that is still to be made
            grad_norm = grad_norm.full_tensor()
        grad_norm = torch.as_tensor(grad_norm, device=self.args.device)  # DeepSpeed's is a number
        self.watch.saw_gradient(self.state.global_step + 1, self._get_learning_rate(), grad_norm)
        return grad_norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.watch.read()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        if self.official and self.optimizer is None:
            self.optimizer = OfficialAdamW(self.model, self.args)
        return super().create_optimizer(*args, **kwargs)

    def log(self, logs, start_time=None):
        if "train_loss" in logs:  # the mean of the whole run, also of a resumed one
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step - self.first_loss_step)
            if logs["train_runtime"]:  # the library's is of full steps, however many rows they had
                logs["train_samples_per_second"] = round(sum(gather(int(self.rows_fed))) / logs["train_runtime"], 3)
        super().log(logs, start_time)

    def save_metrics(self, split, metrics, combined=True):
        """Write <split>_results.json and, with `combined`, all_results.json, each completely or not at all."""
        if self.is_world_process_zero():
            write_metrics(Path(self.args.output_dir), split, metrics, combined, self.say)

    def save_state(self):
        """Write trainer_state.json into the run's folder, completely or not at all."""
        if self.is_world_process_zero():
            file = Path(self.args.output_dir) / STATE_FILE
            write_text(file, json.dumps(asdict(self.state), indent=2, sort_keys=True) + "\n")

    # ---- dev loss and predictions

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="predict", **generation_settings):
        """Generate an answer to every row, in the order of the rows.

        Returns transformers' PredictionOutput; its `predictions` are the token ids of each answer. Every process
        answers a share of the rows, and has all answers afterwards. Raises ValueError for a prompt that leaves no
        room for an answer.
        """
        config = self.generation_config
        prompts = test_dataset["input_ids"][:]
        names = [name for name in ("dataset", "row") if name in test_dataset.column_names]
        rows = list(zip(*(test_dataset[name][:] for name in names), strict=True))
        for prompt, row in zip(prompts, rows, strict=True):
            if len(prompt) >= config.max_length:
                raise ValueError(
                    f"Row {row[-1]}: the prompt has {len(prompt)} tokens, and prompt and answer together may have "
                    f"{config.max_length} (--generation_max_length, and seq_length of the model). Lower "
                    "--max_source_length."
                )
        if config.num_beams > 1:
            return self._predict_with_beams(test_dataset, ignore_keys, metric_key_prefix, **generation_settings)
        self.run_log.enter("evaluating")
        started = time.time()
        model, was_training = self.accelerator.unwrap_model(self.model), self.model.training
        model.eval()
        batch_size = self.args.prediction_batch_size or rows_that_fit(model, config.max_length)
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        mine = by_length[self.args.process_index :: self.args.world_size]  # equal work for all
        self.progress.begin(f"{metric_key_prefix} row", len(mine))
        with explaining_out_of_memory(model, self.args, (batch_size, config.max_length), training=False):
            answers = answer_prompts(
                model,
                [prompts[index] for index in mine],
                config.max_length,
                num_known=len(self.processing_class),
                ends=self.processing_class.stop_ids,
                batch_size=batch_size,
                rows=[rows[index] for index in mine],
                seed=self.args.seed,
                temperature=config.temperature if config.do_sample else 0.0,
                top_p=config.top_p if config.do_sample else 1.0,
                progress=self.progress.advance,
            )
        self.progress.end()
        model.train(was_training)
        answers = dict(pair for part in gather(list(zip(mine, answers, strict=True))) for pair in part)
        metrics = speed_metrics(metric_key_prefix, started, len(prompts), -(-len(prompts) // batch_size))
        output = PredictionOutput([answers[index] for index in range(len(prompts))], None, metrics)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return output

    def _predict_with_beams(self, test_dataset, ignore_keys, metric_key_prefix, **generation_settings):
        """Answer every row with beams, by the library's generate(), batch by batch; returns what predict() returns."""
        training = self.data_collator, self.gather_function, self.args.train_sampling_strategy
        self.data_collator, self.args.train_sampling_strategy = self.collate_prediction, "random"
        self.generating = True
        try:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix, **generation_settings)
        finally:
            self.generating = False
            self.data_collator, self.gather_function, self.args.train_sampling_strategy = training

    generating = False
    score_dev_rows = None  # with --eval_with_generate, a function that gives metrics of the answers to the dev rows

    def evaluate(self, *args, **kwargs):
        self.run_log.enter("evaluating")
        metrics = super().evaluate(*args, **kwargs)
        if self.score_dev_rows is not None:
            with torch.random.fork_rng():  # training draws the same numbers with and without it
                scores = self.score_dev_rows()
            self.log(dict(scores))
            metrics.update(scores)
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Loss or answers of a split. The dev loss is the mean over all supervised tokens, in batches of any size."""
        if self.generating:
            # Drops the rows that pad the last batch to a multiple of the processes; Seq2SeqTrainer keeps them.
            self.gather_function = self.accelerator.gather_for_metrics
            return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.gather_function = self.accelerator.gather
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.means_of(*output.predictions.sum(axis=0, dtype="float64"))
        output.metrics.update({f"{metric_key_prefix}_{name}": float(mean) for name, mean in means.items()})
        return output

    def means_of(self, nats, tokens):
        """{name: mean} of the sums of a split, over its batches, of what prediction_step gives."""
        return {"loss": nats / tokens}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **generation_settings):
        """The (1, 2) nats and supervised tokens of a batch in training form, or the answers to a batch of prompts,
        found with beams.

        Answers are (B, longest) int64. The official code limits prompt, padding and answer together to
        `max_length`, at a batch size of 1; here the padding does not count, so that each row gets the room
        it would get alone.
        """
        inputs = self._prepare_inputs(inputs)
        if not self.generating:
            inputs.pop("row")
            with torch.no_grad():
                model = self.accelerator.unwrap_model(model)
                shape = tuple(inputs["input_ids"].shape)
                with explaining_out_of_memory(model, self.args, shape, training=False):
                    nats = model(**inputs, logits_to_keep=1, use_cache=False, num_items_in_batch=1).loss
            tokens = (inputs["labels"][:, 1:] != IGNORED_LABEL).sum()
            return None, torch.stack((nats.float(), tokens.float()))[None], None
        config = self.generation_config
        room = config.max_length - inputs["attention_mask"].sum(dim=1)  # (B,) tokens each row may still get
        answers = self.accelerator.unwrap_model(self.model).generate(
            **{name: tensor for name, tensor in inputs.items() if name != "labels"},
            generation_config=config,
            max_new_tokens=int(room.max()),
            max_length=None,
        )[:, inputs["input_ids"].shape[1] :]
        places = torch.arange(answers.shape[1], device=answers.device)
        answers = answers.masked_fill(places[None, :] >= room[:, None], config.pad_token_id)
        return None, answers, inputs["labels"]
