"""benchmark.py: base and tuned model in one table, on tasks of the harness's own form."""

import json
from types import SimpleNamespace

import pytest
from conftest import TINY
from support.chat_server import make_run

import benchmark
from checkpoint import load_model, load_prefix, load_tokenizer, read_config
from evaluation.likelihoods import log_likelihoods
from tuning.methods import prepare_model, save_trained

ABSENT = "pip install -r tests/requirements.txt"
ROWS = [
    {"question": "以下哪个是颜色？", "A": "裙", "B": "黑色", "C": "上衣", "D": "锅", "answer": "B"},
    {"question": "类型#裙*颜色#", "A": "白色", "B": "棉", "C": "风格", "D": "你好", "answer": "A"},
    {"question": "请从1数到", "A": "裙", "B": "黑", "C": "3", "D": "锅", "answer": "C"},
]
TASK = """\
task: own-ceval
dataset_path: json
dataset_kwargs: {{data_files: {{val: {folder}/val.jsonl, dev: {folder}/dev.jsonl}}}}
validation_split: val
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nA. {{{{A}}}}\\nB. {{{{B}}}}\\nC. {{{{C}}}}\\nD. {{{{D}}}}\\n答案："
doc_to_choice: [A, B, C, D]
doc_to_target: "{{{{['A', 'B', 'C', 'D'].index(answer)}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), (4,)) / "checkpoint-10"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of C-Eval's form, of the harness's yaml and jsonl."""
    pytest.importorskip("lm_eval", reason=ABSENT)
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("val", "dev"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "own.yaml").write_text(TASK.format(folder=folder), encoding="utf-8")
    return folder


def prompt_of(row, answer=""):
    choices = "".join(f"{letter}. {row[letter]}\n" for letter in "ABCD")
    return f"{row['question']}\n{choices}答案：{answer}"


def share_of_right(model, tokenizer):
    """What the task must give, computed from its text."""
    shots = "\n\n".join(prompt_of(row, row["answer"]) for row in ROWS[:2])
    right = 0
    for row in ROWS:
        context = tokenizer.encode(f"{shots}\n\n{prompt_of(row)}")
        wholes = [tokenizer.encode(f"{shots}\n\n{prompt_of(row)} {letter}") for letter in "ABCD"]
        scores = log_likelihoods(model, [(context, whole[len(context) :]) for whole in wholes], len(tokenizer))
        right += max(range(4), key=lambda place: scores[place][0]) == "ABCD".index(row["answer"])
    return right / len(ROWS)


@pytest.mark.clients
def test_base_and_prefix_stand_in_one_table_as_a_direct_computation_has_them(checkpoint, tasks, tmp_path, capsys):
    words = ["--ptuning_checkpoint", checkpoint, "--tasks", "own-ceval", "--include_path", tasks, "--num_fewshot", 2]
    benchmark.main([str(word) for word in [*words, "--output_dir", tmp_path]])
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=4))
    load_prefix(model, checkpoint)
    tokenizer, base = load_tokenizer(TINY, model.config), load_model(TINY)
    written = json.loads((tmp_path / "benchmark.json").read_text())["scores"]
    expected = {"base": share_of_right(base, tokenizer), "tuned": share_of_right(model, tokenizer)}
    assert {name: scores["own-ceval/acc"] for name, scores in written.items()} == pytest.approx(expected)
    table = (tmp_path / "benchmark.txt").read_text()
    assert table.splitlines()[0] == "| task | metric | base | tuned | difference |" and table in capsys.readouterr().out


@pytest.mark.clients
def test_the_harness_gets_texts_and_whole_texts_scored(tasks):
    from lm_eval.api.instance import Instance

    from evaluation.harness import HarnessModel

    model = load_model(TINY)
    tokenizer = load_tokenizer(TINY, model.config)
    asked = HarnessModel(model, tokenizer, 2)

    def requests(kind, *arguments):
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    greedy = {"until": ["。"], "max_gen_toks": 24, "do_sample": False}
    prompts = [tokenizer.build_prompt(text) for text in ("你好", "请从38数到43")]
    texts = asked.generate_until(requests("generate_until", *((prompt, greedy) for prompt in prompts)))
    answers = [model.chat(tokenizer, text, do_sample=False, max_new_tokens=24)[0] for text in ("你好", "请从38数到43")]
    assert [text.strip() for text in texts] == [answer.partition("。")[0] for answer in answers]
    whole = "类型是裙，颜色是黑色。" * 200  # more tokens than the model takes
    [total] = asked.loglikelihood_rolling(requests("loglikelihood_rolling", (whole,)))
    [(short, _)] = asked.loglikelihood(requests("loglikelihood", ("", "类型是裙")))
    ids = tokenizer.encode("类型是裙", add_special_tokens=False)
    assert short == pytest.approx(log_likelihoods(model, [(tokenizer.prefix_tokens, ids)], len(tokenizer))[0][0])
    assert total < short < 0


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_weights_are_scored_by_exact_products(bits):
    words = ["--model_name_or_path", str(TINY), "--quantization_bit", str(bits), "--official_ceval", "."]
    session = benchmark.open_session(benchmark.parse_arguments(words))
    scored = benchmark.load(session.folder, session, session.config)
    exact = load_model(TINY, quantization_bit=bits, quantization_backend="torch")
    tokenizer = load_tokenizer(TINY, exact.config)
    texts = [("类型#裙", "*颜色#黑色"), ("你好", "，很高兴见到你。")]
    pairs = [(tokenizer.encode(start), tokenizer.encode(end, add_special_tokens=False)) for start, end in texts]
    expected = [log_likelihoods(exact, [pair], len(tokenizer))[0][0] for pair in pairs]  # each on its own
    assert [value for value, _ in log_likelihoods(scored, pairs, len(tokenizer))] == pytest.approx(expected, abs=1e-5)


def test_an_adapter_and_a_whole_model_are_compared_with_their_base(tmp_path, capsys):
    (tmp_path / "ceval").mkdir()
    row = {"inputs_pretokenized": "1+1=？\nA. 1\nB. 2\nC. 3\nD. 4", "label": 1}
    (tmp_path / "ceval" / "numbers.jsonl").write_text(json.dumps(row) + "\n")
    for method in ("lora", "freeze"):
        model = load_model(TINY)
        prepare_model(model, method, do_train=True)
        save_trained(model, tmp_path / method, {"base_model": str(TINY), "finetuning_type": method})
        benchmark.main(["--ptuning_checkpoint", str(tmp_path / method), "--official_ceval", str(tmp_path / "ceval")])
        *_, difference = capsys.readouterr().out.strip().splitlines()[-1].split("|")[1:-1]
        assert difference.strip() == "+0.0000"  # neither has trained


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "Give --tasks"),
        ("--tasks a --official_ceval .", "and not both"),
        ("--tasks a", "--ptuning_checkpoint is missing"),
        ("--model_name_or_path x --tasks a --num_fewshot -1", "--num_fewshot -1"),
        ("--model_name_or_path x --official_ceval ./none", "no such folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(words, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        benchmark.parse_arguments(words.split())


def test_without_the_harness_its_installation_is_named(monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install .lm_eval>="):
        benchmark.parse_arguments(["--model_name_or_path", str(TINY), "--tasks", "ceval-valid"])


@pytest.mark.clients
def test_a_task_that_is_not_there_is_named(tasks, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: SimpleNamespace(match_tasks=lambda names: []))
    with pytest.raises(ValueError, match="there is no task ceval-vaild"):
        benchmark.main(["--model_name_or_path", str(TINY), "--tasks", "ceval-vaild"])
