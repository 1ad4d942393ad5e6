"""A real S3 server (moto's) in a process of its own, and what it was asked for."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from upath import UPath

STARTED = re.compile(r"Running on (http://\S+)")
REQUEST = re.compile(r"((?:GET|PUT|POST|HEAD|DELETE) \S+) HTTP/1\.1")


@dataclass
class S3Server:
    """A server that runs. endpoint: its URL. log: the file with a line for each request."""

    endpoint: str
    log: Path

    def __post_init__(self) -> None:
        self._buckets = count()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "an-id",
            "AWS_SECRET_ACCESS_KEY": "a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def new_bucket(self) -> str:
        """The URL of an empty bucket."""
        url = f"s3://bucket-{next(self._buckets)}"
        UPath(url).mkdir()
        return url

    def requests(self) -> list[str]:
        """Method and path of every request so far."""
        return REQUEST.findall(self.log.read_text())


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """A server that lives as long as the context; `folder` is for its log."""
    log = folder / "s3.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 30
        while not (started := STARTED.search(log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server doesn't start: {log.read_text()}")
            time.sleep(0.02)
        yield S3Server(started[1], log)
    finally:
        process.kill()
        process.wait()
