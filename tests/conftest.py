"""What the tests share: the reference data, where there is some."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tiny models gain nothing from a second thread and lose much where another process wants the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# What `make quick` leaves out whole: these train, start processes or servers, or load larger models.
SLOW_MODULES = ("training", "grpo", "models", "reliability", "processes", "server", "harness", "inference", "readme")
SLOW_FIXTURES = ("reproduced",)
SLOW_TESTS = (
    "test_all_real_questions_in_every_mode_with_the_real_tokenizer",
    "test_bad_input_ends_a_process_in_one_line",
    "test_no_two_texts_of_a_picture_overlap",
    "test_scoring_takes_time_in_proportion_to_the_text",
    "test_the_committed_page_of_the_demo_is_what_its_committed_answers_give",
    "test_votes_and_comparisons_keep_little_of_a_line",
)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by `make quick`")


def pytest_collection_modifyitems(items):
    for item in items:
        module, slow = item.path.stem.removeprefix("test_"), set(SLOW_FIXTURES)
        if module in SLOW_MODULES or item.originalname in SLOW_TESTS or slow.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)


SHARED = Path(os.environ.get("GSM8K_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def shared():
    """The folder of reference data: GSM8K, the Qwen3 tokenizer, published outputs."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED}; set GSM8K_SHARED to its folder")
    return SHARED
