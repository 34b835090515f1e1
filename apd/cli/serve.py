"""`apd serve`: loads the pair and serves it until a signal ends it."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apd.cli.checkpoints import NEW_TOKENS, check_places, settle_new_tokens
from apd.cli.listening import bound
from apd.cli.parsing import flag
from apd.cli.report import show_warning
from apd.cli.usage import UsageError, check_decoding, check_options, config_of, sampling_of
from apd.config import APDConfig
from apd.extras import install
from apd.serve.engine.process import EngineProcess
from apd.serve.settings import ServeSettings

# Nothing here imports torch before the engine's process has started: both processes import it at the same time.

if TYPE_CHECKING:
    from apd.sampler import APDSampler

EXTRA = "The server needs packages that are not installed, {missing} among them: {command}."


def run(arguments: argparse.Namespace) -> None:
    """Run the command with parsed arguments, until SIGINT or SIGTERM.

    Raises:
        UsageError: options that cannot be used together, or one out of range.
        ImportError: the extra `serve` is not installed.
    """
    config = config_of(arguments)
    check_options(arguments)
    settings = _settings(arguments)
    template = None if arguments.chat_template is None else _template(arguments.chat_template)
    for package in ("fastapi", "uvicorn", "prometheus_client", "jinja2"):  # before weights that could not be served
        if find_spec(package) is None:
            raise ImportError(EXTRA.format(missing=package, command=install("serve")))
    check_places(arguments)
    sockets = bound(arguments.host, arguments.port)
    try:
        load = partial(_loaded, arguments, config, template)
        with EngineProcess(load, max_rows=settings.max_batch_size) as engine:
            _serve(engine, arguments, settings, sockets)
    finally:
        for each in sockets:
            each.close()


def _loaded(arguments: argparse.Namespace, config: APDConfig, template: str | None) -> APDSampler:
    """The sampler, in the engine's process."""
    import torch
    from tqdm import tqdm

    from apd.cli.answers import load
    from apd.cli.settings import keep_memory, set_up

    warnings.showwarning = show_warning
    tqdm.set_lock(threading.RLock())  # its own is one between processes, which a kill would leave behind
    check_decoding(arguments)
    set_up(included=arguments.drafter is None)
    keep_memory()
    if arguments.drafter is not None and arguments.device_map is None and torch.cuda.is_available():
        arguments.device_map = "cuda"
    sampler = load(arguments, config)
    if template is not None:
        sampler.tokenizer.chat_template = template
    return sampler


def _settings(arguments: argparse.Namespace) -> ServeSettings:
    for name, least in (("max_queue", 0), ("max_body", 1), ("max_length", 2), ("port", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"{flag(name)} must be at least {least}, got {value}.")
    if arguments.port >= 2**16:  # the server would take the rest of a division
        raise UsageError(f"--port must be below {2**16}, got {arguments.port}. Use 0 for a free one.")
    for name in ("request_timeout", "drain_timeout"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UsageError(f"{flag(name)} must be above 0 seconds, got {value}.")
    for origin in arguments.cors_origin or ():
        if not re.fullmatch(r"\*|null|\w+://[^/\s]+", origin):  # as browsers send it; another would never match
            raise UsageError(f"--cors-origin must be *, null or scheme://host[:port] without a path, got {origin!r}.")
    sampling = (
        {"do_sample": True, "top_k": 0, **sampling_of(arguments)} if arguments.do_sample else {"do_sample": False}
    )
    return ServeSettings(
        model_name=arguments.served_model_name or _name(arguments.drafter),
        max_batch_size=arguments.max_batch_size,
        max_queue=arguments.max_queue,
        max_new_tokens=arguments.max_new_tokens or NEW_TOKENS,
        max_length=arguments.max_length,
        request_timeout=arguments.request_timeout,
        drain_timeout=arguments.drain_timeout,
        max_body=arguments.max_body,
        api_key=_key(arguments.api_key_env),
        cors_origins=tuple(arguments.cors_origin or ()),
        sampling=sampling,
        fixed_decoding=arguments.fixed_decoding,
    )


def _name(drafter: str | None) -> str:
    return "apd" if drafter is None else Path(drafter).name if os.path.isdir(drafter) else drafter


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not variable:
        raise UsageError("--api-key-env must name a variable that holds the key, got nothing.")
    if not (key := os.environ.get(variable, "").strip()):
        raise UsageError(f"--api-key-env must name a variable that holds the key, got {variable}, which is not set.")
    return key


def _template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template must be a file of text in UTF-8, got {path}: {error}.") from None


def _serve(
    engine: EngineProcess, arguments: argparse.Namespace, settings: ServeSettings, sockets: list[socket.socket]
) -> None:
    import uvicorn

    from apd.serve.app import app_of

    facts = engine.loaded()  # before the hub is asked again: wrong options are told here
    settle_new_tokens(arguments)
    settings = replace(settings, max_new_tokens=arguments.max_new_tokens)
    app = app_of(engine, facts, settings)
    dispatcher = app.state.dispatcher

    class Server(uvicorn.Server):
        """Drains at the first signal, and ends with exit code 0.

        While it drains it still listens, since a closed door could not be told from a crash: requests are answered with 503.
        """

        end = float("inf")

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.should_exit = dispatcher.is_draining  # the second signal: at once
            dispatcher.drain()
            self.end = min(self.end, time.monotonic() + settings.drain_timeout)

        async def on_tick(self, counter: int) -> bool:
            is_drained = dispatcher.is_draining and (dispatcher.is_idle or time.monotonic() > self.end)
            return await super().on_tick(counter) or is_drained

        async def shutdown(self, sockets: Any = None) -> None:
            dispatcher.cut_off()
            await super().shutdown(sockets)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
                told = {"model": settings.model_name, "url": f"{url}/v1", "key": settings.api_key is not None}
                if not settings.fixed_decoding:
                    told["page"] = f"{url}/"
                print(f"apd: serving {json.dumps(told)}", file=sys.stderr, flush=True)

    Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=75,  # clients give idle connections up after 5 seconds, and a race with them loses requests
            timeout_graceful_shutdown=5,  # seconds for sending what is done: nothing is decoded any more
        )
    ).run(sockets)
    counts = {"jobs": dispatcher.num_jobs, "cut_off": dispatcher.num_cut_off}
    print(f"apd: stopped {json.dumps(counts)}", file=sys.stderr, flush=True)
