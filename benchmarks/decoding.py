"""Answers on a CPU, one conversation and eight: int4, int8 and float weights, side by side with chatglm.cpp.

    PYTHONPATH=ptuning python -m benchmarks.decoding

The model has the layers of ChatGLM2-6B, --layers of them, with the full vocabulary and random weights. A turn feeds a
prompt of --prompt tokens and then decodes --new_tokens greedily. The contenders are processes of their own that take
turns; the figures are medians over --repeats turns. chatglm.cpp takes part where `pip install chatglm-cpp tabulate`
has been done (with CMAKE_POLICY_VERSION_MINIMUM=3.5 set): its q4_0 and q8_0 quantize embedding and head, too, which are
float here; "int8 head" stands for --quantize_output_layer, "bfloat16" for --bf16.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
from pathlib import Path

from common.environment import KEEP_MEMORY

ROOT = Path(__file__).resolve().parents[1]
INT8_HEAD = ", int8 head"
BFLOAT16 = ", bfloat16"  # --bf16
OURS = {f"int{bits}{kind}": bits for bits in (4, 8) for kind in ("", INT8_HEAD, BFLOAT16, INT8_HEAD + BFLOAT16)}
OURS |= {"float32": 0, f"float{BFLOAT16}": 0}
CHATGLM_CPP = {"chatglm.cpp q4_0": "Q4_0", "chatglm.cpp q8_0": "Q8_0"}
BLOCK = 2**24  # random numbers drawn, and used again and again


def random_model(layers):
    """A model of the 6B's shapes with so many layers, float16, as published: 28 layers of it fit into 16 GB."""
    import torch
    from benchmarks.full_size import CONFIG

    from chatglm2.configuration_chatglm import ChatGLMConfig
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration

    config = ChatGLMConfig(**{**CONFIG, "num_layers": layers})
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).half()
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_("layernorm" in name)
            continue
        for part in parameter.view(-1).split(BLOCK):
            part.copy_(block[: len(part)])
    return model


def build_ours(name, layers):
    """turn(prompts, new_tokens): (seconds of prompt and first token, [seconds of each further token])."""
    import torch
    from benchmarks.contenders.ours import lay_out
    from benchmarks.full_size import next_tokens, timed

    from chatglm2.quantization import QuantizedLinear, choose_backend, quantize_model_, use_backend_

    model = random_model(layers)
    if bits := OURS[name]:
        quantize_model_(model, bits)
    dtype = torch.bfloat16 if name.endswith(BFLOAT16) else torch.float32
    if INT8_HEAD in name:
        model.transformer.output_layer = QuantizedLinear.from_linear(model.transformer.output_layer, 8).eval()
    lay_out(model, dtype)
    model.to(dtype)
    for bits in (4, 8):
        use_backend_(model, choose_backend("auto", "cpu", bits, dtype), bits)

    return lambda prompts, new_tokens: timed(next_tokens(model, prompts, new_tokens + 1))


def build_chatglm_cpp(name, layers):
    """As build_ours; one conversation at a time, which is all that chatglm.cpp takes."""
    from benchmarks.contenders.chatglmcpp import next_tokens, open_in_chatglm_cpp
    from benchmarks.full_size import timed

    pipeline = open_in_chatglm_cpp(random_model(layers), CHATGLM_CPP[name])

    return lambda prompts, new_tokens: timed(next_tokens(pipeline, prompts[0], new_tokens + 1))


def serve(name, layers, connection):
    turn = (build_chatglm_cpp if name in CHATGLM_CPP else build_ours)(name, layers)
    connection.send("ready")
    while (work := connection.recv()) is not None:
        connection.send(turn(*work))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    everyone = [*OURS, *CHATGLM_CPP]
    usual = [name for name in everyone if BFLOAT16 not in name]  # with four layers all together take more than 24 GB
    parser.add_argument("--contenders", nargs="+", choices=everyone, default=usual)
    settings = parser.parse_args()
    names = [name for name in settings.contenders if name in OURS]
    if all(importlib.util.find_spec(package) for package in ("chatglm_cpp", "tabulate")):
        names += [name for name in settings.contenders if name in CHATGLM_CPP]
    else:
        print("Without chatglm.cpp: it needs CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install chatglm-cpp tabulate.")
    os.environ.update(KEEP_MEMORY)  # as the scripts
    context = multiprocessing.get_context("spawn")
    children = {}
    for name in names:
        connection, end = context.Pipe()
        context.Process(target=serve, args=(name, settings.layers, end), daemon=True).start()
        assert connection.recv() == "ready"
        children[name] = connection
    figures = {}
    for _ in range(settings.repeats):
        for name, connection in children.items():
            for rows in (1,) if name in CHATGLM_CPP else (1, 8):
                prompts = [[100 + row + place for place in range(settings.prompt)] for row in range(rows)]
                connection.send((prompts, settings.new_tokens))
                first, seconds = connection.recv()
                figures.setdefault((name, rows), []).append((first, statistics.median(seconds)))
    for connection in children.values():
        connection.send(None)
    print(
        f"| {settings.layers} layers of the 6B, prompt of {settings.prompt} tokens | prompt + first token | a further token |"
    )
    print("|---|---|---|")
    for (name, rows), turns in figures.items():
        first, token = (1000 * statistics.median(values) for values in zip(*turns, strict=True))
        print(f"| {name}, {rows} conversation{'s' * (rows > 1)} | {first:,.0f} ms | {token:.1f} ms |")


if __name__ == "__main__":
    main()
