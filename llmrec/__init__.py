"""llmrec: fine-tune large language models for sequential recommendation (MME-SID)."""

__version__ = "0.1.0"
