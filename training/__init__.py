"""Trains a CNN digit classifier and writes a checkpoint; ``service`` never imports it."""
