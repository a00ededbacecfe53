"""Version 1 of the API, generated from digits.proto."""
