"""A few seconds of fuzz.py; five minutes of each are run by hand."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("target", ["data", "checkpoint"])
def test_no_input_of_the_fuzzer_ends_in_anything_but_a_message(target):
    command = [sys.executable, ROOT / "tests" / "support" / "fuzz.py", target, "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "no finding" in done.stdout and " 0 inputs" not in done.stdout
