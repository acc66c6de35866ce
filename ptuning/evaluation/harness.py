"""A model as EleutherAI's lm-evaluation-harness asks it: likelihoods and answers by this project's own batched code.

Answers to nothing in the official scripts. It needs the package lm_eval. Every text stands behind
`[gMASK] sop`, or before it where the model has it so.
"""

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from chatglm2.generation import answer_prompts
from evaluation.likelihoods import log_likelihoods

LONGEST_ANSWER = 256  # tokens, where a task names none


class HarnessModel(LM):
    """A model and its tokenizer; `batch_size` answers are computed at once."""

    def __init__(self, model, tokenizer, batch_size):
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def prompt(self, token_ids, room):
        """A text's ids as a prompt, which loses its beginning so that `room` more tokens still fit."""
        most = self.model.config.seq_length - room - len(self.tokenizer.with_ends([]))
        return self.tokenizer.with_ends(token_ids[max(0, len(token_ids) - most) :])

    def pair(self, context, continuation):
        """(token ids of a context, those that its continuation adds); spaces between them belong to the latter."""
        kept = context.rstrip()
        before, whole = self.tokenizer.encode_batch([kept, context + continuation])
        behind = whole[len(before) :]
        return self.prompt(before, len(behind)), behind

    def loglikelihood(self, requests):
        return self.score([self.pair(*request.args) for request in requests])

    def score(self, pairs):
        """As log_likelihoods(); a continuation without tokens is certain."""
        places = [place for place, (_, continuation) in enumerate(pairs) if continuation]
        found = log_likelihoods(self.model, [pairs[place] for place in places], len(self.tokenizer))
        return [dict(zip(places, found, strict=True)).get(place, (0.0, True)) for place in range(len(pairs))]

    def loglikelihood_rolling(self, requests):
        start, totals = self.tokenizer.with_ends([]), []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                *self.tokenizer.encode_batch([text]),
                prefix_token=start[-1],
                max_seq_len=self.model.config.seq_length - len(start),
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            pairs = [
                (start if context == start[-1:] else self.tokenizer.with_ends(context), continuation)
                for context, continuation in pairs
            ]
            totals.append(sum(value for value, _ in self.score(pairs)))
        return totals

    def generate_until(self, requests):
        """The answer to each request, in groups that are answered in one way."""
        answers, groups = [None] * len(requests), {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        for places in groups.values():
            how = requests[places[0]].args[1]
            contexts = [requests[place].args[0] for place in places]
            for place, answer in zip(places, self.answer(contexts, how), strict=True):
                answers[place] = answer
        return answers

    def answer(self, contexts, how):
        """Texts that go on behind contexts, up to one of how["until"]."""
        longest = min(int(how.get("max_gen_toks", LONGEST_ANSWER)), self.model.config.seq_length // 2)
        until = how.get("until") or []
        prompts = [self.prompt(ids, longest) for ids in self.tokenizer.encode_batch(contexts)]
        samples = how.get("do_sample") and how.get("temperature", 1.0)
        found = answer_prompts(
            self.model,
            prompts,
            max(map(len, prompts)) + longest,
            max_answer=longest,
            num_known=len(self.tokenizer),
            batch_size=self.batch_size,
            rows=range(len(prompts)),
            temperature=float(samples or 0.0),
            top_p=float(how.get("top_p", 1.0)),
        )
        texts = []
        for prompt, ids in zip(prompts, found, strict=True):
            before = self.tokenizer.decode(prompt)
            text = self.tokenizer.decode([*prompt, *ids])[len(before) :]
            for stop in [until] if isinstance(until, str) else until:
                text = text.partition(stop)[0] if stop else text
            texts.append(text)
        return texts
