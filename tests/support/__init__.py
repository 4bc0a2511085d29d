"""What tests share: problems, measures, things that stand in for others. No tests."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
GOLDEN = ROOT / "tests" / "golden"  # tensors of the official implementation
FILES = ROOT / "tests" / "files"  # other data
