"""Token ids of what is asked, within what a model takes.

Answers to `build_inputs` of the official model, whose demos bound nothing.
"""

from bisect import bisect_right
from functools import partial
from itertools import accumulate

from serving.answers import check_text
from serving.auto import AUTO, encode_for

CHARACTERS_A_TOKEN = 16  # of the longest token of ChatGLM2, so a longer text fits into no prompt


class TooLong(ValueError):
    """A prompt leaves no room for an answer."""


class Prompts:
    """The part of ChatServer that makes prompts; it has a model, a tokenizer, and what was trained beside the base."""

    def source_prefix(self, name=None):
        """The text before every prompt: the given one, else that of the training of a model; "" where there is none."""
        name = name or self.default
        self.prefix(name)
        return self._source_prefixes[name] if self.given_source_prefix is None else self.given_source_prefix

    def encode(self, query, history=(), model=None, among=(), role="user"):
        """Token ids of the chat prompt for a model; ValueError for text that no UTF-8 file could hold.

        For auto a Prompt, to be answered by one of the models `among`, by default the candidates, or by the base.
        """
        query, history = self.tokenizer.read_history(query, history)
        self.check_characters(query, history)
        check_text(query, history)
        encode = partial(self.tokenizer.encode_prompt, query, history, role=role)
        return encode_for(self._before(model, among), encode)

    def _before(self, model, among):
        """{model: the text before its prompts} of the one that is asked for; for auto of the base, and all `among`."""
        names = [self.base, *(among or self.candidates)] if model == AUTO else [model or self.default]
        return {name: self.source_prefix(name) for name in names}

    def read_prompt(self, prompt):
        """(text, token ids) of a raw prompt, a text or ids; `[gMASK] sop` stands before a text's. ValueError for others."""
        if isinstance(prompt, str):
            self.check_characters(prompt)
            check_text(prompt, [])
            return prompt, self.tokenizer.encode(prompt)
        if max(prompt) >= len(self.tokenizer):
            last = len(self.tokenizer) - 1
            raise ValueError(f"The prompt has the token id {max(prompt)}; this model's are from 0 to {last}.")
        return self.tokenizer.decode(prompt), prompt

    def fit(self, query, history, max_new_tokens, model=None, among=()):
        """(token ids, number of oldest turns left out so that an answer fits); ValueError if the question is too long.

        `among` is as in encode. Kept free for the answer: `max_new_tokens`, at most a quarter of what the model was made for.
        """
        query, history = self.tokenizer.read_history(query, history)
        self.check_characters(query)
        check_text(query, history)
        seq_length = self.model.config.seq_length
        # The oldest turns may have too many characters behind them to be a part of any prompt.
        behind = list(accumulate(sum(map(len, turn)) for turn in reversed(history)))
        turn_tokens = self.tokenizer.turn_tokens
        too_old = len(history) - min(bisect_right(behind, CHARACTERS_A_TOKEN * seq_length), seq_length // turn_tokens)
        history = history[too_old:]
        limit = seq_length - min(max_new_tokens, seq_length // 4)
        before = self._before(model, among)
        token_ids, dropped = self.tokenizer.fit_prompt(query, history, limit, max(before.values(), key=len))
        if len(before) > 1:
            fitted = partial(self.tokenizer.fit_prompt, query, self.tokenizer.kept_history(history, dropped), limit)
            token_ids = encode_for(before, lambda text: fitted(text)[0])
        self.check_length(token_ids)
        return token_ids, dropped + too_old

    def check_characters(self, query, history=()):
        """ValueError where a prompt has more characters than could fit, before time goes into tokenizing it."""
        seq_length = self.model.config.seq_length
        if self.tokenizer.turn_tokens * len(history) > seq_length:
            raise self.too_long(f"The history has {len(history):,} turns", "tokens ", "history")
        characters = len(query) + sum(len(text) for turn in history for text in turn)
        if characters > CHARACTERS_A_TOKEN * seq_length:
            raise self.too_long(f"The prompt has {characters:,} characters", "tokens ")

    def check_length(self, token_ids):
        """ValueError where a prompt leaves no room for an answer."""
        if len(token_ids) >= self.model.config.seq_length:
            raise self.too_long(f"The prompt has {len(token_ids)} tokens")

    def too_long(self, found, unit="", what="question or the history"):
        """The error for a prompt that leaves no room for an answer."""
        return TooLong(
            f"{found}; this model takes {self.model.config.seq_length} {unit}for prompt and answer together (seq_length "
            f"of its config.json). Shorten the {what}."
        )
