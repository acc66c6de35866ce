"""Run the official ptuning/main.py under a clock; started by speed.py with the Python of the official environment.

The scripts are run as they are: their model, tokenizer, preprocessing, Trainer of transformers 4.30.2 and generate(), on
a folder of random weights. Changed from outside: the steps and the batches to answer wait for the commands of speed.py;
answers have a fixed number of new tokens; and on a CPU `.half()` keeps float32, in which the others compute too.
"""

import json
import os
import runpy
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

CODE = ("configuration_chatglm.py", "modeling_chatglm.py", "quantization.py", "tokenization_chatglm.py")


class Clock:
    """Lets `units` of work pass for each command that comes in, then answers with the seconds they took."""

    def __init__(self, units):
        self.units, self.left, self.before = units, 0, None

    def resident(self, name):
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
        return int(line.split()[1]) * 1024

    def unit(self):
        """Called before each step and each batch of answers."""
        if not self.left:
            self.answer()
            if self.before is None:
                self.before = self.resident("VmRSS")
            command = sys.stdin.readline().strip()
            self.left = self.units[command]
            if command == "memory" and not torch.cuda.is_available():
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
            self.started = time.perf_counter()
        self.left -= 1

    def unit_ended(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended = time.perf_counter()

    def answer(self):
        figures = {}
        if self.before is not None:
            extra = self.resident("VmHWM") - self.before
            figures = {"seconds": self.ended - self.started, "extra_bytes": extra}
        print(json.dumps(figures), flush=True)


def write_model(folder, official, tokenizer, sizes, dtype):
    """A base model in the official layout, with random weights."""
    for name in CODE:
        shutil.copy(next(Path(official).rglob(name)), folder)
    for file in Path(tokenizer).glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    config = {
        **sizes,
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "torch_dtype": str(dtype).replace("torch.", ""),
        "eos_token_id": 2,
        "pad_token_id": 0,
        "use_cache": True,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModel.from_config(loaded, trust_remote_code=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02)
        # Their tokenizer has no text for ids from 64,789 on: a logit of 0 is never among the likeliest.
        model.transformer.output_layer.weight[64789:] = 0
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def main():
    official, tokenizer, rows_file, settings = sys.argv[1:]
    settings = json.loads(settings)
    on_gpu = torch.cuda.is_available()
    batch_size, turns = settings["batch_size"], settings["repeats"] + 1
    steps, batches = (-(-settings[name] // batch_size) for name in ("rows", "prompts"))
    clock = Clock({"memory": 1, "train": steps, "answer": batches})

    training_step, generate = transformers.Trainer.training_step, transformers.GenerationMixin.generate

    def timed_step(*args, **kwargs):
        clock.unit()
        return training_step(*args, **kwargs)

    def timed_generate(self, *args, **kwargs):
        clock.unit()
        kwargs.pop("max_length", None)
        answers = generate(self, *args, **kwargs, max_new_tokens=settings["new_tokens"])
        clock.unit_ended()
        return answers

    class StepEnd(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.unit_ended()

    transformers.trainer.DEFAULT_CALLBACKS.append(StepEnd)
    transformers.Trainer.training_step = timed_step
    transformers.GenerationMixin.generate = timed_generate
    if not on_gpu:
        torch.nn.Module.half = torch.nn.Module.float

    scripts = next(Path(official).resolve().rglob("ptuning/main.py")).parent
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = folder / "model"
        model.mkdir()
        write_model(model, official, tokenizer, settings["sizes"], torch.float16 if on_gpu else torch.float32)
        rows = Path(rows_file).read_text(encoding="utf-8").splitlines()
        for name, count in (("train", settings["rows"]), ("dev", settings["prompts"] * turns)):
            (folder / f"{name}.json").write_text("\n".join(rows[:count]), encoding="utf-8")
        flags = {
            "train_file": folder / "train.json", "test_file": folder / "dev.json", "prompt_column": "content",
            "validation_file": folder / "dev.json", "response_column": "summary", "model_name_or_path": model,
            "output_dir": folder / "output", "max_source_length": 64, "max_target_length": 128,
            "per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size,
            "gradient_accumulation_steps": 1, "max_steps": 1 + turns * steps, "logging_steps": 1000,
            "save_strategy": "no", "learning_rate": 2e-2, "pre_seq_len": settings["pre_seq_len"], "report_to": "none",
        }  # fmt: skip
        if settings["quantization_bit"]:
            flags["quantization_bit"] = settings["quantization_bit"]
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        words += [
            "--do_train",
            "--do_predict",
            "--predict_with_generate",
            "--overwrite_cache",
            "--disable_tqdm",
            "True",
        ]
        sys.argv = ["main.py", *words, *([] if on_gpu else ["--no_cuda"])]
        sys.path.insert(0, str(scripts))
        os.chdir(folder)
        runpy.run_path(str(scripts / "main.py"), run_name="__main__")
        clock.answer()


if __name__ == "__main__":
    main()
