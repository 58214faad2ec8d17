"""A training job's log lines and states on the terminal, until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from stocktake.aws.connection import Aws, AwsError, translate_aws_errors
from stocktake.aws.jobs import LOG_GROUP, Job, find_job, printable

POLL_SECONDS = 2.0
_LONGEST_PAUSE = 5.0
_LONGEST_RETRY_PAUSE = 60.0
_QUIET_POLLS = 2
"""Logs may lag behind the job: after its end, poll until nothing came this often."""


@dataclass
class LogStreams:
    """The lines of a job's processes, each once."""

    aws: Aws
    name: str
    instance_count: int = 1
    is_muted: bool = False
    """Whether the logs may not be read."""
    _tokens: dict[str, str] = field(default_factory=dict)
    """Stream -> where to go on."""

    def new_lines(self, *, look_for_streams: bool) -> Iterator[str]:
        """Lines since the last time; with several instances each begins with its instance's name.

        Args:
            look_for_streams: list the streams too. An account may do so 5 times a second, all its users together.

        Raises:
            AwsError: AWS does not answer, or throttles.
        """
        if self.is_muted:
            return
        try:
            if look_for_streams or not self._tokens:
                self._find_streams()
            for stream in sorted(self._tokens):
                # NAME/algo-1-1700000000; one instance has several after an interruption
                instance = stream.partition("/")[2].rpartition("-")[0]
                for line in self._read(stream):
                    yield printable(f"[{instance}] {line}" if self.instance_count > 1 else line)
        except AwsError as error:
            if error.is_transient:
                raise
            if error.code != "ResourceNotFoundException":  # nothing was written yet
                self.is_muted = True
                yield f"warning: {printable(str(error))}"

    def _find_streams(self) -> None:
        with translate_aws_errors("the job's logs cannot be read"):
            pages = self.aws.logs.get_paginator("describe_log_streams").paginate(
                logGroupName=LOG_GROUP, logStreamNamePrefix=f"{self.name}/"
            )
            for page in pages:
                for stream in page["logStreams"]:
                    self._tokens.setdefault(stream["logStreamName"], "")

    def _read(self, stream: str) -> Iterator[str]:
        while True:
            token = self._tokens[stream]
            with translate_aws_errors("the job's logs cannot be read"):
                page = self.aws.logs.get_log_events(
                    logGroupName=LOG_GROUP,
                    logStreamName=stream,
                    startFromHead=True,
                    **({"nextToken": token} if token else {}),
                )
            self._tokens[stream] = page["nextForwardToken"]
            yield from (event["message"].rstrip("\n") for event in page["events"])
            if not page["events"] or page["nextForwardToken"] == token:
                return


def follow_training_job(aws: Aws, name: str, *, poll_seconds: float = POLL_SECONDS) -> Job:
    """Print the job's log lines as they come and its states as they change, until it ends.

    Polls less often while nothing happens. An AWS that does not answer, or throttles, is asked again, less and less
    often, until it answers.

    Raises:
        AwsError: there is no such job, or AWS refuses to describe it.
    """
    streams = LogStreams(aws, name)
    state, warning, pause, quiet_polls = "", "", poll_seconds, 0
    while True:
        has_lines = False
        try:
            job = find_job(aws, name)
            streams.instance_count = job.instance_count
            # A stream appears shortly after its instance starts, which is when the others have said nothing new
            for line in streams.new_lines(look_for_streams=quiet_polls > 0):
                has_lines = True
                print(line, flush=True)
            warning = ""
        except AwsError as error:
            if not error.is_transient:
                raise
            if warning != str(error):
                warning = str(error)
                print(f"warning: {warning}; trying again", flush=True)
            pause = min(2 * max(pause, poll_seconds), _LONGEST_RETRY_PAUSE)
            time.sleep(pause)
            continue
        if state != (state := f"{job.status}: {job.step}" if job.step != job.status else job.status):
            print(f"--- {name} {state}{f' ({job.failure})' if job.failure else ''}", flush=True)
            has_lines = True
        quiet_polls = 0 if has_lines else quiet_polls + 1
        if job.has_ended and quiet_polls >= _QUIET_POLLS:
            return job
        pause = min(poll_seconds, 0.5) if job.has_ended else poll_seconds * 1.5 ** min(quiet_polls, 10)
        time.sleep(min(pause, _LONGEST_PAUSE))
