"""Training, prediction, data and start, side by side with the official recipe, with PEFT, and with what is possible.

    PYTHONPATH=ptuning python -m benchmarks.speed --size small          (6b needs a GPU; tiny takes a minute)

Contenders, each a process of its own with random weights of the same sizes, that takes the same rows:

- `ours`: model, loss, order of rows, batches and prediction of this project, with malloc as launch.py sets it.
- `official`: with --official FOLDER and --official_python PYTHON the official scripts themselves, in their own
  environment (FOLDER holds ptuning/main.py and the model's Python files); see official_scripts.py. Without them the
  "official recipe, restated": rows padded to source + target + 1 tokens, gradient checkpointing, float32 logits of every
  position, KV groups copied to all heads, a mask for every row, rotary table of seq_length anew in each forward, cache
  grown by concatenation. It is generous: it runs in this environment, and generates without generate()'s overhead.
- `peft`: transformers' GlmForCausalLM with PEFT's PrefixTuningConfig, as one would write it today: rows padded to the
  longest of the batch, no checkpointing, generate(). Needs `pip install peft`.
- `chatglmcpp`: li-plus/chatglm.cpp in float32, which answers one prompt at a time, here without a prefix, and does not
  train. It takes part on a CPU after `CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install chatglm-cpp tabulate`.

Prediction is measured twice for ours: in batches like the others', and in the batches that it takes on its own.
They take turns, and the figures are medians of --repeats turns. A turn is one pass over --rows rows in training, and
--new_tokens tokens for each of --prompts prompts of one length in prediction.

The floor. Training: `minimal_operations` at the rate of a large product. Decoding: reading every weight once per step,
and keys and values, at the rate of a copy. Both rates are measured between the turns.

Memory is the peak while training, beyond what is resident before the first step: on a CPU of the process (VmHWM), on a
GPU of PyTorch's allocator.

The contenders stand in contenders/, the clock in measuring.py, tables and plots in report.py.
"""

import argparse
import sys

from benchmarks.contenders import BFLOAT16, CONTENDERS, FLOAT
from benchmarks.contenders.base import SIZES
from benchmarks.measuring import measure, work
from benchmarks.report import describe_machine, plot, report


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, default=32, help="rows of a training turn")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a prediction turn")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quantization_bit", type=int, choices=(4, 8), default=0, help="ours and official; beside ours in float"
    )
    parser.add_argument(
        "--group_by_length", action="store_true", help="ours with --train_sampling_strategy group_by_length"
    )
    parser.add_argument("--official", help="folder with the official ptuning/main.py and the model's Python files")
    parser.add_argument("--official_python", help="the Python of its environment (transformers 4.30.2)")
    parser.add_argument("--no_growth", dest="growth", action="store_false", help="leave the longer rows out")
    parser.add_argument("--worker", choices=(*CONTENDERS, FLOAT, BFLOAT16), help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.worker == FLOAT:
        settings.quantization_bit = 0
    if settings.worker:
        return work(settings)
    import torch

    if bool(settings.official) != bool(settings.official_python):
        parser.error("--official and --official_python belong together")
    settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    settings.machine = describe_machine(settings.device)
    print("    " + "PYTHONPATH=ptuning python -m benchmarks.speed " + " ".join(sys.argv[1:]))
    figures = measure(settings)
    report(settings, figures)
    plot(settings, figures)


if __name__ == "__main__":
    main()
