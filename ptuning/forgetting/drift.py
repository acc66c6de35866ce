"""How far a tuned model has moved away from its base, on the base's own greedy answers to general prompts.

    drift         mean over the tokens of these answers of KL(base || tuned), in nats: how much less likely the tuned
                  model finds, on average, what the base would say next. 0: nothing has changed.
    same_answers  share of the prompts to which the tuned model's greedy answer is the base's, token for token.

No answer of the tuned model is generated. A greedy answer takes the likeliest token at each place. Up to its first
token that differs from the base's it has read what the base has read; so it is the base's answer if and only if the
likeliest token is the base's at every place of that answer, and one pass over it tells.

What the base computes is kept as its last hidden states, H numbers a token instead of V logits: 13 MB of ChatGLM2-6B
for 48 answers of 32 tokens, where the logits would take 200 MB. So a measurement is one pass of the tuned model.
"""

import torch

from chatglm2.loss import Packing, next_tokens, supervised_states
from common.ranks import gather
from data.batches import collate_training
from data.encoding import IGNORED_LABEL
from tuning.swapping import BASE, evaluating, swapped

TOKENS_AT_ONCE = 2048  # of prompts and answers in one pass
LOGITS_AT_ONCE = 128  # tokens whose logits exist at a time, in float32 about six times: 200 MB of ChatGLM2-6B


def compare_logits(base: torch.Tensor, tuned: torch.Tensor, num_known: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(base || tuned) float32 (U,), whether the likeliest of the first `num_known` tokens is one (U,)) of logits
    (U, V)."""
    same = base[:, :num_known].argmax(-1) == tuned[:, :num_known].argmax(-1)
    base, tuned = base.float().log_softmax(-1), tuned.float().log_softmax(-1)
    return (base.exp() * (base - tuned)).sum(-1), same


def training_rows(prompts, answers) -> list[dict]:
    """Prompts and answers (token ids) as rows of training, of which the answer is learned."""
    return [
        {"input_ids": prompt + answer, "labels": [IGNORED_LABEL] * len(prompt) + answer, "row": number}
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1)
    ]


def batches_by_length(rows: list[dict], tokens: int) -> list[list[int]]:
    """Indices of the rows, those of like length together, with about so many tokens in each list."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    batches, longest = [], 0
    for index in order:
        if not batches or (len(batches[-1]) + 1) * longest > tokens:
            batches.append([])
            longest = len(rows[index]["input_ids"])
        batches[-1].append(index)
    return batches


class Drift:
    """Measures the drift of a model, each process a share of the prompts. The model is never changed.

    `num_known` ids of the vocabulary are tokens that may be chosen. No random number is drawn.
    """

    def __init__(self, model, prompts, answers, *, num_known, pad_token_id, process=0, processes=1):
        self.model, self.num_known = model, num_known
        rows = training_rows(prompts, answers)[process::processes]
        self.batches = [
            collate_training([rows[index] for index in batch], pad_token_id=pad_token_id)
            for batch in batches_by_length(rows, TOKENS_AT_ONCE)
        ]
        self.base_states = None  # of each batch, (U, H) on the CPU

    def states(self, batch):
        """The hidden states (U, H) that predict the tokens of a batch's answers, and the row (U,) of each."""
        input_ids, targets = batch["input_ids"].to(self.model.device), next_tokens(batch["labels"])
        packing = Packing.of_targets(targets.to(self.model.device))
        hidden = self.model.transformer(input_ids, use_cache=False, packing=packing).last_hidden_state
        hidden, _ = supervised_states(hidden, targets.to(self.model.device), packing)
        return hidden, (targets != IGNORED_LABEL).nonzero()[:, 0]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """{"drift", "same_answers"} of the model as it is now; the same in every process."""
        sums = [0.0, 0, 0, 0]  # nats, tokens, same answers, answers
        with evaluating(self.model):
            if self.base_states is None:
                with swapped(self.model, BASE):
                    self.base_states = [self.states(batch)[0].cpu() for batch in self.batches]
            for batch, base in zip(self.batches, self.base_states, strict=True):
                nats, same_rows = self.compare(base, *self.states(batch))
                sums = [a + b for a, b in zip(sums, (nats, len(base), same_rows, len(batch["labels"])), strict=True)]
        nats, tokens, same, rows = (sum(parts) for parts in zip(*gather(sums), strict=True))
        return {"drift": max(0.0, nats / tokens), "same_answers": same / rows}

    def compare(self, base, tuned, rows):
        """(nats, number of same answers) of hidden states (U, H), the base's and the tuned model's."""
        output_layer, nats, same = self.model.transformer.output_layer, 0.0, []
        for start in range(0, len(base), LOGITS_AT_ONCE):
            part = slice(start, start + LOGITS_AT_ONCE)
            with swapped(self.model, BASE):
                logits = output_layer(base[part].to(tuned.device))
            each, agree = compare_logits(logits, output_layer(tuned[part]), self.num_known)
            nats += each.double().sum().item()
            same.append(agree.cpu())
        differs = torch.zeros(int(rows.max()) + 1, dtype=torch.bool).index_fill(0, rows[~torch.cat(same)], True)
        return nats, int((~differs).sum())
