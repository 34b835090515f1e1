"""The example with Ray Serve, in two replicas on this machine. Ray is too large for an extra: pip install "ray[serve]"."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.slow
def test_two_replicas_share_the_requests_and_stream(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason='Ray is not installed: pip install "ray[serve]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = [
        sys.executable,
        str(ROOT / "examples/ray_serve.py"),
        "--replicas",
        "2",
        "--most",
        "2",
        "--ask",
        "--port",
        port,
    ]
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(script, env={**os.environ, **ours}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"^replica (\w+): (\d+) chunks from (\d+\.\d+) to (\d+\.\d+) s$", done.stdout, flags=re.MULTILINE
    )
    assert len(found) == 24
    assert len({replica for replica, *_ in found}) == 2  # all at one: 2 in 2^24, were each drawn alone
    assert any(int(chunks) > 2 and float(first) < float(last) for _, chunks, first, last in found)
