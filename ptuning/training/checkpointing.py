"""Seq2SeqTrainer whose checkpoints are written completely or not at all, and hold all that a resumed run needs.

Answers to the library's, whose checkpoint is half there while it is written, and of a prefix holds the whole model. The
private methods of the library that are overridden stand in the table of trainer.py.
"""

import shutil
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_optimizer
from transformers import Seq2SeqTrainer
from transformers.trainer_callback import ExportableState, TrainerState

from checkpoints.run_folder import (
    checkpoint_name,
    next_save_number,
    nothing_half_written,
    point_to_best,
    publish_checkpoint,
    rotate_checkpoints,
    stage_checkpoint,
)
from checkpoints.trainer_state import reading_known_keys
from common.files import STATE_FILE, read_json
from common.ranks import gather, on_first_rank, on_writing_ranks
from training.resume import (
    check_optimizer,
    check_schedule,
    fitting,
    random_state,
    random_state_file,
    read_process_states,
    restore_random_state,
)
from training.watch import follow, watched_key
from tuning.methods import load_trained, save_trained
from tuning.signature import write_signature


class CheckpointTrainer(Seq2SeqTrainer):
    """The part of PrefixTrainer that writes checkpoints and goes on from them; it has `sidecar`, `say`, `stop`, `watch`
    and `run_log`."""

    signature = None  # of the training prompts, for every checkpoint

    @property
    def sharded(self):
        """True where every process holds only a part of the weights and the optimizer."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _determine_best_metric(self, metrics, trial):
        # Only a step that is saved can be the best one: `best` has to point to a checkpoint.
        saved = self.control.should_save or self.args.save_strategy == "best"
        return saved and super()._determine_best_metric(metrics, trial)

    saved_step = 0  # of the newest checkpoint that this run wrote
    first_loss_step = 0  # after which the sum of losses begins

    def _save_checkpoint(self, model, trial):
        """Write checkpoint-<step>, completely or not at all, then delete those beyond save_total_limit.

        Raises OSError in every process where one of them cannot write.
        """
        self.run_log.enter("saving")
        self.store_flos()
        folder = Path(self.args.output_dir) / checkpoint_name(self.state.global_step)
        if best_step := self.state.best_global_step:
            best = folder.with_name(checkpoint_name(best_step))
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        processes = gather(self._process_state())
        shards = self._write_shards(folder) if self.sharded else ()
        on_writing_ranks(self.args.should_save, self._write_checkpoint, folder, processes, *shards)
        self.saved_step = self.state.global_step

    def _write_shards(self, folder):
        """Write the optimizer's shards, all processes together: (staging folder, the complete weights on process 0)."""
        staging = on_first_rank(stage_checkpoint, folder)
        weights = self.accelerator.get_state_dict(self.model_wrapped)  # on the first process
        if self.is_deepspeed_enabled and not self.args.save_only_model:
            self.model_wrapped.save_checkpoint(staging)
        elif not self.args.save_only_model:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, staging)
        return staging, weights

    def _write_checkpoint(self, folder, processes, staging=None, weights=None):
        with nothing_half_written(folder):
            staging = staging or stage_checkpoint(folder)
            self._write_files(staging, folder, processes, weights)
            publish_checkpoint(staging, folder)
        if self.state.best_global_step == self.state.global_step:
            point_to_best(folder.parent, self.state.global_step)  # or else the one before would count as the best, too
        self._delete_surplus(folder)

    def _delete_surplus(self, newest):
        if (self.args.save_total_limit or 0) > 0:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(newest.parent, self.args.save_total_limit, newest=newest, best=best)

    def _write_files(self, staging, folder, processes, weights):
        number = next_save_number(folder.parent)
        self.sidecar["training"] = {**self.sidecar.get("training", {}), "save_number": number}
        self._save(staging, weights)
        if not self.args.save_only_model:
            if self.sharded:
                torch.save(self.lr_scheduler.state_dict(), staging / "scheduler.pt")
            else:
                self._save_optimizer_and_scheduler(staging)
            self._save_scaler(staging)
            for process, state in enumerate(processes):
                torch.save(state, staging / random_state_file(process, len(processes)))
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(staging / STATE_FILE)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        save_trained(self.accelerator.unwrap_model(self.model), output_dir, self.sidecar, state_dict)
        write_signature(self.signature, output_dir)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, output_dir / "training_args.bin")

    def _process_state(self):
        """The random numbers of this process, and its losses since the last line of the log: what it needs to go on."""
        losses = {"since_log": self._tr_loss.detach().cpu(), "last_logged_step": self._globalstep_last_logged}
        losses |= {"sum": self._total_loss_scalar, "first_step": self.first_loss_step}
        return {**random_state(self.args.device), "losses": losses}

    def _load_rng_state(self, checkpoint):
        """Restore _process_state. Called when the first batch of a resumed run is there, before it is computed.

        A process that the run did not have before goes on from the state of process 0.
        """
        if checkpoint is None:
            return
        states = read_process_states(checkpoint)
        self.first_loss_step = self.state.global_step
        if not states:
            return
        state = states[self.args.process_index] if self.args.process_index < len(states) else states[0]
        with fitting(Path(checkpoint, random_state_file(0, len(states)))):
            self._restore_process_state(state, states)
        if Path(checkpoint).suffix == ".divided":  # now everything has been read from it
            for state in self.model_wrapped.optimizer.optimizer.state.values():
                state["step"] = torch.as_tensor(state["step"]).clone()  # ZeRO-3 lets all weights count in one tensor
            self.accelerator.wait_for_everyone()
            on_first_rank(shutil.rmtree, checkpoint)

    def _restore_process_state(self, state, states):
        restore_random_state(state, self.args.device)
        if "losses" not in state:  # written by transformers' own trainer
            return
        losses = state["losses"]
        if len(states) != self.args.world_size:  # the log shows the mean over the processes
            losses["since_log"] = torch.stack([other["losses"]["since_log"] for other in states]).mean()
        self._tr_loss = losses["since_log"].to(self.args.device).reshape(())
        self._globalstep_last_logged = int(losses["last_logged_step"])
        self._total_loss_scalar = float(losses["sum"])
        self.first_loss_step = int(losses["first_step"])

    def _load_optimizer_and_scheduler(self, checkpoint):
        # By way of the CPU: transformers 5.17 cannot load for several processes on one.
        if checkpoint is None or self.sharded:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optim = getattr(self.args.optim, "value", self.args.optim)
        hint = f"Another --optim than {optim}, or other flags of what trains, have written it. "
        with fitting(file := Path(checkpoint, "optimizer.pt"), hint):
            state = torch.load(file, map_location="cpu", weights_only=True)
            check_optimizer(state, self.optimizer, optim)
            self.optimizer.load_state_dict(state)
        hint = f"Another --lr_scheduler_type than {self.args.lr_scheduler_type.value} may have written it. "
        with fitting(file := Path(checkpoint, "scheduler.pt"), hint):
            state = torch.load(file, map_location="cpu", weights_only=True)
            check_schedule(state, len(self.optimizer.param_groups))
            self.lr_scheduler.load_state_dict(state)

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # a run in fp16 may go on in another dtype
            super()._load_scaler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.sharded:  # main.py has loaded the weights before they were divided
            return
        self.load_weights(resume_from_checkpoint)

    def load_weights(self, checkpoint):
        """Take what a checkpoint has trained."""
        load_trained(self.accelerator.unwrap_model(self.model), checkpoint, self.sidecar["finetuning_type"])

    def _load_best_model(self):
        """Take what the best checkpoint has trained, for --load_best_model_at_end."""
        best = self.state.best_model_checkpoint
        if self.sharded:  # nothing is computed after training, and the weights are divided
            self.say(f"--load_best_model_at_end: with an engine nothing is left to do for {best}.")
            return
        self.load_weights(best)
        self.say(f"The best checkpoint has been loaded: {best} (--load_best_model_at_end).")

    def _evaluate(self, *args, **kwargs):
        if self.stop.agreed:  # what stops the run may not wait for the dev loss
            self._save_checkpoint(self.model, None)
        return super()._evaluate(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        """Save the last step where nothing else did; and keep the library from deleting it for save_total_limit."""
        if self.args.save_strategy != "no" and self.state.global_step > self.saved_step:
            self.watch.read()
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def why_finished(self, checkpoint):
        """One line that says why a run has nothing left to train after a checkpoint; empty where it has."""
        state = read_json(Path(checkpoint, STATE_FILE))
        planned_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if state["global_step"] >= planned_steps:
            return (
                f"{checkpoint} is the last step of this run: nothing is left to train. "
                "A larger --max_steps continues it."
            )
        if self.args.early_stopping and follow(state.get("log_history") or [], watched_key(self.args))[1]:
            return (
                f"{checkpoint}: the loss had been rising, and with --early_stopping the run ended there. "
                "Without the flag it goes on."
            )
        return ""

    def end_from(self, checkpoint: str) -> dict[str, float]:
        """The metrics with which a run ended whose last checkpoint this is, its time left out, which nobody knows.

        `state` is then that of the end, and surplus checkpoints are deleted, as if this process had trained.
        """
        with reading_known_keys():
            self.state = TrainerState.load_from_json(str(Path(checkpoint, STATE_FILE)))
        states = read_process_states(checkpoint)
        metrics = {"total_flos": self.state.total_flos}
        if states and "losses" in states[0]:
            losses = states[0]["losses"]
            total = float(losses["sum"]) + float(losses["since_log"])
            metrics["train_loss"] = total / max(1, self.state.global_step - int(losses["first_step"]))
        if self.args.should_save:
            self._delete_surplus(Path(checkpoint))
        self.state.log_history.append({**metrics, "epoch": self.state.epoch, "step": self.state.global_step})
        return metrics
