"""What is served, and how to try it: the first thing a person or a script reads."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

from service.config import ServerConfig
from service.host.addresses import socket_address
from service.host.streams import STDOUT, write_all
from service.security.access import Access
from service.serving.model import ServedModel

logger = logging.getLogger(__name__)


def announce(
    config: ServerConfig,
    model: ServedModel,
    *,
    grpc_port: int,
    http_port: int,
    instances: int,
    batch_images: int,
    access: Access,
    seconds: float,
) -> None:
    """Logs everything that was decided at the start, and why; prints it too for people.

    Args:
        config: The settings.
        model: The model in service.
        grpc_port: The port really bound.
        http_port: The port really bound.
        instances: Inferences at the same time.
        batch_images: Images in a batch of small requests, as measured at warm-up.
        access: Who may call.
        seconds: From the start of the process to SERVING.
    """
    address = socket_address(_reachable(config.host), grpc_port)
    http = socket_address(_reachable(config.host), http_port)
    fields = {
        "model": f"{model.name} release {model.version}",
        "sha256": model.sha256,
        "precision": model.precision,
        "provider": f"{model.provider} ({model.engine.reason})",
        "inference": f"{instances} x {config.intra_op_threads} thread(s)",
        "batch": f"{batch_images} images",
        "transport": config.transport,
        "access": access.summary(),
        "grpc": address,
        "http": f"http://{http}/metrics",
        **({"draw": f"http://{http}/draw"} if config.playground else {}),
        "ready_after": f"{seconds:.2f} s",
        "try": f"{_program()} classify --address {address} {access.flags()}{_sample()}",
    }
    if config.log_format == "json":
        logger.info("SERVING", extra={"fields": fields})
    else:
        logger.info("SERVING")
        _print("".join(f"{key:>12}  {value}\n" for key, value in fields.items()))


def _print(text: str) -> None:
    """Prints on a thread of its own, which waits for a reader if there is none."""
    data = text.encode(errors="backslashreplace")
    threading.Thread(target=write_all, args=(STDOUT, data), name="banner", daemon=True).start()


def _reachable(host: str) -> str:
    """An address to reach a server by that listens on ``host``."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound


def _program() -> str:
    """How this program was called, as short as it can be pasted again."""
    called = Path(sys.argv[0]).absolute()
    if called.name != "digits":
        return "digits"
    inside = called.is_relative_to(Path.cwd()) and Path.cwd() != Path("/")
    return str(called.relative_to(Path.cwd()) if inside else called)


def _sample() -> str:
    """A digit that can be classified from here, if there is one."""
    sample = "tests/samples/7.png"
    return sample if Path(sample).is_file() else "IMAGE"
