"""What flags, checkpoints and a base model's folder mean together (tuning/session.py)."""

import ast
import inspect
from pathlib import Path

import pytest
from conftest import ROOT, TINY

import main
from arguments import ModelArguments
from checkpoint import load_model, read_config
from checkpoints.ways import METHOD_FLAGS, RULES
from tuning.methods import METHODS, find_trained, prepare_model, save_trained
from tuning.session import DATA_FIELDS, check_base, check_engine, open_base, resolve_session

REMEMBERED = {
    "base_model": str(TINY),
    "prompt_column": "content",
    "response_column": "summary",
    "messages_column": "messages",
    "source_prefix": "广告：",
    "max_source_length": 64,
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A function: the folder of a checkpoint of a method, with more in its sidecar if wanted."""

    def made(method, **more):
        shape = {"pre_seq_len": 8} if method == "p_tuning" else {"pre_seq_len": None}
        model = load_model(TINY, config=read_config(TINY, **shape))
        prepare_model(model, method, do_train=True)
        folder = tmp_path_factory.mktemp(method) / "checkpoint-1"
        own = METHODS[method].remember(METHODS[method].complete({}), [], None, resume=True)
        save_trained(model, folder, {"finetuning_type": method, **own, **REMEMBERED, **more})
        return folder

    return made


def test_without_flags_and_checkpoint_a_prefix_and_the_defaults_hold():
    session = resolve_session({}, [])
    assert (session.method.name, session.base, session.quantization_bit) == ("p_tuning", None, None)
    assert session.data_fields == DATA_FIELDS
    assert set(session.decided_by.values()) == {"default"}


def test_with_a_stage_the_defaults_of_chatglm_efficient_tuning_hold(checkpoint_of):
    session = resolve_session({"stage": "sft"}, [])
    assert (session.method.name, *session.limits.values()) == ("lora", 512, 512)
    session = resolve_session({"stage": "sft", "max_target_length": 9}, [checkpoint_of("p_tuning")])
    assert (session.method.name, *session.limits.values()) == ("p_tuning", 64, 9)


@pytest.mark.parametrize("method", [name for name in METHODS if RULES[name].trains])
def test_what_no_flag_says_is_read_from_the_checkpoint(method, checkpoint_of):
    session = resolve_session({}, [checkpoint_of(method)])
    assert session.method is METHODS[method]
    assert {name: session.data_fields[name] for name in REMEMBERED if name != "base_model"} == {
        name: value for name, value in REMEMBERED.items() if name != "base_model"
    }
    assert session.data_fields["max_target_length"] == DATA_FIELDS["max_target_length"]
    assert session.decided_by["source_prefix"] == session.decided_by["finetuning_type"] == "checkpoint"


def test_a_given_flag_counts_more_than_the_checkpoint(checkpoint_of):
    session = resolve_session({"max_source_length": 32, "model_name_or_path": "other"}, [checkpoint_of("p_tuning")])
    assert (session.data_fields["max_source_length"], session.base) == (32, "other")
    assert session.decided_by["max_source_length"] == session.decided_by["model_name_or_path"] == "flag"


@pytest.mark.parametrize(
    ("method", "flag", "value", "trained_with"),
    [
        ("p_tuning", "pre_seq_len", 9, 8),
        ("p_tuning", "prefix_projection", True, False),
        ("p_tuning", "finetuning_type", "lora", "p_tuning"),
        ("freeze", "num_layer_trainable", 2, 3),
        ("lora", "lora_rank", 4, 8),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(method, flag, value, trained_with, checkpoint_of):
    folder = checkpoint_of(method)
    with pytest.raises(ValueError) as error:
        resolve_session({flag: value}, [folder])
    assert str(error.value) == (
        f"--{flag} {value} contradicts {folder}, which was trained with {trained_with}. Leave the flag out: it is "
        "read from the checkpoint."
    )


@pytest.mark.parametrize("how", [{}, {"do_train": True}, {"do_train": True, "resumes": True}], ids=str)
@pytest.mark.parametrize("method", ["p_tuning", "lora", "full"])
def test_prompts_are_written_as_in_training_where_what_was_trained_needs_a_base(method, how, checkpoint_of):
    folder = checkpoint_of(method, prompt_template="chatglm2")
    assert (
        resolve_session({"prompt_template": "chatglm2"}, [folder], **how).data_fields["prompt_template"] == "chatglm2"
    )
    if method == "full" and "resumes" not in how:  # a model like any other
        assert resolve_session({"prompt_template": "none"}, [folder], **how).data_fields["prompt_template"] == "none"
        return
    with pytest.raises(ValueError, match="--prompt_template none contradicts .* was trained with chatglm2"):
        resolve_session({"prompt_template": "none"}, [folder], **how)


def test_a_new_adapter_may_have_other_prompts_than_the_one_below_it(checkpoint_of):
    flags = {"prompt_template": "none", "resume_lora_training": False}
    session = resolve_session(flags, [checkpoint_of("lora", prompt_template="chatglm2")], do_train=True)
    assert session.data_fields["prompt_template"] == "none"


def test_lora_targets_in_another_order_are_the_ones_of_the_checkpoint(checkpoint_of):
    folder = checkpoint_of("lora")
    assert resolve_session({"lora_target": "query_key_value"}, [folder]).settings["lora_target"] == "query_key_value"
    session = resolve_session({"finetuning_type": "lora", "lora_target": "dense,query_key_value"}, [])
    assert session.settings["lora_target"] == "query_key_value,dense"


def test_a_new_adapter_need_not_be_like_the_one_below_it(checkpoint_of):
    session = resolve_session({"lora_rank": 4, "resume_lora_training": False}, [checkpoint_of("lora")], do_train=True)
    assert session.own_settings["lora_rank"] == 4


def test_a_resumed_run_trains_its_adapter_on_whatever_the_flag_says(checkpoint_of):
    flags = {"lora_rank": 4, "resume_lora_training": False}
    with pytest.raises(ValueError, match="--lora_rank 4 contradicts"):
        resolve_session(flags, [checkpoint_of("lora")], do_train=True, resumes=True)


def test_a_complete_checkpoint_is_its_own_base(checkpoint_of):
    folder = checkpoint_of("full")
    session = resolve_session({"model_name_or_path": "other"}, [folder])
    assert (session.base, session.checkpoints) == (str(folder), [])


def test_a_resumed_run_of_all_weights_begins_with_its_base(checkpoint_of):
    assert resolve_session({}, [checkpoint_of("full")], do_train=True, resumes=True).base == str(TINY)


@pytest.mark.parametrize(("given", "bits"), [(None, 4), (8, 8)])
def test_bits_are_those_of_the_flag_or_else_of_the_checkpoint(given, bits, checkpoint_of):
    session = resolve_session({"quantization_bit": given}, [checkpoint_of("lora", quantization_bit=4)])
    assert session.quantization_bit == bits


def test_columns_that_are_given_take_the_place_of_remembered_messages(checkpoint_of):
    session = resolve_session({"prompt_column": "question"}, [checkpoint_of("p_tuning")])
    assert (session.data_fields["prompt_column"], session.data_fields["messages_column"]) == ("question", None)


def test_the_untouched_base_takes_only_the_data_from_a_checkpoint(checkpoint_of):
    session = resolve_session({"finetuning_type": "none", "pre_seq_len": 9}, [checkpoint_of("p_tuning")])
    assert (session.checkpoints, session.settings["pre_seq_len"], session.base) == ([], None, str(TINY))
    assert session.data_fields["source_prefix"] == REMEMBERED["source_prefix"]


def test_several_prefixes_take_turns_and_no_run_starts_from_them(checkpoint_of):
    folders = [checkpoint_of("p_tuning"), checkpoint_of("p_tuning")]
    assert resolve_session({}, folders).takes_turns
    with pytest.raises(ValueError, match="--ptuning_checkpoint run/all: a run starts from one checkpoint"):
        resolve_session({"ptuning_checkpoint": "run/all"}, folders, do_train=True)


def test_several_prefixes_can_be_evaluated_on_integer_weights(checkpoint_of):
    session = resolve_session({"quantization_bit": 4}, [checkpoint_of("p_tuning"), checkpoint_of("p_tuning")])
    open_base(session, **session.prefix_shape)
    check_base(session)
    assert session.bits == 4


def test_several_adapters_are_refused_on_integer_weights(checkpoint_of):
    session = resolve_session({"quantization_bit": 4}, [checkpoint_of("lora"), checkpoint_of("lora")])
    open_base(session, pre_seq_len=None)
    with pytest.raises(ValueError, match="2 adapters cannot be used on an int4 base model"):
        check_base(session)


@pytest.mark.parametrize("text", [",", " , "])
def test_commas_without_a_name_between_them_are_refused(text):
    with pytest.raises(ValueError, match="Several checkpoints can be given for LoRA adapters only"):
        find_trained(text)


def test_more_layers_than_the_base_has_are_refused():
    session = resolve_session(
        {"finetuning_type": "freeze", "num_layer_trainable": 99, "model_name_or_path": str(TINY)}, []
    )
    open_base(session, pre_seq_len=None)
    with pytest.raises(ValueError, match="--num_layer_trainable 99: this base model has 4 layers"):
        check_base(session)


def test_a_run_goes_on_with_the_engine_that_wrote_its_optimizer(checkpoint_of):
    session = resolve_session({}, [checkpoint_of("full", engine="deepspeed")], do_train=True, resumes=True)
    check_engine(session, "deepspeed")
    with pytest.raises(ValueError, match="was written with --deepspeed, and its optimizer"):
        check_engine(session, None)


@pytest.mark.parametrize("method", [name for name in METHODS if RULES[name].trains])
def test_a_sidecar_says_again_what_the_session_was_told(method, checkpoint_of):
    first = resolve_session({}, [checkpoint_of(method)])
    again = first.sidecar("fingerprint")
    assert again["finetuning_type"] == method
    assert {name: again[name] for name in DATA_FIELDS} == first.data_fields
    assert again["base_fingerprint"] == "fingerprint"


# ---- a way of tuning is one file, one line in methods.py, one row in ways.py


def test_every_way_of_tuning_has_rules_and_a_place_among_the_choices_of_the_flag():
    assert list(METHODS) == list(RULES)
    choices = ModelArguments.__annotations__["finetuning_type"]
    assert [name in choices for name in RULES] == [True] * len(RULES)


def test_only_its_own_file_its_row_and_its_flag_name_a_way_of_tuning():
    names = {"p_tuning", "freeze", "lora"}  # the others are words that mean other things, too
    naming = set()
    for path in (ROOT / "ptuning").rglob("*.py"):
        constants = {node.value for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Constant)}
        naming |= {path.name} if names & constants else set()
    assert naming == {"ways.py", "arguments.py", *(f"{name}.py" for name in names)}


def test_the_flags_of_a_way_are_those_that_its_rules_name():
    assert {name: tuple(method.defaults) for name, method in METHODS.items()} == {
        name: rules.flags for name, rules in RULES.items()
    }
    assert set(METHOD_FLAGS) <= set(ModelArguments.__dataclass_fields__)


def test_main_names_no_way_of_tuning():
    source = inspect.getsource(main.main)
    assert not [name for name in METHODS if f'"{name}"' in source]


def test_every_way_of_tuning_is_a_file_of_its_own():
    files = {Path(inspect.getfile(type(method))).stem for method in METHODS.values()}
    assert files == set(METHODS)
