"""What a finished stage was made from, and whether it would be made from the same now."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.config import StageSettings, as_dict, changed_settings
from llmrec.console import redact
from llmrec.encoders.config import PICTURES
from llmrec.errors import MissingArtifactError, StaleArtifactError
from llmrec.finished import SCHEMA_VERSION, fingerprint, fingerprint_of, stage_manifest
from llmrec.folder_digest import folder_digest, model_digest
from llmrec.manifest import MANIFEST, sha256
from llmrec.own import code_file, imported_files
from llmrec.stages import STAGES, in_order

if TYPE_CHECKING:
    from llmrec.recipe import Recipe

CODE = "code of "
"""Before a setting's name, among what a stage was made from: the code of the class that the setting names."""
TO_DO = "would be computed"
MADE_WITH = "was made with"
UNCERTAIN = "is kept if what it was made from comes out the same again, else refused"


def describe_stage(name: str, config: StageSettings, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """What makes a stage's output what it is: name, config and the files it was made from."""
    settings = as_dict(config)
    if "mirrors" in settings:  # no one compares them, and an address may have a password
        settings["mirrors"] = [redact(address) for address in settings["mirrors"]]
    return {
        "schema": SCHEMA_VERSION,
        "stage": name,
        "config": settings,
        "sources": source_hashes(config) | config.source_digests(*inputs),
        "inputs": {artifact.stage: fingerprint(artifact) for artifact in inputs},
    }


def source_hashes(config: StageSettings, known: dict[str, str] | None = None) -> dict[str, str]:
    """Hashes of the users' own files and folders that a config names, by setting.

    What is gone is left out: what was made from it may still be used.

    Args:
        config: a stage's settings.
        known: hashes that need not be worked out again.
    """
    known = known or {}
    found = known | file_hashes(config, known)
    for name, path in folders_of(config).items():
        if name not in found and Path(path).is_dir():
            data = name in config.source_folders()
            found[name] = folder_digest(Path(path)) if data else model_digest(Path(path))
    return code_hashes(config) | found


def file_hashes(config: StageSettings, known: Container[str] = ()) -> dict[str, str]:
    """Hashes of the files alone, without those that are known already; see `source_hashes`."""
    return {
        name: sha256(Path(path))
        for name, path in config.source_files().items()
        if name not in known and Path(path).is_file()
    }


def code_hashes(config: StageSettings) -> dict[str, str]:
    """Hashes of the files that hold the users' own classes, and of their own files that those import."""
    found: dict[str, str] = {}
    for name, kind in config.own_classes().items():
        if (file := code_file(kind)) is not None:
            found[CODE + name] = sha256(file)
        for path, imported in imported_files(kind).items():
            found[f"{CODE}{name} ({path})"] = sha256(imported)
    return found


def folders_of(config: StageSettings) -> dict[str, str]:
    """Folders that a config names, of data and of models, by setting."""
    return config.source_folders() | config.model_folders()


def changed_sources(
    manifest: dict[str, Any], sources: dict[str, str], folders: Iterable[str] = ()
) -> list[str]:
    """Phrases naming the users' files whose content is no longer what a stage was made from.

    Args:
        manifest: of the stage.
        sources: hashes as they are now, by setting.
        folders: the settings among them that name a folder.
    """
    before = manifest.get("sources")
    if before is None:
        return []
    phrases = {
        PICTURES: f"other {PICTURES}",
        **{name: f"other files in the {name} folder" for name in folders},
        **{name: f"other {name}" for name in sources if name.startswith(CODE)},
    }
    changed = [
        phrases.get(name, f"other content of the {name} file")
        for name, digest in sources.items()
        if before.get(name, digest) != digest and form_of(before[name]) == form_of(digest)
    ]
    # Files that the settings name by themselves; what a setting names was there, or it was another setting.
    appeared = [
        name for name in sources if name not in before and name not in folders and not name.startswith(CODE)
    ]
    absent = {PICTURES: f"some {PICTURES} absent"}
    return changed + [f"{absent.get(name, f'no {name}')}, which are there now" for name in appeared]


def form_of(digest: str) -> str:
    """In which way a digest was made; those of different ways cannot be compared."""
    form, mark, _ = digest.partition(":")
    return form if mark else ""


def changes_of(manifest: dict[str, Any], config: StageSettings, sources: dict[str, str]) -> list[str]:
    """Phrases naming the files and settings that differ from those a stage was made with. A file that was
    only moved does not differ."""
    before = copy.deepcopy(manifest["config"])
    now = as_dict(config)
    made_from = manifest.get("sources") or {}
    folders = folders_of(config)
    for name in sources:
        *groups, field = name.split(".")
        old, new = before, now
        for group in groups:
            old, new = old.get(group) or {}, new.get(group) or {}
        # More than a path, such as the split of a data set, must be the same.
        moves = name not in folders or new.get(field) in (folders[name], f"local-dir:{folders[name]}")
        if made_from.get(name) == sources[name] and field in old and field in new and moves:
            old[field] = new[field]
    return [*changed_sources(manifest, sources, folders), *changed_settings(before, config)]


def check_folder(folder: Path, wanted: dict[str, Any], config: StageSettings) -> str:
    """'done' or 'absent'; raises if the folder holds anything else.

    Settings that change no result may be others than the folder was made with.
    """
    if not folder.exists():
        if folder.is_symlink():  # nothing could take its name in the end
            raise MissingArtifactError(
                f"{folder} is a link to {folder.readlink()}, where nothing is. Make that folder's disk "
                "available, or delete the link to compute the stage"
            )
        return "absent"
    if not (folder / MANIFEST).is_file():
        raise MissingArtifactError(
            f"{folder} is not the output of a finished stage, and what is there is never overwritten. Use "
            "another folder, or move it away"
        )
    manifest = stage_manifest(folder)
    if manifest["stage"] != wanted["stage"]:
        raise StaleArtifactError(
            f"{folder} holds the output of {manifest['stage']}; give another folder to {wanted['stage']}"
        )
    changes = changes_of(manifest, config, wanted["sources"])
    old, new = manifest["inputs"], wanted["inputs"]
    changes += [f"another {name}" for name in new if old.get(name) != new[name]]
    changes += [f"{name}, which is not given now" for name in old if name not in new]
    if not changes:
        return "done"
    raise StaleArtifactError(
        f"{folder} was made with {', '.join(changes)}. Use another folder, or delete {folder} to recompute it"
    )


def statuses(recipe: Recipe, root: Path, until: str | None) -> dict[str, str]:
    """Of each stage: done, `TO_DO`, `UNCERTAIN`, or why what is there cannot be used."""
    found: dict[str, str] = {}
    # Stages that are absent, and those of which it is not known that what is made from them fits.
    new = {name for name in STAGES if not (root / name).exists()}
    for stage in in_order(recipe):
        name = stage.name
        config = getattr(recipe, name)
        made_from = stage.made_from(config)
        done = [other for other in made_from if found.get(other) == "done"]
        found[name] = status_of(root / name, config, [root / other for other in done])
        if found[name] == "done" and new.intersection(made_from):
            found[name] = UNCERTAIN
        if found[name] != "done":
            new.add(name)
        if name == until:
            break
    return found


def status_of(folder: Path, config: StageSettings, inputs: Sequence[Path]) -> str:
    """Of one stage: done, `TO_DO`, or why what is there cannot be used.

    Args:
        folder: where its output lies, or will.
        config: its settings.
        inputs: folders of the finished stages that it is made from.
    """
    if not folder.exists() and not folder.is_symlink():
        return TO_DO
    if not (folder / MANIFEST).exists():
        return "is not a finished stage; use another --run-dir, or move it away"
    manifest = stage_manifest(folder)
    changes = changes_of(manifest, config, source_hashes(config))
    changes += [
        f"another {one.name}"
        for one in inputs
        if manifest["inputs"].get(one.name) != fingerprint_of(stage_manifest(one))
    ]
    if changes:
        return f"{MADE_WITH} {', '.join(changes)}; use another --run-dir or delete the folder"
    return "done"


def refuse_what_is_stale(root: Path, stages: dict[str, str]) -> None:
    """Say now which finished stages a run would refuse once it gets there.

    Args:
        root: the run folder.
        stages: what `statuses` says of them.

    Raises:
        StaleArtifactError: names the first.
    """
    for name, status in stages.items():
        if status not in ("done", TO_DO, UNCERTAIN):
            raise StaleArtifactError(f"{root / name} {status}")
