"""``digits top``: watches a running server in the terminal."""
