"""The training page as gr.Blocks: seven tabs over the programs that exist, and a strip on what runs above them.

What its parts do is in choosing.py and events.py.
"""

import gradio as gr

from board.choosing import NAMES
from board.commands import EMPTY, PRESETS, STAGES, known_flags
from board.events import Page
from board.files import COLUMNS
from board.words import TEXTS
from checkpoints.ways import DEFAULT_METHOD, TRAINED
from common.messages import cut_short
from serving.opening import keep_theme, translations

SECONDS = 2  # between two looks at the files
QUICK = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
BROWSER = {"show_progress": "hidden", "api_visibility": "private"}  # nothing is asked of the server
# What takes seconds or minutes stands in a queue, two of a kind at once.
LONG = {"concurrency_limit": 2, "api_visibility": "private", "trigger_mode": "once"}
SAVE = """(...values) => {
  const link = document.createElement("a");
  const settings = Object.fromEntries(Object.entries(values.at(-1) ?? {}).filter(([, value]) => value?.length));
  link.href = URL.createObjectURL(new Blob([JSON.stringify(settings, null, 2)], { type: "application/json" }));
  link.download = "settings.json";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def build(page: Page):
    """(the page as gr.Blocks, its translations)."""
    i18n = translations(TEXTS)

    def field(name, text="", label=None, **more):
        """One line of text."""
        how = {"max_lines": 1, "max_length": 500, "min_width": 150, **more}
        return gr.Textbox(text, label=i18n(label or name), elem_id=name, **how)

    def bits(name):
        """The choice of weights."""
        choices = [(i18n("bits_float"), ""), (i18n("bits_8"), "8"), (i18n("bits_4"), "4")]
        return gr.Radio(choices, value="", label=i18n("bits"), elem_id=name)

    def one_of(name, values, value=None, kind=None, **more):
        """The choice of one of several values, each with a text of its own."""
        choices = [(i18n(f"{kind or name}_{each}"), each) for each in values]
        return gr.Radio(choices, value=value, label=i18n(kind or name), elem_id=name, **more)

    def html(name):
        return gr.HTML(elem_id=name)

    def choose(name, choices, value=None, **more):
        return gr.Dropdown(
            choices,
            value=value,
            label=i18n(more.pop("label", name)),
            elem_id=name,
            allow_custom_value=True,
            min_width=150,
            **more,
        )

    def button(name, **more):
        return gr.Button(i18n(name), elem_id=f"button-{name}", **{"size": "md", "min_width": 110, "scale": 0, **more})

    with gr.Blocks(title="ChatGLM2 P-Tuning", analytics_enabled=False, fill_width=True) as blocks:
        kept = gr.BrowserState(
            {**EMPTY, **PRESETS["tiny"]}, storage_key="settings of a run", secret="kept in this browser"
        )
        look = gr.BrowserState(None, storage_key="theme of the page", secret="kept in this browser")
        tab, seen, looked, sources = gr.State("model"), gr.State({}), gr.State(None), gr.State([])
        timer = gr.Timer(SECONDS)
        f = {}  # the settings' fields
        with gr.Row(elem_id="head"):
            gr.Markdown(i18n("heading"), elem_id="title")
            run = choose("run", [])
            theme = gr.Button(i18n("theme"), size="sm", scale=0, min_width=60, elem_id="theme")
        strip = html("strip")
        tabs = {}
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
            with gr.Tab(i18n("tab_model"), id="model", elem_id="tab-model") as tabs["model"]:
                f["model"] = choose("model", ["tiny", "THUDM/chatglm2-6b"], "tiny")
                model_said = html("model-said")
                f["family"] = choose("family", [], "", visible=False)
                f["bits"] = bits("bits")
                estimate, memory = button("estimate"), html("memory")
            with gr.Tab(i18n("tab_data"), id="data", elem_id="tab-data") as tabs["data"]:
                with gr.Row():
                    path = field("path", "AdvertiseGen/sample", scale=4)
                    see = button("look")
                    upload = gr.UploadButton(i18n("upload"), size="md", scale=0, min_width=110, elem_id="upload")
                found = html("found")
                with gr.Row():
                    columns = [choose(name, []) for name in COLUMNS]
                with gr.Row():
                    use, add = button("use", variant="primary"), button("add")
                    share = field("share", max_length=20)
                    clear = button("clear")
                unchosen = html("unchosen")
                chosen = html("chosen")
                with gr.Row():
                    f["dev"], f["dev_ratio"] = field("dev"), field("dev_ratio")
                check, checked = button("check"), html("checked")
                f["data"] = gr.Textbox("", visible=False, elem_id="data")
            with gr.Tab(i18n("tab_settings"), id="settings", elem_id="tab-settings") as tabs["settings"]:
                preset = one_of("preset", PRESETS)
                with gr.Row():
                    for name in ("steps", "epochs", "batch", "lr", "prefix", "source", "target"):
                        f[name] = field(name, min_width=120)
                with gr.Row():
                    f["method"] = one_of("method", TRAINED, DEFAULT_METHOD)
                    f["stage"] = one_of("stage", STAGES, "sft")
                f["name"] = field("name")
                with gr.Accordion(i18n("more"), open=False, elem_id="more"):
                    with gr.Row():
                        for name in ("accumulation", "save", "gpus", "start"):
                            f[name] = field(name)
                    with gr.Row():
                        helped = [(f"{name}: {cut_short(flag.help, 80)}", name) for name, flag in known_flags().items()]
                        flag = choose("flag", helped)
                        value = field("value")
                        add_flag = button("add_flag")
                    flag_said = html("flag-said")
                    f["extra"] = gr.Textbox(
                        "", label=i18n("extra"), lines=3, max_lines=12, max_length=6000, elem_id="extra"
                    )
                with gr.Row():
                    save = button("save_settings", min_width=150)
                    load = gr.UploadButton(
                        i18n("load_settings"), file_types=[".json"], size="md", scale=0, min_width=150, elem_id="load"
                    )
                load_said = html("load-said")
            with gr.Tab(i18n("tab_run"), id="run", elem_id="tab-run") as tabs["run"]:
                with gr.Row():
                    start, stop = button("begin", variant="primary"), button("stop", variant="stop", visible=False)
                    go_on, adopt = button("continue", visible=False), button("adopt", visible=False)
                will_train = html("will-train")
                choice = one_of("choice", ("continue", "name", "overwrite"), kind="exists", visible=False)
                run_said, card, plots, tail = html("run-said"), html("card"), html("plots"), html("tail")
            with gr.Tab(i18n("tab_evaluate"), id="evaluate", elem_id="tab-evaluate") as tabs["evaluate"]:
                with gr.Row():
                    step = choose("step", [], "", label="checkpoint")
                    rows, data = field("rows", label="eval_rows", max_length=9), field("eval-data", label="eval_data")
                with gr.Row():
                    how = {"placeholder": i18n("as_trained")}
                    called = [field(f"eval-{name}", label=name, **how) for name in COLUMNS]
                with gr.Row():
                    evaluate = button("evaluate", variant="primary")
                    end_evaluation = gr.Button(
                        i18n("stop"), size="md", scale=0, min_width=110, visible=False, elem_id="end-evaluation"
                    )
                evaluate_said, evaluated = html("evaluate-said"), html("evaluated")
                with gr.Row():
                    compared = choose("compared", [], multiselect=True, label="compare_runs", max_choices=8)
                    compare = button("compare")
                comparison = html("comparison")
            with gr.Tab(i18n("tab_chat"), id="chat", elem_id="tab-chat") as tabs["chat"]:
                with gr.Row():
                    chat_step = choose("chat-step", [], "", label="checkpoint")
                    open_chat = button("open_chat", variant="primary", min_width=140)
                    end_chat = button("end_chat", min_width=250)
                chat_said, chat = html("chat-said"), html("chat")
            with gr.Tab(i18n("tab_export"), id="export", elem_id="tab-export") as tabs["export"]:
                with gr.Row():
                    export_step = choose("export-step", [], "", label="checkpoint")
                    export_bits = bits("export-bits")
                    export = button("export", variant="primary")
                export_said, exported = html("export-said"), html("exported")
        command = gr.Textbox(
            label=i18n("command"), lines=2, max_lines=6, interactive=False, buttons=["copy"], elem_id="command"
        )
        wrong = html("wrong")

        f["sources"] = sources
        fields = [f[name] for name in NAMES]
        shown = [command, wrong, kept, will_train]
        now = [run, strip, card, plots, tail, stop, go_on, adopt, end_evaluation, step, chat_step, export_step]
        now += [evaluated, chat, exported, compared, run_said, seen]
        looking = {"fn": page.tick, "inputs": [run, tab, seen], "outputs": now, **QUICK}
        latest = {**QUICK, "trigger_mode": "always_last"}  # what changes while an answer is on its way counts, too
        refreshing = {"fn": page.refresh, "inputs": fields, "outputs": shown, **latest}
        modelling = {
            "fn": page.look_at_model,
            "inputs": [f["model"], f["family"]],
            "outputs": [model_said, f["family"]],
            **latest,
        }

        timer.tick(**looking)
        run.input(lambda: {}, None, [seen], **QUICK).then(**looking)
        for name, each in tabs.items():
            each.select(lambda name=name: name, None, [tab], **QUICK).then(**looking)

        texts = [
            f[name] for name in NAMES if name not in ("sources", "model", "family", "bits", "method", "stage", "data")
        ]
        gr.on([event for each in texts for event in (each.blur, each.submit)], **refreshing)
        gr.on([f["bits"].input, f["method"].input, f["stage"].input], **refreshing)
        gr.on([f["model"].input, f["model"].blur], **modelling).then(**refreshing)
        f["family"].input(**modelling).then(**refreshing)
        estimate.click(page.estimate, fields, [memory], **LONG)

        looking_at = {"outputs": [found, *columns, looked], **QUICK}
        gr.on([see.click, path.submit], page.look_at_rows, [path], **looking_at)
        upload.upload(page.uploaded, [upload], [path, found, *columns, looked], **LONG)
        for pressed, chosen_as in ((use, page.use_rows), (add, page.add_rows)):
            pressed.click(
                chosen_as,
                [looked, sources, *columns, share],
                [unchosen, sources, f["data"], f["dev"], f["dev_ratio"]],
                **QUICK,
            ).then(page.rows_chosen, [sources], [chosen], **QUICK).then(**refreshing)
        clear.click(lambda: ([], "", "", ""), None, [sources, f["data"], f["dev"], f["dev_ratio"]], **QUICK).then(
            page.rows_chosen, [sources], [chosen], **QUICK
        ).then(**refreshing)
        check.click(page.check_rows, fields, [checked], **LONG)

        preset.input(page.preset, [preset, *fields], fields, **QUICK).then(**refreshing).then(**modelling)
        flag.input(page.flag_help, [flag], [flag_said], **QUICK)
        add_flag.click(page.add_flag, [flag, value, f["extra"]], [f["extra"], flag_said], **QUICK).then(**refreshing)
        save.click(**refreshing).then(None, [kept], None, js=SAVE, **BROWSER)
        load.upload(page.load, [load], [*fields, load_said], **QUICK).then(
            page.rows_chosen, [sources], [chosen], **QUICK
        ).then(**refreshing)

        start.click(
            page.start, [choice, *fields], [run_said, choice, run, f["name"]], **{**QUICK, "trigger_mode": "once"}
        ).then(**looking)
        stop.click(page.stop, [run], [run_said], **QUICK).then(**looking)
        go_on.click(page.go_on, [run, *fields], [run_said], **QUICK).then(**looking)
        adopt.click(page.adopt, [run], [run_said], **QUICK).then(**looking)

        evaluate.click(page.evaluate, [run, step, data, rows, *called], [evaluate_said], **QUICK).then(**looking)
        end_evaluation.click(lambda name: page.stop_job(name, "evaluate"), [run], [evaluate_said], **QUICK)
        compare.click(page.compare, [compared], [comparison], **LONG)
        open_chat.click(page.open_chat, [run, chat_step], [chat_said], **LONG).then(**looking)
        end_chat.click(page.end_chat, None, [chat_said], **QUICK).then(**looking)
        export.click(page.export, [run, export_step, export_bits], [export_said], **QUICK).then(**looking)

        keep_theme(blocks, theme, look, **BROWSER)
        blocks.load(page.restore, [kept], fields, **QUICK).then(page.rows_chosen, [sources], [chosen], **QUICK).then(
            **refreshing
        ).then(**modelling)
        blocks.load(**looking)
        blocks.unload(page.left)
    return blocks, i18n
