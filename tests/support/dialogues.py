"""Dialogues for comparing ChatGLM3's token ids and label masks with the official tokenizer's."""

import random

TEXTS = [
    "你好",
    "今天北京的天气怎么样？\n请简短回答。",
    "Write a poem about the sea.\n\nIn four lines.",
    "<|user|> 这只是文本 <|assistant|>",
    "[gMASK] sop </s> <unk> eop",
    "  前面有两个空格，\t还有制表符  ",
    "def f(x):\n    return x ** 2  # 平方\n",
    "😀🚀 emoji 与 数学 ∑∫√",
    "类型#裙*颜色#蓝色*图案#条纹",
    "\n开头就换行",
    "1,234.56 美元 ≈ 8,900 元",
    "",
    '<|observation|>\n{"temp": 21}',
    "```python\ntool_call(symbol='10111')\n```",
    "Ünïcödé naïve café — “quotes” …",
    "한국어와 日本語を混ぜる",
]
ANSWERED = "好的，\n这是回答。"  # to each, for training
METADATA = ["", "", "", "get_weather", "interpreter", "查询 股票"]
TOOLS = [
    {"name": "track", "description": "追踪指定股票的实时价格", "parameters": {"type": "object", "required": []}},
    {"name": "get_weather", "parameters": {"city": {"type": "string"}}},
]


def dialogues():
    """240 of (question, history of official messages, role of the question), the same each time."""
    chance = random.Random(21)
    found = []
    for number in range(240):
        history = []
        if chance.random() < 0.5:
            system = {"role": "system", "content": chance.choice(TEXTS)}
            if chance.random() < 0.5:
                system["tools"] = TOOLS[: chance.randint(1, 2)]
            history.append(system)
        for _ in range(chance.randint(0, 3)):
            history.append({"role": chance.choice(["user", "user", "observation"]), "content": chance.choice(TEXTS)})
            answer = {"role": "assistant", "content": chance.choice(TEXTS)}
            if metadata := chance.choice(METADATA):
                answer["metadata"] = metadata
            history.append(answer)
        role = "observation" if number % 5 == 4 else "user"
        found.append((chance.choice(TEXTS) or "问", history, role))
    return found
