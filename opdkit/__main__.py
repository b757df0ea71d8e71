"""python -m opdkit."""

from opdkit.cli import program

program()
