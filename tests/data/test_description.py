"""What a user sees of the data."""

from support.rows import LONG_DIALOGUE, ROWS, own_cache, tokenizer, tokenizer_folder, write  # noqa: F401, fixtures

from data.description import describe_training
from data.encoding import encode_training
from data.examples import load_examples


def test_description_counts_rows_and_cut_texts_and_marks_what_is_learned(tokenizer, write):
    rows = [{"content": "今天", "summary": "答" * size} for size in (3, 3, 3, 30)] + [{"content": "", "summary": ""}]
    examples, skipped = load_examples(write(rows), "content", "summary")
    encoded = encode_training(examples, tokenizer, max_source_length=64, max_target_length=10)
    text = describe_training(encoded, tokenizer, skipped=skipped, max_source_length=64, max_target_length=10)
    assert "5 rows read, 1 skipped (empty prompt or response), 4 used" in text
    assert "25% of the responses lose their end at 10 tokens; raise --max_target_length" in text
    assert "of the prompts" not in text
    assert text.endswith("[gMASK] sop [Round 1]\n\n问：今天\n\n答：⟦答答答 </s>⟧")
    response = next(line for line in text.splitlines() if line.strip().startswith("response"))
    assert response.split()[-2:] == ["10", "25.0%"]


def test_description_says_how_many_dialogues_lose_their_oldest_turns(tokenizer, write):
    examples, skipped = load_examples(write([LONG_DIALOGUE, ROWS[0]]), "content", "summary", "history")
    lengths = {"max_source_length": 80, "max_target_length": 64}
    text = describe_training(encode_training(examples, tokenizer, **lengths), tokenizer, skipped=skipped, **lengths)
    assert "50% of the prompts lose their oldest turns at 80 tokens; raise --max_source_length to keep them." in text
    assert "lose their end" not in text
    assert text.endswith("问：那明天呢\n\n答：⟦好 </s>⟧")


def test_every_answer_that_is_learned_is_marked(tokenizer, write):
    history = [["早", "早安"], ["晚", "晚安"]]
    examples, _ = load_examples(
        write([{"content": "问", "summary": "答", "history": history}]), "content", "summary", "history"
    )
    lengths = {"max_source_length": 99, "max_target_length": 64}
    encoded = encode_training(examples, tokenizer, train_on_history=True, **lengths)
    text = describe_training(encoded, tokenizer, skipped=0, **lengths)
    assert text.count("⟧") == 4 and "答：⟦早安 </s>⟧\n\n[Round 2]" in text and text.endswith("答：⟦答 </s>⟧")
