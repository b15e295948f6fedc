"""Random networks against the definition of DFA, until the time is up.

    python tests/fuzz.py --minutes 10
    python tests/fuzz.py --seed 7 --first 1200 --programs 5000      goes on where it stopped

Program i of a seed is always the same one. Of each that fails the choices that draw it are shrunk,
as long as it fails in the same way, and it is written down as a file of Python that fails alone.
"""

import argparse
import random
import sys
import time
import warnings
from pathlib import Path

import torch
from helpers import drawing

TESTS = Path(__file__).parent
SHRINKING = 30.0  # seconds at most for each that fails


def failure(program):
    """How it fails; None where it does not."""
    try:
        program.check()
    except Exception as error:
        return error


def shrunk(numbers, fails):
    """Numbers that still fail, of which none can be left out or made smaller."""
    end, size = time.monotonic() + SHRINKING, max(len(numbers), 1)
    while size:
        changed, place = False, 0
        while place < len(numbers) and time.monotonic() < end:
            before, these, after = (
                numbers[:place],
                numbers[place : place + size],
                numbers[place + size :],
            )
            smaller = [before + after, [*before, *[0] * len(these), *after]]
            if size == 1:
                smaller += [[*before, k, *after] for k in range(1, these[0])]
            found = next((s for s in smaller if s != numbers and fails(s)), None)
            if found is None:
                place += size
            else:
                numbers, changed = found, True
        if not changed:
            size //= 2
    return numbers


def smallest(numbers, error):
    """The shrunk program that fails by the same kind of error, and how."""

    def fails(numbers):
        return type(failure(drawing.renumbered(numbers))) is type(error)

    program = drawing.renumbered(shrunk(numbers, fails))
    return program, failure(program)


def lines_of(data):
    """The `repr` of a program, one line for each of its arguments."""
    text, depth, start, lines = repr(data), 0, 0, []
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 1 and text[place : place + 2] == ", ":
            lines.append(text[start : place + 1].strip())
            start = place + 1
    return [*lines, text[start:].strip()]


def first_line(error):
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def written(program, error, what):
    """What fails as a file of Python."""
    first, *rest = lines_of(program)
    return "\n".join([
        f'"""{what}: {first_line(error)}"""',
        "import sys, warnings",
        "",
        f"sys.path[:0] = {[str(TESTS), str(TESTS.parent)]}",
        "import torch",
        "from fastdfa import Feedback",
        "from helpers.programs import *",
        "",
        'warnings.simplefilter("ignore")',
        f"program = {first}",
        *[f"    {line}" for line in rest],
        "program.check()",
        "",
    ])  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="how long (2, unless programs are given)")
    parser.add_argument("--programs", type=int, help="how many at most")
    parser.add_argument("--seed", type=int, help="of the programs; one of its own if not given")
    parser.add_argument("--first", type=int, default=0, help="the number of the first program")
    parser.add_argument("--out", type=Path, default=TESTS.parent / "build" / "fuzz")
    options = parser.parse_args(argv)
    minutes = 2.0 if options.minutes is None and options.programs is None else options.minutes
    end = time.monotonic() + 60 * (minutes or 1e9)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    number, failed = options.first, 0
    last = None if options.programs is None else number + options.programs
    print(f"seed {seed}, from program {number}", flush=True)
    warnings.simplefilter("ignore")
    while number != last and time.monotonic() < end:
        program, numbers = drawing.numbered(seed, number)
        error = failure(program)
        if error is not None:
            failed += 1
            program, error = smallest(numbers, error)
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"seed-{seed}-program-{number}.py"
            path.write_text(written(program, error, f"program {number} of seed {seed}"))
            print(f"program {number} fails: {first_line(error)}\n    {path}", flush=True)
        number += 1
        if number % 500 == 0:
            print(f"{number} programs, {failed} failed", flush=True)
    done = number - options.first
    print(f"{done} programs, {failed} failed. Go on with --seed {seed} --first {number}")
    return min(failed, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
