"""What was said so far, in the two forms that there are: (question, answer) pairs, or messages of a role.

Answers to the `history` of the official `chat`, which are pairs; messages are those of a data file and of the API.
"""

from common.messages import cut_short

ROLES = ("system", "user", "assistant")
EXPECTED = (
    'expected a list of (question, answer) pairs, such as [("你好", "你好！")], or of messages, such as '
    '[{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]'
)


def conversation(messages: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
    """(question, history) of (role, text) messages, for build_prompt.

    ChatGLM2 knows questions and answers only: system messages stand before the question they precede, and
    messages of one side in a row become one. ValueError unless a user has the last word.
    """
    history, pending = [], []  # texts are joined once, at the end: a stranger may send very many
    for role, text in messages:
        if role != "assistant":
            pending.append(text)
        elif pending or not history:
            history.append((pending, [text]))
            pending = []
        else:
            history[-1][1].append(text)
    if messages[-1][0] != "user":
        raise ValueError(f"The last message is of role {messages[-1][0]!r}; expected 'user', whom the model answers.")
    return "\n".join(pending), [("\n".join(questions), "\n".join(answers)) for questions, answers in history]


def read_history(query, history) -> tuple[str, list[tuple[str, str]]]:
    """(question, pairs) of a question and what was said before it, in either form. ValueError for anything else."""
    if not isinstance(query, str):
        raise ValueError(f"The question is {cut_short(repr(query))}, expected one text.")
    if history is None:
        return query, []
    if not isinstance(history, list | tuple):
        raise ValueError(f"history is {cut_short(repr(history))}, {EXPECTED}.")
    if any(isinstance(turn, dict) for turn in history):
        messages = [read_message(message, position) for position, message in enumerate(history, start=1)]
        return conversation([*messages, ("user", query)])
    for position, turn in enumerate(history, start=1):
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"history, turn {position}: found {cut_short(repr(turn))}, {EXPECTED}.")
    return query, [tuple(turn) for turn in history]


def read_content(content, place):
    """The text of a message's content, which may be OpenAI's list of texts. ValueError for what is none."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: the content is {cut_short(repr(content))}, expected text")
    return "".join(texts)


def read_message(message, position):
    """(role, text) of one message. ValueError, with its number, for what is none."""
    place = f"history, turn {position}"
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        keys = f"an object of {', '.join(map(str, message)) or 'nothing'}" if isinstance(message, dict) else None
        found = keys or cut_short(repr(message))
        raise ValueError(f"{place}: expected an object of role and content, found {found}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{place}: the role is {cut_short(repr(role))}, expected {' or '.join(map(repr, ROLES))}")
    return role, read_content(content, place)


def continued(history, query, response):
    """`history` with the new turn, in the form that it has."""
    history = list(history or [])
    if history and isinstance(history[0], dict):
        return [*history, {"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return [*history, (query, response)]
