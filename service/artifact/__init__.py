"""The format of a model on disk, shared by the exporter and the server."""
