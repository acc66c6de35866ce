"""Runs that cannot be continued: each is refused in one message."""

from support.damage import PREFIX, copy_run, cut, edit_json, remove, torch_payload, write
from support.refusals import here, refuse, table, train_flags, trained  # noqa: F401, fixtures

# What is wrong, how a run is damaged before it is continued, what the message says.
RESUMES = [
    ("the run is there and nothing is said", None, {}, "already has checkpoint-2"),
    ("a broken state", write("trainer_state.json", "{"), {"resume_from_checkpoint": "run/checkpoint-2"},
     "trainer_state.json"),
    ("an official checkpoint", lambda f: edit_json(f / "trainer_state.json", train_batch_size=...),
     {"resume_from_checkpoint": "run/checkpoint-2"}, "official scripts of 2023"),
    ("no state", remove("trainer_state.json"), {"resume_from_checkpoint": "run/checkpoint-2"}, "checkpoint-2"),
    ("a state without a step", lambda f: edit_json(f / "trainer_state.json", global_step=...),
     {"resume_from_checkpoint": "run/checkpoint-2"}, "trainer_state.json"),
    ("a state of text", lambda f: edit_json(f / "trainer_state.json", global_step="two"),
     {"resume_from_checkpoint": "run/checkpoint-2"}, "trainer_state.json"),
    ("no weights", remove(PREFIX), {"resume_from_checkpoint": "run/checkpoint-2"}, "checkpoint-2"),
    ("weights that would run code", torch_payload(PREFIX), {"resume_from_checkpoint": "run/checkpoint-2"}, PREFIX),
    ("an optimizer that would run code", torch_payload("optimizer.pt"), {"resume_from_checkpoint": "run/checkpoint-2"},
     "optimizer.pt"),
    ("a cut optimizer", cut("optimizer.pt", 900), {"resume_from_checkpoint": "run/checkpoint-2"}, "optimizer.pt"),
    ("a cut scheduler", cut("scheduler.pt", 400), {"resume_from_checkpoint": "run/checkpoint-2"}, "scheduler.pt"),
    ("a cut random state", cut("rng_state.pth", 400), {"resume_from_checkpoint": "run/checkpoint-2"}, "rng_state.pth"),
    ("another prefix length", None, {"resume_from_checkpoint": "run/checkpoint-2", "pre_seq_len": 5}, "checkpoint-2"),
]  # fmt: skip


@table(RESUMES)
def test_a_run_is_not_continued(case, forks, trained, here):
    damage, more, says = case
    copy_run(trained, here / "run")
    if damage:
        damage(here / "run" / "checkpoint-2")
    refuse(forks, here, train_flags(here, output_dir="run", max_steps=4, **more), says)
    assert not (here / "executed").exists()
