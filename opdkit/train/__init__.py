"""The trainer: it knows no method."""
