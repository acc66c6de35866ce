"""Who takes part in benchmarks.speed: one file a contender, NAME.py with the class Name, and one line in CONTENDERS.

A further contender needs nothing else: its process, its turns, its lines in the tables and its bars follow from the line.
"""

import importlib.util
from typing import NamedTuple


class Entry(NamedTuple):
    title: str  # in the tables
    takes_bits: bool = False  # --quantization_bit means something to it
    only_answers: bool = False  # one prompt at a time
    package: str | None = None  # without which it does not take part


CONTENDERS = {
    "ours": Entry("ours", takes_bits=True),
    "official": Entry("official recipe, restated", takes_bits=True),
    "peft": Entry("GlmForCausalLM + PEFT"),
    "chatglmcpp": Entry("chatglm.cpp, one prompt at a time", only_answers=True, package="chatglm_cpp"),
}
FLOAT = "float"  # ours without --quantization_bit, beside those that take it
BFLOAT16 = "bfloat16"  # ours with --bf16, on a CPU
OURS = ("ours", FLOAT, BFLOAT16)


def taking_part(settings):
    """The names of those that --quantization_bit, or its absence, lets take part."""
    at_hand = [
        name for name, entry in CONTENDERS.items() if not entry.package or importlib.util.find_spec(entry.package)
    ]
    if not settings.quantization_bit:
        return [*at_hand, BFLOAT16] if settings.device == "cpu" else at_hand
    return [*(name for name in at_hand if CONTENDERS[name].takes_bits), FLOAT]


def only_answers(name):
    """True for a contender that does not train, and takes one prompt at a time."""
    return name in CONTENDERS and CONTENDERS[name].only_answers


def titles(settings):
    """{name: title}, with the second line of ours in prediction."""
    found = {name: entry.title for name, entry in CONTENDERS.items()}
    if settings.official:
        found["official"] = "official scripts"
    return {**found, "automatic": "ours, automatic batch size", FLOAT: "ours, float", BFLOAT16: "ours, --bf16"}


def make_contender(name, settings):
    """The contender, whose file is imported only here: it may need a library that the others do without."""
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, name.capitalize())(settings)
