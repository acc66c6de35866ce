"""PEFT's own tests of decoders that train or generate, on a small ChatGLM2 with a prefix, and with projection."""

from support.peft_peers import decoder_tests

COMPUTING = (
    "test_generate",
    "test_prepare_for_training_parametrized",
    "test_training_decoders",
    "test_training_decoders_gradient_checkpointing",
)


class TestPeft(decoder_tests("chatglm-prefix", "chatglm-projection", only=COMPUTING)):
    pass
