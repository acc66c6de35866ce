"""What the page says, in English and Chinese.

Answers to the texts of the official `web_demo.py`, which are English only.
"""

from common.languages import by_language, in_language_of

WORDS = {  # name -> English, Chinese
    "title": ("Talk to the tuned model", "与微调后的模型对话"),
    "heading": ("# Talk to the tuned model", "# 与微调后的模型对话"),  # in Markdown
    "mode": ("Who answers", "由谁回答"),
    "tuned": ("Tuned", "微调模型"),
    "base": ("Base", "原模型"),
    "both": ("Both", "两者并排"),
    "auto": ("Auto", "自动"),
    "other": ("Ask the other one", "换另一个回答"),
    "checkpoint": ("Checkpoint of the run", "本次训练的检查点"),
    "message": ("Your message", "输入"),
    "placeholder": ("Enter sends, Shift+Enter starts a new line", "回车发送，Shift+回车换行"),
    "submit": ("Submit", "发送"),
    "stop": ("Stop", "停止"),
    "clear": ("New chat", "新对话"),
    "theme": ("Light / dark", "浅色 / 深色"),
    "settings": ("Settings", "设置"),
    "max_length": ("Maximum length of an answer (new tokens)", "回答的最大长度（新生成的 token 数）"),
    "top_p": ("Top P", "Top P"),
    "temperature": ("Temperature (0: always the likeliest)", "温度（0 表示总选最可能的词）"),
    "export": ("Save the conversation", "保存对话"),
    "copy": ("Copy the message", "复制消息"),
    "edit": ("Edit the message", "修改消息"),
    "empty": (
        "Ask something; the answer appears here. The conversation is kept in this browser only.\n\nTry one of these:",
        "在下方输入，回答会显示在这里。对话只保存在本浏览器中。\n\n可以试试：",
    ),
    "empty_base": (
        "The base model, without tuning, is asked the same questions here.",
        "未经微调的原模型会在这里回答同样的问题。",
    ),
    "prefix": ("{model} (prefix of {pre_seq_len})", "{model}（前缀长度 {pre_seq_len}）"),
    "drift": ("drift {drift:.2f}", "偏移 {drift:.2f}"),
    "no_prefix": ("base model, no prefix", "原模型，不带前缀"),
    "chooses": ("each question chooses: {names}", "由每个问题选择：{names}"),
    "chosen": ("chosen by the question, {sure:.0%} sure", "由问题选定，把握 {sure:.0%}"),
    "waiting": ("waiting", "等待中"),
    "ahead": ("waiting, {ahead} before this one", "排队中，前面还有 {ahead} 个"),
    "speed": ("{tokens} tokens, {speed:.1f} tokens/s", "{tokens} 个 token，每秒 {speed:.1f} 个"),
    "end_stop": ("ended by itself", "自然结束"),
    "end_length": ("ended at the maximum length", "达到最大长度"),
    "end_cancelled": ("stopped", "已停止"),
    "end_error": ("failed: {error}", "出错：{error}"),
    "dropped": ("the oldest {count} turns no longer fit and were left out", "历史过长，最早的 {count} 轮未送入模型"),
    "asked_late": ("the oldest {count} turns were not asked again", "最早的 {count} 轮没有重新提问"),
    "busy": ("Too many requests at the moment. Try again in a while.", "当前请求过多，请稍后再试。"),
    "too_long": (
        "This is too long: the model takes {limit} tokens for question and answer together.",
        "内容过长：问题与回答合计最多 {limit} 个 token。",
    ),
    "error": ("Error", "出错"),
    "lost": (
        "The server does not answer. The conversation is kept; this page goes on as soon as the server is back.",
        "服务器没有响应。对话已保留，服务器恢复后本页会自动继续。",
    ),
    "refused": (
        "The server did not take this; it may be too long. Nothing of it was lost.",
        "服务器没有接受该请求，内容可能过长。输入的内容没有丢失。",
    ),
    "saved": ("Saved as a preference.", "已记录为偏好。"),
    "nothing_to_compare": (
        "A thumb compares two answers to one question: choose Both, or retry the answer, and give it then.",
        "赞或踩需要同一问题的两个回答：请选择“两者并排”或重试回答后再评价。",
    ),
    "feedback_full": ("The preference file is full.", "偏好文件已满。"),
    "feedback_failed": ("The preference could not be written.", "偏好无法写入。"),
}
TEXTS = by_language(WORDS)


def said_in(request) -> dict[str, str]:
    """The texts in the language of a visitor's browser."""
    return in_language_of(request, TEXTS)
