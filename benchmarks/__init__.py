"""Measurements, each a module with a command line and a make target of its own."""
