"""Put methods of finished runs side by side: means over seeds, differences tested user by user.

    python tools/compare_runs.py sasrec=runs/a/evaluate:sasrec ours=runs/a/evaluate ours=runs/b/evaluate

Every argument is NAME=FOLDER or NAME=FOLDER:METHOD (mme_sid unless said otherwise), FOLDER the output of
evaluate. Several folders under one name are seeds. All must have ranked the same targets. The first name is
what the others are compared with; ± is the standard deviation over seeds, intervals and p (Wilcoxon,
corrected by Holm) are over users, of the mean over seeds.
"""

from __future__ import annotations

import argparse
import sys

from llmrec.console import guarded
from llmrec.evaluation.compare_runs import Entry, compare_runs, markdown


def main() -> None:
    made = argparse.ArgumentParser(
        prog="compare_runs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("entries", nargs="+", metavar="NAME=FOLDER[:METHOD]")
    options = made.parse_args()
    sys.exit(guarded(lambda: print(markdown(compare_runs([Entry.parse(text) for text in options.entries])))))


if __name__ == "__main__":
    main()
