"""What the server tells about itself: metrics, logs, traces. Serving depends on none of it."""
