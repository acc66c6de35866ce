"""What contenders have in common: sizes, rows, what must be computed for them, and the base class.

The module needs no torch, so that `python -m benchmarks.speed --help` does not wait for it.
"""

from pathlib import Path

from benchmarks.contenders import BFLOAT16

ROOT = Path(__file__).resolve().parents[2]
SIZES = {  # small: every width of the 6b divided by eight
    "6b": {
        "num_layers": 28,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "kv_channels": 128,
        "num_attention_heads": 32,
    },
    "small": {
        "num_layers": 6,
        "hidden_size": 512,
        "ffn_hidden_size": 1712,
        "kv_channels": 64,
        "num_attention_heads": 8,
    },
    "tiny": {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 428, "kv_channels": 32, "num_attention_heads": 4},
}
COMMON = {
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": 65024,
    "seq_length": 32768,
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
}
MAX_SOURCE, MAX_TARGET = 64, 128
LEARNING_RATE = 2e-2


# ---- rows and what must be computed for them


def find_data():
    """(tokenizer folder, training file): ADGEN and the real vocabulary where they are at hand, else the sample's."""
    shared = ROOT.parent / "shared"
    files = (ROOT / "AdvertiseGen" / "train.json", shared / "AdvertiseGen" / "train.json")
    file = next((file for file in files if file.is_file()), ROOT / "AdvertiseGen" / "sample" / "train.json")
    tokenizer = shared / "chatglm2-tokenizer"
    return (tokenizer if tokenizer.is_dir() else ROOT / "ptuning" / "tiny"), file


def read_examples(count):
    """(tokenizer, the first rows of the training file as read from it)."""
    from chatglm2.configuration_chatglm import ChatGLMConfig
    from checkpoint import load_tokenizer
    from data.examples import load_examples

    folder, file = find_data()
    tokenizer = load_tokenizer(folder, ChatGLMConfig(**COMMON, **SIZES["tiny"]))
    return tokenizer, load_examples(str(file), "content", "summary", max_samples=count)[0]


def read_data(settings):
    """{"rows": encoded training rows, "prompts": token ids of prompts of one length}."""
    from data.encoding import encode_prediction, encode_training

    tokenizer, examples = read_examples(max(2000, settings.rows))
    lengths = {"max_source_length": MAX_SOURCE, "max_target_length": MAX_TARGET}
    encoded = encode_training(examples.select(range(settings.rows)), tokenizer, **lengths)
    prompts = encode_prediction(examples, tokenizer, **lengths)["input_ids"][:]
    by_length = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(prompt)
    return {
        "rows": [{name: encoded[index][name] for name in ("input_ids", "labels")} for index in range(settings.rows)],
        "prompts": max(by_length.values(), key=len)[: settings.prompts],
    }


def long_row(tokens):
    """A row of so many tokens, the later half supervised."""
    ids = [100 + index % 1000 for index in range(tokens + 1)]
    return {"input_ids": ids, "labels": [-100] * (tokens // 2 + 1) + ids[tokens // 2 + 1 :]}


def supervised_count(row):
    return sum(label != -100 for label in row["labels"])


def minimal_operations(sizes, rows, prefix_length):
    """Floating-point operations that prefix tuning of a frozen model cannot do without, for one pass over the rows.

    A product of (m, k) and (k, n) counts 2 m k n. The tokens of a row are those up to the last that predicts a label.
    Forward and the gradient of the input of every linear layer, but for the first projection, below which nothing
    trains; attention's two products over the keys that a query sees, and their four gradients; the output layer,
    forward and backward, for supervised positions. Norms, softmax and the like are not counted.
    """
    hidden, layers = sizes["hidden_size"], sizes["num_layers"]
    width = sizes["num_attention_heads"] * sizes["kv_channels"]
    mixed = width + 2 * COMMON["multi_query_group_num"] * sizes["kv_channels"]
    linear = hidden * mixed + width * hidden + 3 * hidden * sizes["ffn_hidden_size"]
    operations = 0
    for row in rows:
        tokens, supervised = len(row["input_ids"]) - 1, supervised_count(row)
        pairs = tokens * prefix_length + tokens * (tokens + 1) // 2
        operations += 4 * tokens * linear * layers - 2 * tokens * hidden * mixed
        operations += 3 * 4 * pairs * width * layers
        operations += 4 * supervised * hidden * COMMON["padded_vocab_size"]
    return operations


def decode_bytes(sizes, prefix_length, prompt_length, new_tokens, num_rows, element):
    """Bytes that decoding reads, over all steps: the weights once a step, and keys and values of every row."""
    hidden, group_width = sizes["hidden_size"], 2 * COMMON["multi_query_group_num"] * sizes["kv_channels"]
    width = sizes["num_attention_heads"] * sizes["kv_channels"]
    block = hidden * (width + group_width) + width * hidden + 3 * hidden * sizes["ffn_hidden_size"]
    weights = block * sizes["num_layers"] + hidden * COMMON["padded_vocab_size"]
    slots = sum(prefix_length + prompt_length + step for step in range(new_tokens))
    return element * (weights * new_tokens + slots * group_width * sizes["num_layers"] * num_rows)


# ---- the base class


class Contender:
    """What the others have in common: an optimizer, a pass over the rows, figures of time and memory."""

    def __init__(self, settings):
        import torch

        torch.manual_seed(0)
        self.settings, self.sizes = settings, SIZES[settings.size]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" or settings.worker == BFLOAT16 else torch.float32
        self.data = read_data(settings)
        self.build()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=self.fused)

    fused = True

    def chatglm(self):
        import torch

        from chatglm2.configuration_chatglm import ChatGLMConfig
        from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
        from chatglm2.quantization import quantize_model_

        config = ChatGLMConfig(**COMMON, **self.sizes, pre_seq_len=self.settings.pre_seq_len)
        with torch.device(self.device):
            torch.set_default_dtype(self.dtype)
            model = ChatGLMForConditionalGeneration(config)
            torch.set_default_dtype(torch.float32)
        model.requires_grad_(False).transformer.prefix_encoder.float().requires_grad_(True)
        if self.settings.quantization_bit:
            quantize_model_(model, self.settings.quantization_bit)
        return model

    def batches(self, rows, size=None):
        size = size or self.settings.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def train(self, rows):
        """One step for each batch of the rows."""
        import torch

        self.model.train()
        for batch in self.batches(rows):
            self.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def answer(self, batch_size=None):
        import torch

        self.model.eval()
        with torch.inference_mode():
            for prompts in self.batches(self.data["prompts"], batch_size):
                answers = self.generate(prompts)
                assert all(len(answer) == self.settings.new_tokens for answer in answers)
