"""Log-probabilities of an answer's tokens, and their form in OpenAI's answers.

Answers to nothing in the official `openai_api.py`. They are the model's own, in float32 over all tokens: neither
temperature nor top_p changes them.
"""

import re

import torch

LEAST = -9999.0  # for a token that cannot come: JSON has no infinity


def log_probabilities(logits: torch.Tensor, token_ids: list[int], num_likeliest: int) -> list[tuple[float, list]]:
    """(log-probability of its token, [(token id, log-probability), …] of the likeliest) for each row of logits (S, V)."""
    rows = logits.float().log_softmax(-1).clamp(min=LEAST)
    chosen = rows.gather(1, torch.tensor(token_ids, device=rows.device)[:, None])[:, 0].tolist()
    values, likeliest = rows.topk(min(num_likeliest, rows.shape[1]))
    pairs = zip(likeliest.tolist(), values.tolist(), strict=True)
    return [(value, list(zip(*pair, strict=True))) for value, pair in zip(chosen, pairs, strict=True)]


def token_bytes(tokenizer, token_id: int) -> bytes:
    """What a token adds to the text; the name of one without text."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def token_name(tokenizer, token_id: int) -> str:
    """A token as completions of OpenAI's spell it: its text, or its bytes where they are no text."""
    raw = token_bytes(tokenizer, token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_entries(tokenizer, token_ids, found) -> list[dict]:
    """`logprobs.content` of a chat completion, from what log_probabilities() found."""

    def entry(token_id, value):
        raw = token_bytes(tokenizer, token_id)
        return {"token": raw.decode(errors="replace"), "logprob": value, "bytes": list(raw)}

    return [
        {**entry(token_id, value), "top_logprobs": [entry(*pair) for pair in likeliest]}
        for token_id, (value, likeliest) in zip(token_ids, found, strict=True)
    ]
