"""Metrics, logs and traces. Serving depends on none of them."""
