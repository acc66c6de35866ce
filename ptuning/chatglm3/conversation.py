"""What was said so far, as ChatGLM3 knows it: messages of a role, with metadata and tools.

Answers to the `history` of the official `chat` of ChatGLM3-6B. It differs in that (question, answer) pairs are taken, too,
that a call of a tool is read without running it, and that what is none of these is one error.
"""

import ast
import json

from chatglm2.conversation import read_content
from common.messages import cut_short

ROLES = ("system", "user", "assistant", "observation")
OTHER_NAMES = {"tool": "observation", "function": "observation", "developer": "system"}
# What stands before the tools that a data file has beside its messages; the model was trained with it.
TOOL_PROMPT = {
    "role": "system",
    "content": "Answer the following questions as best as you can. You have access to the following tools:",
}
CALL = "tool_call"  # the function that the model writes down for a call


def read_messages(history) -> list[tuple[str, str, str]]:
    """(role, metadata, content) of each message of a history.

    `history` are messages, objects of role and content as officially or lists of the three texts, or (question, answer)
    pairs. ValueError, with its number, for what is none.
    """
    messages = []
    for position, turn in enumerate(history or (), start=1):
        if isinstance(turn, dict):
            messages.append(read_message(turn, f"history, turn {position}"))
        elif isinstance(turn, list | tuple) and len(turn) in (2, 3) and all(isinstance(text, str) for text in turn):
            pair = [("user", "", turn[0]), ("assistant", "", turn[-1])]
            messages += pair if len(turn) == 2 else [tuple(turn)]
        else:
            raise ValueError(
                f"history, turn {position}: found {cut_short(repr(turn))}, expected a message such as "
                '{"role": "user", "content": "你好"}, or a (question, answer) pair.'
            )
    return messages


def read_message(message: dict, place: str) -> tuple[str, str, str]:
    """(role, metadata, content) of one message; tools stand behind the text of a system message. ValueError at `place`.

    An assistant's `tool_calls`, as OpenAI writes them, become the metadata and content that ChatGLM3 writes for a call.
    """
    role = message.get("role")
    role = OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(
            f"{place}: the role is {cut_short(repr(message.get('role')))}, expected {', '.join(map(repr, ROLES))}"
        )
    metadata, content = message.get("metadata") or "", message.get("content")
    if calls := role == "assistant" and message.get("tool_calls"):
        metadata, content = call_as_text(calls, place)
    if isinstance(content, dict):  # an answer of the official chat that calls a tool
        content = json.dumps(content, ensure_ascii=False)
    content = read_content(content, place)
    if not isinstance(metadata, str):
        raise ValueError(f"{place}: the metadata is {cut_short(repr(metadata))}, expected text")
    if role == "system" and "tools" in message:
        content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return role, metadata, content


def call_as_text(calls, place):
    """(name of the tool, text of the call) of OpenAI's tool_calls, of which ChatGLM3 makes one at a time."""
    try:
        (call,) = calls
        function = call["function"]
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        return str(function["name"]), f"```python\n{CALL}({text})\n```"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{place}: tool_calls is {cut_short(repr(calls))}, expected one call, such as [{{"function": {{"name": '
            '"weather", "arguments": {"city": "北京"}}}]'
        ) from error


def read_used_tool(message: dict, place: str) -> list[dict]:
    """The call of a tool and what it gave, as two messages, of one in the data of ChatGLM3's own fine-tuning:
    {"role": "tool", "name": …, "parameters": {…}, "observation": …}.
    """
    function = {"name": message.get("name"), "arguments": message.get("parameters")}
    result = message["observation"]
    result = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    name, content = call_as_text([{"function": function}], place)
    call = {"role": "assistant", "metadata": name, "content": content}
    return [call, {"role": "observation", "content": result}]


def split_answer(text: str) -> tuple[str, str]:
    """(metadata, content) of an answer: its first line names a tool, or is empty."""
    metadata, found, content = text.partition("\n")
    return (metadata, content) if found else ("", text)


def read_call(content: str) -> dict | None:
    """The arguments of the call in a fenced block; None where there is none. The code is read, never run."""
    lines = content.strip().split("\n")
    try:
        call = ast.parse("\n".join(lines[1:-1]).strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        return {argument.arg: ast.literal_eval(argument.value) for argument in call.keywords}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
