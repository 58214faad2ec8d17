from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
import pytest
import yaml

from stocktake.models.export import export_model
from stocktake.serving.predictor import Predictor, record
from stocktake.serving.pyfunc import CODE, SIGNATURE, save_pyfunc
from tiny_bins import draw_bin, tiny_model


@pytest.fixture(scope="module")
def exported(few_bins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "counter"
    export_model(tiny_model("pca_svm", few_bins), folder)
    return folder


@pytest.fixture(scope="module")
def saved(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pyfunc(exported, tmp_path_factory.mktemp("saved") / "model", draw_bin(1, 0))


PHOTOS = [draw_bin(quantity, 800 + quantity) for quantity in (1, 2, 3)]


def test_the_loaded_model_answers_as_the_predictor_does(saved: Path, exported: Path) -> None:
    """In the shape of the HTTP server's answers, which is also that of the signature."""
    answers = mlflow.pyfunc.load_model(str(saved)).predict(pd.DataFrame({"photo": [*PHOTOS, b"no photo", None]}))
    predictor = Predictor(exported)
    expected = [record(prediction, predictor.version) for prediction in predictor.predict(PHOTOS)]
    assert answers.to_dict("records")[:3] == expected
    assert list(answers.columns) == SIGNATURE.outputs.input_names()
    for row in answers.to_dict("records")[3:]:
        assert row["error"]
        assert (row["quantity"], row["confidence"], row["probabilities"]) == (None, None, {})


def test_the_folder_has_graph_and_the_code_it_needs_and_no_pickle(saved: Path) -> None:
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".joblib")]
    for path in files:
        head = path.read_bytes()[:2]
        assert not (head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")), f"{path} is a pickle"
        assert not zipfile.is_zipfile(path), f"{path} may hold a pickle"
    assert {path.name for path in (saved / "artifacts" / "exported").iterdir()} == {"model.json", "model.onnx"}
    code = {str(path.relative_to(saved)) for path in files if path.suffix == ".py"}
    assert code == {"pyfunc.py", *(f"code/stocktake/{name}" for name in CODE)}
    described = yaml.safe_load((saved / "MLmodel").read_text())
    columns = [(column["name"], column["type"]) for column in json.loads(described["signature"]["inputs"])]
    assert columns == [("photo", "binary")]
    assert "torch" not in (saved / "requirements.txt").read_text()


def test_the_input_example_is_the_photo(saved: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(saved))
    example = loaded.input_example
    assert list(example.columns) == ["photo"]
    answers = loaded.predict(example)
    assert answers["quantity"][0] in (1, 2, 3)
    assert bytes(example["photo"][0]) == draw_bin(1, 0)


ELSEWHERE = """
import sys
from importlib.abc import MetaPathFinder

class NotInstalled(MetaPathFinder):
    '''The package is to be found in the model's folder only, and these libraries nowhere.'''
    def find_spec(self, name, path, target=None):
        if name.partition('.')[0] in ('torch', 'torchvision', 'pytorch_lightning', 'sklearn'):
            raise ImportError(name + ' is not installed here')
        return None

sys.meta_path.insert(0, NotInstalled())
sys.path[:] = [entry for entry in sys.path if not entry.rstrip('/').endswith('/src')]
sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in getattr(one, '__module__', '').lower()]
try:
    import stocktake
except ImportError:
    pass
else:
    raise SystemExit('stocktake is still importable from ' + str(stocktake.__path__))
import mlflow.pyfunc, pandas as pd, pathlib
model = mlflow.pyfunc.load_model(sys.argv[1])
answers = model.predict(pd.DataFrame({'photo': [pathlib.Path(sys.argv[2]).read_bytes()]}))
import stocktake.serving.predictor as predictor
assert 'code' in pathlib.Path(predictor.__file__).parts, predictor.__file__
print('quantity', answers['quantity'][0])
"""


@pytest.mark.slow
def test_it_answers_where_neither_the_package_nor_torch_is_installed(
    saved: Path, exported: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    saved.rename(moved)
    try:
        (tmp_path / "photo.jpg").write_bytes(PHOTOS[1])
        (tmp_path / "answer.py").write_text(ELSEWHERE)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "answer.py", str(moved), "photo.jpg"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
        )
    finally:
        moved.rename(saved)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["quantity", str(Predictor(exported).predict([PHOTOS[1]])[0].quantity)]


def test_its_requirements_are_those_of_the_serving_extra(saved: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = [*project["dependencies"], *project["optional-dependencies"]["serving"]]
    names = {re.split(r"[^\w.-]", name)[0] for name in extra}
    for line in (saved / "requirements.txt").read_text().split():
        name, _, pinned = line.partition("==")
        assert name in names
        assert pinned


@pytest.mark.slow
def test_mlflows_own_server_takes_it(saved: Path, exported: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(saved), "-p", str(port)]
    # mlflow starts the uvicorn that it finds on the path
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, "--env-manager", "local"],
            stdout=file,
            stderr=file,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            start_new_session=True,
        )
    try:
        encoded = [[base64.b64encode(photo).decode()] for photo in PHOTOS]
        body = json.dumps({"dataframe_split": {"columns": ["photo"], "data": encoded}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                answer = urllib.request.urlopen(request, timeout=60)
                break
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read()) from None
            except OSError:
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
        rows = json.load(answer)["predictions"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert rows == [record(each, each.model_version) for each in Predictor(exported).predict(PHOTOS)]
