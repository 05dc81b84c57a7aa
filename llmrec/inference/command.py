"""Commands for a trained recommender: package, push_to_hub, recommend, serve. torch comes with them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmrec.arguments import positive
from llmrec.console import set_up_logging
from llmrec.errors import ConfigError, DataError

BATCH = 256
"""Histories that are read and answered at once."""

MAX_PORT = 65535


def add_parsers(verbs: Any) -> None:
    """The four verbs with their arguments."""
    made = verbs.add_parser("package", help="gather what a run learned into one folder that others can use")
    made.add_argument("run_dir", metavar="RUN_DIR", help="a recipe's run folder")
    made.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    add_rename(made)
    made = verbs.add_parser(
        "push_to_hub", help="push a packaged recommender, or a run, to a Hugging Face hub"
    )
    made.add_argument("source", metavar="PACKAGE", help="a package, or a recipe's run folder")
    made.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made if it is not there")
    made.add_argument(
        "--public", action="store_true", help="if the repository is created, for everyone to see"
    )
    made.add_argument("--dry-run", action="store_true", help="list files and sizes and leave")
    made.add_argument(
        "--endpoint", metavar="URL", help="address of the hub (the public one, or $HF_ENDPOINT)"
    )
    made.add_argument("--message", default="Recommender packaged by llmrec", help="of the commit")
    add_rename(made, "; needs a run folder, since a package stays as it was made")
    made = verbs.add_parser("recommend", help="recommend items for histories")
    add_source(made)
    made.add_argument(
        "--history", action="append", default=[], metavar="ID,ID,...",
        help="item ids, oldest first, or a JSON list of them; may be repeated. Without any: from --file or "
        "standard input",
    )  # fmt: skip
    made.add_argument("--file", metavar="FILE", help="one history a line: ids with commas, or a JSON list")
    made.add_argument("--k", type=positive, default=10, help="items per history (10)")
    made.add_argument("--keep-seen", action="store_true", help="items of the history may come back")
    made.add_argument(
        "--skip-unknown", action="store_true", help="pass over ids that are not in the catalogue"
    )
    made.add_argument("--explain", action="store_true", help="what each source added to a score")
    made.add_argument(
        "--format",
        choices=("table", "jsonl"),
        default="table",
        help="for people, or a line of JSON a history",
    )
    made = verbs.add_parser("serve", help="answer over HTTP, with a page for people")
    add_source(made)
    made.add_argument("--compare", metavar="PACKAGE", help="a second recommender, side by side on the page")
    made.add_argument("--images", metavar="DIR", help="pictures named by item id (ID.jpg, ID.png, ID.webp)")
    made.add_argument("--host", default="127.0.0.1", help="127.0.0.1; 0.0.0.0 answers other machines too")
    made.add_argument(
        "--port", type=port_of, default=8000,
        help="8000; 0 takes any that is free. It is taken at once; requests that come while the recommender "
        "is loaded wait",
    )  # fmt: skip


def port_of(text: str) -> int:
    """A port, as an argument."""
    if not text.isdecimal() or len(text) > 5 or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(
            f"must be 1 to {MAX_PORT}, or 0 for any that is free, got {text!r:.40}"
        )
    return int(text)


def add_source(made: argparse.ArgumentParser) -> None:
    made.add_argument("source", metavar="PACKAGE", help="a packaged recommender: a folder, or a Hub id")
    made.add_argument("--revision", help="commit, branch or tag on the Hub")
    made.add_argument("--base-model", metavar="MODEL", help="where the base model is, if not where it says")
    made.add_argument("--device", help="cpu, cuda, cuda:1 (a GPU if there is one)")


def add_rename(made: argparse.ArgumentParser, note: str = "") -> None:
    made.add_argument(
        "--rename", action="extend", nargs="+", default=[], metavar="OLD=NEW",
        help="replace a text in all settings, such as a local model folder by its Hub id" + note,
    )  # fmt: skip


def renamed(pairs: list[str]) -> dict[str, str]:
    """OLD=NEW pairs as a mapping."""
    for pair in pairs:
        if not pair.partition("=")[0] or "=" not in pair:
            raise ConfigError(f"--rename {pair!r} is not of the form OLD=NEW")
    return dict(tuple(pair.split("=", 1)) for pair in pairs)  # type: ignore[misc]


def package(options: argparse.Namespace) -> None:
    """Make a package."""
    from llmrec.inference.package import package_run

    print(package_run(Path(options.run_dir), Path(options.out), renamed=renamed(options.rename)))


def push_to_hub(options: argparse.Namespace) -> None:
    """Push a package; a run folder is packaged first."""
    import tempfile

    from llmrec.hub import check_name, listing, push, refuse_private
    from llmrec.inference.package import MANIFEST, check, package_run

    check_name(options.repo)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.source)
        if not (folder / MANIFEST).is_file():
            folder = package_run(folder, Path(scratch) / "package", renamed=renamed(options.rename))
        elif options.rename:
            raise ConfigError(
                "--rename changes settings while packaging; give the run folder, or package again"
            )
        if options.dry_run:
            check(folder)
            refuse_private(folder)
            files = listing(folder)
            for name, size in files:
                print(f"{size:>15,}  {name}")
            total = sum(size for _, size in files)
            print(f"{total:>15,}  bytes in {len(files)} files would go to {options.repo}")
            return
        pushed = push(
            folder,
            options.repo,
            private=not options.public,
            endpoint=options.endpoint,
            message=options.message,
        )
    print(f"{pushed.url} at {pushed.revision}")


def recommend(options: argparse.Namespace) -> None:
    """Print recommendations for histories from arguments, a file or standard input."""
    recommender = load(options, options.source)
    number = 0
    waits = not options.history and not options.file
    for batch in from_input() if waits else batches(read_histories(options)):
        for (_, history), items in zip(batch, answers(recommender, batch, options)):
            number += 1
            print(shown(number, history, items, options.format), flush=True)


def answers(
    recommender: Any, batch: list[tuple[str, list[str]]], options: argparse.Namespace
) -> Iterator[list[Any]]:
    """What is recommended for histories that come with the places they stand at.

    Raises:
        DataError: an id is not in the catalogue; names the place, once all before it are answered.
    """
    from llmrec.inference.recommender import UnknownItemError

    try:
        yield from recommender.recommend(
            [history for _, history in batch],
            options.k,
            exclude_seen=not options.keep_seen,
            unknown="skip" if options.skip_unknown else "error",
            explain=options.explain,
        )
    except UnknownItemError as error:
        assert error.place is not None, "no candidates are given here"
        if before := batch[: error.place]:
            yield from answers(recommender, before, options)
        raise DataError(
            f"{batch[error.place][0]}: {error.reason}; --skip-unknown leaves such ids out"
        ) from None


def shown(number: int, history: list[str], items: list[Any], how: str) -> str:
    """One answer as a JSON line or as a table."""
    if how == "jsonl":
        rows = [
            {"item_id": item.item_id, "title": item.title, "score": item.score}
            | ({"parts": item.parts} if item.parts else {})
            for item in items
        ]
        return json.dumps({"history": history, "items": rows}, ensure_ascii=False)
    lines = [f"{number}. after {', '.join(history[-5:]) or 'nothing'}"]
    for place, item in enumerate(items, start=1):
        parts = "  ".join(f"{name} {value:+.3f}" for name, value in item.parts.items())
        lines.append(
            f"{place:>5}  {item.item_id:<16} {item.score:>9.4f}  {item.title or ''}  {parts}".rstrip()
        )
    return "\n".join(lines)


def read_histories(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Histories as lists of ids, each with the place where it stands.

    Raises:
        ConfigError: both ways to give them are taken.
        DataError: a line is neither; names file and line.
    """
    if options.history and options.file:
        raise ConfigError("--history and --file are two ways to give histories; leave one out")
    if options.history:
        for number, text in enumerate(options.history, 1):
            yield f"history {number}", ids_of(text.strip(), f"history {number}")
        return
    if options.file:
        path = Path(options.file)
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        try:
            with path.open(encoding="utf-8-sig") as lines:
                yield from parse_lines(lines, str(path))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error}); convert it") from None


def parse_lines(lines: Iterable[str], where: str, first: int = 1) -> Iterator[tuple[str, list[str]]]:
    """The history of every line with file and line, counted from `first`; an empty line is an empty one."""
    for number, line in enumerate(lines, start=first):
        place = f"{where}, line {number}"
        yield place, ids_of(line.lstrip("\ufeff").strip(), place)


def ids_of(text: str, place: str) -> list[str]:
    """A history as it is typed: ids with commas, or JSON, which ids that hold commas need.

    Raises:
        DataError: it looks like JSON and is not, or is no list of texts; names the place.
    """
    if not text.startswith(("[", "{")):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also of numbers of too many digits
        raise DataError(f"{place}: not JSON ({error})") from None
    value = value.get("history") if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(f'{place}: expected a list of item ids, texts such as ["1", "2"], got {text:.80}')
    return value


def batches(histories: Iterable[tuple[str, list[str]]]) -> Iterator[list[tuple[str, list[str]]]]:
    """Histories in lists of at most `BATCH`."""
    held: list[tuple[str, list[str]]] = []
    for history in histories:
        held.append(history)
        if len(held) == BATCH:
            yield held
            held = []
    if held:
        yield held


def from_input() -> Iterator[list[tuple[str, list[str]]]]:
    """The same from standard input. Lines are handed on as soon as they arrive, so a program that writes one
    and waits for the answer gets it.

    Raises:
        DataError: of a line, once all before it are handed on.
    """
    number = 1
    for lines in as_they_come(sys.stdin):
        held, wrong = [], None
        try:
            for history in parse_lines(lines, "standard input", number):
                held.append(history)
        except DataError as error:
            wrong = error
        if held:
            yield held
        if wrong is not None:
            raise wrong
        number += len(lines)


def as_they_come(lines: Iterable[str]) -> Iterator[list[str]]:
    """Lists of the lines that have arrived since the last list, at most `BATCH` each; a thread reads them.

    Raises:
        DataError: they are not UTF-8.
    """
    there: queue.Queue[str | UnicodeDecodeError | None] = queue.Queue(BATCH)

    def read() -> None:
        last = None
        try:
            for line in lines:
                there.put(line)
        except UnicodeDecodeError as error:
            last = error
        finally:
            there.put(last)

    threading.Thread(target=read, daemon=True).start()
    while True:
        found = [there.get()]
        while not there.empty() and len(found) < BATCH:
            found.append(there.get())
        if held := [one for one in found if isinstance(one, str)]:
            yield held
        if isinstance(found[-1], UnicodeDecodeError):
            raise DataError(f"standard input: not UTF-8 text ({found[-1]}); convert it")
        if found[-1] is None:
            return


def serve(options: argparse.Namespace) -> None:
    """Answer over HTTP until stopped."""
    images = Path(options.images) if options.images else None
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder")
    with listening(options.host, options.port) as held:
        try:
            import uvicorn

            from llmrec.inference.server import application
        except ImportError:
            raise ConfigError("serving needs fastapi and uvicorn: pip install 'llmrec[serve]'") from None
        models = {"first": load(options, options.source)}
        if options.compare:
            models["second"] = load(options, options.compare)
        names = {"first": Path(options.source).name, "second": Path(options.compare or "").name}
        app = application(models, images=images, names=names)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"http://{host}:{held.getsockname()[1]}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[held])


def listening(host: str, port: int) -> socket.socket:
    """A socket that holds an address from now on; clients that connect early wait until they are served.

    Raises:
        ConfigError: the port is in use, or the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use; give another with --port") from None
        reason = str(error.strerror).partition(" (while")[0]
        raise ConfigError(
            f"port {port} of {host} cannot be taken ({reason}); give another --port or --host"
        ) from None


def load(options: argparse.Namespace, source: str) -> Any:
    """A recommender as the arguments say."""
    set_up_logging()
    from llmrec.inference.recommender import Recommender

    return Recommender.from_pretrained(
        source, revision=options.revision, device=options.device, base_model=options.base_model
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "package": package,
    "push_to_hub": push_to_hub,
    "recommend": recommend,
    "serve": serve,
}
