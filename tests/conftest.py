"""What the tests share: the reference data, where there is some."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tiny models gain nothing from a second thread and lose much where another process wants the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; `make quick` leaves it out")


SHARED = Path(os.environ.get("GSM8K_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def shared():
    """The folder of reference data: GSM8K, the Qwen3 tokenizer, published outputs."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED}; set GSM8K_SHARED to its folder")
    return SHARED
