"""The trainer of pairs of answers: PrefixTrainer with another loss, and with figures of the pairs in its logs.

Answers to `PairwiseTrainerForChatGLM` of ChatGLM-Efficient-Tuning. A batch of B pairs is computed as one of 2 B rows. The
loss of a step is the mean over all its pairs, however many batches and processes it has.
"""

import torch

from common.ranks import gather
from trainer import PrefixTrainer
from training.memory import explaining_out_of_memory


class ObjectiveTrainer(PrefixTrainer):
    """Trains what `objective` says, of a stage of its own.

    An objective's `figures` are names of what is logged; `save` and `load` write and read what it keeps beside the
    weights in a checkpoint's folder. `loss_of_batch` is the loss, in place of the model's own.
    """

    def __init__(self, *args, objective, **kwargs):
        self.objective, self.logged = objective, objective.figures
        super().__init__(*args, **kwargs)
        self.model.own_loss = self.loss_of_batch

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.objective.save(output_dir or self.args.output_dir)

    def load_weights(self, checkpoint):
        super().load_weights(checkpoint)
        self.objective.load(checkpoint)


class PairTrainer(ObjectiveTrainer):
    """Trains on pairs of answers, by a RewardObjective or PreferenceObjective.

    An objective called with a model and a batch of collate_pairs gives {"loss": (B,)} and one such tensor for each name
    in its `figures`.
    """

    sums = None  # (1 + figures,) since the last line of the log: how many pairs, and the sum of each figure

    # ---- batches and steps

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step and the number of their pairs, by which its loss is divided."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.stack([batch["weight"].sum() for batch in batches]).sum().to(device) if batches else None
        if batches and self.args.world_size > 1:
            pairs = self.accelerator.gather(pairs).sum()
        return batches, pairs

    def loss_of_batch(self, model, input_ids, labels, num_items_in_batch, **batch):
        """The part that a batch has of its step's loss; takes note of its figures."""
        loss, sums = self.sums_of_batch(model, {"input_ids": input_ids, "labels": labels, **batch})
        self.sums = sums if self.sums is None else self.sums + sums
        return loss / num_items_in_batch

    def sums_of_batch(self, model, batch):
        """(the loss of all pairs of a batch, (1 + figures,) as `sums`)."""
        found, weight = self.objective(model, batch), batch["weight"]
        loss = (found["loss"] * weight).sum()
        figures = [(found[name].detach() * weight).sum() for name in self.logged]
        return loss, torch.stack([weight.sum(), *figures])

    def log(self, logs, start_time=None):
        if "loss" in logs and self.sums is not None:
            logs |= self.means(torch.stack(gather(self.sums.cpu())).sum(dim=0))
            self.sums = None
        super().log(logs, start_time)

    def means(self, sums):
        """{name: mean} of what is logged beside the loss."""
        return {name: float(total / sums[0]) for name, total in zip(self.logged, sums[1:], strict=True)}

    # ---- checkpoints

    def _process_state(self):
        return {**super()._process_state(), "figures": None if self.sums is None else self.sums.cpu()}

    def _restore_process_state(self, state, states):
        super()._restore_process_state(state, states)
        saved = [state["figures"] for state in states if state.get("figures") is not None]
        if len(states) == self.args.world_size:
            saved = [] if state["figures"] is None else [state["figures"]]
        elif self.args.process_index:  # the first process has those of all
            saved = []
        self.sums = torch.stack(saved).sum(dim=0).to(self.args.device) if saved else None

    # ---- dev loss and scores

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The (1, 2 + figures) sums of a batch of pairs: loss, how many pairs, and each figure."""
        inputs = self._prepare_inputs(inputs)
        inputs.pop("row")
        model = self.accelerator.unwrap_model(model)
        shape = tuple(inputs["input_ids"].flatten(0, 1).shape)
        with torch.no_grad(), explaining_out_of_memory(model, self.args, shape, training=False):
            loss, sums = self.sums_of_batch(model, inputs)
        return None, torch.cat((loss[None], sums))[None].float(), None

    def means_of(self, loss, *sums):
        return {"loss": loss / sums[0], **self.means(sums)}

    def score_rows(self, dataset, collate):
        """The (chosen, rejected) rewards of all rows of encode_pairs, in order; None for an answer that is not there."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        order = sorted(range(len(dataset)), key=dataset["length"][:].__getitem__)[args.process_index :: args.world_size]
        was_training, scores = model.training, {}
        model.eval()
        for start in range(0, len(order), args.per_device_eval_batch_size):
            rows = order[start : start + args.per_device_eval_batch_size]
            features = [dataset[row] for row in rows]
            alone = [not feature["rejected_input_ids"] for feature in features]
            for feature in (feature for feature, single in zip(features, alone, strict=True) if single):
                del feature["rejected_input_ids"], feature["rejected_labels"]  # the chosen one is scored twice
            inputs = self._prepare_inputs(collate(features))
            with torch.no_grad():
                rewards = self.objective.rewards(model, inputs).tolist()
            for row, single, (chosen, rejected) in zip(rows, alone, rewards, strict=True):
                scores[row] = chosen, None if single else rejected
        model.train(was_training)
        scores = dict(pair for part in gather(list(scores.items())) for pair in part)
        return [scores[row] for row in range(len(dataset))]
