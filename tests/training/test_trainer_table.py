"""The table at the head of trainer.py, held against transformers' Trainer."""

import inspect
import re

import pytest
from conftest import ROOT
from transformers import Seq2SeqTrainer, Trainer

import trainer

TABLE = dict(re.findall(r"^    (_\w+) +(\d+\.\d+) +\S", trainer.__doc__, flags=re.M))  # method -> since


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def test_the_table_names_exactly_the_private_methods_that_are_overridden():
    ours = [owner for owner in trainer.PrefixTrainer.__mro__ if not issubclass(Seq2SeqTrainer, owner)]
    own = {name for owner in ours for name in vars(owner) if is_private(name)}
    assert set(TABLE) == {name for name in own if hasattr(Seq2SeqTrainer, name)}


def test_the_oldest_transformers_that_is_allowed_has_all_of_them():
    least = re.search(r"transformers>=(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert max(tuple(map(int, since.split("."))) for since in TABLE.values()) <= tuple(map(int, least.groups()))


@pytest.mark.parametrize("name", TABLE)
def test_the_library_still_has_the_method_and_calls_it_in_a_way_that_ours_takes(name):
    parameters = list(inspect.signature(getattr(Trainer, name)).parameters.values())
    ours = inspect.signature(getattr(trainer.PrefixTrainer, name))
    ours.bind(*parameters)
    positional = [parameter for parameter in parameters if parameter.default is parameter.empty]
    named = {parameter.name: parameter for parameter in parameters if parameter not in positional}
    ours.bind(*positional, **named)
