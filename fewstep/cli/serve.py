"""Serve predictions over HTTP as a Cog container does: POST /predictions {"input": {"prompt": "a red house"}}

The port is PORT (5000) of this machine alone, unless --host says otherwise. FEWSTEP_MODEL chooses the model.
coglet has no passwords, and a caller can have it fetch any address: do not give it to strangers.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from fewstep.cli.run import say
from fewstep.coglet.server import ServerFailed, end_as_by_ctrl_c, running_server


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; 1 when the server cannot start or ends by itself."""
    parser = argparse.ArgumentParser(
        prog="scripts/serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    parser.add_argument("--train", action="store_true", help="serve trainings instead: POST /trainings")
    chosen = parser.parse_args(arguments)
    port = os.environ.get("PORT") or "5000"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        return _end("PORT must be a number from 1 to 65535")
    if not os.environ.get("FEWSTEP_MODEL"):
        say("model miniature, since FEWSTEP_MODEL is not set")
    end_as_by_ctrl_c()
    mode = "train" if chosen.train else "predict"
    environ = os.environ if sys.stderr.isatty() else {"NO_COLOR": "1", **os.environ}
    try:
        with running_server(host=chosen.host, port=int(port), environ=environ, mode=mode) as server:
            server.wait_ready()
            say(f"serving on http://{chosen.host}:{port}; Ctrl-C ends it")
            return _end(f"the server ended with status {server.process.wait()}")
    except ServerFailed as error:
        return _end(str(error))
    except KeyboardInterrupt:
        return 0


def _end(sentence: str) -> int:
    say(sentence)
    return 1


if __name__ == "__main__":
    sys.exit(main())
