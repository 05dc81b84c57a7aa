"""Run one stage, report_semantic_ids, with explicit input and output folders; --help lists its settings."""

from llmrec.cli import stage_main

if __name__ == "__main__":
    stage_main("report_semantic_ids")
