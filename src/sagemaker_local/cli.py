"""`sagemaker-local`: run the emulator in the foreground and print the variables that lead AWS clients to it."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

READY = "# ready"
"""Start of the last line that is printed, once everything answers."""
_EXAMPLES = """examples:
  (umask 077; exec sagemaker-local > emulator.sh) &     then, after its line "# ready": . ./emulator.sh
  sagemaker-local --port 5000 --grace 2
  sagemaker-local --image '*/mine:*=python -m mine'     containers of this image start with: python -m mine train
  sagemaker-local --image '*/other*=sh ./docker/entry.sh --verbose'
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until Ctrl-C or SIGTERM. Exit code 2: a setting that cannot be used, or a package that is missing."""
    options = _parser().parse_args(arguments)
    try:
        from sagemaker_local.server import Emulator, EmulatorError
    except ModuleNotFoundError as error:
        _exit(f"{error.name} is not installed: pip install 'moto[server]' optuna")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        emulator = Emulator(
            options.port, options.region, options.state, options.grace, options.startup, dict(options.image)
        )
    except EmulatorError as error:
        _exit(str(error))
    with emulator:
        print(f"# SageMaker at {emulator.context.endpoint}, with a bucket and a role")
        for name, value in emulator.environment.items():
            print(f"export {name}={shlex.quote(value)}")
        if not emulator.context.has_namespaces:
            print(
                "# This machine allows no private mount namespace: containers see no /opt/ml, but SAGEMAKER_BASE_DIR, "
                "and jobs of several hosts fail."
            )
        print(f"{READY}; Ctrl-C ends it and everything that runs in it", flush=True)
        ended.wait()
        print("sagemaker-local: ending", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sagemaker-local",
        description="A SageMaker on this machine: training jobs run, endpoints answer, S3 and IAM are moto's.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=_integer(0, 65535), default=0, help="of 127.0.0.1; default: any free one")
    parser.add_argument("--region", default="us-east-1", help="AWS region that it plays (default: %(default)s)")
    parser.add_argument(
        "--state", type=Path, help="folder for what containers write, emptied at the end; default: a temporary one"
    )
    parser.add_argument(
        "--grace",
        type=_integer(0, 120),
        default=10,
        help="seconds between SIGTERM and SIGKILL for a stopped container (default: %(default)s; AWS gives 120)",
    )
    parser.add_argument(
        "--startup",
        type=_integer(1, 3600),
        default=60,
        help="seconds that a model server may take to answer /ping (default: %(default)s)",
    )
    parser.add_argument(
        "--image",
        type=_image,
        action="append",
        default=[],
        metavar="PATTERN=COMMAND",
        help="command that containers of matching images start with, as their ENTRYPOINT; may be repeated. SageMaker "
        "adds `train` or `serve`. Words that begin with ./ are paths in this folder. Without a match `train` or "
        "`serve` itself is looked for on PATH",
    )
    return parser


def _integer(least: int, most: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between {least} and {most}")
        return value

    return integer


def _image(text: str) -> tuple[str, list[str]]:
    pattern, separator, command = text.partition("=")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    if not separator or not words:
        raise argparse.ArgumentTypeError(f"{text} is not PATTERN=COMMAND")
    return pattern, [str(Path(word).absolute()) if word.startswith(f".{os.sep}") else word for word in words]


def _exit(message: str) -> None:
    print(f"sagemaker-local: {message}", file=sys.stderr)
    sys.exit(2)
