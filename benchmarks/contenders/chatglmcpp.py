"""li-plus/chatglm.cpp through its Python package: it answers, one prompt at a time, with float32 weights and no prefix."""

import tempfile
from types import SimpleNamespace

import torch
from benchmarks.contenders.base import ROOT, SIZES, Contender, read_data
from chatglm_cpp._C import GenerationConfig, Pipeline
from chatglm_cpp.convert import ChatGLM2Converter, GGMLType


def open_in_chatglm_cpp(model, kind):
    """What chatglm.cpp makes of a model of ours; its weights of `kind`, a name of GGMLType."""
    model.config.pre_seq_len = None
    proto = (ROOT / "ptuning" / "tiny" / "tokenizer.model").read_bytes()
    sentencepiece = SimpleNamespace(serialized_model_proto=lambda: proto)
    tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(sp_model=sentencepiece))
    with tempfile.NamedTemporaryFile(suffix=".ggml") as file:
        ChatGLM2Converter.convert(file, model, tokenizer, GGMLType[kind])
        file.flush()
        return Pipeline(file.name)


def next_tokens(pipeline, prompt, count):
    """Yield `count` token ids that follow `prompt` (token ids), greedily."""
    settings, ids, known = GenerationConfig(do_sample=False), list(prompt), 0
    for _ in range(count):
        token_id = pipeline.model.generate_next_token(ids, None, settings, known, len(prompt) + count)
        known = len(ids)
        ids.append(token_id)
        yield token_id


class Chatglmcpp(Contender):
    def __init__(self, settings):  # without an optimizer: it does not train
        torch.manual_seed(0)
        self.settings, self.data = settings, read_data(settings)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.sizes = SIZES[settings.size]
        self.model = torch.nn.Identity()
        self.pipeline = open_in_chatglm_cpp(self.chatglm(), "F32")

    def generate(self, prompts):
        return [list(next_tokens(self.pipeline, prompt, self.settings.new_tokens)) for prompt in prompts]
