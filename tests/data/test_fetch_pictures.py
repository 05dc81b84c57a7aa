"""Pictures from a real server that misbehaves; nothing broken is ever kept."""

import gzip
import io
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_server import serving
from PIL import Image

from llmrec.data import pictures as module
from llmrec.data.pictures import PictureLimits, check_picture, fetch_pictures, name_of
from llmrec.data.web import RetryError
from llmrec.errors import DataError

LIMITS = PictureLimits(
    max_bytes=60_000, max_pixels=40_000, retries=1, timeout_seconds=0.5, public_only=False, num_threads=4
)


def picture(size=(60, 40), kind="PNG", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


CONTENT = {
    "a.png": picture(),
    "b.jpg": picture(kind="JPEG", seed=1),
    "large.png": picture((1000, 1000)),
    "wide.jpg": picture((300, 200), "JPEG"),
    "text.jpg": b"<html>no picture</html>",
    "half.jpg": picture(kind="JPEG", seed=2)[:-800],
    "other.tif": picture(kind="TIFF"),
    "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.fixture
def server():
    with serving(CONTENT) as found:
        yield found


def run(server, folder, *paths, limits=LIMITS, **options):
    wanted = [(f"item{number}", server.url(path)) for number, path in enumerate(paths)]
    return fetch_pictures(wanted, folder, limits, sleep=lambda seconds: None, **options)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "status.parquet")


def test_every_item_has_a_status_and_only_whole_pictures_are_kept(server, tmp_path):
    cases = {
        "/good/a.png": ("ok", None),
        "/redirect/b.jpg": ("ok", None),
        "/cut/b.jpg": ("ok", None),
        "/cutchunks/a.png": ("ok", None),
        "/stall/a.png": ("ok", None),
        "/busy/a.png": ("ok", None),
        "/missing/a.png": ("refused", "answers 404"),
        "/good/large.png": ("refused", "bytes, more than 60,000"),
        "/good/wide.jpg": ("refused", "300 x 200 pixels, more than 40,000"),
        "/good/text.jpg": ("refused", "no picture that can be read"),
        "/good/other.tif": ("refused", "no picture that can be read"),
        "/chunks/large.png": ("refused", "more than 60,000 bytes"),
        "/wrongrange/b.jpg": ("failed", "answers 206"),
        "/good/vector.svg": ("refused", "no picture that can be read"),
        "/to/file:///etc/hosts": ("refused", "no http or https address"),
        "/loop/a.png": ("refused", "more than 5 redirects"),
        "/good/half.jpg": ("failed", "the picture is cut short"),
        "/broken/a.png": ("failed", "answers 500"),
        "/longer/a.png": ("failed", "broke off after"),
    }
    found = run(server, tmp_path, *cases)
    for one, (path, (status, reason)) in zip(found, cases.items()):
        assert one.status == status and one.url == server.url(path), one
        assert reason is None or reason in one.reason, one
    good = [one for one in found if one.status == "ok"]
    assert files(tmp_path) == sorted(one.path for one in good)
    for one in good:
        assert Image.open(tmp_path / one.path).size == (one.width, one.height) == (60, 40)
    table = pq.read_table(tmp_path / "status.parquet")
    assert table.num_rows == len(cases) and set(table["status"].to_pylist()) == {"ok", "refused", "failed"}


def test_what_is_there_or_refused_is_not_asked_for_again_and_failures_are(server, tmp_path):
    paths = ("/good/a.png", "/missing/a.png", "/broken/b.jpg", "/good/a.png")
    first = run(server, tmp_path, *paths)
    assert first[0].path == first[3].path
    assert [path for path, _ in server.asked].count("/good/a.png") == 1
    server.asked.clear()
    again = run(server, tmp_path, *paths)
    assert [one.status for one in again] == ["ok", "refused", "failed", "ok"]
    assert {path for path, _ in server.asked} == {"/broken/b.jpg"}
    assert (again[0].width, again[0].height) == (first[0].width, first[0].height) == (60, 40)


def test_another_data_set_in_the_same_folder_leaves_what_is_known(server, tmp_path):
    run(server, tmp_path, "/good/a.png", "/missing/a.png")
    run(server, tmp_path, "/good/b.jpg")
    server.asked.clear()
    assert [one.status for one in run(server, tmp_path, "/good/a.png", "/missing/a.png")] == ["ok", "refused"]
    assert server.asked == []


def test_reasons_are_the_same_in_every_run(server, tmp_path):
    (found,) = run(server, tmp_path, "/good/text.jpg")
    assert found.reason == "no picture that can be read (cannot identify image file)"


def test_repeats_wait_longer_and_as_long_as_the_server_asks_within_reason(server, tmp_path):
    for retry_after, asked in (("7", 7.0), ("500", 60.0)):
        server.retry_after, pauses = retry_after, []
        server.times.clear()
        module.fetch_picture(server.url("/busy/a.png"), tmp_path, LIMITS, pauses.append)
        assert pauses == [asked, 1.0]
    pauses = []
    module.fetch_picture(server.url("/broken/a.png"), tmp_path, replace(LIMITS, retries=3), pauses.append)
    assert pauses == [1.0, 2.0, 4.0]


def test_a_picture_that_takes_too_long_altogether_is_left(server, tmp_path):
    (found,) = run(server, tmp_path, "/trickle/b.jpg", limits=replace(LIMITS, timeout_seconds=0.2, retries=0))
    assert (found.status, found.reason) == ("failed", "stalled")


def test_a_long_run_writes_down_what_it_knows_now_and_then(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_SECONDS", -1.0)
    written = []
    monkeypatch.setattr(module, "write_status", lambda folder, pictures: written.append(len(pictures)))
    run(server, tmp_path, "/good/a.png", "/missing/a.png", "/good/b.jpg")
    assert written == [1, 2, 3, 3]


def test_a_picture_that_comes_packed_is_unpacked_to_whatever_length(tmp_path):
    packed = gzip.compress(CONTENT["a.png"])
    assert len(packed) > len(CONTENT["a.png"])
    with serving({"a.png": packed}) as server:
        (found,) = run(server, tmp_path, "/gzip/a.png")
    assert found.status == "ok" and (tmp_path / found.path).read_bytes() == CONTENT["a.png"]


@pytest.mark.parametrize(("name", "bytes_left"), [("b.jpg", 300), ("a.png", 60), ("b.jpg", 1500)])
def test_a_picture_that_is_cut_anywhere_is_asked_for_again(name, bytes_left):
    with pytest.raises(RetryError, match="the picture is cut short"):
        check_picture(CONTENT[name][:bytes_left], 10**6)


def test_an_address_that_is_none_is_refused_alone(server, tmp_path):
    bad = "http://[bad/pic.jpg"
    wanted = [("x", bad), ("y", server.url("/good/a.png"))]
    found = fetch_pictures(wanted, tmp_path, LIMITS, sleep=lambda seconds: None)
    assert [one.status for one in found] == ["refused", "ok"]


def test_offline_asks_nobody(server, tmp_path):
    run(server, tmp_path, "/good/a.png")
    server.asked.clear()
    found = run(server, tmp_path, "/good/a.png", "/good/b.jpg", offline=True)
    assert [one.status for one in found] == ["ok", "offline"] and server.asked == []


def test_private_addresses_are_refused_by_default(server, tmp_path):
    (found,) = run(server, tmp_path, "/good/a.png", limits=PictureLimits())
    assert found.status == "refused" and "127.0.0.1, which is no public address" in found.reason
    assert server.asked == [] and files(tmp_path) == []


def test_names_come_from_addresses_and_cannot_leave_the_folder(server, tmp_path):
    url = server.url("/good/../../../etc/passwd?x=/../..")
    assert len(name_of(url)) == 32 and name_of(url).isalnum()
    run(server, tmp_path / "deep", "/good/a.png?/../../out")
    assert files(tmp_path) == ["deep"]


def test_a_damaged_status_is_named(server, tmp_path):
    (tmp_path / "status.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"status.parquet cannot be read .*delete it"):
        run(server, tmp_path, "/good/a.png")
