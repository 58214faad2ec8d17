"""`serve`: the server as SageMaker starts it, without arguments, and as people start it on their own machine.

Settings come from options, else STOCKTAKE_<SETTING>, else SageMaker's own variables, else the defaults.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from stocktake.errors import StocktakeError
from stocktake.serving.deployment import Deployment, version_of, write_spec
from stocktake.serving.settings import ServerSettings
from stocktake.serving.supervisor import Supervisor

CONTAINER_MODEL = "/opt/ml/model"
"""Where SageMaker puts the model."""
_PREFIX = "STOCKTAKE_"
_SAGEMAKER = {"SAGEMAKER_BIND_TO_PORT": "port", "SAGEMAKER_MODEL_SERVER_WORKERS": "workers"}
_EXAMPLES = """examples:
  serve                                         in a container: serves /opt/ml/model on port 8080
  serve exported/ --port 0 --page true          a folder of this machine, on any free port, with a page for people
  STOCKTAKE_WORKERS=2 STOCKTAKE_HOST=0.0.0.0 serve
  kill -HUP PID                                 load the model folder anew, without dropping a request

Every setting can be given as STOCKTAKE_<SETTING>, the model as STOCKTAKE_MODEL_DIR and its version as
STOCKTAKE_MODEL_VERSION. SAGEMAKER_BIND_TO_PORT and SAGEMAKER_MODEL_SERVER_WORKERS set the port and the workers; with
SAGEMAKER_BATCH=true, a photo that cannot be used is answered with an error record and status 200."""


def main() -> NoReturn:
    """Serve until SIGTERM. Exit codes: 0 ended by a signal, 1 the model was not loaded, 2 a mistake in the call."""
    options = _parse(sys.argv[1:])
    try:
        if options.pop("endpoint", None):
            sys.exit(Supervisor(Path(options["model"]), is_endpoint=True).serve())
        with tempfile.TemporaryDirectory(prefix="stocktake-serve-") as folder:
            write_spec(Path(folder), deployment_of(options, os.environ))
            code = Supervisor(Path(folder)).serve()
        sys.exit(code)
    except StocktakeError as error:
        print(f"serve: {error}", file=sys.stderr)
        sys.exit(2)


def deployment_of(options: Mapping[str, str], environment: Mapping[str, str]) -> Deployment:
    """What options and environment ask for.

    Raises:
        StocktakeError: a bad value, naming the option or variable; or the model folder is missing.
    """
    asked = {setting: (environment[name], name) for name, setting in _SAGEMAKER.items() if environment.get(name)}
    for setting in _settings():
        name = _PREFIX + setting.upper()
        if environment.get(name):
            asked[setting] = (environment[name], name)
    asked |= {name: (value, f"--{name}") for name, value in options.items() if name not in ("model", "model_version")}
    for setting, (value, source) in asked.items():
        try:
            ServerSettings.read({setting: value})
        except StocktakeError as error:
            raise StocktakeError(f"{source}: {error}") from None
    model = options.get("model") or environment.get(f"{_PREFIX}MODEL_DIR") or CONTAINER_MODEL
    if not Path(model).is_dir():
        raise StocktakeError(f"there is no model folder {model}: name one, or set {_PREFIX}MODEL_DIR")
    version = options.get("model_version") or environment.get(f"{_PREFIX}MODEL_VERSION") or version_of(Path(model))
    settings = {setting: value for setting, (value, _) in asked.items()}
    return Deployment(str(Path(model).absolute()), model, version, settings)


def setting_descriptions() -> dict[str, str]:
    """Of every setting, its docstring and default, for people."""
    from docstring_parser import parse_from_object

    defaults = ServerSettings()
    parts = {part.arg_name: part.description or "" for part in parse_from_object(ServerSettings).params}
    return {name: f"{' '.join(text.split())} ({getattr(defaults, name)})" for name, text in parts.items()}


def _settings() -> list[str]:
    return list(ServerSettings.__dataclass_fields__)


def _parse(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="serve",
        description="Serve a counting model over HTTP: GET /ping, POST /invocations.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", help="folder of an exported model, or an MLflow model folder")
    parser.add_argument("--model_version", metavar="TEXT", help="what answers bear as model_version")
    parser.add_argument("--endpoint", action="store_true", help=argparse.SUPPRESS)  # the folder is an endpoint's
    described = setting_descriptions() if {"-h", "--help"} & set(arguments) else {}
    for setting in _settings():
        parser.add_argument(f"--{setting}", metavar="VALUE", help=described.get(setting, "").replace("%", "%%"))
    return vars(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
