"""What a teacher reads, where that is not what the student wrote, token by token."""
