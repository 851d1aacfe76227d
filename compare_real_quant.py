"""Compare original, Q4_K_M and mixed on speed, quality and memory."""

from halfbyte.cli import run

if __name__ == "__main__":
    raise SystemExit(run("compare"))
