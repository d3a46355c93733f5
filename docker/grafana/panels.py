"""List the panels of the dashboards as plain data, from which dashboards.py makes Grafana's JSON.

A panel's description is what to do when it looks wrong. Queries use recorded series where possible
(docker/prometheus/rules.yaml), so that dashboards and alerts agree.
"""

from dataclasses import dataclass

RUN = 'run=~"$run"'
RANKS = 'run=~"$run",rank=~"$rank"'

# Facts of a rank, value 1: adds the rank's labels to what the process or its GPU reports.
OF_RANK = f"* on (job, instance) group_left (run, rank) cmtrain_run_info{{{RANKS}}}"

NEEDS_DCGM = "needs dcgm-exporter"


@dataclass(frozen=True)
class Panel:
    """One panel.

    `queries`: legend -> PromQL. `kind`: one of dashboards.BUILDERS. `width`: in 24ths of the page.
    `warn_at`, `critical_at`: thresholds, which a curve also shows as lines.
    """

    title: str
    unit: str
    description: str
    queries: dict[str, str]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    warn_at: float | None = None
    critical_at: float | None = None
    stacked: bool = False
    log_base: int | None = None
    no_value: str = ""


@dataclass(frozen=True)
class PanelRow:
    title: str
    panels: tuple[Panel, ...]


def number(title: str, unit: str, description: str, queries: dict[str, str], **look: float) -> Panel:
    """Return a panel that shows the last value only."""
    return Panel(title, unit, description, queries, kind="stat", width=4, height=4, **look)  # type: ignore[arg-type]


def of_gpu(metric: str) -> str:
    """Return DCGM's `metric` for the GPUs of the chosen ranks. Two runs may share a GPU: it "
    "is the "one" side."""
    return f"cmtrain_gpu_info{{{RANKS}}} * on (UUID) group_left () max by (UUID) ({metric})"


def step_quantile(q: float) -> str:
    buckets = f"rate(cmtrain_step_duration_seconds_bucket{{{RUN}}}[$__rate_interval])"
    return f"histogram_quantile({q}, sum by (run, le) ({buckets}))"


OVERVIEW = PanelRow("Overview", (
    number("Progress", "percentunit", "Share of the optimizer steps done.", {
        "{{run}}": f"run:cmtrain_progress:ratio{{{RUN}}}",
    }),
    number("Time left", "s", "At the speed of the last log window.", {
        "{{run}}": f"max by (run) (cmtrain_eta_timestamp_seconds{{{RUN}}} > 0) - time()",
    }),
    number("Images per second", "suffix: img/s", "All ranks, last minute; 0 during an evaluation.", {
        "{{run}}": f"run:cmtrain_images:rate1m{{{RUN}}}",
    }),
    number("Top-1 now", "percentunit", "The last evaluation of the model and, if there is one, its EMA.", {
        "{{run}} {{weights}}": f'max by (run, weights) (cmtrain_eval_accuracy_ratio{{{RUN},k="1"}})',
    }),
    number("Top-1 best", "percentunit", "Its checkpoint is kept.", {
        "{{run}}": f"max by (run) (cmtrain_eval_best_accuracy_ratio{{{RUN}}})",
    }),
    number("Alerts", "none", "Firing now; see Alerts in Prometheus for what to do.", {
        "firing": f'count(ALERTS{{{RUN},alertstate="firing"}}) or vector(0)',
    }, warn_at=1, critical_at=5),
    number("Ranks", "none", "That answer. Fewer than world_size: see Stragglers.", {
        "{{run}}": f"count by (run) (cmtrain_step{{{RUN}}})",
    }),
    number("Steps skipped", "none",
        "In the time shown: the gradient was not finite. Some are normal in fp16.", {
        "{{run}}": f'max by (run) (increase(cmtrain_steps_total{{{RUN},result="skipped"}}[$__range]))',
    }),
    number("Rollbacks", "none", "In the time shown. events.jsonl names what overflowed.", {
        "{{run}}": f"max by (run) (increase(cmtrain_rollbacks_total{{{RUN}}}[$__range]))",
    }, warn_at=1, critical_at=3),
    number("Restarts", "none", "In the time shown. Many: look at the node and its memory.", {
        "{{run}}": f"changes(run:cmtrain_start_timestamp_seconds:max{{{RUN}}}[$__range])",
    }, warn_at=1, critical_at=5),
    Panel("State", "none", "What rank 0 does. Long evaluations: evaluate.every_epochs.", {
        "{{run}} {{state}}": f'cmtrain_state{{{RUN},rank="0"}} == 1',
    }, kind="statetimeline", height=4),
))  # fmt: skip

THROUGHPUT = PanelRow("Throughput", (
    Panel("Images per second", "suffix: img/s", "All ranks of a run. A drop that stays: Where time goes.", {
        "{{run}}": f'sum by (run) (rate(cmtrain_images_total{{{RUN},split="train"}}[$__rate_interval]))',
    }),
    Panel("Time of a step", "s",
        "p99 far above p50: checkpoints on a slow disk, or data that comes in bursts.", {
        "{{run}} p50": step_quantile(0.5), "{{run}} p95": step_quantile(0.95),
        "{{run}} p99": step_quantile(0.99),
    }),
    Panel("Operations per second and rank", "flops", (
        "Forward and backward pass, a multiply-add is two. Divide by the GPU's peak for its "
        "utilization: in 16 bits, "
        "dense, 989e12 for an H100 SXM, 312e12 for an A100, 125e12 for a V100."
    ), {
        "{{run}} {{rank}}": (
            f'rate(cmtrain_images_total{{{RANKS},split="train"}}[$__rate_interval]) '
            f"* ignoring (split) cmtrain_flops_per_image{{{RANKS}}}"
        ),
    }),
))  # fmt: skip

TIME = PanelRow("Where time goes", (
    Panel("Share of a step by phase", "percentunit", (
        "data_wait: the loader is too slow (Data). backward of all ranks: gradients on the "
        "network. What is missing to "
        "100 %: the host, and on a GPU gaps between kernels."
    ), {"{{run}} {{phase}}": f"run_phase:cmtrain_phase_duration_seconds:ratio5m{{{RUN}}}"}, stacked=True),
    Panel("Waiting for data", "percentunit", (
        "Above the line the run is bound by its loader: cmtrain bench shows whether by reading or decoding."
    ), {
        "{{run}} {{rank}}": f"run_rank:cmtrain_data_wait_seconds:ratio5m{{{RANKS}}}",
    }, warn_at=0.1, critical_at=0.2),
    Panel("Wall time by state", "percentunit",
        "Of rank 0, in the time shown. Little train: evaluate less often.", {
        "{{run}} {{state}}": f'avg_over_time(cmtrain_state{{{RUN},rank="0"}}[$__range])',
    }, kind="bargauge"),
))  # fmt: skip

STRAGGLERS = PanelRow("Stragglers", (
    Panel("Own time of a rank", "s", (
        "Data wait and forward pass, the part of a step in which no rank waits for another. A line "
        "above the others is "
        "a slow node: hot, shared, or with a slow disk."
    ), {"{{run}} {{rank}}": f"run_rank:cmtrain_own_seconds:mean5m{{{RANKS}}}"}),
    Panel("Lost to the slowest rank", "percentunit", "Share of a step. Above the line: exclude that node.", {
        "{{run}}": f"run:cmtrain_straggler:ratio5m{{{RUN}}}",
    }, warn_at=0.1, critical_at=0.25),
    Panel("Ranks that answer", "bool_on_off",
        "Off: the process is dead, or cannot be reached (CmtrainRankDown).", {
        "{{run}} {{rank}}": (
            f"(topk by (job, instance) (1, "
            f"last_over_time(cmtrain_start_timestamp_seconds{{{RANKS}}}[1h])) > bool 0) "
            "* on (job, instance) group_left () up"
        ),
    }, kind="statetimeline"),
))  # fmt: skip

DATA = PanelRow("Data", (
    Panel("Encoded bytes read", "Bps", "All ranks. At the storage's limit: cmtrain data pack.", {
        "{{run}}": f"sum by (run) (rate(cmtrain_data_bytes_total{{{RUN}}}[$__rate_interval]))",
    }, width=6),
    Panel("Unreadable images", "none",
        "Replaced by others. events.jsonl names them; cmtrain data check finds all.", {
        "{{run}} {{kind}}": f"sum by (run, kind) (cmtrain_data_decode_errors_total{{{RUN}}})",
    }, width=6, warn_at=1),
    Panel("CPU cores used", "none", "At the limit while the run waits for data: more cores.", {
        "{{run}} {{rank}}": f"rate(process_cpu_seconds_total[$__rate_interval]) {OF_RANK}",
    }, width=6),
    Panel("Host memory", "bytes", "Grows for hours: the kernel will end the run at the limit.", {
        "{{run}} {{rank}}": f"process_resident_memory_bytes {OF_RANK}",
    }, width=6),
))  # fmt: skip

BUCKET = PanelRow("Bucket", (
    Panel("Read from the bucket", "Bps",
        "All ranks. Falls to zero when all images are on local disk.", {
        "{{run}}": f"sum by (run) (rate(cmtrain_store_bytes_total{{{RUN}}}[$__rate_interval]))",
    }),
    Panel("Requests to the bucket", "reqps", "All ranks. Stores limit them, S3 at 5,500/s a prefix.", {
        "{{run}}": f"sum by (run) (rate(cmtrain_store_requests_total{{{RUN}}}[$__rate_interval]))",
    }),
    Panel("Requests repeated", "reqps",
        "failed: no answer, or one of a server in trouble; corrupt: wrong checksum (CmtrainStoreFailing).", {
        "{{run}} {{reason}}": (
            f"sum by (run, reason) (rate(cmtrain_store_retries_total{{{RUN}}}[$__rate_interval]))"
        ),
    }),
))  # fmt: skip

LEARNING = PanelRow("Learning", (
    Panel("Loss", "none",
        "Rising for long: lower optim.lr. Training far below evaluation: more augmentation.", {
        "{{run}} train": f"max by (run) (cmtrain_train_loss{{{RUN}}})",
        "{{run}} eval {{weights}}": f"max by (run, weights) (cmtrain_eval_loss{{{RUN}}})",
    }),
    Panel("Accuracy", "percentunit", "On the whole validation set.", {
        "{{run}} top-{{k}} {{weights}}": f"max by (run, k, weights) (cmtrain_eval_accuracy_ratio{{{RUN}}})",
        "{{run}} balanced {{weights}}":
            f"max by (run, weights) (cmtrain_eval_balanced_accuracy_ratio{{{RUN}}})",
        "{{run}} mAP {{weights}}":
            f"max by (run, weights) (cmtrain_eval_mean_average_precision_ratio{{{RUN}}})",
    }),
    Panel("Learning rate", "sci", "Warm-up, schedule, and the factor that a rollback leaves for a while.", {
        "{{run}}": f"max by (run) (cmtrain_learning_rate{{{RUN}}})",
    }),
    Panel("Gradient norm", "none", "Before clipping. Mostly above optim.clip_grad: every step is clipped.", {
        "{{run}}": f"max by (run) (cmtrain_grad_norm{{{RUN}}})",
    }, log_base=10),
    Panel("Weight norm", "none", "Grows without end: optim.weight_decay is too small.", {
        "{{run}}": f"max by (run) (cmtrain_weight_norm{{{RUN}}})",
    }),
    Panel("Epoch", "none", "From 0. A flat stretch is an evaluation, a checkpoint or a stall (State).", {
        "{{run}}": f"max by (run) (cmtrain_epoch{{{RUN}}})",
    }),
))  # fmt: skip

NUMERICS = PanelRow("Numerics", (
    Panel("Loss scale", "none", "fp16. Falls and falls: activations overflow. Try bf16.", {
        "{{run}}": f"max by (run) (cmtrain_loss_scale{{{RUN}}})",
    }, log_base=2),
    Panel("Share of steps skipped", "percentunit", "Above the line: lower optim.lr, or train in bf16.", {
        "{{run}}": f"run:cmtrain_steps_skipped:ratio10m{{{RUN}}}",
    }, warn_at=0.05, critical_at=0.25),
    Panel("Bad steps in a row", "none",
        "At guard.rollback_after_bad_steps the run goes back to a good state.", {
        "{{run}}": f"max by (run) (cmtrain_guard_consecutive_skips{{{RUN}}})",
    }),
    Panel("Non-finite values", "none", (
        "By place and answer, since the process started. More batchnorm than gradient: overflows "
        "that only evaluation "
        "would have shown."
    ), {"{{run}} {{where}}: {{action}}": f"max by (run, where, action) (cmtrain_nonfinite_total{{{RUN}}})"}),
    Panel("BatchNorm's largest statistics", "none", (
        "Of any layer. fp16 ends at 65504: six times the root of the variance should stay below "
        "half of that."
    ), {
        "{{run}} variance": f"max by (run) (cmtrain_bn_running_var_max{{{RUN}}})",
        "{{run}} mean": f"max by (run) (cmtrain_bn_running_mean_abs_max{{{RUN}}})",
    }, log_base=10),
    Panel("Loss spikes, rollbacks, lack of memory", "none",
        "In the last hour. events.jsonl names steps, samples and layers.", {
        "{{run}} spikes": f"max by (run) (increase(cmtrain_loss_spikes_total{{{RUN}}}[1h]))",
        "{{run}} rollbacks": f"max by (run) (increase(cmtrain_rollbacks_total{{{RUN}}}[1h]))",
        "{{run}} out of memory": f"max by (run) (increase(cmtrain_out_of_memory_total{{{RUN}}}[1h]))",
    }),
))  # fmt: skip

GPU = PanelRow("GPU", (
    Panel("Utilization", "percent",
        "Share of time with a kernel running, whatever it does. Low: Waiting for data.", {
        "{{run}} {{rank}}": of_gpu("DCGM_FI_DEV_GPU_UTIL"),
    }, width=6, no_value=NEEDS_DCGM),
    Panel("Tensor cores", "percentunit", "Share of cycles. Low at full utilization: train in 16 bits.", {
        "{{run}} {{rank}}": of_gpu("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"),
    }, width=6, no_value=NEEDS_DCGM),
    Panel("Power", "watt", "One GPU below the others at the same work: capped or throttled.", {
        "{{run}} {{rank}}": of_gpu("DCGM_FI_DEV_POWER_USAGE"),
    }, width=6, no_value=NEEDS_DCGM),
    Panel("Temperature", "celsius", "Near the limit clocks go down: look at the node's cooling.", {
        "{{run}} {{rank}}": of_gpu("DCGM_FI_DEV_GPU_TEMP"),
    }, width=6, warn_at=83, critical_at=90, no_value=NEEDS_DCGM),
    Panel("Memory of the GPU", "bytes", "Everything on it: torch, DALI, NCCL, others.", {
        "{{run}} {{rank}}": of_gpu("DCGM_FI_DEV_FB_USED * 1024 * 1024"),
    }, width=6, no_value=NEEDS_DCGM),
    Panel("Memory of torch", "bytes",
        "peak is what a larger train.max_batch_per_gpu has to fit beside DALI.", {
        "{{run}} {{rank}} {{kind}}": f"cmtrain_gpu_memory_bytes{{{RANKS}}}",
    }, width=6, no_value="no GPU"),
    Panel("Images per joule", "none",
        "Of the GPUs. What a change of precision or batch size is worth in energy.", {
        "{{run}}": (
            f"run:cmtrain_images:rate1m{{{RUN}}} / sum by (run) ({of_gpu('DCGM_FI_DEV_POWER_USAGE')})"
        ),
    }, width=6, no_value=NEEDS_DCGM),
    Panel("Last Xid", "none", "0: none. 48, 63, 64, 74, 79, 94, 95: broken hardware; drain the node.", {
        "{{run}} {{rank}}": of_gpu("DCGM_FI_DEV_XID_ERRORS"),
    }, width=6, critical_at=1, no_value=NEEDS_DCGM),
))  # fmt: skip

CHECKPOINTS = PanelRow("Checkpoints and evaluations", (
    Panel("Age of the last checkpoint", "s",
        "The work that a crash costs now. Too much: checkpoint.every_steps.", {
        "{{run}}": f"time() - max by (run) (cmtrain_checkpoint_last_success_timestamp_seconds{{{RUN}}} > 0)",
    }, width=6, warn_at=4 * 3600),
    Panel("Mean time to write one", "s", "Grows: the file system is slow or nearly full.", {
        "{{run}}": (
            f'increase(cmtrain_checkpoint_duration_seconds_sum{{{RUN},rank="0"}}[$__range]) '
            f'/ increase(cmtrain_checkpoint_duration_seconds_count{{{RUN},rank="0"}}[$__range])'
        ),
    }, width=6),
    Panel("Size of one", "bytes", "Times checkpoint.keep, plus the best one: what the disk has to hold.", {
        "{{run}}": f'cmtrain_checkpoint_size_bytes{{{RUN},rank="0"}}',
    }, width=6),
    Panel("Failures", "none", "Since the process started. Make room: the next save is tried.", {
        "{{run}}": f'cmtrain_checkpoint_failures_total{{{RUN},rank="0"}}',
    }, width=6, critical_at=1),
    Panel("Mean time of an evaluation", "s", "Of the model and its EMA. Too long: evaluate.every_epochs.", {
        "{{run}}": (
            f'increase(cmtrain_eval_duration_seconds_sum{{{RUN},rank="0"}}[$__range]) '
            f'/ increase(cmtrain_eval_duration_seconds_count{{{RUN},rank="0"}}[$__range])'
        ),
    }, width=6),
    Panel("Standing still for checkpoints", "percentunit", "Share of the time. Much: save less often.", {
        "{{run}}": f'rate(cmtrain_checkpoint_wait_seconds_total{{{RUN},rank="0"}}[$__rate_interval])',
    }, width=6),
    Panel("Images evaluated per second", "suffix: img/s",
        "Far below training: more data.threads for evaluation.", {
        "{{run}}": f'sum by (run) (rate(cmtrain_images_total{{{RUN},split="eval"}}[$__rate_interval]))',
    }, width=6),
))  # fmt: skip

RUN_ROWS = (OVERVIEW, THROUGHPUT, TIME, STRAGGLERS, DATA, BUCKET, LEARNING, NUMERICS, GPU, CHECKPOINTS)

FLEET_ROWS = (
    PanelRow("Runs", (
        Panel("Runs that answer", "none", "A click on a run opens its dashboard.", {
            "facts": f'cmtrain_run_info{{{RUN},rank="0"}}',
            "progress": f"run:cmtrain_progress:ratio{{{RUN}}}",
            "images/s": f"run:cmtrain_images:rate1m{{{RUN}}}",
            "time left": f"max by (run) (cmtrain_eta_timestamp_seconds{{{RUN}}} > 0) - time()",
            "loss": f"max by (run) (cmtrain_train_loss{{{RUN}}})",
            "best top-1": f"max by (run) (cmtrain_eval_best_accuracy_ratio{{{RUN}}})",
            "ranks": f"count by (run) (cmtrain_step{{{RUN}}})",
            "alerts": f'count by (run) (ALERTS{{{RUN},alertstate="firing"}})',
        }, kind="table", width=24, height=9),
        Panel("Alerts", "none", "Each has a runbook: its annotation in Prometheus, and docs/metrics.md.", {
            "alerts": 'ALERTS{alertname=~"Cmtrain.*",run=~"$run"}',
        }, kind="table", width=24, height=6, no_value="none"),
    )),
    PanelRow("Side by side", (
        Panel("Images per second", "suffix: img/s", "Divide by ranks before comparing.", {
            "{{run}}": f"run:cmtrain_images:rate1m{{{RUN}}}",
        }),
        Panel("Progress", "percentunit", "A line that ends below 100 % is a run that ended early.", {
            "{{run}}": f"run:cmtrain_progress:ratio{{{RUN}}}",
        }),
        Panel("Waiting for data", "percentunit",
            "The rank that waits most. Many runs at once: the shared storage.", {
            "{{run}}": f"max by (run) (run_rank:cmtrain_data_wait_seconds:ratio5m{{{RUN}}})",
        }, warn_at=0.1, critical_at=0.2),
        Panel("Training loss", "none", "Compare runs of the same augmentation and mixing only.", {
            "{{run}}": f"max by (run) (cmtrain_train_loss{{{RUN}}})",
        }),
        Panel("Top-1", "percentunit", "The better of model and EMA, at the last evaluation.", {
            "{{run}}": f'max by (run) (cmtrain_eval_accuracy_ratio{{{RUN},k="1"}})',
        }),
        Panel("Share of steps skipped", "percentunit",
            "One run above the others: its optim.lr is too high for fp16.", {
            "{{run}}": f"run:cmtrain_steps_skipped:ratio10m{{{RUN}}}",
        }, warn_at=0.05),
        Panel("Training loss over steps", "none", (
            "Runs that began at different times, over each other; x is the optimizer step. For runs "
            "that are no longer "
            "in Prometheus: cmtrain report A B."
        ), {
            "step": f"max by (run) (cmtrain_step{{{RUN}}})",
            "loss": f"max by (run) (cmtrain_train_loss{{{RUN}}})",
        }, kind="xychart", width=24, height=10),
    )),
)  # fmt: skip

# Name -> (colour, query): a mark where the query has a value. Counters appear at 0, so a change is an event.
ANNOTATIONS = {
    "rollback": ("orange", f'changes(cmtrain_rollbacks_total{{{RUN},rank="0"}}[1m]) > 0'),
    "restart": ("blue", f"changes(run:cmtrain_start_timestamp_seconds:max{{{RUN}}}[1m]) > 0"),
    "alert": ("red", f'ALERTS{{{RUN},alertstate="firing",severity="critical"}}'),
}
