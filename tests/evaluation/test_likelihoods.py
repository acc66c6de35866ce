"""Log-likelihoods of texts, and C-Eval by the official recipe: equal to a direct computation, row by row."""

import json

import pytest
import torch
from conftest import TINY

from checkpoint import load_model, load_tokenizer, read_config
from evaluation.ceval import CONCLUSION, answer_choices, choice_tokens, read_subjects, score_subjects
from evaluation.likelihoods import log_likelihoods


@pytest.fixture(scope="module")
def tuned():
    torch.manual_seed(1)
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=4))
    return model, load_tokenizer(TINY, model.config)


TEXTS = [
    ("类型#裙", "*颜色#黑色"),
    ("你好", "，很高兴见到你。" * 30),
    ("1+1=", "2"),
    ("1+1=", "3"),
    ("请从38数到43", "，"),
]


@pytest.mark.parametrize("bits", [None, 8])
def test_log_likelihoods_are_those_of_one_row_after_the_other(tuned, bits):
    model, tokenizer = tuned
    if bits:
        model = load_model(
            TINY, config=read_config(TINY, pre_seq_len=4), quantization_bit=bits, quantization_backend="torch"
        )
    pairs = [(tokenizer.encode(context), tokenizer.encode(text, add_special_tokens=False)) for context, text in TEXTS]
    found = log_likelihoods(model, pairs, len(tokenizer))
    for (context, continuation), (value, likeliest) in zip(pairs, found, strict=True):
        ids = torch.tensor([context + continuation])
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1, : len(tokenizer)].float()
        expected = logits.log_softmax(-1).gather(1, ids[0, len(context) :, None]).sum().item()
        assert value == pytest.approx(expected, abs=1e-5, rel=1e-6)
        assert likeliest == (logits.argmax(-1).tolist() == continuation)


QUESTIONS = ["以下哪个是颜色？\nA. 裙\nB. 黑色\nC. 上衣\nD. 锅", "1+1=？\nA. 1\nB. 2\nC. 3\nD. 4", "你好" * 40]


@pytest.fixture
def folder(tmp_path):
    """Two subjects of the published layout."""
    for name, questions in (("STEM/numbers", QUESTIONS[:2]), ("Other/words", QUESTIONS[2:])):
        file = tmp_path / "val" / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        rows = [
            {"inputs_pretokenized": question, "choices_pretokenized": [" A", " B", " C", " D"], "label": 1}
            for question in questions
        ]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_a_choice_is_the_likeliest_letter_after_the_models_own_reasoning(tuned):
    model, tokenizer = tuned
    letters = choice_tokens(tokenizer)
    assert len(set(letters)) == 4
    expected = []
    for question in QUESTIONS:
        prompt = tokenizer.encode(tokenizer.build_prompt(question))
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            reasoned = model.generate(ids, do_sample=False, max_new_tokens=512)[0, len(prompt) :].tolist()
            concluded = tokenizer.build_prompt(question + tokenizer.decode(reasoned) + CONCLUSION)
            logits = model(input_ids=torch.tensor([tokenizer.encode(concluded)])).logits[0, -1]
        expected.append(int(logits[letters].argmax()))
    assert answer_choices(model, tokenizer, QUESTIONS, batch_size=2) == expected


def test_subjects_are_files_and_all_questions_count_alike(tuned, folder):
    subjects = read_subjects(folder)
    assert {name: len(rows) for name, rows in subjects.items()} == {"Other/words": 1, "STEM/numbers": 2}
    scores = score_subjects(*tuned, subjects, batch_size=4)
    right = [choice == 1 for choice in answer_choices(*tuned, QUESTIONS, batch_size=1)]
    expected = {"STEM/numbers": sum(right[:2]) / 2, "Other/words": float(right[2]), "all": sum(right) / 3}
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 3: no JSON"),
        ('{"label": 1}', "line 3: expected inputs"),
        ('{"inputs_pretokenized": "x", "label": 4}', "0 to 3"),
    ],
)
def test_a_row_of_another_kind_is_named(folder, line, said):
    with open(folder / "val" / "STEM" / "numbers.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=said):
        read_subjects(folder)


def test_a_folder_without_files_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .jsonl file"):
        read_subjects(tmp_path)
