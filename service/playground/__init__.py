"""Pages on the HTTP port, and POST /v1/classify: for people who want to try the model."""
