"""The gRPC server. Imports no torch and nothing from ``training`` or ``export``."""
