"""Serve the page that paints while you type, and all that it needs: scripts/web

It starts a Cog server of the model that FEWSTEP_MODEL names (one for each GPU), keeps it alive, and opens
http://127.0.0.1:8000. OpenAI's images API is at /v1, metrics at /metrics. What visitors keep is in data/
(FEWSTEP_WEB_DATA), or in the database of DATABASE_URL.
"""

import argparse
import asyncio
import logging
import os
import sys
import time
import webbrowser
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fewstep.cli.run import say, status_of
from fewstep.coglet.server import require_free
from fewstep.errors import ServerFailed, SettingsError

TICK_S = 0.25


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; 1 when nothing can be served, with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/web", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which visitors reach this server, besides localhost; * is any",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="Cog servers (one for each GPU, or one)")
    generators = parser.add_mutually_exclusive_group()
    generators.add_argument("--cog-url", metavar="URL", help="a Cog container of fewstep that runs elsewhere")
    generators.add_argument(
        "--replicate", metavar="OWNER/MODEL", help="fewstep on Replicate, by the token in REPLICATE_API_TOKEN"
    )
    parser.add_argument("--no-open", action="store_true", help="do not open a browser")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.port < 65536:
        parser.error("--port must be from 1 to 65535")
    if chosen.cog_url and not chosen.cog_url.startswith(("http://", "https://")):
        parser.error("--cog-url must begin with http:// or https://")
    if chosen.workers is not None and not 0 < chosen.workers <= 64:
        parser.error("--workers must be from 1 to 64")

    def work() -> None:
        with suppress(KeyboardInterrupt):  # which is how it ends
            asyncio.run(_serve(chosen, os.environ))

    return status_of(work)


def with_model(environ: Mapping[str, str], *, elsewhere: bool) -> dict[str, str]:
    """Return `environ` with a model: what is elsewhere is taken for a container, which has SDXL."""
    model = environ.get("FEWSTEP_MODEL")
    if not model:
        model = "sdxl" if elsewhere else "miniature"
        say(f"model {model}, since FEWSTEP_MODEL is not set")
    return {**environ, "FEWSTEP_MODEL": model}


def environs_of(workers: int | None, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the environment of every Cog server: each has a GPU, or its share of the processors."""
    from fewstep.web.worker_pool import visible_gpus

    gpus = visible_gpus(environ)
    count = workers or len(gpus) or 1
    if gpus:
        return [{**environ, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    share = {} if count == 1 else {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}
    return [{**share, **environ}] * count


async def _serve(chosen: argparse.Namespace, environ: Mapping[str, str]) -> None:
    from fewstep.models.specs import get_model
    from fewstep.settings import Settings
    from fewstep.web.app import WebServer, create_app
    from fewstep.web.auth import LOOPBACK
    from fewstep.web.monitoring import JsonLines

    if sys.stderr.isatty():  # a person is told what matters; a log holds every image
        logging.getLogger("fewstep.web").setLevel(logging.WARNING)
    else:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())

    require_free(chosen.host, chosen.port, "give another as --port")
    environ = with_model(environ, elsewhere=bool(chosen.cog_url or chosen.replicate))
    settings = Settings.from_env(environ)
    spec = get_model(settings.model)
    pool = _worker_pool(chosen, environ, settings)
    hosts = {*LOOPBACK, *chosen.allow_host}
    if chosen.host not in ("0.0.0.0", "::"):
        hosts.add(chosen.host)
    app = create_app(spec, settings, pool, hosts)
    server = WebServer(app, chosen.host, chosen.port)
    announcing = asyncio.create_task(_announce(chosen, spec.name, pool, app, server))
    try:
        await server.serve()
    finally:
        announcing.cancel()
    with suppress(asyncio.CancelledError):
        await announcing  # which says why, if nothing can start


def _worker_pool(chosen: argparse.Namespace, environ: Mapping[str, str], settings: Any) -> Any:
    from fewstep.web.worker_pool import LocalWorkers, RemoteWorker, ReplicateWorker

    timeout_s = settings.deadline_s + 60  # of the server's own, and for its answer
    if chosen.cog_url:
        return RemoteWorker(chosen.cog_url, timeout_s)
    if chosen.replicate:
        if not settings.replicate_token:
            raise SettingsError("--replicate needs a token; set REPLICATE_API_TOKEN to it")
        return ReplicateWorker(chosen.replicate, settings.replicate_token)
    environs = environs_of(chosen.workers, environ)
    return LocalWorkers(environs, timeout_s, settings.web_data / "painters.log")


async def _announce(chosen: argparse.Namespace, model: str, pool: Any, app: Any, server: Any) -> None:
    """Say how far the start is. Ends the server, and raises ServerFailed, when nothing can start."""
    began = time.monotonic()
    anew = "\r\x1b[K" if sys.stderr.isatty() else ""  # begins a terminal's line once more
    address = f"http://{chosen.host if chosen.host != '0.0.0.0' else '127.0.0.1'}:{chosen.port}"
    said = False
    while not server.started or not app.state.app_state.queue.ready:
        if server.should_exit:
            return
        if pool.failure:
            sys.stderr.write(anew)
            server.should_exit = True
            raise ServerFailed(pool.failure)
        if server.started:
            line = f"{address} is open; {model} is starting ({time.monotonic() - began:.0f} s)"
            if anew:
                sys.stderr.write(anew + line)
                sys.stderr.flush()
            elif not said:
                say(line)
            said = True
        await asyncio.sleep(TICK_S if server.started else 0.02)
    say(f"{anew}ready: {address}; Ctrl-C ends it")
    if anew and not chosen.no_open:
        await asyncio.to_thread(webbrowser.open, address)  # which one in a terminal blocks


if __name__ == "__main__":
    sys.exit(main())
