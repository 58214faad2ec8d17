"""Models whose container is a short program, so that it answers in a moment."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

import pytest

from emulated_aws import EmulatedAws

PROGRAM = b"""
import http.server, os

class Shout(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"bad" in body:
            return self.answer(400, b"a bad record")
        words = os.environ["VOICE"], self.headers["Content-Type"], os.environ.get("SAGEMAKER_BATCH", "-")
        self.answer(200, " ".join(words).encode() + b" " + body.upper())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Shout).serve_forever()
"""


@pytest.fixture(scope="session")
def create_model(emulator: EmulatedAws) -> Callable[..., str]:
    """create_model(name, image="1.dkr.ecr/model-program:1", **environment): a model, made once per name: its name.

    It answers with its VOICE (its name), the content type, SAGEMAKER_BATCH or -, and the body in capital letters; with
    400 where the body has the word bad.
    """
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        member = tarfile.TarInfo("main")
        member.size = len(PROGRAM)
        archive.addfile(member, io.BytesIO(PROGRAM))
    uri = emulator.put("models/shout/model.tar.gz", data.getvalue())
    created: set[str] = set()

    def create(name: str, image: str = "1.dkr.ecr/model-program:1", **environment: str) -> str:
        if name not in created:
            container = {"Image": image, "ModelDataUrl": uri, "Environment": {"VOICE": name, **environment}}
            emulator.client("sagemaker").create_model(
                ModelName=name, ExecutionRoleArn=emulator.role, PrimaryContainer=container
            )
            created.add(name)
        return name

    return create
