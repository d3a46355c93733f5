"""Two ranks, one poisoned: both refuse the step, and they take every decision together."""

import dataclasses
import os
import pickle
import socket

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from helpers.mini import assert_same, batch, make_learner, snapshot
from helpers.runs import FORKS

CASES = [(rank, broadcast) for rank in (0, 1) for broadcast in (False, True)]


def _train(rank, port, folder, protect):
    """One rank: for every case six steps, the third of them poisoned on one rank; leaves what it has at the
    end.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    outcomes = {}
    for poisoned_rank, broadcast in CASES:
        wrapper = DistributedDataParallelKwargs(broadcast_buffers=broadcast, gradient_as_bucket_view=True)
        learner = make_learner(accelerator=Accelerator(cpu=True, kwargs_handlers=[wrapper]), protect=protect)
        snapshots = []
        for number in range(6):
            poison = torch.inf if (number, rank) == (2, poisoned_rank) else 1.0
            learner.step(iter([batch(2 * number + rank, poison)]), number, 0.05)
            snapshots.append(snapshot(learner))
        before, after = snapshots[1:3]
        own_statistics = learner.guard.committed.clone()
        report = learner.report(6, 0, 0.05, reset=True)
        learner.average_over_ranks()
        outcomes[poisoned_rank, broadcast] = {
            "changed": [key for key in before if not torch.equal(before[key], after[key])],
            "own_statistics": own_statistics,
            "report": report,
            "end": snapshot(learner),
        }
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(outcomes))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(folder, protect):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=_train, args=(rank, port, folder, protect)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]


def shared(report):
    return dataclasses.replace(report, bn_mean_abs_max=0.0, bn_var_max=0.0)


def test_a_poisoned_rank_poisons_nothing(tmp_path):
    """Whichever rank, whether DDP sends rank 0's statistics before each forward pass or, as build.py has it,
    not.
    """
    ranks = run(tmp_path, protect=True)
    for case in CASES:
        one, other = (rank[case] for rank in ranks)
        assert one["changed"] == other["changed"] == []
        # Between evaluations and saves each rank has statistics of its own, and reports how large they are.
        assert shared(one["report"]) == shared(other["report"])
        assert one["report"].bad_steps == 1
        assert_same(one["end"], other["end"])
        for outcome in (one, other):
            assert torch.isfinite(outcome["own_statistics"]).all()
            assert all(torch.isfinite(value).all() for value in outcome["end"].values())


def test_without_the_guard_it_poisons_the_other_rank_or_the_average(tmp_path):
    ranks = run(tmp_path, protect=False)
    for case in CASES:
        assert any(torch.isnan(value).any() for rank in ranks for value in rank[case]["end"].values()), case
