"""A step's rollouts: from where they come, what is dropped, what they are worth."""
