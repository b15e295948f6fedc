"""Repeats a run of train.py with several seeds, for the mean of what it reaches and its spread.

    python -m benchmarks.accuracy.seeds 10 --model gcn --data DIR

After the number come options of train.py, but --seed. The runs NAME-0, NAME-1, ... and the figures
of their last epochs, NAME.json, are left in OUT. Exit status: train.py's, of the first that fails.
"""

import json
import sys
from pathlib import Path

from examples.training import train


def gathered(folders):
    """Returns the options and the machine of the first of these runs, and the summaries of all."""
    runs = [json.loads((folder / "results.json").read_text()) for folder in folders]
    kept = {key: runs[0][key] for key in ("options", "machine", "build")}
    return kept | {"runs": [{"seed": r["options"]["seed"], **r["summary"]} for r in runs]}


def main(argv):
    try:
        seeds, options = range(int(argv[0])), argv[1:]
        folder = train.options(options)[1]
    except (ValueError, IndexError, train.UsageError) as error:
        print(f"seeds: error: {error}; see the top of this file", file=sys.stderr)
        return 2
    folders = [folder.with_name(f"{folder.name}-{seed}") for seed in seeds]
    for seed, each in zip(seeds, folders, strict=True):
        status = train.main([*options, "--seed", str(seed), "--name", each.name])
        if status:
            return status
    content = gathered(folders)
    Path(f"{folder}.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
