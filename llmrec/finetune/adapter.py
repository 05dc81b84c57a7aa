"""What fine-tuning learned, as an artefact: LoRA matrices in PEFT's format, and everything else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor

from llmrec.files import load_tensors, read_json, read_jsonl, write_json, write_jsonl
from llmrec.shown import Shown

PER_ITEM = ("target_table", "table", "train_count")
"""Last parts of the names of those heads that have one row per item."""


def per_item(name: str) -> bool:
    """Whether a head's rows are items; lengths cannot tell, since a width may equal the catalogue's size."""
    return name.rpartition(".")[2] in PER_ITEM


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Adapter(Shown):
    """The trained weights of MME-SID; made by finetune.

    Files: heads.safetensors (item tokens, gate, target table), log.jsonl, llmrec_config.json, either
    adapter_model.safetensors + adapter_config.json (LoRA; loads with plain PEFT on the base model) or
    base/ (a base model that was trained in full), and scaling.safetensors if item vectors are scaled.
    """

    stage: ClassVar[str] = "finetune"

    catalog: str
    settings: dict[str, Any]
    """The finetune config, the prompt's token ids, the base model's revision and size, and ``num_added``, how
    many of the items came after training, if some did."""
    heads: dict[str, Tensor]
    """Trained weights outside the base model, and train_count int64 (N + 1,)"""
    scaling: dict[str, Tensor] = field(default_factory=dict)
    """How item vectors are scaled, see `llmrec.finetune.scaling`; empty if that depends on no catalogue"""
    lora: dict[str, Tensor] = field(default_factory=dict)
    """LoRA matrices under PEFT's names; empty if the base was trained in full"""
    lora_config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    """The whole base model if it was trained in full, else empty"""
    base_config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    """Targets, tokens, seconds, trainable parameters by part, validation metrics."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """Rows of training (step, loss, tokens_per_second...) and of validation (epoch, valid_ndcg@10...)."""
    analysis: dict[str, Any] = field(default_factory=dict)
    """tau: before and after, by item table; spectra by item table (see finetune/analysis.py)."""

    def save(self, folder: Path) -> None:
        # One entry per header: with more, their order, and so the file's bytes, would be left to chance.
        _save_tensors(folder / "heads.safetensors", self.heads, {"catalog": self.catalog})
        if self.scaling:
            _save_tensors(folder / "scaling.safetensors", self.scaling, {"catalog": self.catalog})
        write_json(folder / "llmrec_config.json", {"catalog": self.catalog, **self.settings})
        write_json(folder / "metrics.json", self.metrics)
        write_jsonl(folder / "log.jsonl", self.log)
        write_json(folder / "analysis.json", self.analysis)
        if self.lora:
            _save_tensors(folder / "adapter_model.safetensors", self.lora, {"format": "pt"})
            write_json(folder / "adapter_config.json", self.lora_config)
        if self.base:
            (folder / "base").mkdir()
            _save_tensors(folder / "base" / "model.safetensors", self.base, {"format": "pt"})
            write_json(folder / "base" / "config.json", self.base_config)

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        folder = Path(folder)
        settings = read_json(folder / "llmrec_config.json")
        catalog = settings.pop("catalog")
        optional: dict[str, Any] = {}
        if (folder / "adapter_config.json").exists():
            optional["lora"] = load_tensors(folder / "adapter_model.safetensors", "pt")
            optional["lora_config"] = read_json(folder / "adapter_config.json")
        if (folder / "scaling.safetensors").exists():
            optional["scaling"] = load_tensors(folder / "scaling.safetensors", "pt", catalog)
        if (folder / "base").exists():
            optional["base"] = load_tensors(folder / "base" / "model.safetensors", "pt")
            optional["base_config"] = read_json(folder / "base" / "config.json")
        return cls(
            catalog=catalog,
            settings=settings,
            heads=load_tensors(folder / "heads.safetensors", "pt", catalog),
            metrics=read_json(folder / "metrics.json"),
            log=read_jsonl(folder / "log.jsonl"),
            analysis=read_json(folder / "analysis.json"),
            **optional,
        )


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata=metadata)
