"""The small ChatGLM-6B of the first generation that the official code was run on, and what it was given."""

import json
import shutil
from pathlib import Path

import torch

# In the format of ice_text.model, with few pieces and without the table of normalization.
SMALL_VOCABULARY = Path(__file__).parents[1] / "chatglm1.ice_text.model"
CONFIG = {
    "model_type": "chatglm",
    "vocab_size": 300,
    "hidden_size": 64,
    "inner_hidden_size": 160,
    "num_layers": 3,
    "num_attention_heads": 4,
    "max_sequence_length": 256,
    "layernorm_epsilon": 1e-5,
    "position_encoding_2d": True,
    "mask_token_id": 250,
    "gmask_token_id": 251,
    "bos_token_id": 252,
    "eos_token_id": 253,
    "pad_token_id": 3,
    "use_cache": True,
}
PREFIX, STEPS, STEP_SIZE = 5, 12, 0.01
MASK, GMASK, SOP, EOP = (CONFIG[name] for name in ("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id"))


def numbers(seed, count):
    """Token ids of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 250, (count,), generator=generator).tolist()


PADDED_PROMPTS = [[*numbers(seed, count), GMASK, SOP] for seed, count in ((1, 9), (2, 4), (3, 13))]


def training_batch(seed=0):
    """Three rows of prompt and answer, padded on the right; `<sop>`, the answer and `<eop>` are supervised."""
    rows, labels = [], []
    for number, (prompt, answer) in enumerate(((7, 9), (12, 6), (3, 11))):
        context, target = (
            [*numbers(10 * seed + number + 100, prompt), GMASK],
            [SOP, *numbers(10 * seed + number, answer), EOP],
        )
        missing = 22 - len(context) - len(target)
        rows.append(context + target + [CONFIG["pad_token_id"]] * missing)
        labels.append([-100] * len(context) + target + [-100] * missing)
    return torch.tensor(rows), torch.tensor(labels)


TEXTS = [
    "你好",
    "晚上睡不着应该怎么办",
    "类型#裤*版型#宽松*风格#性感*图案#线条*裤型#阔腿裤",
    "[Round 0]\n问：你好\n答：你好👋！我是人工智能助手。\n[Round 1]\n问：再见\n答：",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1,  2))",
    "a" + " " * 85 + "b\t\tc" + " " * 80 + "d   e  f",
    " leading and trailing ",
    "Hello , world ! It 's fine . Don 't do n't worry ?",
    "𠮷野家 \u200b emoji 😀 é ü ¥ \x07",
    "１２３ＡＢＣ，。！ 全角与half",
    "<n>and<|tab|>written<|blank_3|>out",
    "",
]


def left_padded(prompts):
    """input_ids, attention_mask and position_ids of prompts, as the tokenizer pads them."""
    length = max(map(len, prompts))
    missing = [length - len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(
            [[CONFIG["pad_token_id"]] * pad + row for pad, row in zip(missing, prompts, strict=True)]
        ),
        "attention_mask": torch.tensor([[0] * pad + [1] * (length - pad) for pad in missing]),
        "position_ids": torch.tensor([[0] * pad + [*range(length - pad)] for pad in missing]),
    }


# Of the small vocabulary: a model that the programs can train.
FOLDER_CONFIG = {
    **CONFIG,
    "vocab_size": 512,
    "num_layers": 2,
    "max_sequence_length": 512,
    "mask_token_id": 4,
    "gmask_token_id": 5,
    "bos_token_id": 8,
    "eos_token_id": 9,
    "torch_dtype": "float32",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
}


def write_folder(folder, **settings):
    """A base model's folder as the hub serves it: config.json, ice_text.model, tokenizer_config.json and one weight file."""
    from chatglm1.configuration_chatglm import ChatGLMConfig
    from chatglm1.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm1.weight_names import computed_names, official_name

    folder.mkdir(parents=True, exist_ok=True)
    config = {**FOLDER_CONFIG, **settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(SMALL_VOCABULARY, folder / "ice_text.model")
    tokenizer = {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0, "name_or_path": "THUDM/chatglm-6b"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(0)
    weights = ChatGLMForConditionalGeneration(ChatGLMConfig(**config)).state_dict()
    weights = {official_name(name): tensor for name, tensor in weights.items()}
    weights.update(dict.fromkeys(computed_names(config["num_layers"]), torch.ones(4).half()))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder
