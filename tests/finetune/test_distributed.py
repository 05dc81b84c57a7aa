"""Two processes, however they share the work, train what one process trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import save_backbone
from test_train import weights

from llmrec import finished
from llmrec.finetune.adapter import Adapter

SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import dataclasses, os, signal
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    # What sums over shared memory would be compiled first, for a minute on two cores; gloo does the same.
    from deepspeed.ops import __compatible_ops__
    assert __compatible_ops__.pop("deepspeed_shm_comm", None) is not None
import test_train
from llmrec import finished, launched, pipeline
from worlds import cycle
data = cycle()
config = dataclasses.replace(
    test_train.TINY, batch_size=100, micro_batch_tokens=150, select="valid", epochs=3,
    log_every_steps=1 if {by!r} == "SIGKILL" else 1000, save_every_minutes=1e-9,
)
whole = test_train.train.Trainer.train_step
def train_step(self, targets):
    if self.state.step == {dies_at} and launched.rank() == launched.world_size() - 1:
        os.kill(os.getpid(), signal.{by})
    return whole(self, targets)
test_train.train.Trainer.train_step = train_step
base = {base!r}
if base:
    config = dataclasses.replace(config, base_model=base, mini=test_train.MiniConfig())
stub = type("Stub", (), {{"stage": "prepare_data", "_manifest": {{"files": {{}}}}}})()
made = test_train.inputs(data)
def finetune(config, stub) -> test_train.Adapter:
    return test_train.train.finetune(config, data, *made)
finetune.every_process = True
pipeline.run_stage(finetune, config, (stub,), Path({out!r}))
"""

PROFILES = Path(__file__).parents[2] / "recipes" / "accelerate"


def start(
    folder: Path,
    world: int,
    profile: str | None,
    base: Path | None = None,
    dies_at: int = -1,
    by: str = "SIGKILL",
) -> subprocess.Popen:
    """The stage under accelerate's launcher with one of our profiles; its last process gets a signal."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = folder / "run.py"
    content = SCRIPT.format(
        paths=paths, out=str(folder / "out"), base=str(base) if base else None, dies_at=dies_at, by=by
    )
    script.write_text(content)
    command = [sys.executable]
    if profile is not None:
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(PROFILES / f"{profile}.yaml")]
        command += [*launch, "--num_processes", str(world), "--main_process_port", "0"]
    environment = {**os.environ, "LLMREC_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(process: subprocess.Popen, folder: Path, world: int) -> Adapter:
    """Wait for the run and load what it made."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-9000:]
    loaded = finished.load(Adapter, folder / "out")
    assert finished.manifest_of(loaded)["processes"] == world
    return loaded


def run(folder: Path, world: int, profile: str | None, base: Path | None) -> Adapter:
    return finish(start(folder, world, profile, base), folder, world)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base) -> dict[bool, Adapter]:
    """One process without a launcher, with the mini base and with LoRA on a frozen one."""
    return {
        lora: run(tmp_path_factory.mktemp("alone"), 1, None, base if lora else None) for lora in (False, True)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "lora"),
    [("zero1", False), ("zero2", False), ("zero3", True), ("fsdp2", True)],
)
def test_two_processes_train_the_same_model_as_one(profile, lora, alone, base, tmp_path):
    found = run(tmp_path, 2, profile, base if lora else None)
    check_same(found, alone[lora])
    assert bool(found.lora) == lora


@pytest.mark.slow
def test_a_request_to_stop_that_one_process_gets_ends_all_of_them_a_step_later(tmp_path):
    """Launchers kill whoever has not ended half a minute after it was asked to."""
    begun = start(tmp_path, 2, "ddp", dies_at=7, by="SIGTERM")
    said, _ = begun.communicate(timeout=300)
    assert begun.returncode, said[-9000:]
    assert said.count("StoppedError: stopped after step 9 of") == 2, said[-9000:]
    kept = tmp_path / ".out.unfinished" / "checkpoints"
    assert max(int(path.name.removeprefix("step-")) for path in kept.glob("step-*")) == 9


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "worlds"), [("ddp", (2, 1)), ("zero3", (1,)), ("fsdp2", (2,))])
def test_two_processes_die_and_one_or_two_go_on_to_the_same_model(profile, worlds, alone, tmp_path):
    """One of two processes is killed; the run goes on from what was kept, with as many or with one."""
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    begun = start(two, 2, profile, dies_at=7)
    said, _ = begun.communicate(timeout=300)
    assert begun.returncode != 0 and not (two / "out").exists()
    kept = sorted(path.name for path in (two / ".out.unfinished" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006", "step-00000007"], said[-9000:]
    shutil.copytree(two, one)
    folders = {2: two, 1: one}
    again = [(start(folders[world], world, profile), folders[world], world) for world in worlds]
    for process, folder, world in again:
        check_same(finish(process, folder, world), alone[False])


def check_same(found: Adapter, expected: Adapter) -> None:
    """The same weights, and in every step the same loss, so the same order of data."""
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-3, atol=1e-4)
    assert len(found.log) == len(expected.log) > 8
    for one, two in zip(expected.log, found.log):
        assert one["step"] == two["step"]
        for name in ("loss", "valid_ndcg@10"):
            assert one.get(name, 0) == pytest.approx(two.get(name, 0), rel=1e-4)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_profiles_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    wanted = {"one_gpu": "NO", "ddp": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == wanted.get(path.stem, "DEEPSPEED")
    assert config.mixed_precision == "no"
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
