"""ChatGLM2's tokenizer: SentencePiece pieces, five special tokens behind them, and the chat prompt.

Answers to the official `tokenization_chatglm.py` of ChatGLM2-6B: same ids, prompt, padding and files.
What differs: it runs on transformers 5; ids that stand for no text (special and control tokens, negative
ids, ids in the padding of the embedding table) decode to nothing instead of raising; a whole batch of texts
is encoded in one SentencePiece call; any SentencePiece model with `<unk>` and `</s>` is accepted, so a small
vocabulary works as well as the real one of 64,789 pieces.
"""

import hashlib
import json
import os
from bisect import bisect_left
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, PreTrainedTokenizer

from chatglm2.conversation import conversation, read_content, read_history
from common.claims import MOST_TOKENIZER_BYTES, check_size

VOCABULARY_FILE = "tokenizer.model"
# In the order of their ids, which follow the last SentencePiece piece: 64789 to 64793 in ChatGLM2-6B.
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# How a prompt is written: a turn up to its answer, and what stands behind the answer. Others are in other rooms.
TEMPLATES = {
    "chatglm2": (lambda query, number: f"[Round {number}]\n\n问：{query}\n\n答：", "\n\n"),
    "none": (lambda query, number: query, ""),
}
# build_prompt of the messages, as conversation.py reads them, in the language that transformers knows of.
CHAT_TEMPLATE = """\
{%- set now = namespace(round=0, question='', asked=false) -%}
{%- macro turn() -%}
  {{- '\\n\\n' if now.round > 1 }}{{ '[Round ' ~ now.round ~ ']\\n\\n问：' ~ now.question ~ '\\n\\n' -}}
{%- endmacro -%}
{%- for message in messages -%}
  {%- set content = message.content | default('') -%}
  {%- if message.role == 'assistant' -%}
    {%- if now.asked or now.round == 0 -%}
      {%- set now.round = now.round + 1 -%}
      {{- turn() ~ '答：' ~ content -}}
      {%- set now.question, now.asked = '', false -%}
    {%- else -%}
      {{- '\\n' ~ content -}}
    {%- endif -%}
  {%- elif message.role in ('system', 'user') -%}
    {%- set now.question = now.question ~ ('\\n' if now.asked else '') ~ content -%}
    {%- set now.asked = true -%}
  {%- else -%}
    {{- raise_exception('The role of a message is ' ~ message.role ~ ', expected system, user or assistant.') -}}
  {%- endif -%}
{%- endfor -%}
{%- if now.asked -%}
  {%- set now.round = now.round + 1 -%}
  {{- turn() ~ ('答：' if add_generation_prompt else '') -}}
{%- elif add_generation_prompt -%}
  {{- raise_exception("The last message is of role assistant; expected user, whom the model answers.") -}}
{%- endif -%}
"""
# What transformers is given of a tokenizer_config.json, or of a caller's arguments: no special tokens, which it would
# cut out of the text, and nothing that names a file or a class.
LIBRARY_SETTINGS = (
    "chat_template",
    "do_lower_case",
    "is_local",
    "local_files_only",
    "model_max_length",
    "name_or_path",
    "remove_space",
    "truncation_side",
    "verbose",
)
# What transformers adds to tokenizer_config.json and the official file has not.
KEYS_NOT_SAVED = ("backend", "is_local", "local_files_only")


# Arguments of apply_chat_template, and where they have no place.
NOT_IN_TEMPLATE = {
    "tools": "this model's prompts, which know none. Describe them in a message, or give a chat_template of your own.",
    "documents": "this model's prompts, which know none. Put them into a message.",
    "return_assistant_tokens_mask": "what this tokenizer gives. Encode a prompt and its answer apart.",
    "continue_final_message": "this model's prompts, which end with the role that answers.",
    "truncation": "this model's prompts. Leave out old messages.",
}


def refuse_in_template(given, names):
    """ValueError where one of apply_chat_template's arguments of these `names` asks for what no prompt has."""
    for name in names:
        if given.get(name):
            raise ValueError(f"apply_chat_template: {name} has no place in {NOT_IN_TEMPLATE[name]}")


def read_texts(messages):
    """Messages for a template, each with one text; what is no message stays as it is. ValueError for no text."""
    return [read_text(message, number) for number, message in enumerate(messages, start=1)]


def read_text(message, number):
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if content is None and message.get("role") == "assistant":  # it has called a tool
        content = ""
    return {**message, "content": read_content(content, f"message {number}")}


def read_settings(folder):
    """The object in a folder's tokenizer_config.json, with the chat template beside it; {} without these files."""
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings = {name: value for name, value in settings.items() if name not in ("vocab_file", "is_local")}
    return {**settings, "chat_template": template.read_text(encoding="utf-8")} if template.is_file() else settings


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Text to ids and back; every encoded text starts with `[gMASK] sop` unless `add_special_tokens=False`.

    Text that merely looks like a special token (`[gMASK]`, `</s>`, ...) is encoded as text: the names are
    never handed to the base class, which would cut them out of the text.

    `vocab_file` is the path of a SentencePiece model; ValueError when it is none or lacks `<unk>` or `</s>`.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    source_prefix = ""  # text before every prompt of build_prompt
    special_names = SPECIAL_TOKENS
    prompt_template = "chatglm2"  # a name in TEMPLATES
    keeps_roles = False  # a history is pairs of question and answer
    stop_ids = ()  # that end an answer beside the end token
    suffix_tokens = ()  # that every prompt ends with
    ends_shown = ("[gMASK] sop ", "")  # to people, around a prompt
    learned_of_prompt = 0  # of a prompt's last tokens, those that training predicts
    own_template = CHAT_TEMPLATE
    turn_tokens = 8  # at least, of a turn of two empty texts: its number and the marks of question and answer

    def __init__(self, vocab_file, padding_side="left", clean_up_tokenization_spaces=False, **kwargs):
        if vocab_file is None:
            raise ValueError(
                f"no {self.vocab_files_names['vocab_file']} came with this tokenizer; copy it from the base model's folder"
            )
        self.vocab_file = str(vocab_file)
        self._load_sentencepiece()
        self.special_token_to_id = self.special_ids()
        self.chosen_ids = {}  # of bos, eos, pad and unk, where someone has set them
        settings = {name: kwargs[name] for name in LIBRARY_SETTINGS if name in kwargs}
        super().__init__(
            padding_side=padding_side, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **settings
        )
        self.chat_template = self.chat_template or self.own_template
        self._add_saved_tokens(kwargs.get("added_tokens_decoder") or {})

    def _add_saved_tokens(self, tokens):
        """Add what add_tokens had added when `tokens` {id: token} were saved. ValueError for what cannot have been.

        Ids below `vocab_size` are passed over: those tokens are there, and their names shall not cut text.
        """
        try:
            added = {int(index): token for index, token in tokens.items() if int(index) >= self.vocab_size}
            added = {index: AddedToken(**token) if isinstance(token, dict) else token for index, token in added.items()}
            self._add_tokens([added[index] for index in sorted(added)])
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"tokenizer_config.json: added_tokens_decoder cannot be read ({error}).") from error
        if {index: str(token) for index, token in added.items()} != {
            v: k for k, v in self._added_tokens_encoder.items()
        }:
            raise ValueError(
                f"tokenizer_config.json: added_tokens_decoder has the ids {', '.join(map(str, sorted(added)))}; expected "
                f"those from {self.vocab_size} on, each with a new name."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *init_inputs, **kwargs):
        """The tokenizer of a folder or hub id, loaded by transformers. FileNotFoundError without `tokenizer.model`.

        Of a local folder this reads tokenizer.model, tokenizer_config.json and chat_template.jinja, and no file that
        one of these names. bos_token, eos_token, pad_token and unk_token are set, and added where they are new.
        """
        chosen = {name: kwargs.pop(name) for name in NAMED_TOKENS if kwargs.get(name) is not None}
        tokenizer = cls._load(pretrained_model_name_or_path, *init_inputs, **kwargs)
        tokenizer.add_special_tokens(chosen)
        return tokenizer

    @classmethod
    def _load(cls, pretrained_model_name_or_path, *init_inputs, **kwargs):
        folder = Path(pretrained_model_name_or_path)
        name = cls.vocab_files_names["vocab_file"]
        file = folder / (kwargs.get("subfolder") or "") / name
        if folder.is_dir() and not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist, so this folder has no ChatGLM2 tokenizer; "
                f"copy {name} and tokenizer_config.json from the ChatGLM2-6B model folder"
            )
        if file.is_file():
            return cls(str(file), **{**read_settings(file.parent), "name_or_path": str(folder), **kwargs})
        return super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)

    def _load_sentencepiece(self):
        check_size(self.vocab_file, MOST_TOKENIZER_BYTES)
        with open(self.vocab_file, "rb") as file:
            model = file.read()
        self.sp_model = SentencePieceProcessor()
        try:
            loaded = bool(model) and self.sp_model.LoadFromSerializedProto(model)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise ValueError(
                f"{self.vocab_file} ({len(model):,} bytes) is not a SentencePiece model; download it again "
                "(a file of about 130 bytes is a Git LFS pointer, the one of ChatGLM2-6B has 1,018,370 bytes)"
            )
        if self.sp_model.unk_id() < 0 or self.sp_model.eos_id() < 0:
            raise ValueError(
                f"{self.vocab_file} has no <unk> or no </s> piece, which stand for padding and the end of an "
                "answer; use a SentencePiece model trained with both"
            )
        # Part of the pickled state, so that caches keyed on the pickle notice another file at the same path.
        self.model_sha256 = hashlib.sha256(model).hexdigest()
        self.ids_without_text = frozenset(
            index
            for index in range(self.sp_model.get_piece_size())
            if self.sp_model.is_control(index) or self.sp_model.is_unknown(index)
        )

    # Workers receive the path, not the processor.
    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "sp_model"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._load_sentencepiece()

    # ---- vocabulary and special tokens

    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return {token: self.sp_model.get_piece_size() + offset for offset, token in enumerate(self.special_names)}

    @property
    def vocab_size(self) -> int:
        return self.sp_model.get_piece_size() + len(self.special_names)

    unk_token_id = property(lambda self: self.chosen_ids.get("unk_token", self.sp_model.unk_id()))
    pad_token_id = property(lambda self: self.chosen_ids.get("pad_token", self.sp_model.unk_id()))
    eos_token_id = property(lambda self: self.chosen_ids.get("eos_token", self.sp_model.eos_id()))
    bos_token_id = property(
        lambda self: self.chosen_ids.get("bos_token", self.sp_model.bos_id() if self.sp_model.bos_id() >= 0 else None)
    )
    unk_token = property(lambda self: self._name_of(self.unk_token_id))
    pad_token = property(lambda self: self._name_of(self.pad_token_id))
    eos_token = property(lambda self: self._name_of(self.eos_token_id))
    bos_token = property(lambda self: self._name_of(self.bos_token_id))

    def _name_of(self, index):
        return None if index is None else self.convert_ids_to_tokens(index)

    def __setattr__(self, key, value):
        """Let bos, eos, pad and unk be another token of the vocabulary; their names do not cut text either way."""
        name = key.removesuffix("_id")
        if name not in NAMED_TOKENS:
            return super().__setattr__(key, value)
        known = value is None or (value in range(len(self)) if name != key else str(value) in self.get_vocab())
        if not known:
            raise ValueError(f"{key} is {value!r}, which is not in the vocabulary. Add it first: add_tokens([…]).")
        self.chosen_ids[name] = value if name != key or value is None else self.convert_tokens_to_ids(str(value))

    def add_special_tokens(self, special_tokens_dict, *args, **kwargs) -> int:
        """Set bos, eos, pad and unk, of which new ones are added; add the others. The number of those added."""
        others, added = dict(special_tokens_dict), 0
        for name in NAMED_TOKENS:
            if (token := others.pop(name, None)) is not None:
                if str(token) not in self.get_vocab():
                    added += self._add_tokens([token], special_tokens=True)
                setattr(self, name, token)
        return added + super().add_special_tokens(others, *args, **kwargs)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that skip_special_tokens leaves out: those of the model, and what add_special_tokens has added."""
        added = {index for index, token in self._added_tokens_decoder.items() if token.special}
        return sorted({*self.ids_without_text, *self.special_token_to_id.values(), *added})

    @property
    def prefix_tokens(self) -> list[int]:
        """The two ids every sequence starts with: `[gMASK] sop`."""
        return [self.special_token_to_id["[gMASK]"], self.special_token_to_id["sop"]]

    def get_command(self, token: str) -> int:
        """Id of a special token by its official name, `<bos>`, `<eos>` and `<pad>` included."""
        commands = {"<bos>": self.bos_token_id, "<eos>": self.eos_token_id, "<pad>": self.pad_token_id}
        commands.update(self.special_token_to_id)
        if token not in commands:
            raise ValueError(f"{token!r} is not a special token; there are {', '.join(commands)}")
        return commands[token]

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.sp_model.id_to_piece(index): index for index in range(self.sp_model.get_piece_size())}
        return {**self.special_token_to_id, **pieces, **self._added_tokens_encoder}

    # ---- text -> ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text without special tokens, all texts in one call on SentencePiece's own threads."""
        return self.sp_model.encode(texts, out_type=int, num_threads=min(8, os.cpu_count() or 1))

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """The chat prompt ChatGLM2 was trained on: past (query, answer) turns, then the open question.

        `history` may also be messages of role and content. ValueError for anything else.
        """
        query, history = read_history(query, history)
        turns = [
            self.build_turn(question, number) + answer + self.behind_answer
            for number, (question, answer) in enumerate(history, start=1)
        ]
        return self.source_prefix + "".join(turns) + self.build_turn(query, len(turns) + 1)

    def build_turn(self, query: str, number: int) -> str:
        """One open turn of the prompt, counted from 1."""
        return TEMPLATES[self.prompt_template][0](query, number)

    def read_history(self, query, history):
        """(question, past turns) of a question and what was said before it. ValueError for anything else."""
        return read_history(query, history)

    def conversation(self, messages: list[tuple[str, str]]):
        """(question, history, role of the question) of (role, text) messages. ValueError where nobody asks."""
        return *conversation(messages), "user"

    def encode_prompts(self, queries, histories, source_prefix: str = "", roles=None) -> list[list[int]]:
        """Ids of the chat prompt of each question and its history, `[gMASK] sop` included.

        `roles` are those of the questions, for a template that has several.
        """
        prompts = [source_prefix + self.build_prompt(*each) for each in zip(queries, histories, strict=True)]
        before, behind = self.prefix_tokens, list(self.suffix_tokens)
        return [before + ids + behind for ids in self.encode_batch(prompts)]

    def with_ends(self, token_ids: list[int]) -> list[int]:
        """A text's ids as every prompt has them."""
        return [*self.prefix_tokens, *token_ids, *self.suffix_tokens]

    def cut_prompt(self, token_ids: list[int], limit: int) -> list[int]:
        """The ids of a prompt, of which the last of its text are left out where they are more than `limit`."""
        return token_ids[:limit]

    def training_limits(self, max_source_length: int, max_target_length: int) -> tuple[int, int]:
        """How many tokens a prompt with its ends, and an answer without its end, may have in training, as officially."""
        return max_source_length, max_target_length

    def encode_prompt(self, query: str, history=None, source_prefix: str = "", role: str = "user") -> list[int]:
        """encode_prompts() of one."""
        return self.encode_prompts([query], [history or []], source_prefix, [role])[0]

    def encode_answers(self, answers: list[str], metadata=None) -> list[list[int]]:
        """Ids of what stands behind a prompt, without the end token; `metadata` is for a template that has some."""
        return self.encode_batch(answers)

    def answers_in(self, source: list[int], history, source_prefix: str) -> list[tuple[int, int]]:
        """[(start, end)] of the tokens of each earlier answer in the ids of a prompt. A token that is partly of what
        stands before an answer is not of it, and neither is the next one.
        """
        text, texts = source_prefix, []
        for number, (asked, answer) in enumerate(history, start=1):
            text += self.build_turn(asked, number)
            texts += [text, text + answer]
            text += answer + self.behind_answer
        borders = []
        for ids in self.encode_batch(texts):
            ids = self.prefix_tokens + ids
            same = next(
                (place for place, pair in enumerate(zip(ids, source, strict=False)) if pair[0] != pair[1]), len(ids)
            )
            borders.append((same, same == len(ids)))
        return [
            (start + (0 if clean else 2), end)
            for (start, clean), (end, _) in zip(borders[::2], borders[1::2], strict=True)
            if start < end
        ]

    def label_behind(self, token_id: int) -> int:
        """What is learned where an earlier answer has ended and the prompt goes on with `token_id`: the end token."""
        return self.eos_token_id

    def kept_history(self, history, dropped: int):
        """What fit_prompt has kept of a history, of which it has left out so many turns."""
        return history[dropped:]

    @property
    def behind_answer(self) -> str:
        """What stands between an answer and the next question."""
        return TEMPLATES[self.prompt_template][1]

    def show(self, token_ids) -> str:
        """The text of ids for people."""
        return self.decode(token_ids)

    def last_turn(self, token_ids: list[int], source_prefix: str = "") -> list[int]:
        """Ids of the last turn of a chat prompt as if nothing had been said before; `token_ids` where that is so.

        `source_prefix` is the text before the whole prompt: it goes, too.
        """
        text = self.decode(token_ids)
        start = text.rfind("[Round ")
        if start <= 0:
            alone = self.without_prefix(text, source_prefix)
            return token_ids if alone == text else self.encode(alone)
        return self.encode("[Round 1]" + text[start:].partition("]")[2])

    def without_prefix(self, text: str, source_prefix: str) -> str:
        """The decoded text without the one that it begins with, which decoding may have changed."""
        return text.removeprefix(self.decode(self.encode_batch([source_prefix])[0])) if source_prefix else text

    def fit_prompt(
        self, query: str, history: list[tuple[str, str]], limit: int, source_prefix: str = "", role: str = "user"
    ) -> tuple[list[int], int]:
        """(ids of the chat prompt, `[gMASK] sop` included, number of oldest turns left out to fit into `limit`).

        The turns that stay are counted from 1, as if the conversation began with them. The question is never
        left out: a longer one comes back whole.
        """
        query, history = read_history(query, history)

        def encode(start):
            prompt = source_prefix + self.build_prompt(query, history[start:])
            return self.with_ends(self.encode_batch([prompt])[0])

        # A turn has more than ten tokens, so most of a very long history is left out without encoding it.
        fewest = 10 if self.prompt_template == "chatglm2" else 1
        starts = range(max(0, len(history) - limit // fewest), len(history))
        dropped = starts.start + bisect_left(starts, True, key=lambda start: len(encode(start)) <= limit)
        return encode(dropped), dropped

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        # By way of the ids: an unknown character must become <unk>, never the name of a special token.
        return self.sp_model.id_to_piece(self.sp_model.encode(text, out_type=int))

    def _convert_token_to_id(self, token: str) -> int:
        index = self.sp_model.piece_to_id(token)
        return self.special_token_to_id.get(token, index) if index == self.sp_model.unk_id() else index

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        """`[gMASK] sop A`, or `[gMASK] sop A B </s>` for a pair."""
        sequence = self.prefix_tokens + token_ids_0
        return sequence if token_ids_1 is None else sequence + token_ids_1 + [self.eos_token_id]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(index in special) for index in token_ids_0]
        mask = [1] * len(self.prefix_tokens) + [0] * len(token_ids_0)
        return mask if token_ids_1 is None else mask + [0] * len(token_ids_1) + [1]

    def _pad(self, encoded_inputs, *args, padding_side=None, **kwargs) -> dict:
        """The base class pads ids and attention mask; position ids count from 0 and are 0 at padding."""
        if "position_ids" not in encoded_inputs:
            encoded_inputs["position_ids"] = list(range(len(encoded_inputs["input_ids"])))
        encoded_inputs = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        padding = [0] * (len(encoded_inputs["input_ids"]) - len(encoded_inputs["position_ids"]))
        if (padding_side or self.padding_side) == "left":
            encoded_inputs["position_ids"] = padding + encoded_inputs["position_ids"]
        else:
            encoded_inputs["position_ids"] = encoded_inputs["position_ids"] + padding
        return encoded_inputs

    # ---- ids -> text

    def _has_text(self, index: int) -> bool:
        return 0 <= index < self.sp_model.get_piece_size() and index not in self.ids_without_text

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < self.sp_model.get_piece_size():
            return self.sp_model.id_to_piece(index)
        offset = index - self.sp_model.get_piece_size()
        return self.special_names[offset] if 0 <= offset < len(self.special_names) else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))

    def decode(self, token_ids, skip_special_tokens=None, **kwargs) -> str | list[str]:
        """Text of ids, or of rows of ids.

        By default special tokens have no text, as in the official code; False shows their names. True leaves out those
        of add_special_tokens as well. The id of `bos_token`, which no answer has, shows its name where it stands alone:
        lm-evaluation-harness takes every text that begins with it to need no `[gMASK] sop`, and every text begins with "".
        """
        if skip_special_tokens is None and isinstance(token_ids, int) and token_ids == self.bos_token_id:
            skip_special_tokens = False
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, sequences, skip_special_tokens=None, **kwargs) -> list[str]:
        """The texts that decode gives of each row."""
        return super().batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)

    def _decode(self, token_ids, skip_special_tokens=None, **kwargs) -> str:
        texts, run = [], []  # a run of pieces is decoded at once, as a character may have several
        for index in [token_ids] if isinstance(token_ids, int) else map(int, token_ids):
            if self._has_text(index):
                run.append(index)
            elif name := self._name_to_show(index, skip_special_tokens):
                texts += [self._text_of(run), name]
                run = []
        return "".join((*texts, self._text_of(run)))

    def _text_of(self, run):
        return self.sp_model.decode(run)

    def _name_to_show(self, index, skip_special_tokens):
        if index in self._added_tokens_decoder:
            token = self._added_tokens_decoder[index]
            return "" if token.special and skip_special_tokens else token.content
        return self._convert_id_to_token(index) if skip_special_tokens is False else ""

    # ---- chat

    def apply_chat_template(
        self, conversation, tools=None, documents=None, chat_template=None, *args, tokenizer_kwargs=None, **kwargs
    ):
        """The prompt of messages, as text or ids. `[gMASK] sop` stands before ids, as no template could write it.

        ValueError for what the model's own template has no place for.
        """
        if chat_template is None and self.chat_template == self.own_template:
            given = {"tools": tools, "documents": documents, **kwargs}
            refuse_in_template(given, ("tools", "documents", "return_assistant_tokens_mask"))
            conversation = [
                read_texts(each) if isinstance(each, list | tuple) else each for each in read_texts(conversation)
            ]
        tokenizer_kwargs = {**(tokenizer_kwargs or {}), "is_chat": True}
        return super().apply_chat_template(
            conversation, tools, documents, chat_template, *args, tokenizer_kwargs=tokenizer_kwargs, **kwargs
        )

    def _encode_plus(self, text, *args, add_special_tokens=True, is_chat=False, **kwargs):
        if kwargs.get("return_offsets_mapping"):
            raise NotImplementedError("return_offsets_mapping: this tokenizer does not know where its tokens stand.")
        return super()._encode_plus(text, *args, add_special_tokens=add_special_tokens or is_chat, **kwargs)

    # ---- files

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `tokenizer.model`, also where the file it was read from is gone."""
        name = "-".join([*([filename_prefix] if filename_prefix else []), self.vocab_files_names["vocab_file"]])
        file = Path(save_directory, name)
        file.write_bytes(self.sp_model.serialized_model_proto())
        return (str(file),)

    def save_pretrained(self, save_directory, legacy_format=None, filename_prefix=None, **kwargs):
        """Write the official files: tokenizer.model, tokenizer_config.json and special_tokens_map.json."""
        template = self.chat_template
        self.chat_template = None if template == self.own_template else template  # the official files have none
        try:
            files = super().save_pretrained(
                save_directory, legacy_format=legacy_format, filename_prefix=filename_prefix, **kwargs
            )
        finally:
            self.chat_template = template
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        config_file = Path(save_directory) / f"{prefix}tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        # Official code loading this folder finds its own class through auto_map.
        config["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
        config = {name: value for name, value in config.items() if name not in KEYS_NOT_SAVED}
        if not config["added_tokens_decoder"]:
            del config["added_tokens_decoder"]
        config_file.write_text(
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        map_file = Path(save_directory) / f"{prefix}special_tokens_map.json"
        map_file.write_text("{}\n", encoding="utf-8")
        return (*files, str(map_file))
