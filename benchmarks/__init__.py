"""Load and cost measurements; each module is run by one make target."""
