"""Chat with the model from Python: the official methods, their signatures, defaults and returns.

Answers to `chat`, `stream_chat`, `stream_generate`, `build_inputs`, `build_stream_inputs` and `process_response` of the
official `modeling_chatglm.py`. It differs in that both forms of a history are taken (conversation.py), that what
transformers' generate() knows works while streaming too, and that a cache which comes back holds all that was shown.
"""

from functools import partial

import torch
from transformers import BatchEncoding, Cache

from chatglm2.conversation import continued, read_history

TRAINING_DATE = "[[训练时间]]"  # written by the official model where its training date belongs
TOP_K = 50  # the official code samples through generate(), whose default this was in transformers 4
# What chat and stream_chat cannot honour: they return one text.
REPLACEMENTS = {
    "return_dict_in_generate": "model.generate(**model.build_inputs(tokenizer, query, history), …)",
    "num_return_sequences": "model.generate(**model.build_inputs(tokenizer, query, history), …)",
}
STREAM_REPLACEMENTS = {
    **REPLACEMENTS,
    "num_beams": "model.chat(…, num_beams=…): beams are compared when all are finished, so nothing can be shown before",
    "streamer": "the texts that stream_chat yields",
    "assistant_model": "model.chat(…, assistant_model=…)",
}


def unknown_token_ids(tokenizer, config) -> list[int] | None:
    """Ids of the padded vocabulary that the tokenizer has no token for, None where there are none."""
    return list(range(len(tokenizer), config.padded_vocab_size)) or None


def check_arguments(name, arguments, replacements):
    """ValueError for an argument of the method `name` that it cannot honour, with what to use instead."""
    for argument, replacement in replacements.items():
        value = arguments.get(argument)
        if value and (value is True or value != 1):  # one beam and one sequence are what there is
            raise ValueError(f"{name}: {argument}={value!r} cannot be used here. Use {replacement}.")


class ChatMethods:
    """The part of ChatGLMForConditionalGeneration that talks."""

    def process_response(self, response):
        return response.strip().replace(TRAINING_DATE, "2023年")

    def limit_length(self, max_length):
        """`max_length` (prompt and answer), cut to what the model was made for."""
        return min(max_length, self.config.seq_length)

    def build_inputs(self, tokenizer, query, history=None):
        """input_ids, attention_mask, position_ids (1, S) of the whole conversation and the open question."""
        return tokenizer([tokenizer.build_prompt(query, history)], return_tensors="pt").to(self.device)

    def build_stream_inputs(self, tokenizer, query, history=None):
        """input_ids, attention_mask, position_ids (1, S) to feed after a cache that holds `history`.

        They are the blank line behind the last answer and the question; without a history the whole prompt.
        """
        question, turns = read_history(query, history)
        if not turns:
            return self.build_inputs(tokenizer, query, history)
        turn = tokenizer.behind_answer + tokenizer.build_turn(question, len(turns) + 1)
        token_ids = tokenizer.encode(turn, add_special_tokens=False)
        if tokenizer.convert_ids_to_tokens(token_ids[0]) == "▁":  # SentencePiece's mark for a new text
            token_ids = token_ids[1:]
        input_ids = torch.tensor([token_ids])
        positions = torch.arange(len(token_ids))[None]
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "position_ids": positions}
        return BatchEncoding(inputs).to(self.device)

    def sampling(self, tokenizer, do_sample, top_p, temperature, arguments):
        """Arguments of generate(): those of a chat method, of which `arguments` are the caller's others and count."""
        settings = {"top_p": top_p, "temperature": temperature, "top_k": TOP_K} if do_sample else {}
        settings |= {"do_sample": do_sample, **arguments}
        suppressed = [*(arguments.get("suppress_tokens") or []), *(unknown_token_ids(tokenizer, self.config) or [])]
        if tokenizer.stop_ids:
            settings.setdefault("eos_token_id", [self.config.eos_token_id, *tokenizer.stop_ids])
        return {**settings, "suppress_tokens": suppressed or None}

    def role_in(self, arguments):
        """(the role of the question,), taken out of a chat method's arguments; () for a model that knows one."""
        return ()

    def conclude(self, tokenizer, history, query, response):
        """(what an answer says, the history with the new turn)."""
        response = self.process_response(response)
        return response, continued(history, query, response)

    @torch.inference_mode()
    def chat(
        self,
        tokenizer,
        query,
        history=None,
        max_length=8192,
        num_beams=1,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        logits_processor=None,
        **kwargs,
    ):
        """Answer `query`: (response, history with the new turn). `max_length` counts prompt and answer.

        `history` are (question, answer) pairs, or messages of role and content; `kwargs` are generate()'s, such as
        top_k and repetition_penalty.
        """
        check_arguments("chat", kwargs, REPLACEMENTS)
        role = self.role_in(kwargs)
        inputs = self.build_inputs(tokenizer, query, history, *role)
        output = self.generate(
            **inputs,
            max_length=self.limit_length(max_length),
            num_beams=num_beams,
            logits_processor=logits_processor,
            **self.sampling(tokenizer, do_sample, top_p, temperature, kwargs),
        )
        response = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :].tolist())
        return self.conclude(tokenizer, history, query, response, *role)

    @torch.inference_mode()
    def stream_chat(
        self,
        tokenizer,
        query,
        history=None,
        past_key_values=None,
        max_length=8192,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        logits_processor=None,
        return_past_key_values=False,
        **kwargs,
    ):
        """Yield the growing answer: (response, history) or (response, history, past_key_values).

        With `return_past_key_values` the cache that comes back holds the whole conversation; given as
        `past_key_values` with the returned history, the next turn feeds its question only. `max_length` counts what
        the cache holds (not the prefix), the prompt and the answer. A text that ends in half a character is held back
        until the character is whole. `history` and `kwargs` are as in chat.
        """
        check_arguments("stream_chat", kwargs, STREAM_REPLACEMENTS)
        role = self.role_in(kwargs)
        build = self.build_inputs if past_key_values is None else self.build_stream_inputs
        inputs = build(tokenizer, query, history, *role)
        length = inputs["input_ids"].shape[1]
        room = self.room(length, past_key_values, max_length)
        settings = self.sampling(tokenizer, do_sample, top_p, temperature, kwargs)
        settings["max_new_tokens"] = min(room, settings.get("max_new_tokens") or room)
        for output in self.stream_generate(
            inputs["input_ids"],
            logits_processor=logits_processor,
            return_past_key_values=return_past_key_values,
            past_key_values=past_key_values,
            **settings,
        ):
            token_ids, cache = output if return_past_key_values else (output, None)
            response_ids = token_ids[0, length:].tolist()
            if response_ids[-1] in (self.config.eos_token_id, *tokenizer.stop_ids):
                return
            response = tokenizer.decode(response_ids)
            if not response or response.endswith("\ufffd"):
                continue
            result = self.conclude(tokenizer, history, query, response, *role)
            yield (*result, cache) if return_past_key_values else result

    def room(self, length, past_key_values, max_length):
        """How many tokens an answer may have after `length` and those in a cache. ValueError for none, or no cache."""
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, expected the cache that "
                "stream_chat(…, return_past_key_values=True) yields."
            )
        if past_key_values is not None:
            length += max(0, int(past_key_values.get_seq_length()) - self.prefix_length)
        limit = self.limit_length(max_length)
        if limit <= length:
            raise ValueError(
                f"The conversation has {length} tokens, which leaves no room for an answer "
                f"within max_length {limit}. Raise max_length or shorten the history."
            )
        return limit - length

    @torch.inference_mode()
    def stream_generate(
        self,
        input_ids,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        return_past_key_values=False,
        **kwargs,
    ):
        """Yield `input_ids` (B, S) with ever more tokens behind, the end token included; with the cache if asked for.

        What generate() accepts works, except beams. A finished row goes on with padding. `max_length` counts
        `input_ids` and the answer. A cache that is yielded holds all tokens yielded with it but an end token.
        """
        check_arguments("stream_generate", kwargs, STREAM_REPLACEMENTS)
        if generation_config is None and kwargs.get("do_sample"):
            kwargs.setdefault("top_k", TOP_K)
        yield from self.generate(
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            custom_generate=partial(stream_tokens, keep_cache=return_past_key_values),
            **kwargs,
        )


def stream_tokens(model, input_ids, logits_processor, stopping_criteria, generation_config, *, keep_cache, **inputs):
    """Yield `input_ids` (B, S) with one more token each time, (these, the cache) with `keep_cache`.

    `inputs` is what generate() has prepared for forward(); padding stands on the left.
    """
    cache, mask = inputs["past_key_values"], inputs.get("attention_mask")
    positions = None if mask is None else inputs["position_ids"]  # without padding forward() counts them itself
    ends = torch.tensor([generation_config.eos_token_id], device=input_ids.device).flatten()

    def feed(token_ids):
        output = model(token_ids, mask, positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    ended = torch.zeros_like(input_ids[:, :1], dtype=torch.bool)
    logits = feed(input_ids)
    while True:
        scores = logits_processor(input_ids, logits)
        next_ids = scores.softmax(-1).multinomial(1) if generation_config.do_sample else scores.argmax(-1, keepdim=True)
        next_ids = next_ids.masked_fill(ended, generation_config.pad_token_id or 0)  # (B, 1)
        input_ids = torch.cat((input_ids, next_ids), dim=1)
        ended |= torch.isin(next_ids, ends)
        if mask is not None:
            mask, positions = torch.cat((mask, torch.ones_like(next_ids)), dim=1), positions[:, -1:] + 1
        finished = bool((ended[:, 0] | stopping_criteria(input_ids, scores)).all())
        if keep_cache and not bool(ended.all()):  # first, so that the cache holds what is shown
            logits = feed(next_ids)
        yield (input_ids, cache) if keep_cache else input_ids
        if finished:
            return
        if not keep_cache:
            logits = feed(next_ids)
