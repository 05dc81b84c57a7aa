"""What launchers leave in the environment, and what is made of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
import torch

from llmrec import distributed, jobs, launched
from llmrec.errors import ConfigError


@pytest.fixture
def nothing_launched(monkeypatch):
    for name in list(os.environ):
        if name.startswith(jobs.LAUNCHER):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ],
)
def test_every_launcher_says_how_many_there_are_and_which_this_is(names, nothing_launched):
    assert (launched.rank(), launched.world_size(), launched.processes_here()) == (0, 1, 1)
    for name, value in zip(names, ("1", "4", "2")):
        nothing_launched.setenv(name, value)
    assert (launched.rank(), launched.world_size(), launched.processes_here()) == (1, 4, 2)
    assert not launched.is_main()


def test_more_processes_than_gpus_are_refused_before_any_meets_another(nothing_launched):
    nothing_launched.setattr(torch.cuda, "is_available", lambda: True)
    nothing_launched.setattr(torch.cuda, "device_count", lambda: 4)
    nothing_launched.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        ConfigError, match="8 processes were started on this machine and it has 4 GPUs; start"
    ):
        distributed.state.__wrapped__()


def test_processes_that_nothing_brings_together_are_refused(nothing_launched):
    """As under mpirun on GPUs: each would take itself for the only one, or wait for others in vain."""
    import accelerate

    nothing_launched.setenv("OMPI_COMM_WORLD_SIZE", "4")
    alone = types.SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    nothing_launched.setattr(accelerate, "PartialState", lambda **_: alone)
    with pytest.raises(ConfigError, match="4 processes were started by a launcher that does not bring them"):
        distributed.state.__wrapped__()


def test_one_process_spreads_nothing(nothing_launched):
    """accelerate would do so by itself, in its own way, on a GPU."""
    nothing_launched.setenv("ACCELERATE_USE_FSDP", "true")
    assert not launched.uses_fsdp()
    distributed.state.__wrapped__()
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    nothing_launched.setenv("ACCELERATE_USE_FSDP", "true")
    nothing_launched.setenv("WORLD_SIZE", "2")
    assert launched.uses_fsdp()


@pytest.mark.parametrize(
    ("name", "what"), [("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "a parallelism config")]
)
def test_parallelism_that_nothing_here_knows_of_is_refused(name, what, nothing_launched):
    nothing_launched.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match=rf"launched with {what}, which .* --config_file recipes/accel"):
        distributed.state.__wrapped__()


def test_what_accelerate_is_told_in_vain_is_said(nothing_launched):
    assert launched.left_aside("fp32") == []
    for name, value in (("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "NO")):
        nothing_launched.setenv(f"ACCELERATE_{name}", value)
    assert launched.left_aside("bf16") == []
    nothing_launched.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    nothing_launched.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    precision, dynamo, steps = launched.left_aside("fp32")
    assert precision.startswith("accelerate's mixed_precision=bf16 is left aside: finetune.precision=fp32 ")
    assert dynamo.startswith("accelerate's dynamo_backend=inductor is left aside: finetune.compile=true ")
    assert steps.startswith("accelerate's gradient_accumulation_steps=4 is left aside: finetune.batch_size ")


def test_what_one_process_wants_is_done_at_once():
    wanted = distributed.Agreement()
    assert [wanted(False, True), wanted(True, False)] == [(False, True), (True, False)]
    assert wanted.settle() == ()


def test_processes_of_a_comparison_know_nothing_of_its_launcher():
    of_launcher = {
        "RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x",
        "ACCELERATE_USE_FSDP": "true", "OMPI_COMM_WORLD_SIZE": "8",
    }  # fmt: skip
    kept = {"PATH": "/bin", "HF_HOME": "/hub", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "1"}
    assert jobs.without_launcher(of_launcher | kept) == kept


def test_a_process_whose_others_never_come_says_so_and_can_be_stopped(nothing_launched):
    """A launcher's variables are left over; the command's own handlers would wait for Python to run."""
    script = (
        "import logging, signal\n"
        "from llmrec import distributed\n"
        "logging.basicConfig()\n"
        "signal.signal(signal.SIGTERM, print)\n"
        "distributed.MEETING_SECONDS = 0.5\n"
        "distributed.state()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    left_over = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **left_over, "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(f"waiting for all of 2 processes at 127.0.0.1:{port}" in line for line in lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_a_launcher_that_shows_each_process_a_gpu_of_its_own_is_taken(nothing_launched):
    import accelerate

    alone = types.SimpleNamespace(num_processes=8, device=torch.device("cpu"))
    nothing_launched.setattr(accelerate, "PartialState", lambda **_: alone)
    nothing_launched.setattr(torch.cuda, "is_available", lambda: True)
    nothing_launched.setattr(torch.cuda, "device_count", lambda: 1)
    nothing_launched.setenv("LOCAL_WORLD_SIZE", "8")
    nothing_launched.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert distributed.state.__wrapped__() is alone
    nothing_launched.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="8 processes were started on this machine and it has 1 GPUs"):
        distributed.state.__wrapped__()


def test_a_launch_that_leaves_one_process_on_a_cpu_says_so(nothing_launched, caplog):
    nothing_launched.setenv("ACCELERATE_USE_CPU", "true")
    distributed.state.__wrapped__()
    assert "starts one process" not in caplog.text
    nothing_launched.setenv("MASTER_PORT", "29500")
    distributed.state.__wrapped__()
    assert "`accelerate launch --cpu` starts one process whatever --num_processes says" in caplog.text


def test_every_process_reads_weights_where_they_are_spread(nothing_launched):
    """Else accelerate has one process read them, and the others begin with what lies in memory."""
    import accelerate

    two = types.SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    nothing_launched.setattr(accelerate, "PartialState", lambda **_: two)
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")):
        nothing_launched.setenv(name, value)
    nothing_launched.setenv("WORLD_SIZE", "2")
    distributed.state.__wrapped__()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_an_error_that_another_process_caused_is_told_from_an_own(nothing_launched):
    of_others = [
        torch.distributed.DistBackendError("NCCL watchdog"),
        RuntimeError("[gloo/transport/tcp/pair.cc:535] Connection closed by peer [127.0.0.1]:31415"),
        RuntimeError("writev: Broken pipe"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
    ]
    assert not any(map(distributed.lost_another, of_others)), "there is no other"
    nothing_launched.setenv("WORLD_SIZE", "2")
    assert all(map(distributed.lost_another, of_others))
    assert not distributed.lost_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_after_all_have_met_a_process_is_stopped_as_before_and_nothing_is_said(nothing_launched, caplog):
    nothing_launched.setattr(distributed, "MEETING_SECONDS", 0.05)
    nothing_launched.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, own := lambda *_: None)
    try:
        with distributed.meeting_others():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    time.sleep(0.1)
    assert "waiting for all" not in caplog.text
