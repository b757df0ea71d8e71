"""What a person chooses, and how it becomes a job."""
