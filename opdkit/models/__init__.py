"""What computes: Hugging Face models in this process, engines elsewhere."""
