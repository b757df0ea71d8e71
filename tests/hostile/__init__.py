"""Inputs that are wrong, and attacks: see `make test-hostile`."""
