"""ChatGLMConfig of the first ChatGLM-6B: its official `config.json`, under the names that chatglm2/ has for its fields.

Answers to the official `configuration_chatglm.py` of ChatGLM-6B. It differs as that of chatglm2/ does; a config.json that
is written has the official names.
"""

import json

from chatglm2 import configuration_chatglm as chatglm2
from common.values import is_integer

# The official name of a field that has another one here.
OFFICIAL_NAMES = {
    "vocab_size": "padded_vocab_size",
    "inner_hidden_size": "ffn_hidden_size",
    "max_sequence_length": "seq_length",
}
# What the model is, where a config.json says nothing; the numbers are the official ones, of the first revision.
OWN_DEFAULTS = {
    "padded_vocab_size": 150528,
    "ffn_hidden_size": 16384,
    "bos_token_id": 150004,
    "eos_token_id": 150005,
    "mask_token_id": 150000,
    "gmask_token_id": 150001,
    "pad_token_id": 0,
    "position_encoding_2d": True,
    "quantization_embeddings": False,  # embedding and output layer are stored as integers, too
}
SHARED = (
    "num_layers hidden_size num_attention_heads seq_length layernorm_epsilon quantization_bit pre_seq_len "
    "prefix_projection prefix_dropout use_cache model_family"
).split()
# Fields of chatglm2/'s modules that no config.json of this model can set.
FIXED = {
    **{name: value for name, value in chatglm2.DEFAULTS.items() if name not in (*SHARED, *OWN_DEFAULTS)},
    "kv_channels": None,
    "rmsnorm": False,
    "add_bias_linear": True,
}


class ChatGLMConfig(chatglm2.ChatGLMConfig):
    """Configuration of a ChatGLM-6B of the first generation, and of its prefix encoder.

    `mask_token_id`, `gmask_token_id` and `bos_token_id` are the ids of `[MASK]`, `[gMASK]` and `<sop>`, which say where a
    prompt ends. Raises ValueError as chatglm2/'s does, and for one-dimensional positions.
    """

    attribute_map = {**chatglm2.ChatGLMConfig.attribute_map, **OFFICIAL_NAMES}
    defaults = {**{name: chatglm2.DEFAULTS[name] for name in SHARED}, **OWN_DEFAULTS, **FIXED}

    def __init__(self, **settings):
        settings = {name: value for name, value in settings.items() if name not in FIXED}
        super().__init__(**{"bos_token_id": OWN_DEFAULTS["bos_token_id"], **settings})

    def to_json_string(self, *args, **kwargs):
        """The text of a config.json, which has the official settings only."""
        settings = json.loads(super().to_json_string(*args, **kwargs))
        renamed = {own: official for official, own in OFFICIAL_NAMES.items()}
        settings = {renamed.get(name, name): value for name, value in settings.items() if name not in FIXED}
        settings["position_encoding_2d"] = True  # by which the model is told
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    @classmethod
    def known_settings(cls, settings):
        own = super().known_settings({name: value for name, value in settings.items() if name not in FIXED})
        return {**own, **{name: settings[name] for name in OFFICIAL_NAMES if name in settings}}

    @property
    def embedding_bits(self):
        return self.quantization_bit if self.quantization_embeddings else 0

    @property
    def prefix_columns(self):
        """Width of a prefix encoder's embedding in front of its projection."""
        return self.hidden_size

    def _check(self, rope_scaling):
        super()._check(rope_scaling)
        if self.position_encoding_2d is not True:
            raise ValueError(
                f"config.json: position_encoding_2d is {self.position_encoding_2d!r}; ChatGLM-6B has two positions a token."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        for name in ("bos_token_id", "mask_token_id", "gmask_token_id"):
            value = getattr(self, name)
            if not is_integer(value) or not 0 <= value < self.padded_vocab_size:
                raise ValueError(
                    f"config.json: {name} is {value!r}, expected a token id below {self.padded_vocab_size}."
                )
