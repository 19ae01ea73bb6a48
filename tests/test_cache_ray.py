"""The Ray engine: what is dealt out, what a worker refuses, and whole jobs on clusters of several nodes that lose some."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from teacher_cache.cache import Cache
from teacher_cache.checking.verify import verify
from teacher_cache.cli.main import main
from teacher_cache.errors import NoSpaceError
from teacher_cache.extraction.make import TargetRequest
from teacher_cache.extraction.planning import CropRequest
from teacher_cache.files.claims import ClaimHeldError
from teacher_cache.files.durable import user_cache_folder
from teacher_cache.files.range_claims import claimed_range
from teacher_cache.format.layout import store_claims
from teacher_cache.sharing import dealing
from teacher_cache.sharing.dealing import AGAIN_S, Block, Dealer
from teacher_cache.sharing.ray_workers import Cutter, Extractor, Receipt
from teacher_cache.store import failures
from teacher_cache.teachers.demo import BUILT_IN

ROOT = Path(__file__).parents[1]
KERNELS = user_cache_folder()
"""Where compiled loops are kept, whatever HOME is."""
SHARED = ["--teacher", "demo", "--crop-size", "32", "--views", "2", "--shard-rows", "1", "--layers", "last"]

# --- what is dealt out -----------------------------------------------------------------------------------------------


class Disk:
    """Pieces that are missing, and a clock."""

    def __init__(self, *pieces):
        self.missing, self.s = set(pieces), 0.0
        self.dealer = Dealer(lambda: sorted(self.missing), now=lambda: self.s)

    def take(self, n_workers: int = 1) -> Block | None:
        self.dealer.refresh()
        return self.dealer.take(n_workers)


def test_blocks_shrink_and_lie_in_one_view():
    """Every piece is handed out once, in runs of one view, large ones first and single ones at the end."""
    pieces = [(view, shard) for view in (0, 1) for shard in range(50) if shard != 7]
    disk, blocks = Disk(*pieces), []
    while block := disk.take(2):
        blocks.append(block)
    assert sorted(piece for block in blocks for piece in block.pieces()) == pieces
    assert blocks[0] == Block(0, 0, 7) and blocks[-1] == Block(1, 49, 50)
    assert [block.last - block.first for block in blocks if block.group == 1][-4:] == [1] * 4


def test_what_does_not_come_back_is_handed_out_again():
    """When all is handed out, the same piece is given to another worker, but not before some time has gone by."""
    disk = Disk((0, 0))
    block = disk.take()
    assert block == Block(0, 0, 1) and disk.dealer.is_first(block) and disk.take() is None
    disk.s = AGAIN_S
    assert disk.take() == block and not disk.dealer.is_first(block) and disk.take() is None
    disk.missing.clear()
    assert not disk.dealer.refresh()


def test_the_piece_that_fails_is_left_and_no_other():
    """Of a block that fails the first missing piece is to blame: it comes last and alone, and is left behind three failures.

    The rest is made before it is tried again: a worker that fails on whatever it gets uses up no piece's tries.
    """
    disk = Disk(*((0, shard) for shard in range(12)))
    assert disk.take() == Block(0, 0, 3)
    disk.missing -= {(0, 0)}
    disk.dealer.failed(Block(0, 0, 3), "it is broken")
    while (0, 1) not in (block := disk.take()).pieces():
        disk.missing -= {*block.pieces()}
    assert disk.missing == {(0, 1)}
    for _ in range(dealing.TRIES - 1):
        assert disk.dealer.left == {} and block == Block(0, 1, 2)
        disk.dealer.failed(block, "it is broken")
        block = disk.take()
    assert disk.dealer.left == {(0, 1): "it is broken"} and block is None
    assert not disk.dealer.refresh() and disk.missing == {(0, 1)}


def test_what_a_worker_refused_goes_to_the_next():
    disk = Disk((0, 0), (0, 1))
    disk.dealer.put_back(first := disk.take())
    assert disk.take() == first


# --- what a worker refuses -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, image_folder) -> Path:
    """A cache by one process, with the demo teacher's weights in a file."""
    folder = tmp_path_factory.mktemp("ray")
    shutil.copy(BUILT_IN, folder / "w.safetensors")
    words = [*SHARED, "--weights", str(folder / "w.safetensors"), "--images", str(image_folder), str(folder / "one")]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives a worker of one slot
    result = CliRunner().invoke(main, ["extract", *words])
    torch.set_num_threads(n_threads)
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def begun(made, tmp_path) -> Path:
    """A copy of it that lacks the targets of its second view."""
    path = shutil.copytree(made / "one", tmp_path / "c")
    shutil.rmtree(path / "view-001/demo.zarr")
    return path


def extractor(made: Path, cache: Path) -> Extractor:
    request = TargetRequest("demo", str(made / "w.safetensors"), shard_rows=1, layers="last")
    return Extractor(cache, CropRequest(views=2), request)


def test_a_worker_makes_its_shards_and_returns_a_receipt(made, begun):
    """Shards are written by the worker itself, with the bytes of a single process; twice is as good as once."""
    worker = extractor(made, begun)
    assert worker.start(None, begun / "cache.json").outcome == "made"
    plan = worker.plan()
    assert (plan.n_shards, plan.shard_rows, plan.n_rows, plan.job, len(plan.stores)) == (24, 1, 24, None, 2)
    for _ in range(2):
        for first, last in ((0, 16), (16, 24)):
            receipt = worker.make(1, first, last, plan, begun / "cache.json")
            assert receipt == Receipt(worker.who) and len(pickle.dumps(receipt)) < 1000
    assert differences(made / "one", begun) == [] and verify(Cache(begun))[0] == []


def test_a_worker_leaves_to_others_what_they_hold(made, begun):
    worker = extractor(made, begun)
    worker.start()
    store = begun / "view-001/demo.zarr"
    with claimed_range(store_claims(store), 3, 4, "The store"):
        receipt = worker.make(1, 2, 6, worker.plan(), begun / "cache.json")
        assert receipt.outcome == "held" and str(os.getpid()) in receipt.words
        with pytest.raises(ClaimHeldError), claimed_range(store_claims(store), 2, 6, "The store"):
            pass


@pytest.mark.parametrize("what", ["weights", "hash", "file system", "software", "library"])
def test_a_node_that_does_not_fit_is_refused(made, begun, tmp_path, monkeypatch, what):
    """Weights that are missing or others, another file system, other software or none: one sentence, and nothing is written."""
    plan_maker = extractor(made, begun)
    plan_maker.start()
    plan, witness = plan_maker.plan(), begun / "cache.json"
    before = sorted(begun.rglob("*"))
    worker = extractor(made, begun)
    if what == "weights":
        worker.request, said = replace(worker.request, weights=str(tmp_path / "none.safetensors")), "none.safetensors"
    elif what == "hash":
        plan, said = replace(plan, weights_sha256="0" * 64), "Copy the same weights to every node."
    elif what == "file system":
        witness, said = tmp_path / "elsewhere", "Every node has to see one file system under one path."
    elif what == "library":
        said = "No module named 'timm'"
        monkeypatch.setattr("teacher_cache.teachers.load_teacher", raising(ModuleNotFoundError(said)))
    else:
        plan, said = replace(plan, software={**plan.software, "torch": "1.0"}), "torch"
    receipt = worker.make(1, 0, 4, plan, witness)
    assert receipt.outcome == "refused" and said in receipt.words and "\n" not in receipt.words
    assert sorted(begun.rglob("*")) == before


def test_a_failure_is_on_record(made, begun, monkeypatch):
    """What fails is said in the receipt and stands beside the claims, for whoever looks at the cache."""
    worker = extractor(made, begun)
    worker.start()
    plan = worker.plan()
    assert worker.make(1, 0, 1, plan, begun / "cache.json").outcome == "made"
    monkeypatch.setattr("teacher_cache.extraction.extract.BackgroundWriter.put", raising(OSError(5, "the disk is broken")))
    store = begun / "view-001/demo.zarr"
    with claimed_range(store_claims(store), 24, 24, "The store"):  # as the driver holds it
        assert worker.make(1, 1, 3, plan, begun / "cache.json").outcome == "failed"
        assert [(f.shard, f.error) for f in failures.read(store)] == [(1, "OSError: [Errno 5] the disk is broken")]


def raising(error: Exception):
    def raises(*_, **__):
        raise error

    return raises


@pytest.mark.parametrize(
    ("error", "outcomes", "said"),
    [
        (RuntimeError("no"), ["failed", "failed", "refused"], "3 shards in a row failed here that had not failed before: it is"),
        (MemoryError(), ["refused"], "MemoryError"),
    ],
)
def test_a_machine_that_breaks(made, begun, monkeypatch, error, outcomes, said):
    """A worker that fails on three fresh shards in a row, or has no memory, is the node's fault: it is given no more."""
    worker = extractor(made, begun)
    worker.start()
    plan, store = worker.plan(), begun / "view-001/demo.zarr"
    with claimed_range(store_claims(store), 24, 24, "The store"):
        monkeypatch.setattr("teacher_cache.extraction.extract.BackgroundWriter.put", raising(error))
        receipts = [worker.make(1, shard, shard + 1, plan, begun / "cache.json") for shard in range(len(outcomes))]
        assert [receipt.outcome for receipt in receipts] == outcomes and said in receipts[-1].words
        assert [(f.shard, f.counts) for f in failures.read(store)] == [(n, len(outcomes) > 1) for n in range(len(outcomes))]
        monkeypatch.undo()
        assert extractor(made, begun).make(1, 0, 3, plan, begun / "cache.json").outcome == "made" and failures.read(store) == []


def test_a_cutter_writes_the_parts_of_a_crop_stage(image_folder, tmp_path, monkeypatch):
    """Parts are the same whoever cuts them; one that does not see the claim of the driver cuts none, a full disk stops all."""
    from teacher_cache.extraction.cropping import make_crops, plan_job
    from teacher_cache.format.crop_plan import CropPlan

    def job():
        return plan_job(tmp_path / "c", image_folder, CropPlan(size=32), "jpeg95", 2)

    def cut_all(job):
        cutter = Cutter(job, tmp_path / "c/crops.claim")
        assert cutter.start() == cutter.make(0, 0, job.work.n_parts) == Receipt(cutter.who)
        assert "file system" in Cutter(job, tmp_path / "no.claim").make(0, 0, 1).words

    def cut_on_a_full_disk(job):
        monkeypatch.setattr("teacher_cache.extraction.parts.WorkFolder.commit", raising(OSError(errno.ENOSPC, "full")))
        receipt = Cutter(job, tmp_path / "c/crops.claim").make(0, 0, job.work.n_parts)
        monkeypatch.undo()
        assert receipt.outcome == "stop" and f"The disk of {tmp_path / 'c'} is full. Finished crops are kept" in receipt.words
        raise NoSpaceError(receipt.words)

    with pytest.raises(NoSpaceError):
        make_crops(job(), cut_all=cut_on_a_full_disk)
    by_workers = make_crops(job(), cut_all=cut_all).path.rename(tmp_path / "workers")
    assert differences(make_crops(job()).path, by_workers) == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_ray(made, monkeypatch):
    """Where Ray is not installed, one sentence says what installs it; options for one's own processes are refused."""
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(main, ["extract", "--engine", "ray", "--teacher", "demo", str(made / "one")])
    assert result.exit_code == 2
    assert result.stderr.endswith("extract needs ray, which is not installed: pip install 'teacher-cache[ray,teachers]'\n")
    for option, value in (("--shards", "0:1"), ("--workers", "2")):
        result = CliRunner().invoke(main, ["extract", "--engine", "ray", "--teacher", "demo", option, value, str(made / "one")])
        assert result.exit_code == 2 and f"{option} is for processes that one starts oneself" in result.stderr
    result = CliRunner().invoke(main, ["extract", "--address", "local", "--teacher", "demo", str(made / "one")])
    assert result.exit_code == 2 and "--address is of a Ray cluster. Give --engine ray with it, or leave it out." in result.stderr


# --- on clusters -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Of a process that may not write to its home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": "/proc", "XDG_CACHE_HOME": str(KERNELS),
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}  # fmt: skip


def differences(one: Path, other: Path) -> list[str]:
    done = subprocess.run(["diff", "-rq", one, other], stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


@pytest.fixture
def cluster(monkeypatch) -> Iterator:
    """A head without a slot, and one node with one."""
    for name, value in environment().items():  # which Ray reads when it is imported
        monkeypatch.setenv(name, value)
    pytest.importorskip("ray", reason="ray is not installed (pip install 'teacher-cache[ray]')")
    from ray.cluster_utils import Cluster

    cluster = patiently(lambda: Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20}))
    try:
        add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster):
    return patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=80 << 20))


def patiently(start_node):
    """Ray gives a node 30 s to start, which a busy machine may not have."""
    n_failed = 0
    while True:
        try:
            return start_node()
        except Exception as error:
            n_failed += 1
            if n_failed == 3 or "timed out during startup" not in str(error):
                raise


def start(cluster, made: Path, cache: Path, *words: str) -> subprocess.Popen:
    engine = ["--engine", "ray", "--address", cluster.address, "--weights", str(made / "w.safetensors")]
    command = [sys.executable, "-m", "teacher_cache", "extract", *SHARED, *engine, *words, str(cache)]
    with tempfile.NamedTemporaryFile("w", dir=cache.parent, suffix=".said", delete=False) as said:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=said)
    driver.said = Path(said.name)
    return driver


def wait_until(what, driver: subprocess.Popen) -> None:
    """Until `what` is true; the driver must still be at work then."""
    began = time.monotonic()
    while not what():
        assert driver.poll() is None and time.monotonic() - began < 300, driver.said.read_text()
        time.sleep(0.1)


def wait_for_shards(cache: Path, n_shards: int, driver: subprocess.Popen) -> None:
    wait_until(lambda: len(list(cache.glob("view-*/demo.zarr/commits/*.json"))) >= n_shards, driver)


def ended(driver: subprocess.Popen, code: int = 0) -> str:
    """What a driver said, when it has ended."""
    out, _ = driver.communicate(timeout=300)
    said = driver.said.read_text()
    assert driver.returncode == code and out == "" and "Traceback" not in said, (out, said)
    return said


@pytest.mark.slow
def test_a_node_that_is_killed(cluster, made, image_folder, tmp_path):
    """Crops and targets by two nodes, one of which is killed in mid-work: the bytes of one process, and a home is not needed."""
    lost = add_node(cluster)
    driver = start(cluster, made, tmp_path / "c", "--images", str(image_folder))
    wait_for_shards(tmp_path / "c", 6, driver)
    cluster.remove_node(lost, allow_graceful=False)
    said = ended(driver).splitlines()
    assert sum("Raylet is terminated" in line for line in said) <= 1 and not any("state-dump" in line for line in said)
    assert differences(made / "one", tmp_path / "c") == []


@pytest.mark.slow
def test_two_drivers_one_of_which_is_killed(cluster, made, begun):
    """Two at once make every shard once; when one is killed the other goes on from the disk, and a third has nothing to do."""
    add_node(cluster)
    first = start(cluster, made, begun)
    wait_for_shards(begun, 2, first)
    second = start(cluster, made, begun)
    wait_for_shards(begun, 4, first)
    first.send_signal(signal.SIGKILL)
    ended(second)
    first.communicate()
    assert differences(made / "one", begun) == []
    assert "Nothing to do" in ended(start(cluster, made, begun))


@pytest.mark.slow
def test_a_node_without_the_weights(cluster, made, begun, tmp_path):
    """A node that comes in mid-work and has no weights is given none, one sentence says so, and the others end the work."""
    here = tmp_path / "weights"
    shutil.copytree(made, here, ignore=shutil.ignore_patterns("one"))
    with claimed_range(store_claims(begun / "view-001/demo.zarr"), 23, 24, "The store"):  # so that the work does not end before
        driver = start(cluster, here, begun)
        wait_for_shards(begun, 1, driver)
        (here / "w.safetensors").unlink()
        add_node(cluster)
        wait_until(lambda: "is given no work" in driver.said.read_text(), driver)
    said = ended(driver)
    assert said.count("is given no work") == 1 and "w.safetensors" in said.partition("is given no work: ")[2].partition("\n")[0]
    assert said.count("what they hold is left to them") == 1 and verify(Cache(begun))[0] == []
    assert "No worker fits. process " in ended(start(cluster, here, begun, "--name", "other"), 2)
