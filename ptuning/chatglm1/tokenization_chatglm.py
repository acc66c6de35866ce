"""The tokenizer of the first ChatGLM-6B: pieces of `ice_text.model`, `[gMASK] <sop>` behind a prompt, rounds from 0.

Answers to the official `tokenization_chatglm.py` of ChatGLM-6B and to the prompt in its `chat`: same ids, prompt, padding
and files. It differs as chatglm2/'s does: text that looks like a special token is text, position ids are one number a
token, and any SentencePiece model with these pieces is accepted.

Line breaks, tabs and runs of spaces are pieces of their own. In the first revision the ids of all pieces lie behind those
of 20,000 pieces of images (`num_image_tokens`).
"""

from chatglm2 import tokenization_chatglm as chatglm2

VOCABULARY_FILE = "ice_text.model"
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>", "<pad>")
NEEDED = ("[MASK]", "[gMASK]", "<sop>", "<eop>", "<pad>")
LONGEST_BLANK = 80  # spaces that are one piece
# Longest first, as officially they are replaced in this order.
BLANKS = [(" " * length, f"<|blank_{length}|>") for length in range(LONGEST_BLANK, 1, -1)]
MARKS = [("\n", "<n>"), ("\t", "<|tab|>"), *BLANKS]
CHAT_TEMPLATE = """\
{%- set now = namespace(round=0, question='', asked=false) -%}
{%- set answers = messages | selectattr('role', 'equalto', 'assistant') | list -%}
{%- macro turn() -%}
  {{- '[Round ' ~ now.round ~ ']\\n问：' ~ now.question ~ '\\n答：' -}}
{%- endmacro -%}
{%- for message in messages -%}
  {%- set content = message.content | default('') -%}
  {%- if message.role == 'assistant' -%}
    {%- if now.asked or now.round == 0 -%}
      {{- turn() ~ content ~ '\\n' -}}
      {%- set now.round = now.round + 1 -%}
      {%- set now.question, now.asked = '', false -%}
    {%- else -%}
      {{- raise_exception('Two answers stand behind each other.') -}}
    {%- endif -%}
  {%- elif message.role in ('system', 'user') -%}
    {%- set now.question = now.question ~ ('\\n' if now.asked else '') ~ content -%}
    {%- set now.asked = true -%}
  {%- else -%}
    {{- raise_exception('The role of a message is ' ~ message.role ~ ', expected system, user or assistant.') -}}
  {%- endif -%}
{%- endfor -%}
{%- if now.asked and answers -%}
  {{- turn() -}}
{%- elif now.asked -%}
  {{- now.question -}}
{%- elif add_generation_prompt -%}
  {{- raise_exception("The last message is of role assistant; expected user, whom the model answers.") -}}
{%- endif -%}
"""


class ChatGLMTokenizer(chatglm2.ChatGLMTokenizer):
    """Text to ids and back; every encoded text ends with `[gMASK] <sop>` unless `add_special_tokens=False`.

    `vocab_file` is the path of a SentencePiece model; ValueError when it is none or lacks the special tokens.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}
    special_names = SPECIAL_TOKENS
    own_template = CHAT_TEMPLATE
    prompt_template = "chatglm1"
    turn_tokens = 6
    ends_shown = ("", " [gMASK] <sop>")
    learned_of_prompt = 1  # `<sop>`, too, is predicted in training

    def __init__(self, vocab_file, num_image_tokens=20000, clean_up_tokenization_spaces=True, **kwargs):
        if type(num_image_tokens) is not int or not 0 <= num_image_tokens < 2**20:
            raise ValueError(
                f"tokenizer_config.json: num_image_tokens is {num_image_tokens!r}, expected such as 0 or 20000."
            )
        self.num_image_tokens = num_image_tokens
        super().__init__(vocab_file, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs)
        self.init_kwargs["num_image_tokens"] = num_image_tokens

    def _load_sentencepiece(self):
        super()._load_sentencepiece()
        unknown = self.sp_model.unk_id()
        missing = [token for token in NEEDED if self.sp_model.piece_to_id(token) == unknown]
        if missing:
            raise ValueError(
                f"{self.vocab_file} has no {', '.join(missing)}; expected the {VOCABULARY_FILE} of ChatGLM-6B since April "
                "2023, of 2,706,249 bytes."
            )
        self.ids_without_text = frozenset(index + self.num_image_tokens for index in self.ids_without_text)

    # ---- vocabulary

    @property
    def vocab_size(self):
        return self.num_image_tokens + self.sp_model.get_piece_size()

    def special_ids(self):
        return {token: self._id_of(token) for token in SPECIAL_TOKENS}

    def _id_of(self, piece):
        return self.num_image_tokens + self.sp_model.piece_to_id(piece)

    unk_token_id = property(lambda self: self.chosen_ids.get("unk_token", self._id_of("<unk>")))
    pad_token_id = property(lambda self: self.chosen_ids.get("pad_token", self._id_of("<pad>")))
    eos_token_id = property(lambda self: self.chosen_ids.get("eos_token", self._id_of("<eop>")))
    bos_token_id = property(lambda self: self.chosen_ids.get("bos_token", self._id_of("<sop>")))
    gmask_token_id = property(lambda self: self._id_of("[gMASK]"))

    @property
    def prefix_tokens(self):
        return []

    @property
    def suffix_tokens(self):
        """The two ids every prompt ends with: `[gMASK] <sop>`."""
        return [self.gmask_token_id, self.bos_token_id]

    def get_vocab(self):
        pieces = {self.sp_model.id_to_piece(index): index for index in range(self.sp_model.get_piece_size())}
        return {
            **{f"<image_{index}>": index for index in range(self.num_image_tokens)},
            **{piece: index + self.num_image_tokens for piece, index in pieces.items()},
            **self._added_tokens_encoder,
        }

    # ---- text -> ids

    @staticmethod
    def _marked(text):
        """Text with a mark for each piece that SentencePiece would not make of white space."""
        for characters, mark in MARKS:
            if characters in text:
                text = text.replace(characters, mark)
        return text

    def encode_batch(self, texts):
        rows = super().encode_batch([self._marked(text) for text in texts])
        return [[index + self.num_image_tokens for index in row] for row in rows] if self.num_image_tokens else rows

    def _tokenize(self, text, **kwargs):
        return super()._tokenize(self._marked(text), **kwargs)

    def _convert_token_to_id(self, token):
        return self._id_of(token)

    def build_prompt(self, query, history=None):
        """The official prompt: a question alone is the whole text; with past turns there are rounds, from 0."""
        if self.prompt_template == "chatglm1" and not history:
            return self.source_prefix + self.read_history(query, history)[0]
        return super().build_prompt(query, history)

    def build_turn(self, query, number):
        """One open turn of the prompt, counted from 1."""
        return (
            f"[Round {number - 1}]\n问：{query}\n答："
            if self.prompt_template == "chatglm1"
            else super().build_turn(query, number)
        )

    def last_turn(self, token_ids, source_prefix=""):
        """Ids of the question that a prompt ends with, as if nothing had been said before."""
        if self.prompt_template != "chatglm1":
            return super().last_turn(token_ids, source_prefix)
        text = self.decode(token_ids)
        start = text.rfind("[Round ")
        if start < 0:  # a question alone
            return super().last_turn(token_ids, source_prefix)
        return self.encode(text[start:].partition("\n问：")[2].removesuffix("\n答："))

    @property
    def behind_answer(self):
        return "\n" if self.prompt_template == "chatglm1" else super().behind_answer

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """`A [gMASK] <sop>`, or `A [gMASK] <sop> B <eop>` for a pair."""
        sequence = list(token_ids_0) + self.suffix_tokens
        return sequence if token_ids_1 is None else sequence + list(token_ids_1) + [self.eos_token_id]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, None, True)
        mask = [0] * len(token_ids_0) + [1, 1]
        return mask if token_ids_1 is None else mask + [0] * len(token_ids_1) + [1]

    def cut_prompt(self, token_ids, limit):
        ends = self.suffix_tokens
        return token_ids if len(token_ids) <= limit else token_ids[: max(0, limit - len(ends))] + ends

    def training_limits(self, max_source_length, max_target_length):
        return max_source_length + 1, max(0, max_target_length - 2)

    # ---- ids -> text

    def _has_text(self, index):
        return (
            0 <= index - self.num_image_tokens < self.sp_model.get_piece_size() and index not in self.ids_without_text
        )

    def _convert_id_to_token(self, index):
        if 0 <= index - self.num_image_tokens < self.sp_model.get_piece_size():
            return self.sp_model.id_to_piece(index - self.num_image_tokens)
        return f"<image_{index}>" if 0 <= index < self.num_image_tokens else ""

    def _text_of(self, run):
        text = super()._text_of([index - self.num_image_tokens for index in run])
        for characters, mark in MARKS:
            text = text.replace(mark, characters)
        return text

    def _decode(self, token_ids, skip_special_tokens=None, clean_up_tokenization_spaces=None, **kwargs):
        text = super()._decode(token_ids, skip_special_tokens, **kwargs)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text
