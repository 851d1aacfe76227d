"""Simulate a plan in PyTorch beside the original, all A8 and all A4."""

from halfbyte.cli import run

if __name__ == "__main__":
    raise SystemExit(run("simulate"))
