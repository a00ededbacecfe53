"""The ``digits`` command: the client's part of it, and what finds the parts of others."""
