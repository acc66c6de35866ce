"""Answers that are JSON: at each place only tokens may be chosen with which a text of the schema goes on.

Answers to nothing in the official `openai_api.py`. The optional package llguidance reads the schema and says which tokens
these are. It bounds what a token takes and fetches nothing that a schema names, but a few lines of `allOf` can keep it
busy for hours. So a process of its own, which has little time and memory, reads a schema first.
"""

import functools
import importlib.util
import subprocess
import sys

import numpy
import torch

from serving.probabilities import token_bytes

LONGEST_SCHEMA = 2**16  # characters
CPU_SECONDS, MOST_BYTES = 2, 2**31  # to read one
READ = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({MOST_BYTES}, {MOST_BYTES}))
from llguidance import LLMatcher
try:
    print(LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(sys.stdin.read())))
except ValueError as error:
    print(error)
"""
SPACE = r"\x0A?\x20{0,8}"  # between the parts of an answer; without a bound a model may write nothing else


@functools.lru_cache(maxsize=64)
def check_schema(schema: str):
    """ValueError where an answer cannot be held to a JSON schema, or llguidance is missing."""
    if importlib.util.find_spec("llguidance") is None:
        raise ValueError(
            "response_format: JSON needs a package that is not installed here. Install it (pip install llguidance), or leave "
            "the field out and ask for JSON in a message."
        )
    if len(schema) > LONGEST_SCHEMA:
        raise ValueError(f"response_format: the schema has {len(schema):,} characters, more than {LONGEST_SCHEMA:,}.")
    read = subprocess.run([sys.executable, "-c", READ], input=schema, capture_output=True, text=True)
    problem = read.stdout.strip().partition("\n")[0]
    if read.returncode:
        problem = f"it takes more than {CPU_SECONDS} s to read"
    if problem:
        raise ValueError(f"response_format: the schema cannot be used: {problem}")


class Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.eos_token_id, self.special_token_ids = tokenizer.eos_token_id, tokenizer.all_special_ids
        self.tokens = [token_bytes(tokenizer, token_id) for token_id in range(len(tokenizer))]

    def __call__(self, text):
        """Ids of a text in the middle of another one, where no space is put before it."""
        return self.tokenizer.sp_model.encode("\n" + text)[2:]


class JsonMode:
    """Begins answers of a tokenizer that are held to a schema."""

    def __init__(self, tokenizer):
        import llguidance

        self.matcher = llguidance.LLMatcher
        self.vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary(tokenizer)))

    def begin(self, schema: str) -> "Format":
        """What holds one answer to a JSON schema that check_schema() has let through; ValueError for too large a one."""
        grammar = self.matcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACE})
        begun = Format(self.matcher(self.vocabulary, grammar, log_level=0))
        if problem := begun.problem():
            raise ValueError(f"response_format: the schema cannot be used: {problem}")
        return begun


class Format:
    """One answer's way through its schema."""

    def __init__(self, matcher):
        self.matcher = matcher

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (V) of the tokens that may come, -inf for the others."""
        bits = numpy.unpackbits(numpy.frombuffer(self.matcher.compute_bitmask(), numpy.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: len(logits)]).to(logits.device)
        return logits.masked_fill(allowed == 0, -torch.inf)

    def take(self, token_id):
        self.matcher.consume_token(token_id)

    def problem(self) -> str | None:
        """Why it cannot go on, where the schema asks too much."""
        if not self.matcher.is_error():
            return None
        return self.matcher.get_error().strip().partition("\n")[0]
