"""Answers in OpenAI's two forms, of a chat and of a completion of raw text: whole, or as server-sent events.

Answers to `create_chat_completion` and `predict` of the official `openai_api.py`, which has the first form only.
"""

import json
import time
import uuid
from dataclasses import asdict

from serving.probabilities import chat_entries, token_bytes, token_name


class ChatForm:
    """A chat completion."""

    mark, whole, event = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def text(self, index, answer):
        return answer.text

    def logprobs(self, index, answer, start=0):
        """(those of the tokens from number `start` on, how many they are); (None, 0) where there are none to give."""
        found = answer.logprobs[start:]
        if answer.sampling.logprobs is None or (start and not found):
            return None, 0
        token_ids = answer.response_ids[start : start + len(found)]
        entries = chat_entries(self.tokenizer, token_ids, found[: len(token_ids)])
        return {"content": entries, "refusal": None}, len(entries)

    def opening(self, index):
        return {**self.piece(index), "delta": {"role": "assistant", "content": ""}}

    def piece(self, index, text="", logprobs=None, reason=None):
        """A choice of an event."""
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def choice(self, index, text, logprobs, reason):
        """A choice of a whole answer."""
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def usage(self, answers):
        prompt = len(answers[0].token_ids)
        return usage(prompt, sum(len(answer.response_ids) for answer in answers))


class TextForm:
    """A completion of raw text; with `echo` behind its prompt, the one of `texts` at the answer's index.

    It counts an end token among the tokens that have a log-probability. `silent` leaves out all that was generated.
    """

    mark, whole, event = "cmpl", "text_completion", "text_completion"
    opening = None

    def __init__(self, tokenizer, texts, answers_each, echo=False, silent=False):
        self.tokenizer, self.answers_each, self.echo, self.silent = tokenizer, answers_each, echo, silent
        self.texts = [text for text in texts for _ in range(answers_each)]
        self.without_text = frozenset(tokenizer.all_special_ids)
        self.characters = [[0] for _ in self.texts]  # before each token of prompt and answer, and behind the last

    def text(self, index, answer):
        # With its first token the log-probabilities of the prompt are there.
        begun = self.echo and (answer.response_ids or answer.finish_reason)
        return (self.texts[index] if begun else "") + ("" if self.silent else answer.text)

    def logprobs(self, index, answer, start=0):
        """(those of the tokens from number `start` on, how many they are); (None, 0) where there are none to give."""
        if answer.sampling.logprobs is None:
            return None, 0
        ended, count = answer.finish_reason, len(answer.response_ids)  # the worker writes the ids after the numbers
        found = [] if self.silent else answer.logprobs[: None if ended else count]
        first = start + (0 if self.echo else len(answer.token_ids))
        found = ([None, *answer.prompt_logprobs, *found] if self.echo else found)[start:]
        if start and not found:
            return None, 0
        token_ids = [*answer.token_ids, *answer.response_ids, self.tokenizer.eos_token_id][: first + len(found)]
        names = [token_name(self.tokenizer, token_id) for token_id in token_ids[first:]]
        return {
            "tokens": names,
            "token_logprobs": [each and each[0] for each in found],
            "top_logprobs": [each and self.likeliest(name, *each) for name, each in zip(names, found, strict=True)],
            "text_offset": self.offsets(index, token_ids)[first:],
        }, len(found)

    def likeliest(self, name, value, pairs):
        """{token: log-probability} of the likeliest, and of the one that stands there."""
        return {**{token_name(self.tokenizer, token_id): each for token_id, each in pairs}, name: value}

    def offsets(self, index, token_ids):
        """Where each token begins in the text of all, in characters."""
        characters = self.characters[index]
        for token_id in token_ids[len(characters) - 1 :]:
            begun = sum(byte & 0xC0 != 0x80 for byte in self.bytes_of(token_id))
            characters.append(characters[-1] + begun)
        # SentencePiece writes a space before a text, and reading drops it.
        space = next((read.startswith(b" ") for read in map(self.bytes_of, token_ids) if read), False)
        return [max(0, count - space) for count in characters[: len(token_ids)]]

    def bytes_of(self, token_id):
        return b"" if token_id in self.without_text else token_bytes(self.tokenizer, token_id)

    def piece(self, index, text="", logprobs=None, reason=None):
        """A choice of an event, or of a whole answer."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    choice = piece

    def usage(self, answers):
        prompt = sum(len(answer.token_ids) for answer in answers[:: self.answers_each])
        return usage(prompt, 0 if self.silent else sum(len(answer.response_ids) for answer in answers))


def usage(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def reason_of(answer):
    return "stop" if answer.finish_reason == "cancelled" else answer.finish_reason


def head(form, kind, model):
    """What an answer begins with, and each of its events."""
    return {"id": f"{form.mark}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def chosen(answer):
    """{"auto": who answers and how sure that is} of an answer that auto was asked for, once that is decided."""
    return {"auto": asdict(answer.decision)} if answer.decision else {}


def whole(form, answers, model):
    """The body for answers that have ended."""
    choices = [
        {
            **form.choice(index, form.text(index, answer), form.logprobs(index, answer)[0], reason_of(answer)),
            **chosen(answer),
        }
        for index, answer in enumerate(answers)
    ]
    return {**head(form, form.whole, model), "choices": choices, "usage": form.usage(answers)}


async def stream(form, pending, model, include_usage):
    """Server-sent events for the answers of a Pending."""
    beginning = head(form, form.event, model)

    def event(choices, **more):
        if include_usage:
            more = {"usage": None, **more}
        return f"data: {json.dumps({**beginning, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    sent, told = [0] * len(pending.answers), [0] * len(pending.answers)  # characters, log-probabilities
    running = dict(enumerate(pending.answers))
    for index in running if form.opening else ():
        yield event([form.opening(index)])
    async for _ in pending.changes():
        for index, answer in list(running.items()):
            reason, text = reason_of(answer), form.text(index, answer)  # in this order: the text is written first
            logprobs = None
            if len(text) > sent[index] or reason:
                logprobs, count = form.logprobs(index, answer, told[index])
                told[index] += count
            if len(text) > sent[index]:
                yield event([form.piece(index, text[sent[index] :], logprobs)])
                logprobs = None
                sent[index] = len(text)
            if reason == "error":
                yield f"data: {json.dumps({'error': {'message': answer.error, 'type': 'server_error'}})}\n\n"
                return
            if reason:
                del running[index]
                yield event([{**form.piece(index, "", logprobs, reason), **chosen(answer)}])
    if include_usage:
        yield event([], usage=form.usage(pending.answers))
    yield "data: [DONE]\n\n"
