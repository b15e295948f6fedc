"""Random networks have the gradients of DFA's definition: drawn and shrunk by hypothesis, or drawn
from a seed (fuzz.py).

Each is built twice by helpers/programs.py: of fastdfa's layers, and of torch's own, which are cut
by `detach` and whose cut tensors are handed s e B_l, with the signal s e, the rule's scale and B by
formulas of their own.
"""

import os
import random
import subprocess
import sys

import fuzz
import pytest
from helpers import drawing
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdfa.engine.broadcast import Broadcast

pytestmark = pytest.mark.filterwarnings("ignore")


@st.composite
def programs(draw):
    return drawing.program(lambda options: draw(st.sampled_from(options)))


@settings(max_examples=300)
@given(programs())
def test_the_gradients_are_those_of_the_definition(program):
    program.check()


@pytest.mark.slow
def test_the_gradients_of_programs_from_a_seed_are_those_of_the_definition(tmp_path):
    """For 90 s, or 1,000 of them; a seed of its own in each run, which a failure names."""
    seed = 0 if os.environ.get("CI") else random.randrange(10**6)
    options = ["--minutes", "1.5", "--programs", "1000", "--seed", str(seed)]
    assert fuzz.main([*options, "--out", str(tmp_path)]) == 0


def test_a_program_is_a_function_of_its_seed_and_number():
    first, again = (repr(drawing.numbered(3, 17)[0]) for _ in range(2))
    assert first == again != repr(drawing.numbered(3, 18)[0]) != repr(drawing.numbered(4, 18)[0])


def test_a_program_that_fails_is_written_as_a_file_that_fails(tmp_path, monkeypatch, capsys):
    """Here where every feedback is doubled, in this process and in the one that runs the file."""
    doubled = (
        "from fastdfa.engine.broadcast import Broadcast\n"
        "send = Broadcast.send\n"
        "Broadcast.send = lambda self, sent: send(self, 2 * sent)\n"
    )
    send = Broadcast.send
    monkeypatch.setattr(Broadcast, "send", lambda self, sent: send(self, 2 * sent))
    monkeypatch.setattr(fuzz, "SHRINKING", 5.0)
    assert fuzz.main(["--programs", "3", "--seed", "1", "--out", str(tmp_path)]) == 1
    written = sorted(tmp_path.glob("*.py"))
    assert written and "--first 3" in capsys.readouterr().out
    text = written[0].read_text()
    assert len(text.splitlines()) <= 20, text
    for before, code in (("", 0), (doubled, 1)):
        file = tmp_path / "alone.txt"
        file.write_text(before + text)
        done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
    assert "is off by" in done.stderr


def test_what_fails_is_shrunk_until_no_choice_can_be_left_out_or_smaller():
    found = fuzz.shrunk([5, 0, 9, 0, 0, 7, 3, 9, 1], lambda numbers: sum(numbers) >= 20)
    assert found == [7, 3, 9, 1]
