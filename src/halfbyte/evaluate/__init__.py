"""Quality of models, plans and files: perplexity, KL, top-1, speed; simulated in PyTorch or measured in engines."""
