"""Serve predictions over HTTP as a Cog container does: POST /predictions {"input": {"prompt": "a red house"}}

The port is PORT (5000) of this machine alone, unless --host says otherwise. FEWSTEP_MODEL chooses the model.
coglet has no passwords, and a caller can have it fetch any address: do not give it to strangers.
"""

import os
import sys
from collections.abc import Sequence

from fewstep.cli.run import command_parser, say
from fewstep.coglet.server import end_as_by_ctrl_c, running_server
from fewstep.errors import FewstepError, Refused, ServerFailed


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; 1 when the server cannot start or ends by itself."""
    parser = command_parser("scripts/serve", __doc__)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    parser.add_argument("--train", action="store_true", help="serve trainings instead: POST /trainings")
    chosen = parser.parse_args(arguments)
    port = os.environ.get("PORT") or "5000"
    mode = "train" if chosen.train else "predict"
    environ = os.environ if sys.stderr.isatty() else {"NO_COLOR": "1", **os.environ}
    try:
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise Refused("PORT must be a number from 1 to 65535")
        if not os.environ.get("FEWSTEP_MODEL"):
            say("model miniature, since FEWSTEP_MODEL is not set")
        end_as_by_ctrl_c()
        with running_server(host=chosen.host, port=int(port), environ=environ, mode=mode) as server:
            server.wait_ready()
            say(f"serving on http://{chosen.host}:{port}; Ctrl-C ends it")
            raise ServerFailed(f"the server ended with status {server.process.wait()}")
    except FewstepError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
