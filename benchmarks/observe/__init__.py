"""Looks at a loaded server with a real Prometheus: dashboard, alerts, a picture, and their docs."""
