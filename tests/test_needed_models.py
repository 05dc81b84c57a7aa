"""Models that are not here: what the Hub says of them is told before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_recipe import tiny

from llmrec import needed_models, network
from llmrec.assignments import override
from llmrec.encoders.llm2clip import CLIP_MODEL, TEXT_MODEL
from llmrec.finetune.config import FinetuneConfig
from llmrec.preflight import fine_tuning
from llmrec.recipe import Recipe, main
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.stages import STAGES

ANSWERS: dict[str, tuple[int, dict[str, str]]] = {
    "ann/there": (200, {"ETag": '"1"', "X-Repo-Commit": "0" * 40}),
    "ann/typo": (404, {"X-Error-Code": "RepoNotFound"}),
    "ann/hidden": (401, {}),
    "meta-llama/gated": (403, {"X-Error-Code": "GatedRepo"}),
    "ann/old": (404, {"X-Error-Code": "RevisionNotFound"}),
    "ann/weights": (404, {"X-Error-Code": "EntryNotFound"}),
    "ann/broken": (503, {}),
}


class Hub(BaseHTTPRequestHandler):
    """Answers for a file of a model as the Hub does."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        status, headers = ANSWERS["/".join(self.path.split("/")[1:3])]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A Hub, and what it is asked for."""
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield Hub.asked
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("ann/there", "note", "is not here yet"),
        ("ann/typo", "problem", "neither a folder here nor on the Hub for you to see"),
        ("ann/hidden", "problem", "neither a folder here nor on the Hub for you to see"),
        ("meta-llama/gated", "problem", "is not for everybody"),
        ("ann/old", "problem", "has no revision v1"),
        ("ann/weights", "problem", "has no config.json"),
        ("ann/broken", "note", "does not say whether it has it (503)"),
    ],
)
def test_what_the_hub_says_of_a_model(model, status, words, asked):
    found = needed_models.model_finding("finetune.base_model", model, "v1")
    assert (found.status, found.what.startswith(f"finetune.base_model={model}")) == (status, True)
    assert words in found.what
    assert asked == [f"/{model}/resolve/v1/config.json"]
    if model == "meta-llama/gated":
        assert f"{constants.ENDPOINT}/meta-llama/gated" in found.advice


def test_a_folder_that_lacks_a_part_of_its_model_is_a_problem(tmp_path):
    def found(where: str = "finetune.base_model") -> str:
        return needed_models.model_finding(where, str(tmp_path), None).what.partition(" holds no ")[2]

    assert found() == ".safetensors weights"
    (tmp_path / "model-00001.safetensors").touch()
    assert found("encode_items.text.adapter") == ""
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    for text in ("", "{}", "[]", "{"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert found().endswith("index.json that can be read")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert found() == "tokenizer" and found("encode_items.text.model") == "config.json"
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "config.json").write_text('{"hidden_size": 48}')
    assert found() == "model-00002.safetensors"
    (tmp_path / "model.safetensors").touch()
    assert found() == ""


def test_a_base_model_is_as_wide_as_code_embeddings(tmp_path, asked):
    (tmp_path / "config.json").write_text('{"text_config": {"hidden_size": 48}}')
    made = tiny()
    config = dataclasses.replace(made.finetune, base_model=str(tmp_path), mini=type(made.finetune.mini)())
    assert needed_models.hidden_size(config) == 48
    for text in ("{", "[]", '{"text_config": null}', '{"hidden_size": "48"}'):
        (tmp_path / "config.json").write_text(text)
        assert needed_models.hidden_size(config) is None
    (tmp_path / "config.json").write_text('{"text_config": {"hidden_size": 48}}')
    assert needed_models.hidden_size(dataclasses.replace(config, base_model="ann/there")) is None
    said = [one.what for one in fine_tuning(dataclasses.replace(made, finetune=config))]
    width = made.learn_semantic_ids.code_dim
    assert f"learn_semantic_ids.code_dim={width} differs from the width of {tmp_path}, 48" in said
    assert needed_models.tokenizer_folder(config) is None, "there is none in it"
    other = override(made, {"learn_semantic_ids.code_dim": str(width + 1)})
    of_mini = f"learn_semantic_ids.code_dim={width + 1} differs from finetune.mini.hidden_size={width}"
    assert of_mini in [one.what for one in fine_tuning(other)]
    simple = LearnSemanticIdsConfig(method="rkmeans")
    temperature = str(FinetuneConfig().fusion_temperature)
    for fits in (
        override(other, {"finetune.project_codes": "true"}),
        override(other, {"finetune.method": "e4srec", "finetune.fusion_temperature": temperature}),
        dataclasses.replace(made, learn_semantic_ids=simple),
    ):
        assert fits.learn_semantic_ids.code_dim != width
        assert [one.what for one in fine_tuning(fits) if one.status == "problem"] == []


def test_a_run_does_not_begin_with_a_base_model_that_is_not_there(asked, tmp_path, capsys):
    def misnamed():
        made = tiny()
        model = dataclasses.replace(made.finetune, base_model="ann/typo", mini=type(made.finetune.mini)())
        return dataclasses.replace(made, finetune=model)

    with pytest.raises(SystemExit) as left:
        main(misnamed, ["--run-dir", str(tmp_path / "run")])
    assert left.value.code == 2
    assert "finetune.base_model=ann/typo is neither a folder here nor on the Hub" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    asked.clear()
    with pytest.raises(SystemExit) as left:
        main(misnamed, ["--run-dir", str(tmp_path / "run"), "--until", "prepare_data"])
    assert left.value.code == 0 and asked == [], "a model that no stage will ask for is not looked for"


def test_a_hub_whose_name_leads_nowhere_is_a_problem(monkeypatch):
    def lost(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network.socket, "getaddrinfo", lost)
    monkeypatch.setattr(network.urllib.request, "getproxies", dict)
    recipe = dataclasses.replace(
        tiny(),
        finetune=dataclasses.replace(
            tiny().finetune, base_model="ann/far", mini=type(tiny().finetune.mini)()
        ),
    )
    (found,) = needed_models.models(recipe, set(STAGES))
    assert found.status == "problem"
    assert found.what == (
        "finetune.base_model=ann/far must be fetched from huggingface.co, whose name cannot be resolved from "
        "here"
    )


def test_offline_only_the_cache_counts(asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = needed_models.model_finding("finetune.base_model", "ann/there", None)
    assert (found.status, asked) == ("problem", [])
    assert "not in the Hub's cache" in found.what


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_nothing_is_asked_for_where_the_hubs_client_is_told_so(name):
    code = (
        "from llmrec import needed_models\n"
        "needed_models.resolves = lambda host: 1 / 0\n"
        "print(needed_models.model_finding('finetune.base_model', 'ann/none', None).status)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, name: "yes"}, capture_output=True, text=True
    )
    assert done.stdout == "problem\n", done.stderr


def test_every_model_is_named_with_its_own_revision():
    given = {
        "finetune.base_model": "ann/llama",
        "finetune.revision": "v1",
        "encode_items.text.encoder": "llm2clip",
        "encode_items.text.revision": "v2",
        "encode_items.text.adapter_revision": "v3",
        "encode_items.image.encoder": "huggingface",
        "encode_items.image.model": "ann/vit",
        "encode_items.image.revision": "v4",
    }
    recipe = dataclasses.replace(Recipe(), prepare_data=tiny().prepare_data)
    recipe = override(recipe, given)
    of_text = [
        ("encode_items.text.model", TEXT_MODEL, "v2"),
        ("encode_items.text.adapter", CLIP_MODEL, "v3"),
    ]
    of_image = [("encode_items.image.model", "ann/vit", "v4")]
    of_base = [("finetune.base_model", "ann/llama", "v1")]
    assert list(needed_models.named(recipe, {"encode_items", "finetune"})) == of_base + of_text + of_image
    assert list(needed_models.named(recipe, {"finetune"})) == of_base
    both = override(recipe, {"encode_items.image.encoder": "llm2clip", "encode_items.image.model": "none"})
    assert list(needed_models.named(both, {"encode_items"})) == [
        *of_text, ("encode_items.image.model", CLIP_MODEL, "v4")
    ]  # fmt: skip


def test_what_the_cache_holds_counts_for_the_revision_it_is_of(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    there = tmp_path / "cache" / "models--ann--there"
    (there / "refs").mkdir(parents=True)
    for name, commit in (("main", "0" * 40), ("v1", "1" * 40)):
        (there / "refs" / name).write_text(commit)
        (there / "snapshots" / commit).mkdir(parents=True)
    folder = there / "snapshots" / ("1" * 40)
    (folder / "config.json").write_text('{"hidden_size": 48}')
    where = "encode_items.text.adapter"
    assert needed_models.model_finding(where, "ann/there", "v1").status == "ok", "its weights have any name"
    (there / "snapshots" / ("0" * 40) / "config.json").write_text('{"hidden_size": 24}')
    for name in ("model.safetensors", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    made = tiny().finetune
    for revision, status, width, tokens in (("v1", "ok", 48, folder), (None, "problem", 24, None)):
        found = needed_models.model_finding("finetune.base_model", "ann/there", revision)
        config = dataclasses.replace(made, base_model="ann/there", revision=revision, mini=type(made.mini)())
        assert found.status == status
        assert needed_models.hidden_size(config) == width
        assert needed_models.tokenizer_folder(config) == tokens


def test_the_hub_is_not_waited_for_long(asked, monkeypatch):
    waits = []

    def slow(address: str, timeout: float) -> None:
        waits.append(timeout)
        raise OSError("timed out")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", slow)
    assert needed_models.model_finding("finetune.base_model", "ann/there", None).status == "note"
    assert waits == [5.0]


def test_a_model_of_which_only_a_part_is_in_the_cache_is_not_here(asked, tmp_path, monkeypatch):
    """As `estimate` leaves it, which reads config.json alone."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    there = tmp_path / "cache" / "models--ann--there"
    (there / "refs").mkdir(parents=True)
    (there / "refs" / "main").write_text(commit)
    files = there / "snapshots" / commit
    files.mkdir(parents=True)

    def status(where: str = "finetune.base_model") -> str:
        return needed_models.model_finding(where, "ann/there", None).status

    (files / "config.json").write_text("{}")
    assert status() == status("encode_items.text.model") == "problem"
    for text in ("{}", "[]", "{", '{"weight_map": {}}'):
        (files / "model.safetensors.index.json").write_text(text)
        assert status("encode_items.text.model") == "problem"
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (files / "model.safetensors.index.json").write_text(json.dumps(index))
    (files / "model-1.safetensors").write_bytes(b"")
    assert status("encode_items.text.model") == "problem"
    (files / "model-2.safetensors").write_bytes(b"")
    assert (status("encode_items.text.model"), status()) == ("ok", "problem")
    (files / "tokenizer_config.json").write_text("{}")
    assert status() == "ok"
