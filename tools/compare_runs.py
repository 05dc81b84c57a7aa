"""Put methods of finished runs side by side: means over seeds, differences tested user by user.

    python tools/compare_runs.py sasrec=runs/a:sasrec ours=runs/a ours=runs/b

Every argument is NAME=FOLDER or NAME=FOLDER:METHOD (what was fine-tuned, unless said otherwise), FOLDER a
finished run or the output of evaluate. Several folders under one name are seeds. All must have ranked the
same targets. The first name is what the others are compared with; ± is the standard deviation over seeds,
intervals and p (paired t-test, corrected by Holm) are over users, of the mean over seeds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from llmrec.console import guarded
from llmrec.evaluation.compare_runs import Entry, compare_runs, markdown


def main() -> None:
    made = argparse.ArgumentParser(
        prog="compare_runs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("entries", nargs="+", metavar="NAME=FOLDER[:METHOD]")
    options = made.parse_args()
    sys.exit(guarded(lambda: print(markdown(compare_runs([entry_of(text) for text in options.entries])))))


def entry_of(text: str) -> Entry:
    """One argument; of a run folder its evaluation."""
    found = Entry.parse(text)
    inside = found.folder / "evaluate"
    return replace(found, folder=inside) if inside.is_dir() else found


if __name__ == "__main__":
    main()
