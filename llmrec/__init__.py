"""llmrec: fine-tune large language models for sequential recommendation (MME-SID).

What notebooks and scripts need is here by name (`PUBLIC`), and imported only when it is asked for:
`import llmrec` loads no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrec.console import set_up_logging as set_up_logging
    from llmrec.inference.recommender import Recommender as Recommender
    from llmrec.pipeline import run as run
    from llmrec.pipeline import run_stage as run_stage
    from llmrec.recipe import Recipe as Recipe
    from llmrec.recipe import recipe_of as recipe_of
    from llmrec.runs import Run as Run

__version__ = "0.1.0"

# Sums are rounded by how many threads share them. One setting rules torch, which `distributed` tells, and the
# libraries of NumPy and scikit-learn, which look at the environment once, when they are loaded.
if "LLMREC_NUM_THREADS" in os.environ:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, os.environ["LLMREC_NUM_THREADS"])

PUBLIC = {
    "Recipe": "llmrec.recipe",
    "Recommender": "llmrec.inference.recommender",
    "Run": "llmrec.runs",
    "recipe_of": "llmrec.recipe",
    "run": "llmrec.pipeline",
    "run_stage": "llmrec.pipeline",
    "set_up_logging": "llmrec.console",
}
"""Names, and the modules that hold them."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(PUBLIC)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *PUBLIC])
