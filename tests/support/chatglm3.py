"""A tiny ChatGLM3, made of the tiny ChatGLM2: its weights and vocabulary under the name of the other family."""

import json
import shutil

from conftest import TINY


def write_tiny3(folder, **settings):
    """A folder with the small model's files as ChatGLM3's; `settings` go into config.json."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.sh"), dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    del config["model_family"]
    config |= {"_name_or_path": "THUDM/chatglm3-6b", "transformers_version": "4.30.2", **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
