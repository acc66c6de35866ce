"""Chat servers of the small model."""

import argparse
import json
import time

import torch
from conftest import SAMPLE, TINY

from arguments import add_model_arguments
from checkpoint import load_model, load_tokenizer, read_config, save_prefix
from serving.loading import load_server
from serving.server import ChatServer, Sampling
from tuning.methods import prepare_model, save_trained
from tuning.signature import fit_signature, prompt_means, write_signature

GREEDY = Sampling(max_new_tokens=24, temperature=0)
QUERIES = ["类型#裙*颜色#白色", "类型#上衣*风格#简约*图案#刺绣", "你好", "类型#锅*功能#聚热*颜色#黑色*人群#上班族"]


class SlowServer(ChatServer):
    """A server whose answers can be made slow, endless, or any text."""

    delay, endless, script = 0.0, False, None

    def _feed(self, *inputs):
        time.sleep(self.delay)
        logits = super()._feed(*inputs)
        if self.endless:
            logits[:, self.model.config.eos_token_id] = -torch.inf
        return logits

    def _accept(self, row):
        if self.script is None:
            return super()._accept(row)
        row.answer.text, row.answer.response_ids = self.script, [5]
        return "stop"


def make_run(folder, lengths=(4, 4, 6)):
    """A run with checkpoint-10, -20, …: untrained prefixes of these lengths."""
    for number, length in enumerate(lengths, start=1):
        torch.manual_seed(number)
        model = load_model(TINY, config=read_config(TINY, pre_seq_len=length))
        save_prefix(model, folder / f"checkpoint-{10 * number}", {"base_model": str(TINY)})
    return folder


def make_adapter(folder):
    """A LoRA adapter that changes answers, with a signature."""
    model = load_model(TINY)
    prepare_model(model, "lora", do_train=True)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.uniform_(-0.3, 0.3)
    save_trained(model, folder, {"base_model": str(TINY), "finetuning_type": "lora"})
    return sign(folder)


def open_server(*words, server_class=None):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    server = load_server(parser.parse_args([str(word) for word in words]), say=lambda line: None)
    if server_class:
        server.close()
        opened = server_class(
            server.model,
            server.tokenizer,
            server.checkpoints(),
            default=server.default,
            max_batch=server.max_batch,
            max_queue=server.max_queue,
            max_sessions=server.max_sessions,
        )
        opened.name, opened.run_folder, opened.candidates = server.name, server.run_folder, server.candidates
        return opened
    return server


def finish(server, query, history=(), **how):
    how.setdefault("sampling", GREEDY)
    *_, answer = server.stream(server.encode(query, history), **how)
    return answer


def remember(checkpoint, **settings):
    """Add to what a checkpoint's sidecar says."""
    file = checkpoint / "ptuning.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def sign(checkpoint, prompts=None):
    """Give a checkpoint the signature of prompts, by default of the sample's adverts."""
    model = load_model(TINY)
    tokenizer = load_tokenizer(TINY, model.config)
    if prompts is None:
        rows = (SAMPLE / "train.json").read_text("utf-8").splitlines()[::12]
        prompts = [json.loads(row)["content"] for row in rows]
    token_ids = [tokenizer.encode(tokenizer.build_prompt(prompt)) for prompt in prompts]
    write_signature(fit_signature(prompt_means(model, token_ids)), checkpoint)
    return checkpoint
