"""What people get wrong: one line that says what to do, exit code 2, nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llmrec import cli

USERS, ITEMS = 12, 9


@pytest.fixture
def shop(tmp_path) -> dict[str, str]:
    """A small correct data set: interactions.csv, items.csv and pictures."""
    rng = np.random.default_rng(0)
    rows = ["user_id,item_id,timestamp,stars"]
    for user in range(USERS):
        for step, item in enumerate(rng.permutation(ITEMS)[:6]):
            rows.append(f"u{user},i{item},{100 * user + step},{1 + item % 5}")
    (tmp_path / "interactions.csv").write_text("\n".join(rows) + "\n")
    items = ["item_id,title,picture"]
    for item in range(ITEMS):
        Image.new("RGB", (8, 8), (20 * item, 90, 200 - 20 * item)).save(tmp_path / f"{item}.png")
        items.append(f"i{item},Thing number {item},{item}.png")
    (tmp_path / "items.csv").write_text("\n".join(items) + "\n")
    return {"interactions": str(tmp_path / "interactions.csv"), "items": str(tmp_path / "items.csv")}


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


def append(path: str, content: bytes) -> None:
    Path(path).write_bytes(Path(path).read_bytes() + content)


def call(arguments: list[str], capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    return left.value.code, capsys.readouterr().err


def prepare(shop: dict[str, str], out: Path, *settings: str) -> list[str]:
    given = ["source=table", f"interactions={shop['interactions']}", f"items={shop['items']}", "k_core=3"]
    return ["prepare_data", "--out", str(out), "--set", *given, *settings]


def refused(arguments: list[str], words: list[str], out: Path, capsys) -> None:
    """The command fails with one line that holds the words, and leaves nothing behind."""
    code, err = call(arguments, capsys)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]
    assert not out.exists()
    left = {path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")}
    assert left <= {f".{out.name}.unfinished"}  # what the next run may go on from


def test_the_shop_itself_is_fine(shop, tmp_path, capsys):
    out = tmp_path / "out"
    code, err = call(prepare(shop, out, "image_column=picture"), capsys)
    assert code == 0, err
    assert pq.read_table(out / "items.parquet").num_rows == ITEMS


BAD_DATA = {
    "missing file": (lambda s: Path(s["interactions"]).unlink(), [], ["interactions.csv", "no such file"]),
    "empty file": (lambda s: Path(s["interactions"]).write_text(""), [], ["interactions.csv", "empty"]),
    "header only": (
        lambda s: Path(s["interactions"]).write_text("user_id,item_id,timestamp\n"), [], ["interactions.csv"],
    ),
    "wrong column": (
        lambda s: edit(s["interactions"], "user_id", "userid"), [], ["user_id", "'userid'"],
    ),
    "text in a timestamp": (
        lambda s: edit(s["interactions"], ",100,", ",yesterday,"), [],
        ["interactions.csv", "row 8", "timestamp", "yesterday"],
    ),
    "empty user": (lambda s: edit(s["interactions"], "u1,", ","), [], ["row 8", "user_id"]),
    "ragged row": (lambda s: edit(s["interactions"], ",100,", ",100,7,7,"), [], ["interactions.csv"]),
    "not UTF-8": (
        lambda s: append(s["interactions"], b"\xff\xfe,i1,1,1\n"),
        [], ["interactions.csv"],
    ),
    "text in a rating": (
        lambda s: None, ["rating_column=user_id", "min_rating=1"], ["user_id", "row 2", "u0"],
    ),
    "duplicate item row": (
        lambda s: edit(s["items"], "i3,Thing", "i2,Other,x.png\ni3,Thing"), [], ["items.csv", "i2"],
    ),
    "unknown item": (
        lambda s: edit(s["interactions"], "u0,i", "u0,zz"), [], ["zz", "items.csv", "unknown_items"],
    ),
    "user with one interaction": (
        lambda s: edit(s["interactions"], "u0,", "lonely,"), ["k_core=0"], ["lonely", "k_core"],
    ),
    "nothing left": (lambda s: None, ["k_core=50"], ["k_core"]),
    "missing text column": (lambda s: None, ["text_columns=brand"], ["items.csv", "brand"]),
    "unknown setting": (lambda s: None, ["k_cor=5"], ["k_cor", "k_core"]),
    "another stage's setting": (lambda s: None, ["train_collab.epochs=3"], ["is a setting of train_collab;"]),
    "impossible value": (lambda s: None, ["k_core=-1"], ["k_core", "-1"]),
    "wrong type": (lambda s: None, ["k_core=many"], ["k_core", "many"]),
    "unknown choice": (lambda s: None, ["split=random"], ["split", "leave_one_out"]),
    "setting without effect": (lambda s: None, ["valid_rate=0.2"], ["valid_rate"]),
    "rating without column": (lambda s: None, ["min_rating=3"], ["rating_column"]),
    "no equals sign": (lambda s: None, ["k_core"], ["k_core", "field=value"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_and_settings_are_refused(name, shop, tmp_path, capsys):
    spoil, settings, words = BAD_DATA[name]
    spoil(shop)
    refused(prepare(shop, tmp_path / "out", *settings), words, tmp_path / "out", capsys)


def test_a_broken_picture_is_named(shop, tmp_path, capsys):
    call(prepare(shop, tmp_path / "data", "image_column=picture"), capsys)
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:40])
    out = tmp_path / "out"
    command = ["encode_items", "--prepare-data", str(tmp_path / "data"), "--out", str(out)]
    refused(command, ["4.png", "image.on_error"], out, capsys)


@pytest.mark.parametrize(
    ("rows", "value", "word"), [(5, 1.0, "i5"), (ITEMS, float("nan"), "NaN")], ids=["too few rows", "NaN"]
)
def test_bad_vectors_are_refused(shop, tmp_path, capsys, rows, value, word):
    call(prepare(shop, tmp_path / "data"), capsys)
    vectors = np.ones((rows, 3), dtype=np.float32)
    vectors[-1, 0] = value
    table = pa.table({"item_id": [f"i{n}" for n in range(rows)], "vector": vectors.tolist()})
    pq.write_table(table, tmp_path / "vectors.parquet")
    out = tmp_path / "out"
    command = ["train_collab", "--prepare-data", str(tmp_path / "data"), "--out", str(out)]
    given = ["provider=precomputed", f"vectors={tmp_path / 'vectors.parquet'}"]
    refused([*command, "--set", *given], ["vectors.parquet", word], out, capsys)


def test_mixed_catalogues_are_refused(shop, finished, tmp_path, capsys):
    call(prepare(shop, tmp_path / "data"), capsys)
    out = tmp_path / "out"
    command = ["learn_semantic_ids", "--prepare-data", str(tmp_path / "data"), "--out", str(out)]
    for name in ("train_collab", "encode_items"):
        command += [f"--{name.replace('_', '-')}", str(finished / name)]
    refused(command, ["train_collab was made from another prepare_data"], out, capsys)


def test_a_damaged_or_foreign_input_folder_is_refused(finished, tmp_path, capsys):
    copy, out = tmp_path / "data", tmp_path / "out"
    command = ["train_collab", "--prepare-data", str(copy), "--out", str(out)]
    refused(command, ["data", "not the output of a finished stage"], out, capsys)
    shutil.copytree(finished / "prepare_data", copy)
    content = (copy / "items.parquet").read_bytes()
    (copy / "items.parquet").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(command, ["items.parquet", "damaged"], out, capsys)
    swapped = ["train_collab", "--prepare-data", str(finished / "train_collab"), "--out", str(out)]
    refused(swapped, ["train_collab", "expected prepare_data"], out, capsys)


def test_an_output_folder_that_holds_something_else_is_kept(shop, tmp_path, capsys):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("do not touch")
    code, err = call(prepare(shop, out), capsys)
    assert code == 2 and "not the output of a finished stage" in err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_file_whose_content_changed_is_noticed(shop, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(prepare(shop, out), capsys)[0] == 0
    assert call(prepare(shop, out), capsys)[0] == 0
    edit(shop["interactions"], ",100,", ",99,")
    code, err = call(prepare(shop, out), capsys)
    assert code == 2 and "was made with other content of the interactions file" in err
    Path(shop["interactions"]).unlink()
    assert call(prepare(shop, out), capsys)[0] == 0
