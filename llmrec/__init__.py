"""llmrec: fine-tune large language models for sequential recommendation (MME-SID)."""

import os

__version__ = "0.1.0"

# Sums are rounded by how many threads share them. One setting rules torch, which `distributed` tells, and the
# libraries of NumPy and scikit-learn, which look at the environment once, when they are loaded.
if "LLMREC_NUM_THREADS" in os.environ:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, os.environ["LLMREC_NUM_THREADS"])
