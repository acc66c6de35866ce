"""What the API takes and gives: the fields of its requests with their bounds, and its errors.

Answers to the request bodies of the official `api.py` and `openai_api.py`, which bound nothing.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, field_validator
from pydantic_core import PydanticCustomError

from serving.answers import Sampling

MAX_ITEMS = 4096  # messages, turns or parts of a text; a turn takes 8 tokens or more, so no model has room for as many
MAX_PROMPTS = 32  # of a request; together they may have as many places as any client
SIDES = {"developer": "system", "tool": "user"}  # ChatGLM2 knows neither; what a tool says comes from outside, too


class Strict(BaseModel):
    """Wrong types are refused rather than converted; unknown fields are ignored, as clients send many."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def expected(what):
    """A validator that says what a field must be, and what to do, where nothing else is honoured."""

    def check(value, validate):
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("not_honoured", what) from None

    return WrapValidator(check)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    # In the documentation `content` is required: leaving it out is the exception.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema["required"].append("content"))

    role: Literal["system", "developer", "user", "assistant", "tool"]
    # One problem of a list is told, not half a million.
    content: str | Annotated[list[TextPart], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = Field(
        None,
        validate_default=True,
        description="null or missing only where an assistant called a tool.",
        json_schema_extra=lambda schema: schema.update(anyOf=schema["anyOf"][:2]),  # null is the exception
    )
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = Field(
        None, description="An assistant's earlier call, for a model that knows tools."
    )

    @field_validator("content")
    @classmethod
    def only_an_assistant_says_nothing(cls, content, info):
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("null", "found null or nothing, expected text; only an assistant's may be null")
        return content

    def text(self):
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""


def said(messages, keeps_roles=False):
    """(role, text) of messages for a tokenizer's conversation(). An answer without text, a call of a tool, is no turn.

    With `keeps_roles`, for a model that knows tools, objects of role, content and tool_calls.
    """
    spoken = [
        message for message in messages[:-1] if message.content is not None or (keeps_roles and message.tool_calls)
    ]
    spoken += messages[-1:]
    if keeps_roles:
        return [{"role": each.role, "content": each.text(), "tool_calls": each.tool_calls} for each in spoken]
    return [(SIDES.get(message.role, message.role), message.text()) for message in spoken]


class StreamOptions(Strict):
    include_usage: bool | None = None


class Format(Strict):
    type: Literal["text", "json_object"]

    def schema_text(self):
        return None if self.type == "text" else json.dumps({"type": "object"})


class NamedSchema(Strict):
    """A JSON schema under OpenAI's names."""

    schema_: dict[str, Any] = Field(alias="schema")


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    def schema_text(self):
        return json.dumps(self.json_schema.schema_)


NO_TOOLS = expected("expected 'auto' or 'none': this model calls no tools. Leave the field out")
NO_PENALTY = expected("expected 0: no token is made likelier or less likely here. Leave the field out")
NO_BIAS = expected("expected nothing: no token is made likelier or less likely here. Leave the field out")
ONLY_TEXT = expected("expected ['text']: answers are text. Leave the field out")
NO_SEARCH = expected("expected nothing: nothing is looked up. Leave the field out")
FORMAT = expected(
    "expected {'type': 'text'}, {'type': 'json_object'}, or {'type': 'json_schema', 'json_schema': {'schema': {…}}}"
)
ONE = expected("expected 1: the best of several answers is not chosen. Ask for n of them")
NO_SUFFIX = expected("expected nothing: this model writes no text before a given one. Leave the field out")
Choice = Annotated[Literal["auto", "none"] | None, NO_TOOLS]
Penalty = Annotated[Annotated[float, Field(ge=0, le=0)] | None, NO_PENALTY]
Tools = Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS, fail_fast=True)] | None
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class Generation(Strict):
    """How to generate."""

    model: str | None = Field(None, description="A name of GET /v1/models; by default the first of them.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy [0.95].")
    top_p: float | None = Field(None, ge=0, le=1, description="Probability mass to choose from [0.8].")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=8, description="Answers to the same prompt [1].")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty = Field(None, description="0 only.")
    presence_penalty: Penalty = Field(None, description="0 only.")
    logit_bias: Annotated[Annotated[dict[str, Any], Field(max_length=0)] | None, NO_BIAS] = Field(
        None, description="Nothing only."
    )

    def samplings_with(self, given, longest, **how):
        """One Sampling for each of the `n` answers to a prompt; `given` are the values where the request has none."""
        return [
            Sampling(
                max_new_tokens=given["max_new_tokens"] if longest is None else longest,
                top_p=given.get("top_p", 0.8) if self.top_p is None else self.top_p,
                temperature=given.get("temperature", 0.95) if self.temperature is None else self.temperature,
                seed=None if self.seed is None else (self.seed + index) % 2**63,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                **how,
            )
            for index in range(self.n or 1)
        ]


class ChatRequest(Generation):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, description="Longest answer, in tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same under its newer name.")
    logprobs: bool | None = Field(None, description="Give the log-probability of every token of the answer.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="So many of the likeliest at each place, and logprobs."
    )
    tool_choice: Choice = Field(None, description="No tool is called.")
    function_call: Choice = Field(None, description="Its older name.")
    tools: Tools = Field(None, description="Nothing, or with a tool_choice of none: no tool is called.")
    functions: Tools = Field(None, description="Its older name.")
    modalities: Annotated[list[Literal["text"]] | None, ONLY_TEXT] = Field(None, description="Text only.")
    audio: Annotated[None, ONLY_TEXT] = Field(None, description="Nothing only.")
    web_search_options: Annotated[None, NO_SEARCH] = Field(None, description="Nothing only.")
    response_format: Annotated[Format | SchemaFormat | None, FORMAT] = Field(
        None, description="JSON, or JSON of a schema; the answer may still end early at max_tokens."
    )

    @field_validator("tools", "functions")
    @classmethod
    def offers_none(cls, tools, info):
        if tools and info.data.get("tool_choice" if info.field_name == "tools" else "function_call") != "none":
            raise PydanticCustomError(
                "not_honoured",
                "expected nothing, as the model is not told of them and calls none. Leave the field out, or describe them "
                "in a system message, where ChatGLM3 looks for them",
            )
        return tools

    def samplings(self, given, seq_length):
        """One for each answer of a model that takes `seq_length` tokens."""
        return self.samplings_with(
            {"max_new_tokens": seq_length, **given},
            self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None,
            schema=self.response_format and self.response_format.schema_text(),
        )


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Several = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
PROMPT = expected(
    f"expected a text, a list of token ids, or a list of up to {MAX_PROMPTS} texts or lists of token ids, none without ids"
)


class CompletionRequest(Generation):
    """Raw text to go on with, or to score."""

    prompt: Annotated[str | Tokens | Annotated[list[str], Several] | Annotated[list[Tokens], Several], PROMPT] = Field(
        description="Text, which `[gMASK] sop` is put before, or token ids, which stay as they are; or a list of either."
    )
    max_tokens: int | None = Field(None, ge=0, description="Longest continuation, in tokens; 0 only scores [16].")
    echo: bool | None = Field(None, description="Give the prompt, too, and with logprobs those of its tokens.")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="Give every token's log-probability, and so many of the likeliest at each place."
    )
    best_of: Annotated[Literal[1] | None, ONE] = Field(None, description="1 only.")
    suffix: Annotated[Literal[""] | None, NO_SUFFIX] = Field(None, description="Nothing only.")

    def samplings(self, given):
        """One for each answer to a prompt."""
        return self.samplings_with(
            {"max_new_tokens": 16, **given},
            None if self.max_tokens is None else max(1, self.max_tokens),  # one of 0 is not shown
            logprobs=self.logprobs,
            score_prompt=bool(self.echo) and self.logprobs is not None,
            raw=True,
        )

    def prompts(self):
        """The texts or lists of ids that were asked for."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


Turn = Annotated[list[str], Field(min_length=2, max_length=2)]


class OfficialRequest(Strict):
    """A question and what was said before it."""

    prompt: str
    history: Annotated[list[Turn], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    max_length: int | None = Field(None, ge=1, description="Tokens of prompt and answer together [2048].")
    top_p: float | None = Field(None, ge=0, le=1, description="[0.7]")
    temperature: float | None = Field(None, ge=0, le=2, description="[0.95]")


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    error: ErrorBody


ERRORS = {
    400: "The request, or the prompt's length.",
    401: "The key.",
    404: "No such model.",
    408: "The request did not arrive in time.",
    413: "More than 1 MiB.",
    429: "All places are taken, or this client's share of them is, or it has tried too many wrong keys.",
    500: "The model failed.",
}
RESPONSES = {status: {"model": Error, "description": text} for status, text in ERRORS.items()}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
TOO_LONG = "context_length_exceeded"  # code of a 400
