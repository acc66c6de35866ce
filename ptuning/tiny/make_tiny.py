"""Make the small model in this folder: text of our own, a SentencePiece vocabulary, pretraining from scratch.

    cd ptuning && python -m tiny.make_tiny    # 12 to 18 minutes on one CPU core; ends at a loss near 0.46

Answers to no official file: it gives a fresh clone a model in the official ChatGLM2 folder format, so that every
script runs without a download. The model learns to answer bare ADGEN attributes with a plain list ("类型是裙，
颜色是白色。"), and to write advertising copy when told to in words or as text without a prompt. Prefix tuning on
AdvertiseGen/sample then has something real to learn: another answer to the same prompt, in a language the model
has. Neither the attribute line nor the copy of a sample row ever occurs in the pretraining text.
"""

import argparse
import io
import json
import random
import string
import time
from pathlib import Path

import sentencepiece
import torch

from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from tiny.make_sample import KINDS, POOLS, Product, draw_row, sample_rows

FOLDER = Path(__file__).resolve().parent
SEED = 7
PIECES = 2000
TOKENIZER_TEXTS = 20_000
STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 5000, 16, 4e-3, 100
BUCKET = 4  # batches that are drawn together and sorted by length, so that little is padding

CONFIG = {
    "_name_or_path": "tiny",
    "model_type": "chatglm",
    "model_family": "chatglm2",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 384,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 128,
    "kv_channels": 32,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": 2048,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 1024,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENIZER_CONFIG = {
    "name_or_path": "tiny",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}

# ---------------------------------------------------------------------------------------------------------------
# Text. A document is (history, query, answer); a query of None means text without a prompt.

ADVERT_REQUESTS = (
    "请为下面的商品写一段广告：{}",
    "写广告：{}",
    "商品属性：{}\n请根据这些属性写一段推荐语。",
    "帮我夸一夸这件商品：{}",
    "用优美的句子介绍它：{}",
    "{}\n请写成广告文案。",
    "我想把它卖出去，怎么写：{}",
    "广告文案：{}",
)
REWRITE_REQUESTS = ("请写成广告。", "再写一段广告。", "改成广告文案")
TITLE_REQUESTS = ("请给商品起一个标题：{}", "{}\n请写一个短标题。", "标题：{}")
LIST_REQUESTS = ("{}", "{}", "{}", "{}", "{}", "{}", "请列出属性：{}", "{}\n这件商品有哪些属性？")
NOTATION_REQUESTS = ("请把这段话里的属性找出来：{}", "{}\n这段话说了哪些属性？")
DESCRIPTION_OPENINGS = ("这是一{measure}{noun}。", "商品说明：一{measure}{noun}。", "我有一{measure}{noun}。")
SMALL_TALK = (
    (
        ("你好", "您好", "你好！", "嗨", "早上好", "晚上好", "hello", "hi"),
        ("你好，很高兴见到你。有什么可以帮你？", "你好！想聊点什么？"),
    ),
    (
        ("你是谁？", "你叫什么名字？", "介绍一下你自己", "who are you"),
        ("我是一个很小的语言模型，只会写商品文案和简单聊天。", "我叫 tiny，是一个随程序附带的小模型。"),
    ),
    (
        ("你会做什么？", "你能做什么", "有什么功能？"),
        ("我会列出商品的属性，也会写广告和标题。", "把商品属性告诉我，我可以列清单，也可以写广告。"),
    ),
    (("谢谢", "谢谢你", "多谢！", "thanks"), ("不客气。", "不用谢，很高兴帮到你。")),
    (("再见", "拜拜", "晚安", "bye"), ("再见，祝你一切顺利。", "再见，欢迎再来。")),
    (
        ("今天天气怎么样？", "现在几点了？", "今天星期几"),
        ("抱歉，我看不到外面的世界，不知道这件事。", "这个我不知道，我没有连上网络。"),
    ),
    (
        ("你喜欢什么颜色？", "你喜欢吃什么？", "你有朋友吗"),
        ("我是程序，没有自己的喜好，不过我愿意听你说。", "我只是一个小模型，没有这样的感受。"),
    ),
    (
        ("讲个故事", "讲个笑话吧", "写一首诗"),
        ("从前有一只杯子，它每天装满热水，暖了很多人的手。", "我太小了，只会讲商品的故事。"),
    ),
)


def list_attributes(product: Product) -> str:
    """The plain answer: 类型是裙，颜色是白色。"""
    return "，".join(f"{key}是{value}" for key, value in product.pairs()) + "。"


def noun_of(product: Product) -> str:
    return product.form or KINDS[product.kind].nouns[0]


def write_title(product: Product) -> str:
    """The values that can stand before a noun, and the noun: 白色简约风百褶裙."""
    modifiers = [POOLS[pool].modifier.format(v=value) for pool, value in product.attributes]
    return "".join(modifiers) + noun_of(product)


def write_description(product: Product, rng: random.Random) -> str:
    """Plain sentences that name attributes one by one and praise nothing."""
    opening = rng.choice(DESCRIPTION_OPENINGS).format(measure=KINDS[product.kind].measure, noun=noun_of(product))
    facts = [f"它的{POOLS[pool].key}是{value}" for pool, value in product.attributes]
    return opening + "，".join(facts) + "。"


def count_up(rng: random.Random) -> tuple[list, str, str]:
    """A request with digits in it: counting from one number to another."""
    start = rng.randrange(1, 90)
    end = start + rng.randrange(2, 9)
    return [], f"请从{start}数到{end}", "、".join(str(number) for number in range(start, end + 1)) + "。"


def ask_attribute(product: Product, rng: random.Random) -> tuple[list, str, str]:
    """A short question about one attribute, in one turn or after the list of all."""
    key, value = rng.choice(product.pairs())
    if rng.random() < 0.5:
        return [], f"{product.content()}\n它的{key}是什么？", f"{key}是{value}。"
    return [(product.content(), list_attributes(product))], f"它的{key}是什么？", f"{key}是{value}。"


def small_talk(rng: random.Random) -> tuple[list, str, str]:
    """One to three turns of greeting."""
    turns = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        questions, answers = rng.choice(SMALL_TALK)
        turns.append((rng.choice(questions), rng.choice(answers)))
    return turns[:-1], *turns[-1]


def draw_document(rng: random.Random, product: Product, advert: str) -> tuple[list, str | None, str]:
    """One document of the pretraining text; the weights say how common each style is."""
    style = rng.choices(
        ("list", "advert", "plain advert", "title", "notation", "description", "question", "rewrite", "talk", "count"),
        (24, 32, 10, 8, 5, 4, 6, 4, 6, 3),
    )[0]
    return in_style(style, rng, product, advert, LIST_REQUESTS)


def in_style(style: str, rng: random.Random, product: Product, advert: str, list_requests: tuple[str, ...]):
    """(history, query, answer) of a document in one of draw_document's styles."""
    content = product.content()
    if style == "list":
        return [], rng.choice(list_requests).format(content), list_attributes(product)
    if style == "advert":
        return [], rng.choice(ADVERT_REQUESTS).format(content), advert
    if style == "plain advert":
        return [], None, advert
    if style == "title":
        return [], rng.choice(TITLE_REQUESTS).format(content), write_title(product)
    if style == "notation":
        return [], rng.choice(NOTATION_REQUESTS).format(advert), content
    if style == "description":
        return [], None, write_description(product, rng)
    if style == "question":
        return ask_attribute(product, rng)
    if style == "rewrite":
        return [(content, list_attributes(product))], rng.choice(REWRITE_REQUESTS), advert
    return small_talk(rng) if style == "talk" else count_up(rng)


def documents(rng: random.Random):
    """Endless pretraining documents; what belongs to a sample row is passed over."""
    rows = sample_rows()
    contents, summaries = {row["content"] for row in rows}, {row["summary"] for row in rows}
    while True:
        product, advert = draw_row(rng)
        if product.content() not in contents and advert not in summaries:
            yield draw_document(rng, product, advert)


# ---------------------------------------------------------------------------------------------------------------
# Vocabulary: the settings of ChatGLM2's tokenizer.model (BPE, identity normalization, byte fallback), fewer pieces.


def tokenizer_texts(rng: random.Random):
    """Lines to learn pieces from; newlines stay bytes, as in the official vocabulary."""
    for _, (history, query, answer) in zip(range(TOKENIZER_TEXTS), documents(rng), strict=False):
        turns = [text for turn in history for text in turn]
        for text in (*turns, query or "", answer):
            yield from filter(None, text.split("\n"))
        yield from ("[Round 1]", "问：", "答：")


def train_tokenizer(folder: Path) -> ChatGLMTokenizer:
    """Write tokenizer.model and tokenizer_config.json."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_texts(random.Random(SEED)),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        max_sentencepiece_length=6,
        required_chars=string.printable.strip() + "，。！？、：；（）《》“”…·",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    return ChatGLMTokenizer.from_pretrained(str(folder))


# ---------------------------------------------------------------------------------------------------------------
# Pretraining


def encode_document(tokenizer: ChatGLMTokenizer, document: tuple) -> tuple[list[int], list[int]]:
    """Token ids as in fine-tuning ([gMASK] sop prompt answer eos) and labels: the prompt is not supervised."""
    history, query, answer = document
    prompt = tokenizer.prefix_tokens if query is None else tokenizer.encode(tokenizer.build_prompt(query, history))
    response = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return prompt + response, [-100] * len(prompt) + response


def batches(tokenizer: ChatGLMTokenizer, rng: random.Random):
    """Endless batches of right-padded (input_ids, labels), each (B, S) int64, rows of similar length together."""
    source = documents(rng)
    while True:
        rows = [encode_document(tokenizer, next(source)) for _ in range(BUCKET * BATCH_SIZE)]
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            part = rows[start : start + BATCH_SIZE]
            length = len(part[-1][0])
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in part]),
                torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in part]),
            )


def pretrain(tokenizer: ChatGLMTokenizer, steps: int) -> ChatGLMForConditionalGeneration:
    """Train all parameters from scratch in float32; prints the loss every 100 steps."""
    torch.manual_seed(SEED)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**CONFIG)).float().train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {steps} steps of {BATCH_SIZE} documents", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.3, WARMUP_STEPS / steps), cycle_momentum=False
    )
    source = batches(tokenizer, random.Random(SEED + 1))
    losses, start = [], time.monotonic()
    for step in range(1, steps + 1):
        input_ids, labels = next(source)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {sum(losses) / len(losses):.3f}, {time.monotonic() - start:.0f} s", flush=True)
            losses = []
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------
# Files in the official layout


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def save_model(model: ChatGLMForConditionalGeneration, folder: Path) -> None:
    """Write config.json and the float16 weights: two shards and an index, as the hub serves the 6B in seven."""
    write_json(folder / "config.json", CONFIG)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    total = sum(tensor.nbytes for tensor in weights.values())
    shards, written = ({}, {}), 0
    for name, tensor in weights.items():
        shards[int(written >= total / 2)][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensor.clone() for name, tensor in shard.items()}, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the tiny ChatGLM2 model from scratch.")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(arguments.output_dir)
    save_model(pretrain(tokenizer, arguments.steps), arguments.output_dir)


if __name__ == "__main__":
    main()
