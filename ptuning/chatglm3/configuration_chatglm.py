"""The configuration of ChatGLM3: that of ChatGLM2 with another meaning of `rope_ratio`.

Answers to the official `configuration_chatglm.py` of ChatGLM3-6B, -32k and -128k.
"""

from chatglm2 import configuration_chatglm


class ChatGLMConfig(configuration_chatglm.ChatGLMConfig):
    """As of ChatGLM2; `rope_ratio` multiplies the base of the rotary frequencies."""

    def __init__(self, **settings):  # else transformers writes one, which knows no fields
        super().__init__(**settings)

    @property
    def rope_position_divisor(self):
        return 1

    @property
    def rope_base_factor(self):
        return self.rope_ratio
