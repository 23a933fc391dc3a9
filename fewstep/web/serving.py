"""uvicorn, set up for the page."""

from __future__ import annotations

import socket

import uvicorn
from starlette.applications import Starlette

GRACE_S = 25.0  # for what is being generated when the server is to end
MAX_MESSAGE = 16 * 10**6  # bytes, of a WebSocket
MAX_CONNECTIONS = 1024


class WebServer(uvicorn.Server):
    """Serves an app of `create_app`. When it is to end, what waits is told at once, and what is running
    is finished; uvicorn by itself would wait for both, and then cut them off."""

    def __init__(self, app: Starlette, host: str, port: int, log_level: str = "warning") -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,
            log_level=log_level,
            timeout_graceful_shutdown=int(GRACE_S),
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            ws_max_size=MAX_MESSAGE,
            ws_per_message_deflate=False,  # images are as small as they get
        )
        super().__init__(config)
        self._state = app.state.app_state

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish and turn away; called once, at the end of serve()."""
        await self._state.end(GRACE_S)
        await super().shutdown(sockets)
