"""On which machines does a run happen? A cluster places its parts, watches them and starts them
again; what they do is said elsewhere.
"""
