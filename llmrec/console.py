"""What commands say: log lines, errors and tracebacks; without secrets, and once for all processes."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

from tqdm import tqdm

from llmrec import distributed, launched
from llmrec.errors import LlmrecError, StoppedError

USER_ERROR = 2
INTERRUPTED = 130
CLOSED_PIPE = 141

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""

OF_DISKS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG),
)
"""Errors of the system that users can mend: files that may not be read or written, disks that are full or
away, too many open files, names that are too long."""

SPINS = "30000"
"""Tries of a waiting thread of GNU OpenMP, which torch comes with for Linux; 300,000 by itself."""

HIDDEN = "[hidden]"
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
SECRETS = re.compile(
    r"""(?<=://)[^/\s:@]*:[^/\s]+(?=@)             # user:password@ in an address
      | (?<=[?&])(?:[\w-]*(?:token|signature|secret|password|api[_-]?key)|sig)=[^&\s"']+
      | (?<=\bBearer\ )[\w.~+/-]{8,}=*
      | \bhf_[A-Za-z0-9]{16,}
      | \bgh[pousr]_[A-Za-z0-9]{20,}
      | \bAKIA[0-9A-Z]{16}\b""",
    re.VERBOSE | re.IGNORECASE,
)
SHORTEST_SECRET = 8


def show_lines_at_once() -> None:
    """Print lines as they come where output goes to a file or another program, too."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def guarded(command: Callable[[], None]) -> int:
    """Run a command; errors meant for users become one line and an exit code.

    What an interrupted command keeps it says in its KeyboardInterrupt, see `pipeline.run_stage`; SIGTERM, and
    SIGHUP of a terminal that closes, are taken for Ctrl-C.

    Returns:
        0 done, 2 something the user gave cannot work, 130 interrupted or asked to stop, 141 nobody reads the
        output any more.
    """
    sys.excepthook = show_traceback
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which is not to be had in another environment
    wait_briefly()
    open_what_is_closed()
    end_with_launcher()
    try:
        with terminated_like_interrupted():
            command()
        sys.stdout.flush()
    except StoppedError as error:
        say(str(error))
        return INTERRUPTED
    except LlmrecError as error:
        say(f"error: {error}")
        return USER_ERROR
    except RuntimeError as error:
        if not distributed.lost_another(error):
            raise
        say(
            f"error: process {launched.rank()} lost the others: one ended, or did not answer for "
            f"{launched.timeout()} ({str(error).splitlines()[0]}). If none of them said why, the system "
            "killed it, most often for want of memory"
        )
        return USER_ERROR
    except KeyboardInterrupt as error:
        say(f"interrupted: {error}" if str(error) else "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has what they wanted; Python's own last flush would fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except UnicodeEncodeError as error:
        # Titles to a terminal of another encoding, and names of files that are not in the locale's.
        say(
            f"error: {error.object[error.start : error.end]!a} cannot be written in {error.encoding}; use a "
            "locale in UTF-8, such as LC_ALL=C.UTF-8, and names of files in it"
        )
        return USER_ERROR
    except OSError as error:
        if error.errno not in OF_DISKS:
            raise
        say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
        return USER_ERROR
    return 0


def wait_briefly() -> None:
    """Let threads that wait for each other sleep sooner; to be called before torch is imported.

    If another process has one of their cores, each of the thousands of waits in a step else lasts until the
    system takes that core from it: several times the time of a step, for the price of a few percent where
    nobody else is (tools/README.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def open_what_is_closed() -> None:
    """Give standard streams that were closed (``2>&-``, or by what starts services) the null device. Python
    has None for them, and the next files to be opened would get their numbers, and what libraries print."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(handle, True)
            setattr(sys, name, os.fdopen(handle, mode))


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C, in the main thread, which alone may say what signals do, and SIGHUP too unless
    it is ignored (nohup). After any, further ones of both, as they come from a launcher that was interrupted
    too, or from a shell that lost its terminal, break off no clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.default_int_handler(number, frame)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    for number, usual in (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL):
        if signal.getsignal(number) is usual:
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_launcher() -> None:
    """Be asked to stop (SIGTERM) when `accelerate launch` ends, which tells its one process nothing. Linux
    alone."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def say(text: str) -> None:
    """Print a last word to standard error, unless another process of this run had one."""
    if first_to_fail():
        with contextlib.suppress(OSError):  # its terminal, or whoever read it, is gone
            print(redact(text), file=sys.stderr)


def show_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """The excepthook of commands."""
    if not first_to_fail():
        return
    import traceback as tracebacks

    print(redact("".join(tracebacks.format_exception(kind, error, traceback))), end="", file=sys.stderr)


def first_to_fail() -> bool:
    """Whether no other process of this run has failed before; true the first time it is asked, anywhere.

    An error of one process soon is an error of all, who lose it; only the first says something.
    """
    if launched.world_size() == 1:
        return True
    from torch.distributed import DistStoreError, TCPStore

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=5),
        )
        return store.add(f"llmrec failed {attempt}", 1) == 1
    except (DistStoreError, RuntimeError, KeyError):
        return True


def redact(text: str) -> str:
    """The text without what looks like a secret, and without the secrets of the environment."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return SECRETS.sub(HIDDEN, text)


class AboveBars(logging.StreamHandler):
    """Log lines to standard error, above the progress bars that a terminal shows."""

    def emit(self, record: logging.LogRecord) -> None:
        # Without a terminal bars log themselves, under tqdm's lock, which must then not be asked for here.
        terminal = sys.stderr.isatty()
        with tqdm.external_write_mode(file=sys.stderr) if terminal else contextlib.nullcontext():
            super().emit(record)


class RedactingFormatter(logging.Formatter):
    """Log lines, tracebacks in them included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def set_up_logging() -> None:
    """One line per stage and evaluation, from the main process, to standard error."""
    root = logging.getLogger()
    if not root.handlers:
        handler = AboveBars(sys.stderr)
        handler.setFormatter(RedactingFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        root.addHandler(handler)
    logging.getLogger("llmrec").setLevel(logging.INFO if launched.is_main() else logging.ERROR)
    # It reports at start that optional CPU kernels are absent, which we do not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
