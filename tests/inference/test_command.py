"""llmrec package, recommend and serve from the command line."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from llmrec import cli
from llmrec.errors import ConfigError
from llmrec.inference import command
from llmrec.inference.recommender import Recommender


def run(arguments: list[str], capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


def test_histories_from_arguments_a_file_and_standard_input(packaged, tmp_path, capsys, monkeypatch):
    recommender = Recommender.from_pretrained(packaged)
    ids = recommender.raw_ids
    expected = [item.item_id for item in recommender.recommend([ids[:2]], k=3)[0]]
    lines = f'\ufeff{ids[0]}, {ids[1]}\n["{ids[0]}", "{ids[1]}"]\n{{"history": ["{ids[0]}", "{ids[1]}"]}}\n\n'
    (tmp_path / "histories.txt").write_text(lines)
    base = ["recommend", str(packaged), "--k", "3", "--format", "jsonl"]
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    for more, count in (
        (["--history", f"{ids[0]},{ids[1]}"], 1),
        (["--history", json.dumps(ids[:2])], 1),
        (["--file", str(tmp_path / "histories.txt")], 4),
        ([], 4),
    ):
        code, out, _ = run([*base, *more], capsys)
        rows = [json.loads(line) for line in out.splitlines()]
        assert code == 0 and len(rows) == count
        assert all([item["item_id"] for item in row["items"]] == expected for row in rows[:3])
    code, out, _ = run(["recommend", str(packaged), "--k", "2", "--explain", "--history", ids[0]], capsys)
    assert code == 0 and "collab" in out and recommender.recommend([[ids[0]]], k=1)[0][0].title in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--history", "gone"], "history 1: 'gone' is not in the catalogue"),
        (["--history", "", "--history", "gone"], "history 2: 'gone' is not in the catalogue"),
        (["--history", "gone"], "; --skip-unknown leaves such ids out"),
        (["--history", '["a, with a comma"]'], "history 1: 'a, with a comma' is not in the catalogue"),
        (["--history", "a", "--history", "[1]"], "history 2: expected a list of item ids"),
        (["--history", "gone", "--file", "x.txt"], "--history and --file are two ways"),
        (["--file", "FAR"], "far.txt, line 4: 'gone' is not in the catalogue"),
        (["--file", "LATIN"], "latin.txt: not UTF-8 text"),
        (["--history", "gone", "--k", "0"], "--k: must be a whole number of at least 1"),
        (["--file", "no-such-file"], "no-such-file: no such file"),
        (["--file", "BAD"], "bad.txt, line 2: not JSON"),
    ],
)
def test_mistakes_are_one_line(more, message, packaged, tmp_path, capsys):
    (tmp_path / "bad.txt").write_text('["P01"]\n[1,\n')
    (tmp_path / "far.txt").write_text("\n[]\n\ngone\n")
    (tmp_path / "latin.txt").write_bytes(b"\xfc\n")
    more = [str(tmp_path / f"{word.lower()}.txt") if word.isupper() else word for word in more]
    code, _, err = run(
        ["recommend", str(packaged), "--skip-unknown" if "bad.txt" in more[-1] else "--explain", *more],
        capsys,
    )
    assert code == 2 and message in err and "Traceback" not in err


def test_what_is_no_package_is_refused(tmp_path, capsys):
    code, _, err = run(["recommend", str(tmp_path), "--history", "a"], capsys)
    assert code == 2 and "is not a packaged recommender" in err and "`llmrec package RUN --out" in err
    (tmp_path / "finetune").mkdir()
    code, _, err = run(["recommend", str(tmp_path), "--history", "a"], capsys)
    assert code == 2 and f"`llmrec package {tmp_path} --out FOLDER`" in err
    (tmp_path / "finetune").rmdir()
    code, _, err = run(["package", str(tmp_path), "--out", str(tmp_path / "x")], capsys)
    assert code == 2 and f"{tmp_path} holds no finished stages; give a recipe's run folder" in err
    code, _, err = run(["serve", str(tmp_path), "--images", str(tmp_path / "none")], capsys)
    assert code == 2 and "no such folder" in err


def test_what_is_no_run_is_not_packaged(finished, packaged, tmp_path, capsys):
    out = ["--out", str(tmp_path / "x")]
    code, _, err = run(["package", str(tmp_path / "far"), *out], capsys)
    assert code == 2 and "far is no folder; give a recipe's run folder" in err
    code, _, err = run(["package", str(finished / "finetune"), *out], capsys)
    assert code == 2 and f"is the output of a single stage; give the run folder, {finished}\n" in err
    code, _, err = run(["package", str(packaged), *out], capsys)
    assert code == 2 and "is a package already; give the run folder that it was made from" in err
    (tmp_path / "begun").mkdir()
    for stage in ("prepare_data", "train_collab"):
        (tmp_path / "begun" / stage).symlink_to(finished / stage)
    code, _, err = run(["package", str(tmp_path / "begun"), *out], capsys)
    assert code == 2 and "begun has no finished encode_items, learn_semantic_ids, finetune; run its" in err


def test_who_writes_a_history_to_a_pipe_and_waits_is_answered(packaged):
    ids = Recommender.from_pretrained(packaged).raw_ids
    arguments = [sys.executable, "-m", "llmrec", "recommend", str(packaged), "--k", "1", "--format", "jsonl"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for asked in ([ids[0]], [ids[1], ids[2]]):
            process.stdin.write(",".join(asked) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["history"] == asked
        process.stdin.close()
    assert process.returncode == 0


def test_histories_before_a_mistake_are_answered(packaged, capsys, monkeypatch):
    ids = Recommender.from_pretrained(packaged).raw_ids
    for mistake in ("gone", "[1,", "[" * 100_000, f"[{'1' * 5000}]"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{ids[0]}\n{ids[1]}\n{mistake}\n{ids[2]}\n"))
        code, out, err = run(["recommend", str(packaged), "--format", "jsonl"], capsys)
        assert code == 2 and "standard input, line 3: " in err
        assert [json.loads(line)["history"] for line in out.splitlines()] == [[ids[0]], [ids[1]]]


def test_a_number_that_is_no_port_is_refused_with_the_arguments(tmp_path, capsys):
    for bad in ("99999", "-1", "http", "9" * 5000):
        code, _, err = run(["serve", str(tmp_path), "--port", bad], capsys)
        assert code == 2 and "argument --port: must be 1 to 65535" in err and "Traceback" not in err


def test_a_port_is_looked_at_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        code, out, err = run(["serve", str(tmp_path), "--port", str(taken)], capsys)
    assert (code, out) == (2, "")
    assert err == f"error: port {taken} of 127.0.0.1 is in use; give another with --port\n"
    code, _, err = run(["serve", str(tmp_path), "--host", "nope.invalid", "--port", "0"], capsys)
    assert code == 2 and "port 0 of nope.invalid cannot be taken (" in err and "while" not in err
    held = []

    def load(*_):
        with pytest.raises(OSError):
            socket.create_server(held[0].getsockname())
        raise ConfigError("looked")

    real = command.listening
    monkeypatch.setattr(command, "listening", lambda *address: held.append(real(*address)) or held[0])
    monkeypatch.setattr(command, "load", load)
    code, out, err = run(["serve", str(tmp_path), "--port", "0"], capsys)
    assert (code, out, err) == (2, "", "error: looked\n") and held[0].fileno() == -1


def test_a_server_starts_answers_and_stops_when_asked(packaged):
    script = "from llmrec.cli import main; main()"
    arguments = [sys.executable, "-c", script, "serve", str(packaged), "--port", "0"]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ})
    try:
        address = child.stdout.readline().decode().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", address)
        assert httpx.get(f"{address}/ready", timeout=60).status_code == 200, "it answers once it says where"
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) in (0, -signal.SIGTERM, 143)
    finally:
        child.kill()
