"""Which general rows a step learns beside its own, with the base's answers in place of labels (--keep_base).

    loss of a step = mean over the tokens of its rows + W * mean over the answers' tokens of its general rows

Which rows a step gets follows from its number and the seed alone: a run that was stopped goes on with the same ones, and
any number of processes share the same ones.
"""

import functools
import random

from forgetting.drift import training_rows


class KeptRows:
    """General prompts with answers (token ids), `per_step` of them for each step of all processes."""

    def __init__(self, prompts, answers, *, per_step: int, seed: int):
        self.rows = training_rows(prompts, answers)
        self.per_step, self.seed = per_step, seed
        self.order = functools.lru_cache(maxsize=2)(self.draw_order)

    def draw_order(self, turn):
        """The places of all rows in the order in which they are read for the `turn`-th time."""
        return random.Random(f"{self.seed} keep {turn}").sample(range(len(self.rows)), len(self.rows))

    def of_step(self, step: int) -> list[dict]:
        """The rows of a step, counted from 0."""
        places = (divmod(number, len(self.rows)) for number in range(step * self.per_step, (step + 1) * self.per_step))
        return [self.rows[self.order(turn)[place]] for turn, place in places]

    @staticmethod
    def tokens(rows: list[dict]) -> int:
        """How many tokens of the rows are learned."""
        return sum(label >= 0 for row in rows for label in row["labels"])

    def mean_length(self) -> float:
        """Tokens of a row, prompt and answer together."""
        return sum(len(row["input_ids"]) for row in self.rows) / len(self.rows)
