"""The operating system: CPUs, memory, files, addresses, standard streams."""
