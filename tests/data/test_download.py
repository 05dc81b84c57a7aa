"""Downloads from a real server that cuts, stalls, redirects and lies."""

import base64
import errno
import gzip
import hashlib
import os
import signal
import ssl
import subprocess
import sys
import time

import numpy as np
import pytest
from bad_server import serving

from llmrec.data import download as module
from llmrec.data import web
from llmrec.data.download import RemoteFile, download
from llmrec.errors import DataError

CONTENT = np.random.default_rng(0).bytes(200_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
NAMES = {"a.bin": CONTENT, "a.csv.gz": gzip.compress(CONTENT)}


@pytest.fixture(scope="module")
def shared_server():
    with serving(NAMES) as server:
        yield server


@pytest.fixture
def server(shared_server):
    shared_server.asked.clear()
    shared_server.times.clear()
    shared_server.headers.clear()
    shared_server.etag, shared_server.retry_after = '"one"', "7"
    return shared_server


def get(server, folder, *ways, name="a.bin", sha=SHA, size=None, **options):
    file = RemoteFile(
        name=name, urls=tuple(server.url(f"/{way}/{name}") for way in ways), num_bytes=size, sha256=sha
    )
    pauses = options.pop("pauses", [])
    return download(file, folder, timeout_seconds=0.5, sleep=pauses.append, **options)


def begin(server, folder):
    """Half of a file, from a mirror that cut."""
    folder.mkdir(exist_ok=True)
    file = RemoteFile(name="a.bin", urls=(server.url("/cut/a.bin"),))
    with pytest.raises(web.RetryError, match="broke off after 100,000"):
        module.fetch(file, file.urls[0], folder / "a.bin", 0.5, False)


def left(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("way", ["good", "redirect", "norange", "cut", "cutchunks", "stall", "busy"])
def test_what_can_be_had_arrives_whole_and_alone(server, tmp_path, way):
    assert get(server, tmp_path / "new", way).read_bytes() == CONTENT
    assert left(tmp_path / "new") == ["a.bin"]


@pytest.mark.parametrize("way", ["cut", "stall"])
def test_what_has_arrived_is_not_asked_for_again(server, tmp_path, way):
    get(server, tmp_path, way)
    first, second = server.ranges
    assert first is None and second in ("bytes=100000-", "bytes=66666-")


def test_a_file_that_changed_meanwhile_is_fetched_from_its_beginning(server, tmp_path, monkeypatch):
    begin(server, tmp_path)
    assert left(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    server.etag = '"two"'
    monkeypatch.setitem(NAMES, "a.bin", CONTENT[::-1])
    assert get(server, tmp_path, "cut", sha=None).read_bytes() == CONTENT[::-1]


def test_what_tells_a_file_from_a_later_one_is_what_servers_heed():
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert module.validator_of({"ETag": '"a"', "Last-Modified": date}) == '"a"'
    assert module.validator_of({"ETag": 'W/"a"', "Last-Modified": date}) == date
    assert module.validator_of({"ETag": 'W/"a"'}) == 'W/"a"' and module.validator_of({}) is None


def test_the_mirror_whose_bytes_are_here_is_asked_first(server, tmp_path):
    begin(server, tmp_path)
    server.asked.clear()
    assert get(server, tmp_path, "good", "cut", sha=None).read_bytes() == CONTENT
    assert server.asked == [("/cut/a.bin", "bytes=100000-")]


def test_a_rest_of_a_file_without_a_size_is_taken(server, tmp_path):
    begin(server, tmp_path)
    assert get(server, tmp_path, "star", retries=0).read_bytes() == CONTENT


@pytest.mark.parametrize("note", ["{", "[]", '"x"'])
def test_a_note_that_is_damaged_says_nothing(tmp_path, note):
    (tmp_path / "a.bin.part.json").write_text(note)
    assert module.read_note(tmp_path / "a.bin.part") == {}


def test_a_part_of_another_mirror_is_continued_only_if_the_hash_can_tell(server, tmp_path):
    for sha, expected in ((SHA, "bytes=100000-"), (None, None)):
        folder = tmp_path / str(sha)
        begin(server, folder)
        server.times.clear()
        assert get(server, folder, "good", sha=sha).read_bytes() == CONTENT
        assert server.asked[-1] == ("/good/a.bin", expected)


def test_a_part_that_is_not_of_this_file_is_found_out(server, tmp_path):
    """And is not held against the mirror that was asked for the rest."""
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    assert get(server, tmp_path, "good", retries=1).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-", None] and left(tmp_path) == ["a.bin"]


def test_a_part_that_is_whole_only_gets_its_name(server, tmp_path):
    for sha in (SHA, None):
        server.times.clear()
        begin(server, tmp_path / str(sha))
        (tmp_path / str(sha) / "a.bin.part").write_bytes(CONTENT)
        server.asked.clear()
        assert get(server, tmp_path / str(sha), "cut", sha=sha).read_bytes() == CONTENT
        assert server.ranges == ["bytes=200000-"] and left(tmp_path / str(sha)) == ["a.bin"]


def test_bytes_of_one_mirror_are_never_noted_as_those_of_another(server, tmp_path, monkeypatch):
    """Though the process ends in between."""
    begin(server, tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "receive", killed)
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path, "good", sha=None)
    assert "good" in module.read_note(tmp_path / "a.bin.part")["url"]
    assert left(tmp_path) == ["a.bin.part.json"]


def test_a_packed_file_is_kept_as_it_is_though_the_server_calls_it_a_packed_answer(server, tmp_path):
    for way in ("gzip", "x-gzip"):
        found = get(server, tmp_path / way, way, name="a.csv.gz", sha=None)
        assert found.read_bytes() == NAMES["a.csv.gz"]


@pytest.mark.parametrize(("way", "name"), [("gzip", "a.bin"), ("br", "a.bin"), ("br", "a.csv.gz")])
def test_an_answer_that_is_packed_is_not_taken_for_the_file(server, tmp_path, way, name):
    with pytest.raises(DataError, match=rf"packs its answer \({way}\), which it was asked not to do"):
        get(server, tmp_path, way, name=name, sha=None)
    assert left(tmp_path) == [] and len(server.asked) == 1


def test_a_part_longer_than_the_file_begins_anew(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 300_000)
    assert get(server, tmp_path, "good").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("way", "options", "message"),
    [
        ("missing", {}, r"/missing/a.bin answers 404"),
        ("broken", {}, r"answers 500"),
        ("loop", {}, r"more than 5 redirects"),
        ("longer", {}, r"broke off after 200,000 bytes"),
        ("shorter", {}, r"another content \(sha256\)"),
        ("shorter", {"sha": None, "size": 200_000}, r"has 100,000 bytes, expected 200,000"),
        ("shorter", {"sha": None, "name": "a.csv.gz"}, r"the packed file that arrived is damaged"),
        ("good", {"sha": "0" * 64}, r"another content \(sha256\) than expected"),
        ("wrongrange", {}, r"answers with bytes from 5 on, asked were 0"),
        ("unsaid", {"sha": None}, r"does not say which part \(Content-Range\)"),
        ("chunks", {"sha": None, "size": 200_001}, r"broke off after 200,000 of 200,001 bytes"),
        ("chunks", {"sha": None, "size": 199_999}, r"200,000 bytes arrived, expected 199,999"),
    ],
)
def test_what_is_wrong_never_gets_the_name_of_the_file(server, tmp_path, way, options, message):
    with pytest.raises(DataError, match=rf"a\.\S+ could not be fetched: .*{message}.*Run the same command"):
        get(server, tmp_path, way, retries=1, **options)
    assert not (tmp_path / "a.bin").exists() and not (tmp_path / "a.csv.gz").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [("file:///etc/hosts", "no http or https address"), ("ftp://a.b/c", "no http or https address")],
)
def test_redirects_lead_to_no_other_scheme(server, tmp_path, target, message):
    file = RemoteFile(name="x", urls=(server.url(f"/to/{target}"),))
    with pytest.raises(DataError, match=message):
        download(file, tmp_path, retries=0)


def test_private_addresses_are_refused_on_demand(server, tmp_path):
    for host in ("127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.1]"):
        file = RemoteFile(name="x", urls=(f"http://{host}:9/x",))
        with pytest.raises(DataError, match=r"which is no public address"):
            download(file, tmp_path, retries=0, public_only=True)


def test_the_next_mirror_is_asked_and_a_lost_one_never_again(server, tmp_path):
    assert get(server, tmp_path, "missing", "broken", "good").read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == ["/missing/a.bin", "/broken/a.bin", "/good/a.bin"]
    server.asked.clear()
    with pytest.raises(DataError, match=r"answers 404 .*answers 500"):
        get(server, tmp_path / "b", "missing", "broken", retries=2)
    assert [path.split("/")[1] for path, _ in server.asked] == ["missing", "broken", "broken", "broken"]


@pytest.mark.parametrize("mirrors", [("bits",), ("bits", "broken"), ("broken", "bits"), ("bits", "missing")])
@pytest.mark.parametrize("sha", [SHA, None])
def test_a_mirror_that_cuts_is_asked_on_as_long_as_it_sends_more(server, tmp_path, mirrors, sha, monkeypatch):
    """From where it cut, whatever other mirrors there are, and with no repeat that brings nothing."""
    monkeypatch.setattr(module, "PROGRESS_BYTES", 40_000)
    assert get(server, tmp_path, *mirrors, sha=sha, retries=0).read_bytes() == CONTENT
    asked = [wanted for path, wanted in server.asked if "bits" in path]
    assert asked == [None, *(f"bytes={done}-" for done in (40_000, 80_000, 120_000, 160_000))]


@pytest.mark.parametrize("ways", [("wobbly",), ("wobbly", "good")])
def test_a_mirror_that_brings_no_more_than_before_is_not_asked_for_ever(server, tmp_path, ways, monkeypatch):
    """It begins anew every time, and cuts here and there; another mirror has its turn."""
    monkeypatch.setattr(module, "PROGRESS_BYTES", 40_000)
    if len(ways) == 1:
        with pytest.raises(DataError, match="broke off"):
            get(server, tmp_path, *ways, sha=None, retries=3)
        assert len(server.asked) <= 2 * 4
    else:
        assert get(server, tmp_path, *ways, sha=None, retries=3).read_bytes() == CONTENT


def test_pauses_grow_and_the_server_may_ask_for_longer_ones(server, tmp_path):
    pauses = []
    with pytest.raises(DataError):
        get(server, tmp_path, "broken", retries=4, pauses=pauses)
    assert len(pauses) == 4 and pauses == sorted(pauses)
    pauses = []
    get(server, tmp_path, "busy", pauses=pauses)
    assert pauses == [7.0]
    server.times.clear()
    pauses.clear()
    get(server, tmp_path / "b", "busy", "broken", pauses=pauses)
    assert pauses == [7.0], "whoever is asked after it"
    assert web.wait_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and web.wait_of("soon") is None


def test_no_pause_is_endless(server, tmp_path):
    pauses = []
    with pytest.raises(DataError):
        get(server, tmp_path, "broken", retries=12, pauses=pauses)
    assert 45 <= max(pauses) <= 75
    pauses.clear()
    server.retry_after = "86400"
    get(server, tmp_path, "busy", pauses=pauses)
    assert pauses == [300.0]


def test_a_mirror_that_stalls_after_a_good_beginning_is_left(server, tmp_path):
    with pytest.raises(DataError, match=r"stalled after 100,0\d\d bytes"):
        get(server, tmp_path, "trickle", retries=0)


def test_only_what_is_still_to_come_must_fit_on_the_disk(server, tmp_path, monkeypatch):
    begin(server, tmp_path)
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: usage._replace(free=module.SPARE_BYTES + 100_000)
    )
    for way in ("good", "chunks"):  # the latter says no size, but it is known
        with pytest.raises(DataError, match="do not fit on the disk"):
            get(server, tmp_path / "new", way, size=200_000)
    assert get(server, tmp_path, "cut").read_bytes() == CONTENT


def test_a_disk_that_is_full_meanwhile_is_named(tmp_path, monkeypatch):
    class Answer:
        def read1(self, *_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(DataError, match="do not fit on the disk"):
        module.receive(Answer(), tmp_path / "a.bin.part", 0, None, "http://a.example/a.bin", 1.0)


def test_packed_files_that_are_damaged_anywhere_are_found_out(tmp_path):
    whole = NAMES["a.csv.gz"]
    middle = len(whole) // 2
    damaged = {
        "whole": whole,
        "cut": whole[:-4],
        "flipped": whole[:middle] + bytes(255 - byte for byte in whole[middle:]),
        "blocks": whole[:10] + b"\xff" * 9 + whole[19:],
        "none": b"<html>",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    assert [name for name in damaged if module.whole_gzip(tmp_path / name)] == ["whole"]


def test_a_file_that_is_there_is_checked_and_kept(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    get(server, tmp_path, "good")
    assert server.asked == []
    (tmp_path / "a.bin").write_bytes(CONTENT[:-1] + b"!")
    for options, message in (({}, "another content"), ({"sha": None, "size": 3}, "expected 3; delete it")):
        with pytest.raises(DataError, match=message):
            get(server, tmp_path, "good", **options)
    assert server.asked == []


def test_offline_uses_what_is_there_or_says_where_to_put_it(server, tmp_path):
    with pytest.raises(
        DataError, match=r"a.bin is not there and may not be fetched \(offline\); put it there"
    ):
        get(server, tmp_path, "good", offline=True)
    assert server.asked == [] and left(tmp_path) == []


def test_a_full_disk_is_named_before_a_byte_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPARE_BYTES", 1 << 60)
    with pytest.raises(DataError, match=r"do not fit on the disk"):
        get(server, tmp_path, "good")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    ["http://[bad/x", "http://\u2100.com/x", "http://a.example/\ud83d", "http://a.example:99999/x"],
    ids=["brackets", "letters", "half a character", "port"],
)
def test_addresses_that_are_none_are_refused(url, tmp_path):
    with pytest.raises(DataError, match=r"no valid address|no valid port|cannot be asked"):
        download(RemoteFile(name="x", urls=(url,)), tmp_path, retries=0)


def test_a_redirect_to_no_address_is_refused(server, tmp_path, monkeypatch):
    answer = type("", (), {"get_redirect_location": lambda self: "http://[bad", "close": lambda self: None})
    monkeypatch.setattr(web, "send", lambda *_: answer())
    with pytest.raises(DataError, match="leads to no valid address"):
        download(RemoteFile(name="x", urls=(server.url("/good/a.bin"),)), tmp_path, retries=0)


def test_headers_that_are_no_numbers_mean_nothing():
    for long in ("9" * 400, "9" * 5000, "Wed, 21 Oct 99999999999999 07:28:00 GMT"):
        assert web.number_of(long) is None and web.wait_of(long) is None
    assert [web.number_of(text) for text in ("12", " 7 ", "", "-1", "\u00b2", "\u0663")] == [12, 7] + [
        None
    ] * 4
    assert web.wait_of("\u00b2") is None and web.wait_of("3") == 3


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
        ("::127.0.0.1", False),
        ("::1", False),
        ("fec0::1", False),
        ("64:ff9b:1::808:808", False),
        ("::ffff:0:10.0.0.1", False),
        ("::ffff:0:8.8.8.8", True),
        ("::ffff:8.8.8.8", True),
        ("224.0.0.1", False),
        ("ff02::1", False),
        ("fe80::1%eth0", False),
    ],
)
def test_an_address_is_as_public_as_the_one_it_stands_for(address, public):
    assert web.is_public(address) == public


def test_a_proxy_is_asked_for_names_that_only_it_knows(server, tmp_path, monkeypatch):
    """The proxy here answers itself, for the whole address."""
    monkeypatch.setenv("http_proxy", server.url(""))
    monkeypatch.setenv("no_proxy", "")
    asked = []
    monkeypatch.setattr(web.socket, "getaddrinfo", recorded(web.socket.getaddrinfo, asked))
    file = RemoteFile(name="a.bin", urls=("http://data.example.invalid/good/a.bin",), sha256=SHA)
    with pytest.raises(DataError, match="could not be fetched"):
        download(file, tmp_path, retries=0, public_only=True)
    assert asked == ["data.example.invalid"] and not server.asked
    assert download(file, tmp_path, retries=0).read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == ["http://data.example.invalid/good/a.bin"]


@pytest.mark.parametrize(
    ("user", "sent"),
    [
        ("", None),
        ("http://", None),
        ("http://me:p%40ss@", "Basic " + base64.b64encode(b"me:p@ss").decode()),
    ],
)
def test_a_proxy_is_told_who_asks_and_needs_no_scheme(server, tmp_path, monkeypatch, user, sent):
    monkeypatch.setenv("http_proxy", user + server.url("").removeprefix("http://"))
    monkeypatch.setenv("no_proxy", "")
    file = RemoteFile(name="a.bin", urls=("http://data.example.invalid/good/a.bin",), sha256=SHA)
    assert download(file, tmp_path, retries=0).read_bytes() == CONTENT
    assert [headers.get("Proxy-Authorization") for headers in server.headers] == [sent]


def test_a_proxy_for_all_is_asked_where_there_is_none_for_the_scheme(server, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    file = RemoteFile(name="a.bin", urls=("http://data.example.invalid/good/a.bin",), sha256=SHA)
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(DataError, match="unsupported scheme socks5, should use http:// or https://"):
        download(file, tmp_path, retries=0)
    monkeypatch.setenv("http_proxy", server.url(""))
    assert download(file, tmp_path / "own", retries=0).read_bytes() == CONTENT
    monkeypatch.delenv("http_proxy")
    monkeypatch.setenv("all_proxy", server.url(""))
    assert download(file, tmp_path / "all", retries=0).read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_a_proxy_that_cannot_be_understood_keeps_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy.example:port")
    monkeypatch.setenv("no_proxy", "")
    file = RemoteFile(name="a.bin", urls=("http://data.example.invalid/a.bin",))
    with pytest.raises(DataError, match=r"\$all_proxy\) is no valid address") as told:
        download(file, tmp_path, retries=0)
    assert "secret" not in str(told.value)


def test_hosts_that_need_no_proxy_are_asked_themselves(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert get(server, tmp_path, "good", retries=0).read_bytes() == CONTENT


def test_a_request_is_plain_and_names_the_host_but_no_password(server, tmp_path, monkeypatch):
    leads_to(monkeypatch, "127.0.0.1")
    host = server.url("").replace("http://127.0.0.1", "data.example")
    file = RemoteFile(name="a.bin", urls=(f"http://me:secret@{host}/good/a.bin?x=1&y=a%20b#part",))
    download(file, tmp_path, retries=0)
    (headers,) = server.headers
    assert (headers["Host"], headers["Accept-Encoding"]) == (host, "identity")
    assert server.asked == [("/good/a.bin?x=1&y=a%20b", None)] and "secret" not in str(headers)


def test_whoever_answers_over_https_must_prove_to_be_the_host():
    pool = web.pool_at("127.0.0.1", web.address_of("https://data.example/x"), web.urllib3.Timeout(1))
    context = pool.conn_kw["ssl_context"]
    assert (pool.host, pool.port, pool.assert_hostname) == ("127.0.0.1", 443, "data.example")
    assert pool.conn_kw["server_hostname"] == "data.example"
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname


def leads_to(monkeypatch, *addresses):
    """data.example has these."""
    plain = web.socket.getaddrinfo

    def look(host, port, *how, **more):
        if host != "data.example":
            return plain(host, port, *how, **more)
        return [(0, 0, 0, "", (address, port)) for address in addresses]

    monkeypatch.setattr(web.socket, "getaddrinfo", look)


def test_the_next_address_is_tried_where_nobody_answers_at_the_first(server, tmp_path, monkeypatch):
    leads_to(monkeypatch, "127.0.0.2", "127.0.0.2", "127.0.0.1")
    url = server.url("/good/a.bin").replace("127.0.0.1", "data.example")
    file = RemoteFile(name="a.bin", urls=(url,), sha256=SHA)
    reached = []
    monkeypatch.setattr(web, "pool_at", recorded(web.pool_at, reached))
    assert download(file, tmp_path, retries=0).read_bytes() == CONTENT
    assert reached == ["127.0.0.2", "127.0.0.1"]


def test_every_address_of_a_host_must_be_public(monkeypatch):
    for addresses in (("8.8.8.8", "10.0.0.1"), ("10.0.0.1", "8.8.8.8")):
        leads_to(monkeypatch, *addresses)
        with pytest.raises(web.RefusedError, match=r"is at 10\.0\.0\.1, which is no public address"):
            web.check_public("data.example", 80, True)


def recorded(function, asked):
    def call(host, *arguments, **options):
        asked.append(host)
        return function(host, *arguments, **options)

    return call


def test_names_cannot_leave_the_folder():
    for name in ("../a", "a/b", "", ".."):
        with pytest.raises(DataError, match="no name of a file"):
            RemoteFile(name=name, urls=())


def test_secrets_in_addresses_are_not_shown():
    assert web.shown("https://me:secret@host.org/a/b?token=abc#x") == "https://host.org/a/b"


def begin_slowly(server, folder):
    """A process that fetches a file, some of which has arrived; and its command."""
    code = (
        "import sys; from pathlib import Path; from llmrec.data.download import *\n"
        f"download(RemoteFile(name='a.bin', urls=(sys.argv[1],), sha256={SHA!r}), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, server.url("/drip/a.bin"), str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    part = folder / "a.bin.part"
    for _ in range(600):
        if part.exists() and part.stat().st_size > 20_000:
            break
        time.sleep(0.05)
    return process, command


def test_a_killed_download_goes_on_where_it_was(server, tmp_path):
    process, command = begin_slowly(server, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    size = (tmp_path / "a.bin.part").stat().st_size
    assert 20_000 < size < len(CONTENT) and not (tmp_path / "a.bin").exists()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and left(tmp_path) == ["a.bin"]
    assert server.ranges == [None, f"bytes={size}-"]


def test_a_file_that_another_process_fetches_is_waited_for(server, tmp_path, monkeypatch, caplog):
    process, _ = begin_slowly(server, tmp_path)
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.02)
    file = RemoteFile(name="a.bin", urls=(server.url("/good/a.bin"),), sha256=SHA)
    with caplog.at_level("INFO", "llmrec"):
        assert download(file, tmp_path).read_bytes() == CONTENT
    assert process.wait() == 0 and left(tmp_path) == ["a.bin"]
    assert [path for path, _ in server.asked] == ["/drip/a.bin"]
    assert caplog.text.count("another process fetches") == 1


def test_a_reason_that_mirrors_share_is_told_once_a_round(tmp_path, monkeypatch, caplog):
    def nowhere(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(web.socket, "getaddrinfo", nowhere)
    file = RemoteFile(name="a.bin", urls=("https://a.example/a.bin", "http://a.example/a.bin"))
    with (
        caplog.at_level("WARNING", "llmrec"),
        pytest.raises(DataError, match=r"no address for a\.example") as told,
    ):
        download(file, tmp_path, retries=1, sleep=lambda seconds: None)
    assert len(caplog.records) == 2 and str(told.value).count("no address for") == 1
