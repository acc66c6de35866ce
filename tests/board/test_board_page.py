"""The training page's handlers and its doors, without a browser: what a stranger sends, and what it gets."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import ROOT, SAMPLE, TINY
from support.over_http import call, serve

from board import show
from board.chat import Chat, Refused, check_room, outstanding_bytes
from board.choosing import NAMES
from board.commands import EMPTY, PRESETS
from board.doors import Bodies, ChatDoor, OwnSiteOnly
from board.events import Page
from board.files import Roots
from board.runs import Run
from board.starting import Starter
from board.words import TEXTS, WORDS
from common.files import write_json

REQUEST = SimpleNamespace(headers={"accept-language": "en"}, session_hash="s")
FIELDS = [{**EMPTY, **PRESETS["tiny"], "name": "mine"}[name] for name in NAMES]


@pytest.fixture
def page(tmp_path):
    return Page(Roots([ROOT, tmp_path]), Starter(tmp_path), Chat(tmp_path / "chat.log"))


# ---- handlers


def test_a_run_that_is_there_is_never_overwritten_unasked(page, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        page.starter, "start", lambda folder, kind, command: started.append((folder.name, command.text))
    )
    (tmp_path / "mine" / "checkpoint-3").mkdir(parents=True)
    said, question, *_ = page.start(REQUEST, None, *FIELDS)
    assert "is there already" in said and question["visible"] and not started
    for choice in ("continue", "overwrite", "name"):
        page.start(REQUEST, choice, *FIELDS)
    (one, going_on), (two, anew), (three, _) = started
    assert (one, two, three) == ("mine", "mine", "mine-2")
    assert going_on == f"{anew} --resume_from_checkpoint last"


def test_a_run_goes_on_with_the_command_it_had(page, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(page.starter, "start", lambda folder, kind, command: started.append(command.text))
    record = {"command": "x", "program": ["bash", "train.sh"], "variables": {"LR": "1"}, "words": ["--seed", "3"]}
    (tmp_path / "mine").mkdir()
    write_json(tmp_path / "mine" / "web.json", record)
    page.go_on(REQUEST, "mine", *FIELDS)
    assert started == ["LR=1 bash train.sh --seed 3 --resume_from_checkpoint last"]


@pytest.mark.parametrize(
    "changed",
    [
        {"program": ["rm", "-rf"]},
        {"program": ["bash", "-c"]},
        {"program": ["bash", "../x.sh"]},
        {"words": [1]},
        {"variables": {"A;B": "1"}},
        {"variables": {"BASH_ENV": "evil.sh"}},
        {"variables": {"LD_PRELOAD": "evil.so"}},
        {"words": "x"},
    ],
    ids=str,
)
def test_a_record_that_somebody_has_changed_starts_nothing(page, tmp_path, monkeypatch, changed):
    monkeypatch.setattr(page.starter, "start", lambda *_: pytest.fail("started"))
    record = {"command": "x", "program": ["bash", "train.sh"], "variables": {}, "words": [], **changed}
    (tmp_path / "mine").mkdir()
    write_json(tmp_path / "mine" / "web.json", record)
    assert "web.json" in page.go_on(REQUEST, "mine", *FIELDS)


@pytest.mark.parametrize("name", ["../x", "", None, 7, ["a"], "a/b", "_uploads", "$(id)", "x" * 200])
def test_a_name_that_is_no_run_is_answered_with_a_message(page, name):
    for said in (
        page.stop(REQUEST, name),
        page.adopt(REQUEST, name),
        page.evaluate(REQUEST, name, "", "", ""),
        page.export(name, "", ""),
    ):
        assert 'class="said bad"' in said
    assert page.tick(REQUEST, name, "run", {})[-1]["card"]


def test_a_tick_sends_what_has_changed_only(page, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "trainer_log.jsonl").write_text('{"current_steps": 1, "total_steps": 2, "loss": 1.0}\n')
    *_, seen = page.tick(REQUEST, "mine", "run", {})
    *updates, again = page.tick(REQUEST, "mine", "run", seen)
    assert again == seen and all(update == {"__type__": "update"} for update in updates)


def test_a_run_that_has_ended_is_no_longer_called_started(page, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("board.events.read_run", lambda folder: Run("mine", folder, alive=True))
    *_, seen = page.tick(REQUEST, "mine", "run", {})
    monkeypatch.undo()
    *_, said, seen = page.tick(REQUEST, "mine", "run", seen)
    assert said == "" and page.tick(REQUEST, "mine", "run", seen)[-2] != ""


def test_a_file_that_no_browser_has_sent_is_not_taken(page, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "incoming"))
    assert "no file that this page was sent" in page.uploaded(REQUEST, "/etc/passwd")[1]
    assert "no file that this page was sent" in page.load(REQUEST, "/etc/passwd")[-1]


def test_settings_and_flags_say_what_is_wrong_at_once(page):
    values = dict(zip(NAMES, FIELDS, strict=True))
    text, wrong, *_ = page.refresh(REQUEST, *{**values, "lr": "fast"}.values())
    assert not text and "learning_rate" in wrong
    assert page.add_flag("seed", "7", "")[0] == "seed = 7"
    assert "none of main.py" in page.add_flag("nosuch", "7", "")[1]
    assert "Rank" in page.flag_help("lora_rank") or "inner width" in page.flag_help("lora_rank")
    assert page.restore({"model": ["x"], "evil": 1})[0] == EMPTY["model"]
    assert "4 layers" in page.look_at_model(REQUEST, "tiny")[0]
    assert "leads out" in page.look_at_model(REQUEST, "/etc")[0]


def test_the_flags_of_a_preset_go_with_it_and_those_of_a_visitor_stay(page):
    values = {**dict(zip(NAMES, FIELDS, strict=True)), "extra": "seed = 7"}
    official = page.preset("official", *values.values())
    place = NAMES.index("extra")
    assert official[place] == "seed = 7\nprecision = official"
    assert page.preset("official", *official)[place] == official[place]
    assert page.preset("tiny", *official)[place] == "seed = 7"


def test_rows_are_used_once_their_columns_are_chosen(page):
    looked = {"file": "a.csv", "dev": "", "folder": ""}
    said, *kept = page.use_rows(REQUEST, None, [], "", "", "", "", "")
    assert "press Look" in said and all(update == {"__type__": "update"} for update in kept)
    said, *kept = page.use_rows(REQUEST, looked, [], None, "b", "", "", "")
    assert "Choose the column" in said and all(update == {"__type__": "update"} for update in kept)
    said, sources, *_, share = page.use_rows(REQUEST, looked, [], "a", "b", "", "", "")
    assert (said, share, [source["prompt"] for source in sources]) == ("", "0.05", ["a"])
    assert len(page.add_rows(REQUEST, looked, sources, "", "", "", "talk", "2")[1]) == 2


def test_what_start_would_train_on_is_said_before_it_is_pressed(page):
    values = dict(zip(NAMES, FIELDS, strict=True))
    source = {"path": "AdvertiseGen/sample/train.json", "prompt": "content", "response": "summary"}
    for changed, line in (
        ({}, "AdvertiseGen/sample, because no rows are chosen"),
        ({"model": "THUDM/chatglm2-6b"}, "AdvertiseGen, because no rows are chosen"),
        ({"model": "THUDM/chatglm2-6b", "stage": "dpo"}, "on data, because no rows are chosen"),
        ({"data": "AdvertiseGen/sample"}, "tiny on AdvertiseGen/sample."),
        ({"sources": [source]}, "train.json (content → summary)."),
    ):
        assert line in page.refresh(REQUEST, *{**values, **changed}.values())[-1]


def test_a_folder_that_does_not_tell_its_model_is_asked_about(page, tmp_path):
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    write_json(tmp_path / "base" / "config.json", {**config, "model_family": None, "auto_map": {}, "_name_or_path": ""})
    folder = str(tmp_path / "base")
    said, question = page.look_at_model(REQUEST, folder, "")
    assert "ChatGLM2 or ChatGLM3" in said and question["visible"]
    assert [name for _, name in question["choices"]] == ["chatglm2", "chatglm3"]
    said, question = page.look_at_model(REQUEST, folder, "chatglm3")
    assert "is a ChatGLM3 model" in said and question["value"] == "chatglm3"
    assert not page.look_at_model(REQUEST, "tiny", "chatglm3")[1]["visible"]
    values = {**dict(zip(NAMES, FIELDS, strict=True)), "model": folder, "family": "chatglm3"}
    assert "bash train.sh --model_family chatglm3" in page.refresh(REQUEST, *values.values())[0]


def test_an_evaluation_takes_the_rows_that_were_held_out_and_asks_for_a_file_where_none_were_kept(
    page, tmp_path, monkeypatch
):
    started = []
    monkeypatch.setattr(page.starter, "start", lambda folder, kind, command: started.append(command.variables["DATA"]))
    (tmp_path / "mine").mkdir()
    write_json(tmp_path / "mine" / "web.json", {"command": "x", "variables": {"DEV_RATIO": "0.05", "DATA": "d"}})
    assert "Name a file of rows" in page.evaluate(REQUEST, "mine", "", "", "") and not started
    kept = tmp_path / "mine" / "held_out"
    kept.mkdir()
    (kept / "dev.json").write_text("{}")
    assert page.evaluate(REQUEST, "mine", "", "", "") == "" and started == [str(kept)]
    assert page.evaluate(REQUEST, "mine", "", str(SAMPLE), "") == "" and started[1:] == ["AdvertiseGen/sample"]


def test_what_others_wrote_is_text():
    hostile = "<script>alert(1)</script>\x1b[2J"
    row = {"prompt": hostile, "labels": hostile, "predict": hostile}
    for html in (show.answers([row], TEXTS["en"]), show.said(hostile), show.pre(hostile, hostile)):
        assert "<script" not in html and "\x1b" not in html
    assert "<script" not in show.framed(hostile, hostile)


def test_both_languages_say_everything():
    assert all(len(texts) == 2 and all(texts) for texts in WORDS.values())


# ---- the chat's memory


def test_a_chat_waits_for_a_run_that_needs_the_memory():
    printed = "x\nEstimated peak memory, training on 16 rows x 128 tokens: 2.00 GB (weights 1.00 GB).\n"
    assert outstanding_bytes(printed, 500_000_000) == 1_500_000_000 and outstanding_bytes(printed, 3 << 30) == 0
    assert outstanding_bytes("Loading", 0) is None
    check_room("mine", 10**9, 4 * 10**9, 10**9)
    with pytest.raises(Refused) as refused:
        check_room("mine", 3 * 10**9, 4 * 10**9, 10**9)
    assert (refused.value.name, refused.value.more["free"]) == ("chat_refused", 3 * 10**9)
    with pytest.raises(Refused, match="chat_waits"):
        check_room("mine", 1, 10**9, None)


def test_the_last_browser_to_leave_ends_the_chat(tmp_path):
    chat = Chat(tmp_path / "chat.log")
    chat.state = "loading"
    chat.shown("a", True)
    chat.shown("b", True)
    chat.shown("a", False)
    assert chat.wanted is None
    chat.shown("b", False)
    assert chat.wanted == ("end",)


# ---- the doors


@pytest.fixture
def door(tmp_path):
    """The port of the doors before an application that says it was reached."""

    async def inner(scope, receive, send):
        if scope["type"] == "http":
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"reached"})

    (tmp_path / "_exports" / "a").mkdir(parents=True)
    (tmp_path / "_exports" / "a" / "x.bin").write_text("x")
    (tmp_path / "_exports" / "out").symlink_to("/etc/passwd")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "secret").write_text("s")
    app = OwnSiteOnly(ChatDoor(Bodies(inner, tmp_path), Chat(tmp_path / "chat.log")), True, tmp_path)
    port, end = serve(app)
    yield port, tmp_path
    end()


def status(door, method="GET", path="/", headers=None, body=None):
    return call(door[0], method, path, body, headers)[0]


def test_the_page_answers_to_its_own_site_only(door):
    own = f"127.0.0.1:{door[0]}"
    assert status(door) == status(door, headers={"origin": f"http://{own}"}) == 200
    assert status(door, headers={"host": "localhost:1"}) == status(door, headers={"host": "[::1]:1"}) == 200
    foreign = [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
    ]
    foreign += [{"origin": f"http://{own}.evil.example"}, {"origin": "http://[", "host": own}, {"host": "10.0.0.7"}]
    foreign += [{"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}]
    for headers in foreign:
        assert status(door, "POST", "/gradio_api/queue/join", headers, {}) == 403, headers


@pytest.mark.parametrize(
    "path",
    ["/monitoring", "/gradio_api/run/other", "/gradio_api/call/x", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd"]
    + ["/gradio_api/file=http://192.0.2.1/", "/gradio_api/proxy=http://192.0.2.1/", "/gradio_api/component_server"]
    + [
        "/gradio_api/file=OUT/mine/secret",
        "/gradio_api/file=OUT/_exports/../mine/secret",
        "/gradio_api/file=OUT/_exports/out",
    ],
)
def test_parts_that_the_page_does_not_use_and_files_of_others_are_not_there(door, path):
    assert status(door, path=path.replace("OUT", str(door[1]))) == 404


def test_a_file_of_an_export_and_the_pages_own_parts_are_there(door):
    assert status(door, path=f"/gradio_api/file={door[1]}/_exports/a/x.bin") == 200
    assert status(door, "POST", "/gradio_api/run/predict", body={}) == 200
    assert status(door, path="/chat/") == 503  # none is open


def test_a_body_is_bounded_and_an_upload_must_say_its_length(door):
    assert status(door, "POST", "/gradio_api/run/predict", body=b"x" * (2**20 + 1)) == 413
    assert status(door, "POST", "/gradio_api/upload", {"content-length": str(2**31)}, b"") == 413
    assert status(door, "POST", "/gradio_api/upload", body=b"x" * 2**21) == 200


@pytest.mark.parametrize(
    "text",
    [
        b'"\\ud800"',
        b'"\\uDC00\\uD83D"',
        b'{"\\udfff": 1}',
        b'"\xed\xa0\x80"',
        '"\ud800"'.encode("utf-16", "surrogatepass"),
    ],
)
def test_half_a_character_is_refused_before_anything_answers_with_it(door, text):
    code, answer = call(
        door[0], "POST", "/gradio_api/run/predict", b'{"data": [' + text + b"]}" if text[:1] in b'"{' else text
    )
    assert code == 400 and answer["error"]["message"] == "The text holds half a surrogate pair."


@pytest.mark.parametrize(
    "text", [b'"\\ud83d\\ude00"', '"\U0001f600"'.encode(), rb'"\\ud800"', b"\\ud800", b"\0"], ids=repr
)
def test_whole_characters_and_what_is_no_json_come_through(door, text):
    assert status(door, "POST", "/gradio_api/run/predict", body=text) == 200


def test_an_upload_that_would_fill_the_disk_is_refused(door, monkeypatch):
    monkeypatch.setattr("board.doors.shutil.disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert status(door, "POST", "/gradio_api/upload", body=b"x") == 507


# ---- the program's own flags


@pytest.mark.parametrize(
    ("words", "password", "message"),
    [
        (["--server_name", "0.0.0.0"], "", "others could reach this page"),
        (["--server_name", "192.0.2.1"], "", "others could reach this page"),
        (["--auth", "/none"], "", "there is no such file"),
        ([], "admin:short", "at least 8 characters"),
        (["--root", "/none"], "", "there is no such folder"),
        (["--share"], "", "Unknown flag --share"),
    ],
)
def test_the_program_refuses_what_would_open_it_to_others(words, password, message, monkeypatch):
    import train_web

    monkeypatch.setenv("PTUNING_AUTH", password)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_web.parse_arguments(words)


def test_a_password_file_may_be_in_any_encoding_of_data_files(tmp_path, monkeypatch):
    import train_web

    monkeypatch.setattr("train_web.check_port", lambda *_: None)
    for encoding in ("utf-8-sig", "utf-16", "gb18030"):
        (tmp_path / "auth").write_text("admin:管理员的密码是很长的\r\n", encoding=encoding)
        assert train_web.parse_arguments(["--auth", str(tmp_path / "auth")]).auth == ("admin", "管理员的密码是很长的")
    (tmp_path / "auth").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="--auth .*auth line 2, byte 128 .* is no text"):
        train_web.parse_arguments(["--auth", str(tmp_path / "auth")])


def test_a_password_comes_from_a_file_and_opens_other_addresses(tmp_path, monkeypatch):
    import train_web

    monkeypatch.setattr("train_web.check_port", lambda *_: None)
    (tmp_path / "auth").write_text("admin:long enough\n")
    args = train_web.parse_arguments(["--auth", str(tmp_path / "auth"), "--server_name", "0.0.0.0"])
    assert args.auth == ("admin", "long enough")
    assert str(ROOT) in args.root
