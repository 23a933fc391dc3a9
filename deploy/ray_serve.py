"""The Cog API on a Ray cluster: serve run deploy.ray_serve:application, or scripts/cluster up.

An ingress checks requests, draws their seeds and keeps those who wait; one generator a GPU runs predict.py's
own Predictor, so that a picture is what one container gives. A request whose generator is lost goes to
another with its seed, so that the picture is the same.
"""

from __future__ import annotations

import asyncio
import base64
import contextvars
import hashlib
import json
import logging
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from starlette.applications import Starlette

from deploy.predictions import Answer, PredictionApi
from fewstep.coglet.server import CONCURRENCY, OFFLINE, SCHEMA
from fewstep.errors import (
    Busy,
    DeviceLost,
    FewstepError,
    InternalError,
    InvalidRequest,
    Stopped,
    error_in,
)
from fewstep.models.specs import get_model
from fewstep.request import SEED_MAX, Inputs
from fewstep.settings import Settings

GENERATOR = "Generator"
ASKED_AGAIN = 2  # times at most, of other generators
WEIGHTS = ("style", "extra_style", "lcm_scale")  # what a request's weights depend on, by name
DATA_URL = "data:image/"

logger = logging.getLogger(__name__)
_answer: contextvars.ContextVar[tuple[dict[str, Any], list[str]]] = contextvars.ContextVar("answer")


class FewestInFlight(FIFOMixin, RequestRouter):
    """Prefers the replica with the fewest requests in flight and, among equals, one that already has the
    weights that are asked for: a style that many want spreads, one that few want stays where it is."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return every candidate as a rank of its own, best first."""
        wanted = pending_request.metadata.multiplexed_model_id if pending_request else ""

        def rank(replica: RunningReplica) -> tuple[int, bool, int]:
            in_flight = self.replica_queue_len_cache.get(replica.replica_id) or 0
            lacks = bool(wanted) and wanted not in replica.multiplexed_model_ids
            return in_flight, lacks, secrets.randbelow(1000)  # no replica is always the first of equals

        return [[replica] for replica in sorted(candidate_replicas, key=rank)]


class _Collect(logging.Handler):
    """Gives a prediction the lines that are logged within it."""

    def emit(self, record: logging.LogRecord) -> None:
        if kept := _answer.get(None):
            kept[1].append(self.format(record) + "\n")


@serve.deployment(
    name=GENERATOR,
    max_ongoing_requests=CONCURRENCY,
    max_queued_requests=64,
    health_check_period_s=1,
    health_check_timeout_s=10,
    graceful_shutdown_wait_loop_s=1,
    graceful_shutdown_timeout_s=130,  # a little more than a request's deadline
    request_router_config=RequestRouterConfig(request_router_class=FewestInFlight),
)
class Generator:
    """One model on one GPU, or on a share of one."""

    async def __init__(self) -> None:
        from predict import Predictor

        os.environ.update({name: value for name, value in OFFLINE.items() if name not in os.environ})
        self._folder = tempfile.TemporaryDirectory(prefix="fewstep-generator-")
        os.environ.setdefault("FEWSTEP_OUTPUTS", f"{self._folder.name}/outputs")

        class Recording(Predictor):
            """A Predictor whose metrics are kept here, since no coglet is there to take them."""

            def record_metric(self, key: str, value: Any, mode: str = "replace") -> None:
                _answer.get()[0][key] = value

        logging.getLogger("fewstep.predict").addHandler(_Collect())
        self._defaults = _defaults()
        self._predictor = Recording()
        await self._predictor.setup()

    async def generate(self, inputs: dict[str, Any]) -> Answer | str:
        """Return the answer, or the FewstepError as `[code] sentence`, which no pickle has to carry."""
        metrics: dict[str, Any] = {}
        lines: list[str] = []
        token = _answer.set((metrics, lines))
        try:
            with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
                given = {name: _as_file(value, Path(folder, name)) for name, value in inputs.items()}
                await self._weights(_weights_of(inputs))
                files = await self._predictor.predict(**(self._defaults | given))
            kind = inputs.get("output_format") or self._defaults["output_format"]
            return Answer([_as_url(Path(file), kind) for file in files], metrics, "".join(lines))
        except FewstepError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            _answer.reset(token)

    @serve.multiplexed(max_num_models_per_replica=8)
    async def _weights(self, key: str) -> str:
        """Let the router know which weights were used here lately; the pipeline keeps them itself."""
        return key

    async def check_health(self) -> None:
        """Raise when the model thread is stuck or the device is lost, so that Ray starts another."""
        if not await self._predictor.healthcheck():
            raise RuntimeError("the generator is not well")


@serve.deployment(name="Ingress", max_ongoing_requests=2000, ray_actor_options={"num_cpus": 0.1})
@serve.ingress()
class Ingress:
    """The door: one for the cluster, since it knows who waits."""

    def __init__(self, generator: DeploymentHandle, webhook_hosts: list[str]) -> None:
        self._generator = generator
        self._api = PredictionApi(self._generate, self._health, frozenset(webhook_hosts))
        settings = Settings.from_env()
        self._spec = get_model(settings.model)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._api.app

    async def _generate(self, inputs: dict[str, Any]) -> Answer:
        """Have it generated, by another generator if the first is lost. Raises the FewstepError."""
        drawn = secrets.randbelow(SEED_MAX + 1)
        inputs = inputs | {"seed": drawn if inputs.get("seed") is None else inputs["seed"]}
        if not (inputs.get("image") or inputs.get("mask")):  # which only opening tells more of
            Inputs.create(self._spec, **inputs)
        handle = self._generator.options(multiplexed_model_id=_weights_of(inputs))
        for _ in range(1 + ASKED_AGAIN):
            response = handle.generate.remote(inputs)
            try:
                answer = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                raise Busy("all generators have enough waiting; ask again in a moment") from None
            except RayTaskError as error:
                logger.error("a generator failed for no foreseen reason", exc_info=error)
                raise InternalError() from None
            except RayError as error:  # the replica, its node or the way to it
                logger.warning("a generator was lost (%s); its request goes to another", type(error).__name__)
                continue
            if isinstance(answer, Answer):
                return answer
            refused = error_in(answer) or InternalError()
            if not isinstance(refused, DeviceLost | Stopped):
                raise refused
        raise Busy("the generators that had this request were lost; ask again", 5)

    async def _health(self) -> str:
        """Return coglet's word for what the cluster is."""
        status = await asyncio.to_thread(serve.status)
        found = [app.deployments[GENERATOR] for app in status.applications.values() if GENERATOR in app.deployments]
        if any(one.replica_states.get("RUNNING", 0) for one in found):
            return "READY"
        return "STARTING" if all(one.status.value in ("UPDATING", "UPSCALING") for one in found) else "UNHEALTHY"


def application(arguments: dict[str, Any]) -> serve.Application:
    """Build it; of `arguments`, `webhook_hosts` lists where results may be sent."""
    return Ingress.bind(Generator.bind(), list(arguments.get("webhook_hosts", ())))


def _weights_of(inputs: dict[str, Any]) -> str:
    """Return a short name of the weights that a request needs; empty for the model as it is."""
    asked = [inputs.get(name) for name in WEIGHTS]
    if asked in ([None, None, None], [None, None, 1], [None, None, 1.0]):
        return ""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _defaults() -> dict[str, Any]:
    """Return what predict() takes for what is left out, as the schema says."""
    document = json.loads(SCHEMA.read_text(encoding="utf-8"))
    properties = document["components"]["schemas"]["Input"]["properties"]
    return {name: entry["default"] for name, entry in properties.items() if "default" in entry}


def _as_file(value: object, path: Path) -> object:
    """Return an image's data URL as a file at `path`, which predict() opens; all else as it is."""
    if not isinstance(value, str) or path.name not in ("image", "mask"):
        return value
    head, _, content = value.partition(";base64,")
    if not head.startswith(DATA_URL):
        raise InvalidRequest(f"{path.name} is an address; send the picture itself, as a data URL")
    try:
        path.write_bytes(base64.b64decode(content, validate=True))
    except ValueError:
        raise InvalidRequest(f"{path.name} is no picture in base64; send one as a data URL") from None
    return path


def _as_url(path: Path, kind: str) -> str:
    """Return the file as a data URL, and remove it."""
    content = path.read_bytes()
    path.unlink()
    media = "jpeg" if kind == "jpg" else kind
    return f"{DATA_URL}{media};base64,{base64.b64encode(content).decode()}"
