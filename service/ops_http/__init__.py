"""The HTTP port: /metrics for Prometheus, /healthz and /livez for probes."""
