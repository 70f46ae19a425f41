"""The bench works: every row, in small, by its exit code. What it measured here means nothing.

Peers that are not installed are told of, and the rows run without them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from archiver.demo import dovecot
from tests.conftest import require
from tests.harness import postgres, seaweedfs

pytestmark = [pytest.mark.slow, pytest.mark.dovecot, pytest.mark.postgres, pytest.mark.s3]

REPOSITORY = Path(__file__).parents[2]
BENCH_SECONDS = 1200.0
"""Other tests run beside it."""


def test_every_row_can_be_measured(server_directory: Path) -> None:
    require(dovecot.unavailable(server_directory))
    require(postgres.unavailable())
    require(seaweedfs.why_not())
    ended = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--quick", "--place", str(server_directory / "bench")],
        cwd=REPOSITORY,
        # Of the environment's settings none is the bench's.
        env={name: value for name, value in os.environ.items() if not name.startswith("ARCHIVER_")},
        capture_output=True,
        text=True,
        timeout=BENCH_SECONDS,
        check=False,
    )
    sys.stderr.write(ended.stderr)
    assert ended.returncode == 0
