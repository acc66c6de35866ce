"""Fuzz what reads files that people bring: no input may end in anything but a ValueError or OSError that names it.

    python tests/support/fuzz.py data 300         JSON, CSV and text of any encoding, through read_rows and load_examples
    python tests/support/fuzz.py checkpoint 300   base models, tokenizers, prefixes and adapters, through all of their readers

Hypothesis makes the inputs: whole files from a grammar of almost correct rows, and sound files that are cut, flipped
or rebuilt around a changed record (so that checksums inside them hold). Whatever a reader accepts must work: rows must
be rows, a model must compute, a tokenizer encode. The inputs run in a child process with bounded memory, so that a
crash, a hang or a memory bomb is found too. A finding ends the run with status 1 and the smallest input that shows it;
the tables of test_bad_*.py keep what was found.
"""

import faulthandler
import io
import itertools
import json
import math
import mmap
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
HANG_SECONDS = 60
MAX_MEMORY = 4 * 2**30  # bytes that the child may ask for
EXAMPLES_PER_BATCH = 200
INPUTS, ACCEPTED, REFUSED, LAST = range(4)  # places in the memory that both processes see; LAST is a time


# ---- changes to a sound file

positions = st.integers(0, 2**24)  # taken modulo the size
edits = st.one_of(
    st.tuples(st.just("cut"), positions),
    st.tuples(st.just("flip"), positions, st.integers(1, 255)),
    st.tuples(st.just("write"), positions, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), positions, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("delete"), positions, st.integers(1, 200)),
    st.tuples(st.just("repeat"), positions, st.integers(1, 64), st.integers(2, 500)),
)
edit_lists = st.lists(edits, min_size=1, max_size=4)


def edited(content, changes):
    """`content` after the changes, each a tuple of `edits`."""
    for kind, position, *rest in changes:
        at = position % (len(content) + 1)
        head, tail = content[:at], content[at:]
        if kind == "cut":
            content = head
        elif kind == "flip":
            content = head + bytes(byte ^ rest[0] for byte in tail[:1]) + tail[1:]
        elif kind == "write":
            content = head + rest[0] + tail[len(rest[0]) :]
        elif kind == "insert":
            content = head + rest[0] + tail
        elif kind == "delete":
            content = head + tail[rest[0] :]
        elif kind == "repeat":
            content = head + tail[: rest[0]] * rest[1] + tail[rest[0] :]
    return content


def edited_inside_zip(content, member, changes):
    """A torch file with one of its records changed and its checksums right."""
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
    rebuilt = io.BytesIO()
    with zipfile.ZipFile(rebuilt, "w", zipfile.ZIP_STORED) as new:
        for index, (name, record) in enumerate(records):
            new.writestr(name, edited(record, changes) if index == member % len(records) else record)
    return rebuilt.getvalue()


def edited_header(content, changes):
    """A safetensors file with its header changed and the header's length right."""
    length = int.from_bytes(content[:8], "little")
    header = edited(content[8 : 8 + length], changes)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


# Numbers, texts and nestings that are JSON, or what Python takes for JSON, and seldom expected.
odd_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 3, 5, 2**31, 2**63, 10**12, 10**400, -(10**30)])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud83d", "\0", "chatglm", "float16", "true", "4", "../x", "pytorch_model.bin", "content"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=4,
)
odd_texts = st.sampled_from(
    ["", " ", "null", "[]", "{}", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}"]
)


def replaced(content, new):
    return new.encode(errors="surrogatepass")


def changed_json(content, changes):
    """A JSON object with keys, or a new one, set to other values; None removes a key."""
    found = json.loads(content)
    for key, value in changes:
        names = [*found, "new"]
        name = names[key % len(names)]
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value[0]
    return json.dumps(found).encode()


def ways_to_change(suffix):
    """Tuples (function, details) that change a file of this kind: function(content, *details)."""
    raw = st.tuples(st.just(edited), edit_lists)
    if suffix == ".json":
        values = st.lists(st.tuples(positions, st.none() | st.tuples(odd_json)), min_size=1, max_size=3)
        whole = st.tuples(st.just(replaced), odd_texts | odd_json.map(json.dumps))
        return st.tuples(st.just(changed_json), values) | whole | raw
    if suffix in (".bin", ".pt", ".pth"):
        return st.tuples(st.just(edited_inside_zip), positions, edit_lists) | raw
    if suffix == ".safetensors":
        return st.tuples(st.just(edited_header), edit_lists) | raw
    return raw


# ---- target: data files

columns = st.sampled_from(["content", "summary", "history", "messages"])
texts = st.text(max_size=30) | st.sampled_from(
    ["类型#裙*颜色#白色", "好看的裙子。", "\ud83d", "\0", "\u2028", " ", '"']
)
histories = st.lists(st.lists(texts | odd_json, max_size=3), max_size=3) | odd_json
dialogues = (
    st.lists(
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value"]),
            st.sampled_from(["user", "assistant", "system", "human", "gpt"]) | texts | odd_json,
            max_size=3,
        )
        | odd_json,
        max_size=4,
    )
    | odd_json
)
good_rows = st.fixed_dictionaries(
    {"content": texts, "summary": texts},
    optional={"history": st.none() | st.lists(st.tuples(texts, texts), max_size=2)},
)
odd_rows = st.one_of(
    st.fixed_dictionaries(
        {"content": texts, "summary": texts}, optional={"history": histories, "messages": dialogues, "x": odd_json}
    ),
    st.dictionaries(columns, texts | odd_json, max_size=3),
    odd_json,
)


@st.composite
def json_texts(draw):
    """JSON lines or an array, sometimes broken."""
    rows = draw(st.lists(good_rows, min_size=1, max_size=6) | st.lists(good_rows | odd_rows, max_size=6))
    ensure_ascii = draw(st.booleans())
    lines = [json.dumps(row, ensure_ascii=ensure_ascii) for row in rows]
    style = draw(st.sampled_from(["lines", "array", "pretty"]))
    if style == "array":
        text = "[" + ",\n".join(lines) + "]"
    elif style == "pretty":
        text = json.dumps(rows, indent=1)
    else:
        text = draw(st.sampled_from(["\n", "\n", "\r\n", "\r", "\n\n", ","])).join(lines)
    return text


csv_texts = st.builds(
    lambda rows, comma, end: end.join(comma.join(cells) for cells in rows),
    st.lists(
        st.lists(columns | texts | st.sampled_from(['"', '"a"', '"a""b"', '"a\nb"', "a,b"]), max_size=4), max_size=6
    ),
    st.sampled_from([",", ",", ";", "\t"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
encodings = st.sampled_from(
    "utf-8 utf-8 utf-8-sig utf-16 utf-16-le utf-16-be utf-32 utf-32-be gb18030 gbk big5 latin-1 shift_jis".split()
)


@st.composite
def data_files(draw):
    """(name, content, flags of load_examples) of a data file."""
    name = draw(st.sampled_from(["a.json", "a.json", "a.jsonl", "a.csv", "a.CSV", "a"]))
    if draw(st.integers(0, 19)) == 0:
        content = draw(st.binary(max_size=300))
    else:
        sensible = csv_texts if name.lower().endswith(".csv") else json_texts()
        text = draw(sensible if draw(st.integers(0, 5)) else odd_texts | texts)
        encoding = draw(encodings)
        content = text.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")
        if draw(st.integers(0, 3)) == 0:
            content = edited(content, draw(edit_lists))
    return (
        name,
        content,
        {
            "prompt_column": draw(st.sampled_from(["content", "content", "x", None])),
            "response_column": draw(st.sampled_from(["summary", "summary", "x", None])),
            "history_column": draw(st.sampled_from([None, "history", "x"])),
            "messages_column": draw(st.sampled_from([None, None, "messages"])),
            "keep_unlabelled": draw(st.booleans()),
            "max_samples": draw(st.sampled_from([None, 1, 2])),
        },
        draw(st.integers(0, 9)) == 0,
    )


def data_target(folder):
    """Try one data file: read_rows on it, and for some load_examples."""
    from data.examples import load_examples
    from data.rows import read_rows

    def attempt(example):
        name, content, flags, encode = example
        file = folder / name
        file.write_bytes(content)
        try:
            rows = read_rows(file)
            assert rows and all(isinstance(row, dict) for row in rows)
            if encode:
                dataset, skipped = load_examples(file, **flags)
                assert len(dataset) + skipped <= len(rows) and len(dataset) > 0
                assert all(isinstance(text, str) for text in dataset["prompt"][:] + dataset["response"][:])
        finally:
            file.unlink()

    return data_files(), attempt


# ---- target: base models, tokenizers, prefixes

SMALL = {
    "num_layers": 1,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "kv_channels": 4,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "seq_length": 64,
    "padded_vocab_size": 2560,
}


def make_folders(folder):
    """Sound folders of a very small model: .bin shards, safetensors, and a prefix and a LoRA adapter of it."""
    import torch
    from conftest import OFFICIAL_FIELDS, TINY, formula_model
    from safetensors.torch import save_file

    from checkpoint import load_model, save_prefix
    from tuning.lora import save_adapter
    from tuning.methods import prepare_model

    model = formula_model({**OFFICIAL_FIELDS, **SMALL, "pre_seq_len": 3})
    weights = {name: value.half() for name, value in model.state_dict().items() if "prefix_encoder" not in name}
    for base in ("bin", "safetensors"):
        (folder / base).mkdir()
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder / base / name)
        config = {**json.loads((TINY / "config.json").read_text()), **SMALL}
        (folder / base / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "safetensors" / "model.safetensors")
    names = sorted(weights)
    shards = {f"pytorch_model-0000{number}-of-00002.bin": names[number - 1 :: 2] for number in (1, 2)}
    for file, members in shards.items():
        torch.save({name: weights[name] for name in members}, folder / "bin" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = folder / "run" / "checkpoint-2"
    sidecar = {"base_model": str(folder / "bin"), "prompt_column": "content", "max_source_length": 64}
    save_prefix(model, checkpoint, sidecar)
    torch.save({"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": []}, checkpoint / "optimizer.pt")
    torch.save({"last_epoch": 2}, checkpoint / "scheduler.pt")
    torch.save({"cpu": torch.random.get_rng_state()}, checkpoint / "rng_state.pth")
    state = {"global_step": 2, "train_batch_size": 1, "log_history": [], "epoch": 1.0}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    base = load_model(folder / "bin")
    prepare_model(base, "lora", do_train=True, lora_rank=2)
    save_adapter(base, folder / "adapter", str(folder / "bin"))


def use_base(folder):
    """Everything that main.py and the demos do with a base model's folder."""
    import torch

    from checkpoint import load_model, load_tokenizer, read_config

    config = read_config(folder, pre_seq_len=None)
    tokenizer = load_tokenizer(folder, config)
    ids = tokenizer.encode(tokenizer.build_prompt("你好 abc", [("问", "答")]))
    tokenizer.decode(ids)
    tokenizer.encode_batch(["类型#裙", ""])
    model = load_model(folder, config=config)
    logits = model(input_ids=torch.tensor([[0, 1, 2]])).logits
    assert logits.shape == (1, 3, config.padded_vocab_size)


def use_checkpoint(folder, model):
    """Everything that they do with a prefix checkpoint."""
    from checkpoint import load_prefix, read_prefix, read_prefix_settings
    from checkpoints.run_folder import newest_checkpoint
    from training.resume import find_resume_checkpoint

    settings_of = read_prefix_settings(folder)
    assert settings_of["pre_seq_len"] >= 1
    read_prefix(folder)
    newest_checkpoint(folder.parent)
    find_resume_checkpoint(str(folder), str(folder.parent))
    load_prefix(model, folder)


def use_adapter(folder, base):
    """Everything that they do with a LoRA adapter."""
    import torch

    from checkpoint import load_model
    from tuning.methods import find_trained, prepare_model, read_settings

    checkpoints, _ = find_trained(folder)
    saved = read_settings(checkpoints)
    model = load_model(base)
    prepare_model(model, saved["finetuning_type"], saved["checkpoints"])
    model(input_ids=torch.tensor([[0, 1, 2]]))


def checkpoint_target(folder):
    """Change one file of one folder, use the folder, and put the file back."""
    from checkpoint import load_model, read_config
    from checkpoints.weight_files import read_tensors

    make_folders(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sound = {path: path.read_bytes() for path in files}
    model = load_model(folder / "bin", config=read_config(folder / "bin", pre_seq_len=3))

    examples = st.sampled_from(files).flatmap(
        lambda file: st.tuples(st.just(str(file.relative_to(folder))), ways_to_change(file.suffix))
    )

    def attempt(example):
        name, (way, *details) = example
        file = folder / name
        file.write_bytes(way(sound[file], *details))
        try:
            if file.suffix in (".bin", ".safetensors"):
                for _ in read_tensors(file):
                    pass
            if name.startswith("run/"):
                use_checkpoint(file.parent, model)
            elif name.startswith("adapter/"):
                use_adapter(file.parent, folder / "bin")
            else:
                use_base(file.parent)
        finally:
            file.write_bytes(sound[file])

    # The folders must be sound before anything is changed, or every refusal would mean nothing.
    use_base(folder / "bin")
    use_base(folder / "safetensors")
    use_checkpoint(folder / "run" / "checkpoint-2", model)
    use_adapter(folder / "adapter", folder / "bin")
    return examples, attempt


TARGETS = {"data": data_target, "checkpoint": checkpoint_target}


# ---- the run


def search(examples, attempt, folder, shared, deadline, first_seed):
    """In the child: try inputs until the time is up. Raises what a reader should not have raised."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    current = folder.with_name(folder.name + ".current")

    def judge(example):
        if time.monotonic() > deadline:  # the rest of the batch
            return
        current.write_text(repr(example)[:20_000], encoding="utf-8", errors="backslashreplace")
        try:
            attempt(example)
            accepted = True
        except (ValueError, OSError) as error:
            message = str(error)
            assert str(folder) in message, f"the message does not name the file: {message!r}"
            accepted = False
        shared[INPUTS] += 1
        shared[ACCEPTED if accepted else REFUSED] += 1
        shared[LAST] = time.monotonic()

    for number in itertools.count(first_seed):
        if time.monotonic() > deadline:
            return
        one_batch = settings(
            max_examples=EXAMPLES_PER_BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        seed(number)(one_batch(given(examples)(judge)))()


def fuzz(target, seconds, first_seed):
    """Number of findings (0 or 1) in so many seconds."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: this process forks
    sys.path[:0] = [str(ROOT / "ptuning"), str(ROOT / "tests")]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        folder = Path(place, "files")
        folder.mkdir()
        examples, attempt = TARGETS[target](folder)
        shared = memoryview(mmap.mmap(-1, 4 * 8)).cast("d")
        started = shared[LAST] = time.monotonic()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                search(examples, attempt, folder, shared, started + seconds, first_seed)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        problem = watch(child, shared)
        print(
            f"{target}: {shared[INPUTS]:,.0f} inputs in {time.monotonic() - started:.0f} s, "
            f"{shared[ACCEPTED]:,.0f} accepted, {shared[REFUSED]:,.0f} refused, {problem or 'no finding'}"
        )
        if problem:
            print(f"the input: {folder.with_name(folder.name + '.current').read_text(encoding='utf-8')[:4000]}")
    return int(problem is not None)


def watch(child, shared):
    """Wait for the child; what went wrong in words, or None."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                return f"a crash ({signal.Signals(-code).name})"
            return "a finding, see above" if code else None
        if time.monotonic() - shared[LAST] > HANG_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"a hang of more than {HANG_SECONDS} s"
        time.sleep(0.05)


if __name__ == "__main__":
    if not (2 <= len(sys.argv) <= 4 and sys.argv[1] in TARGETS):
        sys.exit(f"usage: python {sys.argv[0]} {'|'.join(TARGETS)} [seconds] [seed]")
    duration = float(sys.argv[2]) if len(sys.argv) > 2 else math.inf
    sys.exit(fuzz(sys.argv[1], duration, int(sys.argv[3]) if len(sys.argv) > 3 else 0))
