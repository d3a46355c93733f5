"""Train from a bucket on loopback: the run equals one from a disk, whatever the store does."""

from pathlib import Path

import pytest
from helpers.bucket import KEY, SECRET, bucket
from helpers.runs import ROOT, Job, assert_same_state, losses, wait_for

from cmtrain.commands.data_pack import pack

SMALL_CHUNKS = str(ROOT / "tests" / "helpers" / "small_chunks_train.py")
SECTIONS = {
    "train": {"global_batch_size": 48, "max_batch_per_gpu": 8, "log_every_steps": 1},
    "checkpoint": {"every_steps": 2},
    "schedule": {"epochs": 4, "warmup_epochs": 1},  # 8 steps
}


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    cache = str(tmp_path_factory.mktemp("cache"))
    pack(
        str(images), str(folder), resize_shorter=None, quality=90, shard_mib=1, processes=1, cache_dir=cache
    )
    return folder


@pytest.fixture
def make(make_job, tmp_path):
    def job(name: str, root: str) -> Job:
        return make_job(name, **SECTIONS, data={"root": root, "cache_dir": str(tmp_path / f"cache-{name}")})

    return job


@pytest.fixture
def from_disk(make, packed) -> Job:
    job = make("disk", str(packed))
    job()
    return job


@pytest.mark.timeout(900)
def test_killed_and_resumed_on_other_numbers_of_ranks_it_equals_the_disk(make, packed):
    """Killed while chunks come. Three ranks make one copy, and later runs of the host fetch no image."""
    parts = (("--max-steps", "4"), 3), (("--max-steps", "6"), 2), ((), 1)
    disk, job = make("disk", str(packed)), make("bucket", "s3://images")
    for arguments, nproc in parts:
        disk(*arguments, nproc=nproc)
    with bucket(packed) as served:
        served.latency = 0.1
        process = job.start(*parts[0][0], nproc=3, module=SMALL_CHUNKS, **served.environment)
        wait_for(lambda: len(served.of_images()) >= 4, process)
        process.kill()
        process.communicate()
        served.latency = 0.0
        for arguments, nproc in parts:
            served.requests.clear()
            job(*arguments, nproc=nproc, module=SMALL_CHUNKS, **served.environment)
            assert nproc == 3 or served.of_images() == []
    assert_same_state(job, disk)
    assert losses(job) == losses(disk)


@pytest.mark.timeout(900)
def test_a_run_goes_from_a_disk_to_a_bucket(make, packed, from_disk):
    job = make("moved", str(packed))
    job("--max-steps", "4")
    with bucket(packed) as served:
        job("--data.root", "s3://images/", **served.environment)
    assert_same_state(job, from_disk)


@pytest.mark.timeout(900)
def test_a_bad_store_costs_time_and_no_sample_and_no_secret_is_written(make, packed, from_disk):
    faults = {1: "500", 3: "503", 4: "cut", 6: "corrupt", 7: "stall 3"}
    job = make("bucket", "s3://images")
    with bucket(packed) as served:
        served.fault = lambda path, number: faults.get(number)
        job(**served.environment)
        assert len(served.requests) > max(faults)
    assert_same_state(job, from_disk)
    written = [path.read_bytes() for path in job.folder.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not any(secret.encode() in content for content in written for secret in (KEY, SECRET))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("fault", "what"), [("403", "credentials are missing"), ("404", "is not there")])
def test_a_store_that_refuses_ends_the_run_and_the_same_command_goes_on(
    make, packed, from_disk, fault, what
):
    job = make("bucket", "s3://images")
    with bucket(packed) as served:
        served.fault = lambda path, number: fault if path.endswith("train/shard-000000.tar") else None
        job(code=3, **served.environment)
        err = job.stderr.read_text()
        assert what in err
        assert KEY not in err
        assert "Traceback" not in err
        served.fault = lambda path, number: None
        job(**served.environment)
    assert_same_state(job, from_disk)
