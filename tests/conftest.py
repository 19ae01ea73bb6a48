"""What several test files share: a small image folder and a small cache, made once."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from fakes import FakeTeacher, write_images
from hypothesis import settings
from store_fakes import compress

from teacher_cache.cache import Cache
from teacher_cache.extraction.cropping import make_crops, plan_job
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.format.crop_plan import CropPlan

N_THREADS = max(1, (os.cpu_count() or 2) // 2)
torch.set_num_threads(N_THREADS)
os.environ.setdefault("OMP_NUM_THREADS", str(N_THREADS))  # of the programs that tests start
os.environ["STUDENT_FEATURES"] = tempfile.mkdtemp(prefix="features-")  # not the user's own
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell begins with Ctrl-C ignored

settings.register_profile("some", max_examples=30, deadline=None)
settings.register_profile("many", max_examples=300, deadline=None)  # --hypothesis-profile many: in `make soak`
settings.load_profile("some")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLAN = CropPlan(size=32, scale=(0.3, 1.0))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 images in 3 classes."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def teacher() -> FakeTeacher:
    return FakeTeacher()


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory, image_folder, teacher) -> Cache:
    """24 rows, 2 views; stores `fake` (int8), `fake16` (float16) and `fake-zstd` (int8, compressed). Read only: see `cache`."""
    cache = make_crops(plan_job(tmp_path_factory.mktemp("cache") / "c", image_folder, PLAN, "jpeg95", 2))
    for number in (0, 1):
        extract_view(cache.view(number), "fake", teacher, ExtractPlan(shard_rows=8, batch_size=5))
        extract_view(cache.view(number), "fake16", teacher, ExtractPlan(dtype="float16", shard_rows=8, batch_size=5))
        extract_view(cache.view(number), "fake-zstd", teacher, ExtractPlan(shard_rows=8, batch_size=5))
    for number in (0, 1):
        compress(cache.view(number).store_path("fake-zstd"))
    return cache


@pytest.fixture
def cache(shared_cache, tmp_path) -> Cache:
    """A copy of `shared_cache` that a test may damage."""
    return Cache(shutil.copytree(shared_cache.path, tmp_path / "cache"))


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium of the system."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
