"""Pushing to a Hub and back, with the real client against a local server that speaks its HTTP API."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import huggingface_hub
import numpy as np
import pytest
from hub_server import TOKEN

from llmrec import cli
from llmrec.errors import ConfigError, MissingArtifactError
from llmrec.hub import HubError, download, listing, push, refuse_private
from llmrec.inference.package import package_run, seal
from llmrec.inference.recommender import Recommender
from llmrec.manifest import write_manifest


@pytest.fixture
def hub(monkeypatch):
    """A local Hub that the client of this process talks to."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with hub_server.running() as running:
        yield running


def put(packaged: Path, hub, **options):
    return push(packaged, "ann/tiny", token=TOKEN, endpoint=hub.address, **options)


FRESH = """
import sys, json
import numpy as np
from llmrec.inference.recommender import Recommender
loaded = Recommender.from_pretrained(sys.argv[1], cache_dir=sys.argv[2])
np.save(sys.argv[3], loaded.score([loaded.raw_ids[:3], [], loaded.raw_ids[7:9]]))
"""


def test_pushed_deleted_and_loaded_by_id_in_a_fresh_process_it_scores_the_same(packaged, hub, tmp_path):
    copy = tmp_path / "package"
    shutil.copytree(packaged, copy)
    before = Recommender.from_pretrained(copy)
    expected = before.score([before.raw_ids[:3], [], before.raw_ids[7:9]])
    pushed = put(copy, hub)
    shutil.rmtree(copy)
    assert hub.repos["ann/tiny"]["private"] and pushed.revision == hub.repos["ann/tiny"]["commits"][-1][0]
    assert len(hub.repos["ann/tiny"]["commits"]) == 2, "one commit for everything"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    script, scores = tmp_path / "fresh.py", tmp_path / "scores.npy"
    script.write_text(FRESH)
    subprocess.run(
        [sys.executable, str(script), "ann/tiny", str(tmp_path / "cache"), str(scores)],
        check=True, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert np.abs(np.load(scores) - expected).max() == 0


def test_a_second_push_uploads_only_what_changed(packaged, hub, tmp_path):
    first = put(packaged, hub)
    uploads = len(hub.uploads)
    second = put(packaged, hub, message="again")
    assert first.revision != second.revision and len(hub.uploads) == uploads
    assert set(hub.repos["ann/tiny"]["commits"][-1][1]) == {name for name, _ in listing(packaged)}


def test_a_second_push_takes_away_what_only_the_first_package_had(packaged, hub, tmp_path):
    """A base trained in full, say, which would be loaded beside the adapter that took its place."""
    larger = tmp_path / "larger"
    shutil.copytree(packaged, larger)
    (larger / "extra.json").write_text("{}")
    seal(larger)
    put(larger, hub)
    files = hub.repos["ann/tiny"]["commits"][-1][1]
    files["notes.md"] = b"somebody's own"
    assert "extra.json" in files
    put(packaged, hub)
    assert set(hub.repos["ann/tiny"]["commits"][-1][1]) == {*dict(listing(packaged)), "notes.md"}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the Hub said 401.*log in with `hf auth login`"),
        (403, "the Hub said 403.*may not write there"),
        (409, "the Hub said 409.*push again"),
    ],
)
def test_refusals_are_explained_without_the_token(status, message, packaged, hub):
    hub.fail("/commit/main", [status])
    with pytest.raises(HubError, match=message) as found:
        put(packaged, hub)
    assert TOKEN not in str(found.value)
    assert len(hub.repos["ann/tiny"]["commits"]) == 1, "nothing of it is to be seen"


@pytest.mark.parametrize("statuses", [[429], [500, 503], [503]])
def test_a_busy_hub_is_asked_again(statuses, packaged, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail("/upload/", list(statuses))
    put(packaged, hub)
    assert hub.failures == [("/upload/", [])], "every refusal was met and passed"
    assert len(hub.repos["ann/tiny"]["commits"]) == 2


def test_an_upload_that_is_cut_goes_on_from_what_arrived(packaged, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    names = [name for name, _ in listing(packaged) if name.endswith(hub_server.LARGE)]
    hub.fail("/upload/", [403] * 3)
    with pytest.raises(HubError):
        put(packaged, hub)
    arrived = len(hub.uploads)
    assert 0 < arrived < len(names)
    put(packaged, hub)
    assert len(hub.uploads) == len(set(hub.uploads)) <= len(names)
    assert set(hub.repos["ann/tiny"]["commits"][-1][1]) == {name for name, _ in listing(packaged)}


def test_what_is_not_there_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        hub.address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("no/such/folder", "no_such_folder", "../packages/mine"):
        with pytest.raises(MissingArtifactError, match=r"is no folder here, nor a Hub id \(owner/name\)"):
            download(name)
    with pytest.raises(MissingArtifactError, match="ann/none is no folder here and not on the Hub"):
        download("ann/none", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("data.json", lambda text: text.replace('"config"', '"where": "/home/ann/data", "config"', 1),
         r"data\.json: where \(/home/ann/data\); push or package the run folder with --rename /home/ann/da"),
        ("data.json", lambda text: text.replace('"config"', '"where": "local-dir:/models/x", "config"', 1),
         r"data\.json: where \(local-dir:/models/x\)"),
        ("README.md", lambda text: text + "\nsee /home/ann/x\n",
         r"README\.md: line \d+ \(/home/ann/x\); take them out of README\.md"),
        ("README.md", lambda text: text + f"\n{TOKEN}\n", "looks like an access token"),
    ],
)  # fmt: skip
def test_paths_and_tokens_never_leave(name, change, message, packaged, tmp_path):
    copy = tmp_path / "package"
    shutil.copytree(packaged, copy)
    (copy / name).write_text(change((copy / name).read_text()))
    with pytest.raises(ConfigError, match=message) as found:
        refuse_private(copy)
    assert TOKEN not in str(found.value)


def bare_package(folder: Path, name: str, text: str) -> Path:
    """A folder with one file that its manifest lists."""
    (folder / "package.json").write_text(json.dumps({"files": {name: {}}}))
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "token",
    [
        *("hf_" + "aB3" * 8, "sk-" + "proj-aB3_" * 4, "AKIA" + "Q7" * 8, "ghp_" + "aB3" * 12),
        "github_pat_" + "11AB_" * 8,
    ],
)
@pytest.mark.parametrize("name", ["README.md", "data.json", "log.jsonl"])
def test_tokens_of_common_services_never_leave(name, token, tmp_path):
    with pytest.raises(ConfigError, match=f"{name} holds what looks like an access token") as found:
        refuse_private(bare_package(tmp_path, name, f'{{"key": "{token}"}}'))
    assert token not in str(found.value)
    refuse_private(bare_package(tmp_path, name, '{"key": "hf_tokenizer, risk-free, AKIA, ghp_x"}'))


@pytest.mark.parametrize(
    "value",
    [
        *(
            "/x",
            "~/x",
            "./x",
            "../x",
            "C:\\x",
            "D:/x",
            "\\\\host\\x",
            "file:x",
            "hub:/x",
            "local-dir:/x",
            "hub:~/x",
        ),
        *(f"see ({root}/ann/x)" for root in ("/home", "/root", "/Users", "/tmp", "/mnt", "/var", "/opt")),
        *(f'as "{root}/x" says' for root in ("/srv", "/media", "/work", "/data", "~")),
    ],
)
def test_what_is_or_holds_a_path_of_a_machine_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"log.jsonl: line 2 a[1].b ({value}); push or")):
        refuse_private(bare_package(tmp_path, "log.jsonl", "{}\n" + json.dumps({"a": ["x", {"b": value}]})))


@pytest.mark.parametrize(
    "value",
    ["ann/llama", "hub:ann/logs", "hf-hub:ann/clip", "and/or", "1/2", "https://host/home/ann/x", "C: drive"],
)
def test_what_only_looks_like_a_path_is_not(value, tmp_path):
    refuse_private(bare_package(tmp_path, "log.jsonl", json.dumps({"a": value})))


def test_the_revision_that_is_asked_for_is_fetched(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("llmrec.hub.snapshot_download", lambda repo, **given: asked.update(given) or repo)
    assert download("ann/tiny", revision="v1", cache_dir=tmp_path) == Path("ann/tiny")
    assert asked == {"revision": "v1", "cache_dir": tmp_path}


def test_all_paths_are_named_at_once(packaged, tmp_path):
    copy = tmp_path / "package"
    shutil.copytree(packaged, copy)
    for name, place in (("data.json", "where"), ("llmrec_config.json", "base"), ("evaluation.json", "there")):
        value = "/models/my llama" if name != "data.json" else "/srv/x"
        (copy / name).write_text(json.dumps({**json.loads((copy / name).read_text()), place: value}))
    (copy / "README.md").write_text("see /srv/x\n")
    with pytest.raises(ConfigError) as found:
        refuse_private(copy)
    assert str(found.value) == (
        "these are paths of this machine: data.json: where (/srv/x), evaluation.json: there "
        "(/models/my llama), llmrec_config.json: base (/models/my llama), README.md: line 1 (/srv/x); "
        "push or package the run folder with --rename /srv/x=HUB_ID "
        "'/models/my llama'=HUB_ID (or any other text for HUB_ID)"
    )


def test_a_run_on_own_files_is_packaged_and_pushed_without_renaming(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    manifest = json.loads((run / "prepare_data" / "manifest.json").read_text())
    manifest["config"] |= {
        "source": "table",
        "interactions": "/home/ann/sales.csv",
        "items": "/home/ann/i.csv",
    }
    write_manifest(run / "prepare_data" / "manifest.json", manifest)
    package = package_run(run, tmp_path / "package")
    config = json.loads((package / "data.json").read_text())["config"]
    assert (config["interactions"], config["items"]) == ("sales.csv", "i.csv")
    for source in (package, run):
        with pytest.raises(SystemExit) as left:
            cli.main(["push_to_hub", str(source), "--repo", "ann/own", "--dry-run"])
        captured = capsys.readouterr()
        assert left.value.code == 0 and "would go to ann/own" in captured.out, captured.err
    assert "on sales" in (package / "README.md").read_text()


def test_raw_data_never_leaves(packaged, finished, tmp_path):
    for foreign in ("interactions.parquet", "notes.txt", "weights.bin"):
        copy = tmp_path / foreign.partition(".")[0]
        shutil.copytree(packaged, copy)
        (copy / foreign).write_bytes(b"x")
        with pytest.raises(ConfigError, match=f"{foreign} is not part of a recommender"):
            refuse_private(copy)


def test_a_recipe_ends_with_a_push_and_writes_down_where(finished, hub, tmp_path, capsys, monkeypatch):
    from tiny_recipe import tiny

    from llmrec.recipe import main

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(SystemExit) as left:
        main(tiny, ["--run-dir", str(tmp_path / "run"), "--push-to-hub", "ann/recipe"])
    assert left.value.code == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "run" / "pushed.json").read_text())
    assert written["revision"] == hub.repos["ann/recipe"]["commits"][-1][0] in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(tiny, ["--run-dir", str(tmp_path / "x"), "--until", "prepare_data", "--push-to-hub", "a/b"])
    assert left.value.code == 2 and "pushes a finished run" in capsys.readouterr().err


def test_the_command_lists_pushes_and_renames(packaged, finished, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ["push_to_hub", str(finished), "--repo", "ann/cli", "--endpoint", hub.address]
    for more in (["--dry-run"], []):
        with pytest.raises(SystemExit) as left:
            cli.main([*command, *more])
        assert not left.value.code, capsys.readouterr().err
        text = capsys.readouterr().out
        assert ("would go to ann/cli" in text) == bool(more)
        assert ("ann/cli" in hub.repos) == (not more)
    assert TOKEN not in text and hub.repos["ann/cli"]["commits"][-1][0] in text
    with pytest.raises(SystemExit):
        cli.main(["push_to_hub", "--help"])
    assert "needs a run folder" in " ".join(capsys.readouterr().out.split())
    for bad in (["--rename", "x"], ["--rename", "=y"]):
        with pytest.raises(SystemExit) as left:
            cli.main([*command, *bad])
        assert left.value.code == 2 and "OLD=NEW" in capsys.readouterr().err
    files = hub.repos["ann/cli"]["commits"][-1][1]
    assert json.loads(files["package.json"])["schema"] == 2


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nonsense"])
def test_a_hub_that_does_not_answer_is_a_sentence(endpoint, packaged, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SystemExit) as left:
        cli.main(["push_to_hub", str(packaged), "--repo", "ann/tiny", "--endpoint", endpoint])
    err = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in err
    assert "ann/tiny: the Hub said nothing" in err and "whether its address is right" in err


def test_data_in_a_package_under_another_name_is_not_pushed(packaged, finished, tmp_path):
    for name in ("purchases.parquet", "events.jsonl"):
        copy = tmp_path / name.partition(".")[0]
        shutil.copytree(packaged, copy)
        shutil.copy(finished / "prepare_data" / "interactions.parquet", copy / name)
        with pytest.raises(ConfigError, match=f"{name} is not part of a recommender and is not pushed"):
            refuse_private(copy)


def test_relative_paths_and_folders_that_are_here_are_paths_of_this_machine(packaged, tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for value in ("../llama", "./llama", "models/llama", "ann/llama"):
        copy = tmp_path / f"package{len(list(tmp_path.iterdir()))}"
        shutil.copytree(packaged, copy)
        config = json.loads((copy / "llmrec_config.json").read_text())
        (copy / "llmrec_config.json").write_text(json.dumps(config | {"base": value}))
        if value != "ann/llama":
            with pytest.raises(ConfigError, match=rf"llmrec_config.json: base \({value}\)"):
                refuse_private(copy)
        else:
            refuse_private(copy)


@pytest.mark.parametrize("content", [b'{"files": [{"a": 1}]}', b"[]", b"no JSON"])
def test_a_repository_that_is_not_ours_is_added_to(content, packaged, hub):
    hub.repos["ann/tiny"] = {
        "private": False,
        "commits": [("0" * 40, {"package.json": content, "x.txt": b"x"})],
    }
    put(packaged, hub)
    files = hub.repos["ann/tiny"]["commits"][-1][1]
    assert set(files) == {*dict(listing(packaged)), "x.txt"}


def test_who_is_not_logged_in_is_told_before_anything_is_trained(hub, tmp_path, capsys, monkeypatch):
    from tiny_recipe import tiny

    from llmrec.recipe import main

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    for token in ("hf_" + "b" * 34, None):
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
            monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(SystemExit) as left:
            main(tiny, ["--run-dir", str(tmp_path / "run"), "--push-to-hub", "ann/recipe"])
        assert left.value.code == 2
        assert "nobody is logged in to the Hub, or with a token that is not" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_push_is_told_also_where_it_cannot_be_written_down(finished, hub, tmp_path, capsys, monkeypatch):
    from llmrec.errors import StorageError
    from llmrec.recipe import push_run

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr("llmrec.files.write_json", full_disk)
    with pytest.raises(StorageError, match=r"pushed\.json cannot be written"):
        push_run(tmp_path / "run", "ann/full")
    assert hub.repos["ann/full"]["commits"][-1][0] in capsys.readouterr().out


def full_disk(path, content) -> None:
    import errno

    raise OSError(errno.ENOSPC, "No space left on device", str(path))
