"""A step's rollouts: who writes them, what they are worth, what is dropped, charged and marked."""
