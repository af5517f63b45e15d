"""Fault D8: a slow disk shows in the metric of the time that a step waits for its data."""

import json
import time
from pathlib import Path
from typing import Any

from gossamer.train import loop
from gossamer.train.data.dataset import LatentDataset
from gossamer.train.distiller import Distiller
from gossamer.train.losses import FlowMatching
from gossamer.train.trackers import NoTracker


class _Slow(LatentDataset):
    def _row(self, shard: int, row: int) -> dict[str, Any]:
        time.sleep(0.05)
        return super()._row(shard, row)


def test_d8_a_slow_disk_shows_in_the_wait_for_data(make_job: Any, lab: Any, tmp_path: Path) -> None:
    waits = {}
    for kind in (LatentDataset, _Slow):
        job = make_job(loss="flow_matching")
        settings = loop.TrainSettings(steps=2, batch_size=4, lr=1e-3)
        loop.train(
            Distiller(job.student(0), None, FlowMatching(), job.draws(0)), kind(lab.data, "train"),
            job.accelerator, settings, folder=tmp_path / kind.__name__, tracker=NoTracker(),
        )  # fmt: skip
        rows = [json.loads(line) for line in (tmp_path / kind.__name__ / "metrics.jsonl").open()]
        waits[kind] = [row["data_seconds"] for row in rows]
        assert all(row["data_seconds"] <= row["step_seconds"] for row in rows)
    assert min(waits[_Slow]) >= 4 * 0.05 > max(waits[LatentDataset])
