"""The base's own answers to general prompts: greedy, found by all processes together, kept from run to run.

The base and the tuned model are the same weights in memory, a prefix or an adapter apart, so the base is always there.
"""

import hashlib
import json

from chatglm2.generation import answer_prompts
from common.messages import dtype_name
from common.ranks import gather, on_first_rank
from data.cache import find_kept, keep
from training.memory import rows_that_fit
from tuning.swapping import BASE, evaluating, swapped


def answers_of(model, prompts: list[list[int]], most: int, num_known: int, ends=()) -> list[list[int]]:
    """Greedy answers of at most `most` tokens, the end included, to prompts (token ids), in their order.

    `ends` are as in answer_prompts.
    """
    longest = max(map(len, prompts), default=0) + most
    with evaluating(model):
        return answer_prompts(
            model,
            prompts,
            longest,
            num_known=num_known,
            batch_size=rows_that_fit(model, longest),
            rows=range(len(prompts)),
            max_answer=most,
            ends=ends,
        )


def base_answers(
    model, prompts: list[list[int]], most: int, num_known: int, args, merged=(), say=print, ends=()
) -> list:
    """The answers_of the base, without what trains. Every process answers a share of them, and has all afterwards.

    `args` are those of training, `merged` the adapters that are merged into the base. They are kept by what decides
    them: base, dtype, kind of device, prompts and `most`.
    """
    if not prompts:
        return []
    base = [model.fingerprint, [str(folder) for folder in merged], model.config.quantization_bit]
    how = [dtype_name(model.transformer.dtype_of_blocks), model.device.type, num_known, most, *ends]
    key = hashlib.sha256(json.dumps(["base answers", base, how, prompts]).encode()).hexdigest()
    answers = on_first_rank(find_kept, key, say)
    if answers is not None and len(answers) == len(prompts):
        return answers
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    mine = by_length[args.process_index :: args.world_size]  # equal work for all
    with swapped(model, BASE):
        found = answers_of(model, [prompts[index] for index in mine], most, num_known, ends)
    found = dict(pair for part in gather(list(zip(mine, found, strict=True))) for pair in part)
    answers = [found[index] for index in range(len(prompts))]
    on_first_rank(keep, key, answers, say)
    return answers
