"""ChatGLMConfig: every field of the official ChatGLM2 `config.json`.

Answers to the official `configuration_chatglm.py`. It differs in that a value the model cannot
honour is a ValueError that names the field, instead of a wrong model, and in that transformers never meets
a setting that this file does not know: a config.json can name kernels, classes and repositories there
(`_attn_implementation`, `quantization_config`, `per_layer_config`, …), which the library then fetches and runs.
"""

import json

from transformers import PretrainedConfig

from common.values import is_integer, is_number

SIZES = (
    "num_layers padded_vocab_size hidden_size ffn_hidden_size kv_channels num_attention_heads multi_query_group_num "
    "seq_length"
).split()
LARGEST_SIZE = 2**20
MOST_LAYERS = 1000
# What transformers is given of a config.json beside the fields of the model: nothing that chooses code.
LIBRARY_SETTINGS = (
    "architectures bos_token_id dtype id2label label2id num_labels output_attentions output_hidden_states problem_type "
    "return_dict torch_dtype transformers_version"
).split()
# Official keys that are written to another config.json as they were read, and used by nothing here.
CARRIED_SETTINGS = ("_name_or_path", "auto_map", "model_type", "vocab_size")
# The model's own settings in a config.json, and what holds where it lacks them.
DEFAULTS = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 2048,
    "hidden_dropout": 0.0,
    "classifier_dropout": None,
    "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "bias_dropout_fusion": True,  # how the official CUDA code fuses; no effect on the numbers
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "apply_query_key_layer_scaling": True,  # cancels out in the official attention; no effect
    "attention_softmax_in_fp32": True,  # scaled_dot_product_attention always accumulates in float32
    "fp32_residual_connection": False,
    "original_rope": True,
    "rope_ratio": 1,
    "quantization_bit": 0,
    "pre_seq_len": None,
    "prefix_projection": False,
    "prefix_dropout": 0.1,
    "initializer_range": 0.02,
    "use_cache": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "model_family": None,  # which of the models of this type it is; written where this code writes, not official
}


class ChatGLMConfig(PretrainedConfig):
    """Configuration of a ChatGLM2 model, and of its prefix encoder.

    `pre_seq_len` (number of virtual tokens, None for no prefix), `prefix_projection` and
    `prefix_dropout` (probability, training only) describe the prefix encoder; `quantization_bit` is
    0 for float weights, else 4 or 8.

    Raises ValueError for sizes that do not fit together and for variants that are not ChatGLM2.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "max_position_embeddings": "seq_length",
        "head_dim": "kv_channels",
    }
    defaults = DEFAULTS
    auto_map = {}  # where transformers and TRL look for code of the folder

    def __init__(self, **settings):
        if (vocab_size := settings.pop("vocab_size", None)) is not None:  # older checkpoints have this name, or both
            settings = {"padded_vocab_size": vocab_size, **settings}
        self._auto_map = settings.get("auto_map")  # for whoever loads a saved folder with the official code
        for name, default in self.defaults.items():
            setattr(self, name, settings.get(name, default))
        self.bos_token_id = settings.get("bos_token_id")
        if self.kv_channels is None:
            self.kv_channels = self.hidden_size // self.num_attention_heads
        self.quantization_bit = self.quantization_bit or 0
        for name in settings.keys() & self.attribute_map.keys():  # the library's names of these fields
            setattr(self, name, settings[name])
        groups = settings.get("num_key_value_heads", self.num_key_value_heads)
        if self.multi_query_attention and "multi_query_group_num" not in settings:
            self.multi_query_group_num = groups
        self._check(settings.get("rope_scaling"))
        if groups != self.num_key_value_heads and "multi_query_group_num" not in settings:
            raise ValueError(
                f"num_key_value_heads is {groups!r}, but without multi_query_attention there are as many as "
                f"num_attention_heads, {self.num_attention_heads}."
            )
        if not is_integer(labels := settings.get("num_labels", 1)) or not 1 <= labels <= LARGEST_SIZE:
            raise ValueError(f"num_labels is {labels!r}, expected a positive integer up to {LARGEST_SIZE:,}.")
        library = {name: settings[name] for name in LIBRARY_SETTINGS if name in settings}
        if settings.get("attn_implementation") in ("eager", "sdpa"):  # any other may name code
            library["attn_implementation"] = settings["attn_implementation"]
        own = {name: getattr(self, name) for name in ("eos_token_id", "pad_token_id", "tie_word_embeddings")}
        super().__init__(**own, **library)

    def __eq__(self, other):
        return isinstance(other, PretrainedConfig) and self.__dict__ == other.__dict__

    def to_dict(self):
        settings = super().to_dict()
        auto_map = settings.pop("_auto_map", None)
        settings["num_key_value_heads"] = self.num_key_value_heads  # PEFT looks here for it
        return settings if auto_map is None else {**settings, "auto_map": auto_map}

    def to_json_string(self, *args, **kwargs):
        """The text of a config.json, which has the official settings only."""
        settings = json.loads(super().to_json_string(*args, **kwargs))
        settings.pop("num_key_value_heads", None)
        if settings.get("model_family") is None:
            settings.pop("model_family", None)
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    @classmethod
    def known_settings(cls, settings):
        """Those of a config.json's `settings` that belong into another one: of the model, and no other."""
        known = {*cls.defaults, *LIBRARY_SETTINGS, *CARRIED_SETTINGS}
        return {name: value for name, value in settings.items() if name in known}

    @property
    def num_key_value_heads(self):
        """KV groups G: `multi_query_group_num` with multi-query attention, else every query head."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    @property
    def rope_position_divisor(self):
        """What positions are divided by: in ChatGLM2-6B-32k `rope_ratio`."""
        return self.rope_ratio

    @property
    def rope_base_factor(self):
        """What the base of the rotary frequencies is multiplied by."""
        return 1

    @property
    def embedding_bits(self):
        """Of the integers that embedding and output layer are stored as, 0 for floats."""
        return 0

    @property
    def prefix_columns(self):
        """Width of a prefix encoder's embedding in front of its projection: that of all keys and values of a token."""
        return 2 * self.num_layers * self.num_key_value_heads * self.kv_channels

    def _check(self, rope_scaling):
        for name in SIZES:
            value = getattr(self, name)
            largest = LARGEST_SIZE if name != "num_layers" else MOST_LAYERS  # or building the modules takes forever
            if not is_integer(value) or not 1 <= value <= largest:
                raise ValueError(f"config.json: {name} is {value!r}, expected a positive integer up to {largest:,}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"multi_query_group_num {self.multi_query_group_num}."
            )
        if self.kv_channels % 4:
            raise ValueError(
                f"config.json: kv_channels is {self.kv_channels}; ChatGLM2 rotates pairs in the first half of a "
                "head, so it must be a multiple of 4."
            )
        for name in ("hidden_dropout", "attention_dropout", "prefix_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"config.json: {name} is {value!r}, expected a probability from 0 up to 1.")
        if not isinstance(self.layernorm_epsilon, int | float) or not 0 < self.layernorm_epsilon < 1:
            raise ValueError(f"config.json: layernorm_epsilon is {self.layernorm_epsilon!r}, expected such as 1e-05.")
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if not is_integer(value) or not 0 <= value < self.padded_vocab_size:
                raise ValueError(
                    f"config.json: {name} is {value!r}, expected a token id below {self.padded_vocab_size}."
                )
        if not self.original_rope or rope_scaling is not None:
            raise ValueError(
                f"config.json: original_rope={self.original_rope}, rope_scaling={rope_scaling} is the rotary embedding of "
                "another GLM; this code computes the one of ChatGLM2-6B and of its long-context models (original_rope true)."
            )
        if not is_number(self.rope_ratio) or not 1 <= self.rope_ratio <= LARGEST_SIZE:
            raise ValueError(f"config.json: rope_ratio is {self.rope_ratio!r}, expected a number from 1 on.")
        if self.tie_word_embeddings:
            raise ValueError("config.json: tie_word_embeddings is true; ChatGLM2 keeps a separate output layer.")
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(
                f"config.json: quantization_bit is {self.quantization_bit!r}, expected 4, 8, or 0 for float weights."
            )
        if self.pre_seq_len is None:
            return
        if not is_integer(self.pre_seq_len) or self.pre_seq_len < 1:
            raise ValueError(f"pre_seq_len is {self.pre_seq_len!r}, expected at least 1 (leave it out for no prefix).")
        if self.pre_seq_len > self.seq_length:
            raise ValueError(
                f"--pre_seq_len {self.pre_seq_len} is longer than any text this model takes ({self.seq_length} "
                "tokens). It counts virtual tokens (official: 128); the length of a text is --max_source_length."
            )
