"""Connect to the scheduler of an existing cluster, or say why that cannot be done."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Final

from distributed import Client, Security

from sgclassify.stages.errors import ClusterError

log = logging.getLogger(__name__)

_CONNECT_S: Final = 10.0
"""Longest time to connect to a scheduler: one that runs answers at once."""
_JUNK_S: Final = 5.0
"""Time for a scheduler file to become complete."""


def read_address(path: Path, timeout_s: float) -> str:
    """Address in a scheduler file, once it is there."""
    start = time.monotonic()
    while True:
        patience = min(_JUNK_S, timeout_s)
        try:
            address = json.loads(path.read_text(encoding="utf-8"))["address"]
            if isinstance(address, str) and address:
                return address
            fault = "names no address"
        except FileNotFoundError:
            fault, patience = "is not there", timeout_s
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError):
            fault = "is not what `dask scheduler --scheduler-file` writes"
        if time.monotonic() - start > patience:
            raise ClusterError(
                f"{path}: the scheduler file {fault}, after {patience:g} s; start the scheduler with "
                f"`dask scheduler --scheduler-file {path}`"
            )
        time.sleep(0.1)


def connect(address: str, timeout_s: float, file: Path | None) -> Client:
    """A client of a scheduler that answers within `timeout_s`; `file` is the scheduler file that named it, if any."""
    security = Security()  # type: ignore[no-untyped-call]
    advice = "check the address and that it runs"
    if file is not None:
        advice = f"{file} may be left from a scheduler that has ended"
    try:
        if address.startswith("tls://"):
            _check_tls(address, security)
            advice += ", and that one authority has signed all certificates"
        elif address.startswith("tcp://"):
            advice += ", or whether it is a tls:// scheduler"
        # the timeout is also that of reconnecting, which is never of use: the tasks of a lost scheduler are lost
        return Client(  # type: ignore[no-untyped-call]
            address, security=security, timeout=min(_CONNECT_S, timeout_s), set_as_default=False
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ClusterError(f"{address}: the scheduler does not answer ({error}); {advice}") from error


def _check_tls(address: str, security: Security) -> None:
    """A scheduler on tls:// needs certificates, without which Dask fails with a TypeError."""
    keys = "DASK_DISTRIBUTED__COMM__TLS__{CA_FILE,CLIENT__CERT,CLIENT__KEY}"
    try:
        found = security.get_connection_args("client").get("ssl_context")  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ClusterError(f"{address}: the certificates cannot be read ({error}); look at {keys}") from error
    if found is None:
        raise ClusterError(
            f"{address}: no certificates are configured; set {keys} in the environment (docs/clusters.md)"
        )


def disconnect(client: Client) -> None:
    """Close the connection; a lost scheduler is no fault any more."""
    try:
        client.close(timeout=10)  # type: ignore[no-untyped-call]
    except OSError as error:
        log.debug("closing the connection to the scheduler: %s", error)
