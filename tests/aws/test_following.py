"""Following real jobs of the emulator through networks that fail: lines, states, results, and what Ctrl-C means."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from emulated_aws import EmulatedAws, eventually
from faulty_aws import FaultyAws
from stocktake.aws.connection import Aws, AwsError
from stocktake.aws.jobs import Job, find_job, printable
from stocktake.aws.logs import LogStreams, follow_training_job
from stocktake.aws.watch import watch
from stocktake.config.runs import TrackingConfig

pytestmark = pytest.mark.aws


@pytest.fixture
def proxy(emulator: EmulatedAws, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyAws]:
    """The way to the emulator; botocore itself does not retry, so that every fault is seen by our code."""
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    proxy = FaultyAws(emulator.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield proxy
    proxy.close()


def test_a_dropped_network_and_a_throttled_account_lose_no_line(
    proxy: FaultyAws, emulator: EmulatedAws, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stocktake.aws.logs._LONGEST_RETRY_PAUSE", 0.2)
    proxy.faults = {
        "DescribeTrainingJob": ["drop", "throttle", "drop"],
        "DescribeLogStreams": ["throttle", "drop"],
        "GetLogEvents": ["throttle", "", "drop", "throttle"],
    }
    emulator.train("dropped", "for number in 1 2 3 4 5 6 7 8; do echo line $number; sleep 0.2; done; exit 3")
    job = follow_training_job(Aws(), "dropped", poll_seconds=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("line ")] == [f"line {number}" for number in range(1, 9)]
    assert job.status == "Failed"
    assert not any(proxy.faults.values()), "every fault was met"
    states = [line for line in lines if line.startswith("--- dropped ")]
    assert len(states) == len(set(states))
    assert states[-1].startswith("--- dropped Failed")
    assert any("Rate exceeded" in line for line in lines), "\n".join(lines)


def test_streams_are_not_listed_while_lines_come(proxy: FaultyAws, emulator: EmulatedAws) -> None:
    emulator.train("chatty", "for number in $(seq 30); do echo $number; sleep 0.1; done")
    eventually(lambda: emulator.log("chatty/"))
    streams = LogStreams(Aws(), "chatty")
    polls = 0
    while find_job(Aws(), "chatty").status == "InProgress":
        list(streams.new_lines(look_for_streams=False))
        polls += 1
        time.sleep(0.05)
    assert polls >= 2
    assert proxy.counts()["DescribeLogStreams"] == 1


def test_a_job_where_nothing_happens_is_polled_less_and_less(
    proxy: FaultyAws, emulator: EmulatedAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(0.05)

    monkeypatch.setattr("stocktake.aws.logs.time", SimpleNamespace(sleep=sleep))
    emulator.train("silent", "sleep 3")
    follow_training_job(Aws(), "silent", poll_seconds=0.1)
    assert max(pauses) > 1


def test_lines_of_two_instances_have_their_names_and_no_control_characters(
    proxy: FaultyAws, emulator: EmulatedAws, capsys: pytest.CaptureFixture[str]
) -> None:
    resources = {"InstanceType": "ml.m5.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1}
    attack = r"printf 'safe \033]0;title\007\033[2J\r\200text\n'"
    emulator.train("two-hosts-follow", attack, ResourceConfig=resources)
    follow_training_job(Aws(), "two-hosts-follow", poll_seconds=0.1)
    out = capsys.readouterr().out
    assert {line[:8] for line in out.splitlines() if "safe" in line} == {"[algo-1]", "[algo-2]"}
    assert printable(out.replace("\n", "")) == out.replace("\n", "")
    assert Job({"FailureReason": "a\x1b[31mb\x9bc\nd"}).failure == "a[31mbc d"


def test_logs_that_may_not_be_read_are_said_once(
    proxy: FaultyAws, emulator: EmulatedAws, rights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.train("private", "echo secret")
    eventually(lambda: emulator.log("private/"))
    for name, value in rights.environment.items():
        if name != "AWS_ENDPOINT_URL":
            monkeypatch.setenv(name, value)
    streams = LogStreams(Aws(), "private")  # a stream of a name that the policy does not give
    (line,) = streams.new_lines(look_for_streams=True)
    assert line.startswith("warning: ")
    assert list(streams.new_lines(look_for_streams=True)) == []


def test_a_job_that_does_not_exist_ends_the_following(proxy: FaultyAws) -> None:
    with pytest.raises(AwsError, match="nobody") as refused:
        follow_training_job(Aws(), "nobody")
    assert not refused.value.is_transient


@pytest.mark.parametrize(("answer", "stops"), [("s", True), ("l", False), (None, True)])
def test_ctrl_c_asks_on_a_terminal_and_stops_elsewhere(
    proxy: FaultyAws,
    emulator: EmulatedAws,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    answer: str | None,
    stops: bool,
) -> None:
    name = f"interrupted-{answer}"
    emulator.train(name, "echo started; exec sleep 60")
    asked: list[str] = []
    if answer is not None:
        monkeypatch.setattr("stocktake.aws.watch.sys", SimpleNamespace(stdin=_Terminal(), stdout=_Terminal()))
        monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    with interrupt_when(
        lambda: emulator.log(f"{name}/"), lambda: not asked and emulator.job(name)["TrainingJobStatus"] == "InProgress"
    ):
        ended = watch(Aws(), name, tmp_path, TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    assert (ended is not None) == stops
    assert emulator.job(name)["TrainingJobStatus"] == ("Stopped" if stops else "InProgress")
    emulator.client("sagemaker").stop_training_job(TrainingJobName=name) if not stops else None


class _Terminal:
    def isatty(self) -> bool:
        return True


class interrupt_when:  # noqa: N801 - a context manager
    """Send this process SIGINT, as Ctrl-C does, once a condition holds; again, as users do, while nothing comes of it.

    Python drops an interrupt that arrives in a callback of the garbage collector.
    """

    def __init__(self, condition: Callable[[], Any], is_lost: Callable[[], Any]) -> None:
        self._condition, self._is_lost = condition, is_lost
        self._over = threading.Event()

    def __enter__(self) -> None:
        def send() -> None:
            eventually(self._condition)
            os.kill(os.getpid(), signal.SIGINT)
            while not self._over.wait(5):
                if self._is_lost():
                    os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=send, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        """The block ends after the interrupt."""
        self._over.set()
