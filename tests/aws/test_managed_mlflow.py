"""An MLflow that SageMaker runs, addressed by its ARN: what reaches it is signed, by this machine and by a job."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from emulated_aws import EmulatedAws
from stocktake.commands.train import train
from stocktake.config.data import SplitConfig
from stocktake.config.runs import TrackingConfig
from stocktake.config.training import MajorityConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import Stores
from stocktake.tracking.connection import Connection
from tiny_bins import tiny_root
from tracking_server import TrackingServer

__all__ = ["tiny_root"]
pytestmark = [pytest.mark.aws, pytest.mark.slow]
ARN = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/bins"
PROJECT = Path(__file__).parents[2]


@dataclass
class Gateway:
    """What stands before a managed server: refuses what is not signed for it, and passes the rest on."""

    uri: str
    signers: set[str] = field(default_factory=set)
    """Access keys of accepted requests."""
    refused: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def gateway(emulator: EmulatedAws, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Before a real `mlflow server` whose artifacts lie in the bucket, as a managed one's do."""
    artifacts = ["--no-serve-artifacts", "--default-artifact-root", f"s3://{emulator.bucket}/managed"]
    folder = tmp_path_factory.mktemp("managed")
    secret = emulator.environment["AWS_SECRET_ACCESS_KEY"]
    with TrackingServer(folder, empty_store, artifacts, emulator.environment) as behind:

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if (fault := _signature_fault(self.command, self.path, self.headers, body, secret)) is not None:
                    seen.refused.append(f"{self.command} {self.path}: {fault}")
                    return self._answer(403, {}, fault.encode())
                seen.signers.add(self.headers["Authorization"].partition("Credential=")[2].partition("/")[0])
                connection = http.client.HTTPConnection("127.0.0.1", behind.port, timeout=60)
                connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                kind = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
                return self._answer(answer.status, kind, answer.read())

            do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815 - the library's names

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        seen = Gateway(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield seen
        server.shutdown()
        server.server_close()


def _signature_fault(method: str, path: str, headers: http.client.HTTPMessage, body: bytes, secret: str) -> str | None:
    """What AWS would say of a request's signature; a role's secret is not known here."""
    authorization = headers.get("Authorization", "")
    if not authorization.startswith("AWS4-HMAC-SHA256 Credential="):
        return "Missing Authentication Token"
    if headers.get("x-mlflow-sm-tracking-server-arn") != ARN:
        return "no tracking server is named"
    parts = dict(part.split("=", 1) for part in authorization.removeprefix("AWS4-HMAC-SHA256 ").split(", "))
    key, _, region, service, _ = parts["Credential"].split("/")
    if (region, service) != ("us-east-1", "sagemaker-mlflow"):
        return f"Credential should be scoped to sagemaker-mlflow, not {service} in {region}"
    if headers["X-Amz-Content-SHA256"] != hashlib.sha256(body).hexdigest():
        return "The body is not what was signed"
    if headers.get("X-Amz-Security-Token"):
        return None
    signed = {name: headers[name] for name in parts["SignedHeaders"].split(";")}
    request = AWSRequest(method, f"http://{headers['Host']}{path}", headers=signed, data=body)
    request.context["timestamp"] = headers["X-Amz-Date"]
    auth = SigV4Auth(Credentials(key, secret), service, region)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    if auth.signature(text, request) != parts["Signature"]:
        return "The request signature we calculated does not match the signature you provided"
    return None


@pytest.fixture
def managed(gateway: Gateway, emulator: EmulatedAws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gateway:
    """The variables of somebody who uses it; the plugin's own says that it is here and not at AWS."""
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT", gateway.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ARN)
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    yield gateway
    mlflow.set_tracking_uri(before)


def test_a_run_is_logged_through_the_arn(managed: Gateway, emulator: EmulatedAws, tiny_root: Path) -> None:
    config = MajorityConfig(
        root=str(tiny_root),
        task="1-3",
        split=SplitConfig(fractions=(0.6, 0.2, 0.2), near_duplicate_distance=0),
        tracking=TrackingConfig(experiment="through-the-arn", system_metrics=False),
    )
    train(config)
    client = mlflow.MlflowClient(ARN, ARN)
    (run,) = client.search_runs([client.get_experiment_by_name("through-the-arn").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/accuracy"] == pytest.approx(10 / 18)
    assert run.info.artifact_uri.startswith(f"s3://{emulator.bucket}/managed/")
    assert "evaluation/test_confusion_matrix.png" in [
        artifact.path for artifact in client.list_artifacts(run.info.run_id, "evaluation")
    ]
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert str(model.status) == "READY"
    assert managed.refused == []


def test_a_job_logs_through_the_arn(managed: Gateway, emulator: EmulatedAws, tiny_root: Path) -> None:
    for path in [*tiny_root.glob("bin-images/*"), *tiny_root.glob("metadata/*")]:
        emulator.put(f"managed-tiny/{path.relative_to(tiny_root)}", path.read_bytes())
    mlflow.set_tracking_uri(ARN)
    done = mlflow.projects.run(
        str(PROJECT),
        "majority",
        parameters={
            "root": f"s3://{emulator.bucket}/managed-tiny",
            "task": "1-3",
            "workspace": "workspace",
            "split.fractions": "[0.6,0.2,0.2]",
            "split.near_duplicate_distance": "0",
            "tracking.system_metrics": "false",
        },
        experiment_name="jobs-through-the-arn",
        backend="sagemaker",
        backend_config={
            "role": emulator.role,
            "bucket": f"s3://{emulator.bucket}/managed-jobs",
            "image": "image:1",
            "environment": {"SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT": managed.uri},
        },
    )
    run = mlflow.MlflowClient(ARN, ARN).get_run(done.run_id)
    assert (run.info.status, run.data.tags["stage"], run.data.tags["results.source"]) == (
        "FINISHED",
        "majority",
        "live",
    )
    assert run.data.metrics["test/n"] > 0
    assert emulator.job(run.data.tags["job.name"])["Environment"]["MLFLOW_TRACKING_URI"] == ARN
    assert managed.refused == []


def test_a_managed_server_that_is_away_is_named(managed: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StocktakeError, match=rf"the tracking server {ARN} does not answer \(.*refused"):
        Connection(Stores(ARN, ARN)).open()


def test_another_store_in_between_changes_nothing(managed: Gateway, tmp_path: Path) -> None:
    connection, other = Connection(Stores(ARN, ARN)), Connection(Stores(*[f"sqlite:///{tmp_path}/mlflow.db"] * 2))
    for store in (connection, other, connection):
        store.client.search_experiments(max_results=1)
    other.open()
    assert connection.health_check() is None
    assert managed.refused == []


def test_what_is_signed_with_another_secret_is_refused(managed: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StocktakeError, match="signature we calculated does not match"):
        Connection(Stores(ARN, ARN)).open()
    assert managed.refused.pop().endswith("the signature you provided")
    managed.refused.clear()
