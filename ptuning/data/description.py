"""What the user sees of the training rows before the first step.

Answers to `print_dataset_example` of the official `main.py`. It differs in that lengths, and what is cut, are told too.
"""

from itertools import groupby

from common.messages import cut_short


def _length_line(name: str, lengths, limit: int) -> str:
    import numpy

    lengths = numpy.asarray(lengths)
    figures = [int(numpy.percentile(lengths, share, method="higher")) for share in (50, 90, 99)]
    columns = [*figures, int(lengths.max()), limit]
    return f"  {name:<10}" + "".join(f"{figure:>8,}" for figure in columns) + f"{(lengths > limit).mean():>10.1%}"


def _marked_prompt(ids, labels, tokenizer):
    """The text of a prompt, what is learned of it (--train_on_history) between ⟦ and ⟧."""
    if tokenizer.keeps_roles:  # the token behind an answer is learned where it stands
        known = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[0] == pair[1])
        parts = [(learned, tokenizer.show([token for token, _ in pairs])) for learned, pairs in known]
        return "".join(f"⟦{text}⟧" if learned else text for learned, text in parts)
    ends = [place for place, label in enumerate(labels) if label == tokenizer.eos_token_id != ids[place]]
    text, done = "", 0
    for end in ends:
        first = end
        while first > done and labels[first - 1] == ids[first - 1]:
            first -= 1
        text += f"{tokenizer.show(ids[done:first])}⟦{tokenizer.show(ids[first:end])} {tokenizer.eos_token}⟧"
        done = end
    return text + tokenizer.show(ids[done:])


def describe_training(
    dataset, tokenizer, *, skipped: int, max_source_length: int, max_target_length: int, marked="what the model learns"
) -> str:
    """Text about a dataset of encode_training, encode_pairs or encode_prompts: rows, token lengths, shares cut, and its
    first example decoded.

    ⟦ and ⟧ enclose the part of the example that the model learns, called `marked`; of a pair the chosen answer, with the
    rejected one on a line of its own.
    """
    answered = "labels" in dataset.column_names  # else prompts, which the model is to answer
    paired = "rejected_target_length" in dataset.column_names
    if answered and not paired:
        max_source_length, max_target_length = tokenizer.training_limits(max_source_length, max_target_length)
    before, behind = tokenizer.ends_shown
    source_lengths, target_lengths = dataset["source_length"][:], dataset["target_length"][:]
    lines = [
        f"{len(dataset) + skipped:,} rows read, {skipped:,} skipped (empty prompt or response), {len(dataset):,} used",
        f"  {'tokens':<10}" + "".join(f"{name:>8}" for name in ("50%", "90%", "99%", "max", "limit")) + "   cut off",
        _length_line("prompt", source_lengths, max_source_length),
    ]
    if answered:
        lines.append(_length_line("response", target_lengths, max_target_length))
    if paired:
        lines.append(_length_line("rejected", dataset["rejected_target_length"][:], max_target_length))
    shortened = [turns > 0 for turns in dataset["dropped_turns"][:]]
    cut = [length > max_source_length and not fits for length, fits in zip(source_lengths, shortened, strict=True)]
    cut_responses = [length > max_target_length for length in target_lengths]
    for what, rows, flag, limit in (
        ("prompts lose their end", cut, "--max_source_length", max_source_length),
        ("prompts lose their oldest turns", shortened, "--max_source_length", max_source_length),
        ("responses lose their end", cut_responses, "--max_target_length", max_target_length),
    ):
        if (share := sum(rows) / len(rows)) > 0.01:
            kept = "them" if what.endswith("turns") else "it"
            lines.append(f"{share:.0%} of the {what} at {limit} tokens; raise {flag} to keep {kept}.")
    example = dataset[0]
    if not answered:
        prompt = cut_short(tokenizer.show(example["input_ids"]), 400)
        return "\n".join([*lines, "The first prompt:", f"{before}{prompt}{behind}"])
    start = len(example["input_ids"]) - min(example["target_length"], max_target_length) - 1
    prompt = _marked_prompt(example["input_ids"][:start], example["labels"][:start], tokenizer)
    answer = tokenizer.decode(example["input_ids"][start:])
    rejected = f"Rejected: {cut_short(tokenizer.decode(example['rejected_input_ids'][start:]), 400)}" if paired else ""
    lines += [
        f"The first example, with {marked} between ⟦ and ⟧:",
        f"{before}{cut_short(prompt, 400)}{behind}⟦{cut_short(answer, 400)} {tokenizer.eos_token}⟧",
        *([rejected] if paired else []),
    ]
    return "\n".join(lines)
