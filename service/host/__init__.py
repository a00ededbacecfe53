"""What the process is told by the machine it runs on, and what it asks of it."""
