"""`serve`: the server as SageMaker starts it, without arguments. `stocktake serve` is the command for people."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from stocktake.errors import StocktakeError
from stocktake.serving.deployment import Deployment, version_of, write_spec
from stocktake.serving.settings import ServerSettings, setting_descriptions
from stocktake.serving.supervisor import Supervisor

CONTAINER_MODEL = "/opt/ml/model"
"""Where SageMaker puts the model."""
_SAGEMAKER = {"SAGEMAKER_BIND_TO_PORT": "port", "SAGEMAKER_MODEL_SERVER_WORKERS": "workers"}
_EXAMPLES = """examples:
  serve                                                      in a container: serves /opt/ml/model on port 8080
  STOCKTAKE_PORT=0 STOCKTAKE_PAGE=true serve exported/       on any free port, with a page for people
  kill -HUP PID                                              load the model anew, without dropping a request

environment:
  STOCKTAKE_MODEL_DIR, STOCKTAKE_MODEL_VERSION               the model's folder; what answers bear as model_version
  SAGEMAKER_BIND_TO_PORT, SAGEMAKER_MODEL_SERVER_WORKERS     as STOCKTAKE_PORT and STOCKTAKE_WORKERS
  SAGEMAKER_BATCH=true                                       answer a bad photo with an error record and status 200
"""


def main() -> NoReturn:
    """Serve until SIGTERM. Exit codes: 0 ended by a signal, 1 the model was not loaded, 2 a mistake in the call."""
    options = _parse(sys.argv[1:])
    try:
        if options.endpoint:
            sys.exit(Supervisor(Path(options.model), is_endpoint=True).serve())
        with tempfile.TemporaryDirectory(prefix="stocktake-serve-") as folder:
            write_spec(Path(folder), deployment_of(options.model, os.environ))
            code = Supervisor(Path(folder)).serve()
        sys.exit(code)
    except StocktakeError as error:
        print(f"serve: {error}", file=sys.stderr)
        sys.exit(2)


def deployment_of(model: str | None, environment: Mapping[str, str]) -> Deployment:
    """What the environment asks for: STOCKTAKE_<SETTING>, else SageMaker's own variables, else the defaults.

    Raises:
        StocktakeError: a bad value, naming the variable; or the model folder is missing.
    """
    variables = {**_SAGEMAKER, **{_variable(setting): setting for setting in ServerSettings.__dataclass_fields__}}
    settings = {}
    for variable, setting in variables.items():
        if value := environment.get(variable):
            try:
                ServerSettings.read({setting: value})
            except StocktakeError as error:
                raise StocktakeError(f"{variable}: {error}") from None
            settings[setting] = value
    folder = Path(model or environment.get("STOCKTAKE_MODEL_DIR") or CONTAINER_MODEL)
    if not folder.is_dir():
        raise StocktakeError(f"there is no model folder {folder}: name one, or set STOCKTAKE_MODEL_DIR")
    version = environment.get("STOCKTAKE_MODEL_VERSION") or version_of(folder)
    return Deployment(str(folder.absolute()), str(folder), version, settings)


def _variable(setting: str) -> str:
    return f"STOCKTAKE_{setting.upper()}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    settings = setting_descriptions() if {"-h", "--help"} & set(arguments) else {}
    parser = argparse.ArgumentParser(
        prog="serve",
        description="Serve a counting model over HTTP: GET /ping, POST /invocations. Its settings are variables.",
        epilog=_EXAMPLES + "\n".join(f"  {_variable(name):29} {text}" for name, text in settings.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="folder of an exported model, or an MLflow model folder")
    parser.add_argument("--endpoint", action="store_true", help=argparse.SUPPRESS)  # the folder is an endpoint's
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
