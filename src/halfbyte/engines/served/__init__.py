"""vLLM, which lives in a Python environment of its own: ``serve_worker.py`` runs there and imports nothing of ours."""
