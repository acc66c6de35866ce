"""What is asked of the server and what it writes: how to choose tokens, an answer on its way, and the answer's text.

Answers to the arguments and to the texts of the official `stream_chat`.
"""

from dataclasses import dataclass, field
from itertools import takewhile

from chatglm2.chat import TRAINING_DATE

CONTEXT = 8  # tokens of a prompt that decide how the text behind it reads: spaces, and a character of several


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `temperature` 0 is greedy; `max_new_tokens` counts the answer only."""

    max_new_tokens: int = 8192
    top_p: float = 0.8
    temperature: float = 0.95
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # keep each token's log-probability, and so many of the likeliest
    score_prompt: bool = False  # those of the prompt's tokens, too; not where a session continues a cache
    schema: str | None = None  # JSON schema that the answer is held to, see json_mode.py
    raw: bool = False  # the text goes on behind the prompt as its tokens spell it; else it is a chat's answer

    @property
    def patterns(self):
        """Texts whose beginning must be held back: they end the answer, or process_response() replaces them."""
        return self.stop if self.raw else (*self.stop, TRAINING_DATE)

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}: expected at least 1.")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: expected a probability from 0 to 1.")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature {self.temperature}: expected from 0 (greedy) to 100.")


@dataclass(eq=False)
class Answer:
    """An answer on its way. The worker writes it, whoever asked reads it; `notify` is called on every change.

    `text` only grows: half a character and the possible beginning of a stop string, or of what process_response()
    replaces, are held back.
    `finish_reason` is None until the end, then stop, length, cancelled or error (with `error` saying which).
    """

    token_ids: list[int]
    model: str
    sampling: Sampling
    notify: object = None
    session: object = None
    client: object = None  # who asked
    text: str = ""
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple] = field(default_factory=list)  # of each of them; of raw text of its end, too
    prompt_logprobs: list[tuple] = field(default_factory=list)  # of its tokens from the second on
    finish_reason: str | None = None
    error: str | None = None
    cancelled: bool = False
    seconds: float = 0.0  # since the first token was asked for
    reused_tokens: int = 0  # of the prompt, found in the cache of the conversation
    signatures: dict = field(default_factory=dict, repr=False)  # {model: signature} of those that auto chooses among
    decision: object = None  # of auto, see auto.py: `model` is then the one that it names
    format: object = field(default=None, repr=False)  # what holds it to the schema
    paused: tuple = field(default=(), repr=False)  # its BatchRow and cache while it waits for its place again

    def cancel(self):
        """Give the place free at the next token."""
        self.cancelled = True

    @property
    def tokens_per_second(self):
        return len(self.response_ids) / self.seconds if self.seconds else 0.0


def check_text(query, history):
    """ValueError for text that no UTF-8 file could hold."""
    for text in (query, *(text for turn in history for text in turn)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The text holds half a surrogate pair ({ascii(text[error.start])}).") from error


def read_answer(model, tokenizer, answer):
    """The text of an answer's tokens, without half a character at its end."""
    if not answer.sampling.raw:
        return model.process_response(tokenizer.decode(answer.response_ids)).rstrip("\ufffd")
    context = answer.token_ids[-CONTEXT:]
    before = tokenizer.decode(context).rstrip("\ufffd")
    return tokenizer.decode(context + answer.response_ids).rstrip("\ufffd")[len(before) :]


def hold_back(text, patterns):
    """`text` without an end that may be the beginning of one of the patterns."""
    beginnings = (pattern[:length] for pattern in patterns for length in range(1, len(pattern)))
    longest = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
    return text[: len(text) - longest]


def shared_length(left, right):
    """How many tokens two sequences have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
