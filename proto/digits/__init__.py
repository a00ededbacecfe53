"""What a client installs: the schema, its generated stubs, and a client (``digits.client``)."""
