"""PEFT's own tests of decoders, on a small ChatGLM2 without a prefix."""

from support.peft_peers import decoder_tests


class TestPeft(decoder_tests("chatglm-plain")):
    pass
