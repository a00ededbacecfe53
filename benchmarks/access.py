"""What TLS, tokens and rate limits cost: servers with them and one without, side by side."""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.figures import Figure, medians
from benchmarks.harness import Run, h2load, running_server


def measure(rounds: int, scale: float) -> list[Figure]:
    """Single-image calls, 64 in flight."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        token, tls = secrets.token_hex(32), _certificate(folder)
        # The one that is shown is the last of many.
        others = "\n".join(secrets.token_hex(32) for _ in range(15))
        Path(folder, "tokens").write_text(f"{others}\n{token}\n")
        tokens = [f"--auth-token-file={folder / 'tokens'}", "--rate-limit-images-per-s=1000000000"]
        shown = Run(1, 64, 0, headers=(f"authorization: Bearer {token}",))
        native, grpcio = int(40_000 * scale), int(8_000 * scale)
        what = "16 tokens and a limit"
        return [
            _compared(f"{what} on over off, native", rounds, replace(shown, calls=native), tokens),
            _compared(f"{what} on over off, grpcio", rounds, replace(shown, calls=grpcio), tokens),
            _compared("TLS on over off, grpcio", rounds, Run(1, 64, grpcio, tls=True), tls),
        ]


def _compared(name: str, rounds: int, run: Run, flags: list[str]) -> Figure:
    """Calls a server with these flags, and one without, on the transport that the name ends in."""
    transport = f"--transport={name.rpartition(' ')[2]}"
    run = replace(run, calls=max(64, run.calls))
    rows = []
    with running_server(transport) as plain, running_server(transport, *flags) as guarded:
        for _ in range(rounds):
            without = h2load(plain, Run(1, 64, run.calls))
            with_it = h2load(guarded, run)
            rows.append(
                {
                    "ratio": with_it.calls_per_s / without.calls_per_s,
                    "cpu_us": with_it.server_cpu_us,
                    "plain_cpu_us": without.server_cpu_us,
                }
            )
    ratios = [row.pop("ratio") for row in rows]
    return Figure(f"{name}, 1 image per call, 64 in flight", ratios, None, details=medians(rows))


def _certificate(folder: Path) -> list[str]:
    """Flags for TLS with a new certificate."""
    certificate, key = folder / "server.pem", folder / "server.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    command += f" -subj /CN=localhost -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return [f"--tls-cert={certificate}", f"--tls-key={key}"]
