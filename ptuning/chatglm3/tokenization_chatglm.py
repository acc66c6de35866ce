"""ChatGLM3's tokenizer: that of ChatGLM2, four role tokens behind `eop`, and the prompt of roles.

Answers to the official `tokenization_chatglm.py` of ChatGLM3-6B: same ids, same prompt. It differs as ChatGLM2's does, in
that (question, answer) pairs are a history, too, and in that transformers' apply_chat_template gives these ids.

    [gMASK] sop <|system|> \\n text <|user|> \\n question <|assistant|> \\n answer <|user|> \\n question <|assistant|>
"""

import itertools
from bisect import bisect_left

import torch
from transformers import BatchEncoding

from chatglm2 import tokenization_chatglm
from chatglm3.conversation import ROLES, read_message, read_messages

ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)


class ChatGLMTokenizer(tokenization_chatglm.ChatGLMTokenizer):
    """As of ChatGLM2, where --prompt_template is another than chatglm3; else prompts are messages of roles.

    A message is its role's token, its metadata and a line break, and its text, each encoded by itself.
    """

    special_names = (*tokenization_chatglm.SPECIAL_TOKENS, *ROLE_TOKENS)
    prompt_template = "chatglm3"
    turn_tokens = 3  # the role, and a line break of two

    @property
    def keeps_roles(self):
        return self.prompt_template == "chatglm3"

    @property
    def stop_ids(self):
        """Ids that end an answer beside the end token: of what comes next in a conversation."""
        return tuple(map(self.get_command, ("<|user|>", "<|observation|>"))) if self.keeps_roles else ()

    # ---- prompts

    def read_history(self, query, history):
        """(question, messages of role, metadata and content). ValueError for anything else."""
        if not self.keeps_roles:
            return super().read_history(query, history)
        if not isinstance(query, str):
            raise ValueError(f"The question is {query!r:.80}, expected one text.")
        return query, read_messages(history)

    def conversation(self, messages):
        """(question, history, role of the question) of messages, objects as in read_message()."""
        if not self.keeps_roles:
            return super().conversation(messages)
        *before, (role, _, text) = [read_message(message, "messages") for message in messages]
        if role not in ("user", "observation"):
            raise ValueError(f"The last message is of role {role!r}; expected 'user', whom the model answers.")
        return text, before, role

    def encode_messages(self, conversations, source_prefix=""):
        """Ids of each list of (role, metadata, content), all texts in one call on SentencePiece's threads."""
        texts = []
        for messages in conversations:
            for position, (_, metadata, content) in enumerate(messages):
                texts += [f"{metadata}\n", content if position else source_prefix + content]
        encoded = iter(self.encode_batch(texts))
        return [
            [[self.get_command(f"<|{role}|>"), *next(encoded), *next(encoded)] for role, _, _ in messages]
            for messages in conversations
        ]

    def encode_prompts(self, queries, histories, source_prefix="", roles=None):
        if not self.keeps_roles:
            return super().encode_prompts(queries, histories, source_prefix, roles)
        roles = roles or itertools.repeat("user", len(queries))
        conversations = [
            [*read_messages(history), (role, "", query)]
            for query, history, role in zip(queries, histories, roles, strict=True)
        ]
        end = [self.get_command("<|assistant|>")]
        encoded = self.encode_messages(conversations, self.source_prefix + source_prefix)
        return [self.prefix_tokens + sum(messages, []) + end for messages in encoded]

    def encode_answers(self, answers, metadata=None):
        if not self.keeps_roles:
            return super().encode_answers(answers)
        lines = self.encode_batch([f"{text}\n" for text in metadata or itertools.repeat("", len(answers))])
        return [line + ids for line, ids in zip(lines, self.encode_batch(answers), strict=True)]

    def answers_in(self, source, history, source_prefix):
        """[(start, end)] of what is learned of each earlier answer: all behind its role's token."""
        if not self.keeps_roles:
            return super().answers_in(source, history, source_prefix)
        messages, place, found = read_messages(history), len(self.prefix_tokens), []
        (encoded,) = self.encode_messages([messages], self.source_prefix + source_prefix)
        for (role, _, _), ids in zip(messages, encoded, strict=True):
            if role == "assistant" and source[place : place + len(ids)] == ids:
                found.append((place + 1, place + len(ids)))
            place += len(ids)
        return found

    def label_behind(self, token_id):
        """What is learned where an earlier answer has ended: the token of the next role."""
        return token_id if self.keeps_roles else super().label_behind(token_id)

    def kept_history(self, history, dropped):
        if not self.keeps_roles:
            return super().kept_history(history, dropped)
        first, rest = split_system(read_messages(history))
        return first + rest[dropped:]

    def last_turn(self, token_ids, source_prefix=""):
        """Ids of the question that a prompt ends with, without what was said before."""
        if not self.keeps_roles:
            return super().last_turn(token_ids, source_prefix)
        asks = tuple(map(self.get_command, ("<|user|>", "<|observation|>")))
        start = max((place for place, token_id in enumerate(token_ids) if token_id in asks), default=0)
        if not start:
            return token_ids
        turn = token_ids[start:]
        if start == len(self.prefix_tokens):  # the first message, in which that text stands
            first = 1 + len(self.encode_batch(["\n"])[0])  # behind the role and its line, which a question has empty
            text = self.decode(turn[first:-1])
            if (alone := self.without_prefix(text, source_prefix)) != text:
                turn = [*turn[:first], *self.encode_batch([alone])[0], turn[-1]]
        return [*self.prefix_tokens, *turn]

    def fit_prompt(self, query, history, limit, source_prefix="", role="user"):
        """As in ChatGLM2. A system message at the start stays; what is left out ends before a question of a user."""
        if not self.keeps_roles:
            return super().fit_prompt(query, history, limit, source_prefix)
        first, rest = split_system(read_messages(history))

        def encode(start):
            return self.encode_prompts([query], [first + rest[start:]], source_prefix, [role])[0]

        least = max(0, len(rest) - limit // self.turn_tokens)
        starts = [place for place, (role, _, _) in enumerate(rest) if role == "user" and place >= least]
        starts = ([0] if starts[:1] != [0] and not least else []) + starts + [len(rest)]
        # The last start is always there: a question that is too long comes back whole.
        place = bisect_left(starts[:-1], True, key=lambda start: len(encode(start)) <= limit)
        return encode(starts[place]), starts[place]

    def build_prompt(self, query, history=None):
        """The prompt as text, for people: no encoding of it gives the ids of the roles."""
        if not self.keeps_roles:
            return super().build_prompt(query, history)
        messages = [*read_messages(history), ("user", "", query)]
        return self.source_prefix + as_text(messages) + "<|assistant|>"

    def show(self, token_ids):
        if not self.keeps_roles:
            return super().show(token_ids)
        token_ids = [index for index in map(int, token_ids) if index not in self.prefix_tokens]
        return self.decode(token_ids, skip_special_tokens=False)

    # ---- as officially

    def build_single_message(self, role, metadata, message):
        """Ids of one message."""
        return self.encode_messages([[read_message({"role": role, "metadata": metadata, "content": message}, role)]])[
            0
        ][0]

    def build_chat_input(self, query, history=None, role="user"):
        """input_ids, attention_mask and position_ids (1, S) of a conversation that the assistant is to go on with."""
        messages = [*read_messages(history), read_message({"role": role, "content": query}, "the question")]
        (encoded,) = self.encode_messages([messages])
        return as_tensors(self.prefix_tokens + sum(encoded, []) + [self.get_command("<|assistant|>")])

    def apply_chat_template(
        self, conversation, tools=None, add_generation_prompt=False, tokenize=True, return_tensors=None, **kwargs
    ):
        """The prompt of messages, as text, ids, or (return_dict) all that the model takes; `tools` join the system's."""
        if not self.keeps_roles or kwargs.get("chat_template"):
            settings = {"tools": tools, "add_generation_prompt": add_generation_prompt, "tokenize": tokenize}
            return super().apply_chat_template(conversation, return_tensors=return_tensors, **settings, **kwargs)
        names = ("documents", "return_assistant_tokens_mask", "continue_final_message", "truncation")
        tokenization_chatglm.refuse_in_template(kwargs, names)
        several = bool(conversation) and not isinstance(conversation[0], dict)
        all_messages = []
        for each in conversation if several else [conversation]:
            each = [dict(message) for message in each]
            if tools:
                if not each or each[0]["role"] != "system":
                    each.insert(0, {"role": "system", "content": ""})
                each[0]["tools"] = tools
            all_messages.append(read_messages(each))
        end = "<|assistant|>" if add_generation_prompt else ""
        if not tokenize:
            texts = [as_text(messages) + end for messages in all_messages]
            return texts if several else texts[0]
        ends = [self.get_command(end)] if end else []
        rows = [self.prefix_tokens + sum(ids, []) + ends for ids in self.encode_messages(all_messages)]
        if not kwargs.get("return_dict", True) and return_tensors is None:
            return rows if several else rows[0]
        rows = rows if several or return_tensors else rows[0]
        padding = kwargs.get("padding") or bool(return_tensors)
        encoded = self.pad({"input_ids": rows}, padding=padding, return_tensors=return_tensors)
        return encoded if kwargs.get("return_dict", True) else encoded["input_ids"]


def split_system(messages):
    """(the system message at the start, in a list, or none; the others)."""
    count = int(bool(messages) and messages[0][0] == "system")
    return messages[:count], messages[count:]


def as_text(messages):
    return "".join(f"<|{role}|>{metadata}\n{content}" for role, metadata, content in messages)


def as_tensors(token_ids):
    """What the model takes of one row."""
    input_ids = torch.tensor([token_ids])
    positions = torch.arange(len(token_ids))[None]
    return BatchEncoding(
        {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "position_ids": positions}
    )
