"""Folders that are written: what to do where one cannot be, and one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from llmrec.errors import BusyError, StorageError

LOCK = "lock"
UNWRITABLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room, or use another folder"),
    errno.EFBIG: "Use a folder on a disk that takes larger files",
    errno.EROFS: "Use a folder on a disk that may be written",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "Use a folder that you may write, or change its permissions"
    ),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
        "Something else is in the way there; use another folder",
    ),
    errno.ENAMETOOLONG: "Use a shorter name",
}
"""What to do, by the number of a system's error that says that a folder cannot be written."""

NO_FOLDER = {
    **UNWRITABLE,
    errno.ENOENT: "No folder can be made there; use another",
    **dict.fromkeys((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP), "Use a folder on a disk that has locks"),
}
"""The same, where a folder is made and locked: what is absent there is not a file that was to be read."""

TRIES = 100
"""How often a lock is taken anew because the one before took its file away at that very moment."""


@contextlib.contextmanager
def writing(folder: Path, advice: Mapping[int, str] = UNWRITABLE) -> Iterator[None]:
    """Say plainly that a folder could not be written.

    Args:
        folder: the one that was asked for.
        advice: what to do by the number of the system's error; other errors, and those of files elsewhere,
            are raised as they are.

    Raises:
        StorageError: the disk is full, or may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors hands the number of the system's error on as text.
        number = getattr(error, "errno", None) or next(map(int, re.findall(r"os error (\d+)", str(error))), 0)
        if number not in advice or is_elsewhere(getattr(error, "filename", None), folder):
            raise
        raise StorageError(
            f"{folder} cannot be written ({error}); nothing of it is kept. {advice[number]}, and start "
            "again: finished stages are kept"
        ) from None


def is_elsewhere(name: object, folder: Path) -> bool:
    """Whether a file that an error names lies neither beside a folder or in it, nor on the way to it."""
    if not isinstance(name, str):
        return False
    file, folder = Path(name).absolute(), folder.absolute()
    return not (file.is_relative_to(folder.parent) or folder.is_relative_to(file))


def open_like_folder(folder: Path) -> None:
    """Let those who may read a folder read what is in it; safetensors keeps its files from all others."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            # Some file systems have no modes; work is not lost for a courtesy.
            with contextlib.suppress(OSError):
                path.chmod(mode)


def unfinished(stage: Path) -> Path:
    """Where a stage that is being computed keeps its lock, and what is left for the run after a stop."""
    return stage.with_name(f".{stage.name}.unfinished")


@contextlib.contextmanager
def locked(stage: Path) -> Iterator[None]:
    """Keep other processes from computing the same stage; the lock goes with this process, however it ends.

    Raises:
        BusyError: another process holds it.
        StorageError: the folder may not be written.
    """
    folder = unfinished(stage)
    with writing(stage, NO_FOLDER):
        handle = take(folder / LOCK)
    if handle is None:
        raise BusyError(
            f"another process is computing {stage.name} in {stage.parent}; wait for it, or use another folder"
        )
    try:
        yield
    finally:
        # Once the stage is done its folder is gone, and what is there now may be another process's.
        if is_at(handle, folder / LOCK) and [path.name for path in folder.glob("*")] == [LOCK]:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def take(path: Path) -> int | None:
    """A file that no other process has locked, opened and locked; made, with its folder, if it is absent.

    Whoever gives a lock back may delete the file: one that was opened before is locked in vain.

    Returns:
        Its handle; None if another process holds it.
    """
    for tries in range(TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, FileExistsError):  # the folder goes while it is made
            if tries == TRIES - 1:
                raise
            continue
        try:
            free = lock(handle)
        except OSError:
            os.close(handle)
            raise
        if free and is_at(handle, path):
            return handle
        os.close(handle)
        if not free:
            return None
    return None


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one that has this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def is_locked(stage: Path) -> bool:
    """Whether a process is computing a stage now."""
    try:
        handle = os.open(unfinished(stage) / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return not lock(handle)
    except OSError:  # no disk that has locks; whoever computes says so
        return False
    finally:
        os.close(handle)


def lock(handle: int) -> bool:
    """Whether the open file could be locked; closing it gives the lock back."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
