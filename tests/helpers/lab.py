"""A small film, its shards and a tiny dense teacher; jobs run in their own processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import gossamer

ROOT = Path(gossamer.__file__).parents[1]  # holds gossamer/, installed or not
SHOTS, SHOT_FRAMES, HEIGHT, WIDTH = 4, 24, 32, 64

BASE = {
    "device": "cpu",
    "data.height": HEIGHT,
    "data.width": WIDTH,
    "data.frames": 8,
    "data.stride": 4,
    "data.holdout": 0.5,
    "codec.patch": [2, 4, 4],
    "codec.channels": 4,
    "text.dim": 16,
    "text.length": 4,
    "batch_size": 4,
    "optimizer.lr": 1e-3,
    "optimizer.warmup": 2,
    "calibration.clips": 2,
    "calibration.noise_levels": [0.7, 0.3],
    "calibration.densities": [0.1, 0.25, 0.5],
    "evaluation.clips": 2,
    "evaluation.noise_levels": [0.7, 0.3],
    "evaluation.sample_clips": 1,
    "evaluation.sample_steps": 2,
}
TEACHER = {
    "name": "teacher",
    "model": "scratch_wan",
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.head_dim": 16,
    "model.ffn_dim": 64,
    "model.channels": 4,
    "model.text_dim": 16,
    "model.condition": "first_frame",
    "loss": "flow_matching",
    "sparsity": 0.0,
    "stages": ["encode", "train", "export"],
    "steps": 60,
    "optimizer.lr": 1e-2,
}
STUDENT = {
    "model": "pretrained",
    "model.condition": "first_frame",
    "sparsity": 0.6,
    "layout.block": [1, 2, 2],
    "stages": ["calibrate", "train"],
    "steps": 8,
    "checkpoint_every": 4,
}


@dataclass(frozen=True)
class Done:
    """A job that ended: its exit code as subprocess counts it, and what it wrote."""

    code: int
    text: str

    @property
    def errors(self) -> list[str]:
        """The lines that begin with `error:`; progress bars end in a carriage return."""
        lines = self.text.replace("\r", "\n").splitlines()
        return [line for line in lines if line.startswith("error: ")]


@dataclass
class Running:
    """A job that runs."""

    pid: int
    log: Path
    wait_for: Callable[[int], int]

    def when(self, happened: Callable[[], bool], seconds: float = 60) -> "Running":
        """Poll until something happened; AssertionError when it takes too long."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, self.log.read_text(errors="replace")
            time.sleep(0.0005)
        return self

    def wait(self) -> Done:
        return Done(self.wait_for(self.pid), self.log.read_text(errors="replace"))

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)  # not yet waited for, so the id is still this job's

    def kill(self) -> Done:
        self.send(signal.SIGKILL)
        return self.wait()


class Launcher:
    """Starts jobs in processes forked from one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._jobs = folder, 0
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("launcher.py")],
            # No GPU: its jobs run on the CPU, and a fork cannot use CUDA. One thread: for tiny
            # tensors, several mostly wait for each other on a busy machine.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        self._server.stdout.readline()  # it has imported all, so that no job waits for that

    def start(
        self,
        overrides: list[str],
        *,
        env: dict[str, str] | None = None,
        hide: str = "",
        fault: tuple[int, str] | None = None,
        inject: str = "",
    ) -> Running:
        """Start `python -m gossamer.train OVERRIDES`; see launcher.py for the options."""
        self._jobs += 1
        log = self._folder / f"job-{self._jobs}.log"
        job = {"argv": overrides, "log": str(log), "env": env or {}, "hide": hide, "fault": fault}
        job["inject"] = inject
        return Running(self._ask({"start": job}), log, lambda pid: self._ask({"wait": pid}))

    def run(self, overrides: list[str], **options: object) -> Done:
        return self.start(overrides, **options).wait()  # type: ignore[arg-type]

    def start_ranks(
        self,
        overrides: list[str],
        *,
        processes: int = 2,
        launch: dict[str, str] | None = None,
        inject: str = "",
        **options: object,
    ) -> list[Running]:
        """Start one job in processes with torchrun's environment; options are the first's.

        `launch` is what `accelerate launch` would add to the environment of all, `inject` of all
        too.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        first, *others = (
            {**common, **(launch or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(processes)
        )
        return [
            self.start(overrides, env=first, inject=inject, **options),  # type: ignore[arg-type]
            *(self.start(overrides, env=env, inject=inject) for env in others),
        ]

    def ranks(self, overrides: list[str], **options: object) -> list[Done]:
        return [job.wait() for job in self.start_ranks(overrides, **options)]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def _ask(self, request: dict[str, object]) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


@dataclass(frozen=True)
class Run:
    """What a run left in its folder."""

    folder: Path

    @property
    def losses(self) -> list[tuple[int, float, float, float]]:
        """Step, loss, learning rate and gradient norm of each line of metrics.jsonl."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]
        return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]

    @property
    def newest(self) -> Path:
        """The checkpoint of the most steps."""
        steps = (self.folder / "checkpoints").glob("step-*")
        return max(steps, key=lambda path: int(path.name.removeprefix("step-")))

    @property
    def weights(self) -> dict[str, str]:
        """File -> SHA-256 of the tensors of the newest checkpoint."""
        from gossamer.train.files import sha256

        return {file.name: sha256(file) for file in sorted(self.newest.glob("*.safetensors"))}


@dataclass(frozen=True)
class Lab:
    """The film, its shards and the tiny teacher, and the overrides that use them."""

    root: Path
    source: Path = ROOT

    @property
    def film(self) -> Path:
        return self.root / "film.mp4"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def teacher(self) -> Path:
        return self.root / "runs" / "teacher" / "export"

    @property
    def teacher_settings(self) -> dict[str, object]:
        return dict(TEACHER)

    @property
    def calibrated(self) -> Path:
        """A folder with the calibration of the student's settings."""
        return self.root / "runs" / "calibrated" / "calibration"

    @property
    def student_settings(self) -> dict[str, object]:
        return {"name": "student", **STUDENT, "model.path": self.teacher}

    def run(self, runs: Path, name: str = "student") -> Run:
        return Run(runs / name)

    def overrides(self, runs: Path, settings: dict[str, object]) -> list[str]:
        """Return key=value of BASE and the settings, with the run below `runs`."""
        paths = {"data.source": self.film, "data.dir": self.data, "runs_dir": runs}
        return [f"{key}={value}" for key, value in {**BASE, **paths, **settings}.items()]

    def student(self, runs: Path, **settings: object) -> list[str]:
        """Return the overrides of a sparse student; `__` stands for a dot, None leaves out.

        It takes the lab's calibration: one with other masks, or whose calibration is of interest,
        is given calibration__path=None.
        """
        named = {name.replace("__", "."): value for name, value in settings.items()}
        merged = {**self.student_settings, "calibration.path": self.calibrated, **named}
        return self.overrides(runs, {k: v for k, v in merged.items() if v is not None})


def write_film(path: Path) -> None:
    """Write shots of a square that runs over a shaded ground, each shot with its own grey."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "10", "preset": "ultrafast"}
        for shot, grey in zip(range(SHOTS), (40, 200, 100, 240), strict=True):
            for index in range(SHOT_FRAMES):
                frame = np.full((HEIGHT, WIDTH, 3), grey, np.uint8)
                frame[:, :, 1] = np.linspace(grey // 2, grey, WIDTH) // (1 + shot % 2)
                left, top = (index * 2 + 5 * shot) % (WIDTH - 8), HEIGHT // 4 + 2 * shot
                frame[top : top + 8, left : left + 8] = (255, 128, 0)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
