"""How many bits an integer weight may have. It loads no torch, so that the command line can ask."""

from __future__ import annotations

SUPPORTED_BITS = (4, 8)


def check_quantization_bit(bits: int | None, already: int | None = None) -> int:
    """Bits of the linear weights once the model is loaded: 4, 8, or 0 for float weights.

    `bits` is what the user asks for (None: nothing), `already` is `quantization_bit` of the base model's config.json
    (None and 0: float weights). Raises ValueError for an unsupported value and for a folder that is quantized to
    another width; the same width is accepted and means that the folder is loaded as it is.
    """
    already = already or 0
    if already not in (0, *SUPPORTED_BITS):
        raise ValueError(
            f"config.json of the base model has quantization_bit {already}; int4 and int8 weights can be loaded. "
            "Use a ChatGLM2-6B, ChatGLM2-6B-int4 or ChatGLM2-6B-int8 folder."
        )
    if bits is None:
        return already
    if bits in (16, 32):
        raise ValueError(
            f"--quantization_bit {bits} makes no sense: 16 and 32 bits are the float weights themselves. "
            "Leave the flag out for a model that is not quantized, or give 4 or 8."
        )
    if bits not in SUPPORTED_BITS:
        raise ValueError(
            f"--quantization_bit {bits} is not supported. Give 4 or 8, or leave the flag out for float weights."
        )
    if already and bits != already:
        raise ValueError(
            f"--quantization_bit {bits} was given, but the base model's weights are int{already} already "
            f"(quantization_bit {already} in its config.json) and are not quantized twice. Leave the flag out to use "
            f"them as they are, or give the folder of the float model."
        )
    return bits
