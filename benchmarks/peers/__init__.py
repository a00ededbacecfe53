"""Other model servers beside this one: the same model, the same load, the same cores."""
