"""The processes behind `sandbox.py`.

This folder is run by path, without site packages: its files import nothing of opdkit.
"""
