"""Runs a command beside a Hub on loopback that is gone afterwards.

    PYTHONPATH=tests python -m hub COMMAND [ARGUMENT ...]

The command finds the Hub, a token for it and an empty cache in its environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from hub.server import HubServer

if __name__ == "__main__":
    server = HubServer()
    server.start()
    try:
        with tempfile.TemporaryDirectory() as home:
            environment = {**os.environ, "HF_HOME": home, **server.environment()}
            # It led to this package, and no command shall find the other folders of the tests.
            environment.pop("PYTHONPATH", None)
            code = subprocess.run(sys.argv[1:], env=environment).returncode
    finally:
        server.stop()
    sys.exit(code)
