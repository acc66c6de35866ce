"""This project: its model, loss, order of rows, batches and prediction."""

from benchmarks.contenders.base import Contender
from torch import nn

from chatglm2.generation import answer_prompts
from chatglm2.matmul import Linear, convert
from chatglm2.quantization import choose_backend, use_backend_
from data.batches import RowOrder, collate_training
from training.memory import rows_that_fit


def lay_out(model, dtype):
    """Let float weights lie in memory, in `dtype`, as load_model() leaves those of a float16 folder."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight = nn.Parameter(convert(module.weight.half(), dtype), requires_grad=False)


class Ours(Contender):
    def build(self):
        self.model = self.chatglm()
        if bits := self.settings.quantization_bit:
            use_backend_(self.model, choose_backend("auto", self.device, bits, self.dtype))
        lay_out(self.model, self.dtype)

    def batches(self, rows, size=None):
        if isinstance(rows[0], dict) and self.settings.group_by_length:
            lengths = [len(row["input_ids"]) for row in rows]
            rows = [
                rows[i] for i in RowOrder(lengths, batch_size=self.settings.batch_size, batches_per_step=1, window=50)
            ]
        return super().batches(rows, size)

    def loss(self, batch):
        batch = collate_training([{**row, "row": 1} for row in batch], pad_token_id=0)
        return self.model(**{name: batch[name].to(self.device) for name in ("input_ids", "labels")}).loss

    def generate(self, prompts):
        self.model.config.eos_token_id = -1  # every answer runs to its full length
        return answer_prompts(
            self.model,
            prompts,
            len(prompts[0]) + self.settings.new_tokens,
            num_known=self.model.config.padded_vocab_size,
            batch_size=len(prompts),
            rows=list(range(len(prompts))),
        )

    def automatic_batch_size(self):
        """What prediction takes where no --per_device_eval_batch_size is given."""
        return rows_that_fit(self.model, len(self.data["prompts"][0]) + self.settings.new_tokens)
