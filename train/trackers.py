"""Where numbers go: a local JSON-lines file that is always written, and optional trackers.

A tracker that fails is warned about once and never ends a run.
"""

import importlib
import json
import logging
import math
import secrets
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

from gossamer.train.files import sync, write_atomic
from gossamer.train.refusal import Refusal

logger = logging.getLogger(__name__)

WANDB_MODES = ("offline", "online", "disabled")


class MetricsLog:
    """Append rows to a JSON-lines file; each row has a `step` and outlives a kill of the process.

    NaN and infinity are written as null, for JSON has no name for them, and read back as NaN.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = _Guard(f"writing {path}")
        self._torn = path.is_file() and not path.read_bytes().endswith(b"\n")

    def append(self, row: dict[str, Any]) -> None:
        """Write one row through to the operating system; a full disk loses it, with a warning."""
        line = json.dumps({key: _or_null(value) for key, value in row.items()})
        with self._guard, self._path.open("a", encoding="utf-8") as file:
            start = "\n" if self._torn else ""
            self._torn = True
            file.write(f"{start}{line}\n")
            file.flush()
            self._torn = False

    def sync(self) -> None:
        """Wait until all rows are on disk; called with each checkpoint."""
        with self._guard:
            if self._path.exists():
                sync(self._path)

    def truncate_after(self, step: int) -> None:
        """Drop the rows past `step`, which a resumed run writes anew, and half-written ones."""
        if self._path.is_file():
            kept = [row for row in self._read() if row["step"] <= step]
            write_atomic(self._path, "".join(f"{json.dumps(row)}\n" for row in kept))
            self._torn = False

    def rows(self) -> list[dict[str, Any]]:
        """Read all whole rows."""
        return [
            {key: math.nan if value is None else value for key, value in row.items()}
            for row in (self._read() if self._path.is_file() else ())
        ]

    def _read(self) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(self._path.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
            elif line:
                logger.warning("%s: line %d is not a whole row, passed over", self._path, number)
        return rows


class Tracker(Protocol):
    """Show a run's numbers somewhere; only `check` and `start` may raise, and only Refusal.

    The caller redacts `config`.
    """

    def check(self) -> None: ...

    def start(self, run_dir: Path, config: dict[str, Any]) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    """Show nothing."""

    def check(self) -> None:
        pass

    def start(self, run_dir: Path, config: dict[str, Any]) -> None:
        pass

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


class Tensorboard:
    """Write TensorBoard event files to `<run_dir>/tensorboard`."""

    def __init__(self) -> None:
        self._guard = _Guard("tensorboard")
        self._writer: Any = None

    def check(self) -> None:
        """Refuse where the package is not installed."""
        _require("tensorboard")

    def start(self, run_dir: Path, config: dict[str, Any]) -> None:
        self.check()
        from torch.utils.tensorboard import SummaryWriter

        with self._guard:
            self._writer = SummaryWriter(str(run_dir / "tensorboard"))
            # As text: TensorBoard's own hyperparameters refuse lists and nested values.
            text = json.dumps(config, indent=2, default=str)
            self._writer.add_text("config", f"```json\n{text}\n```")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # A writer that failed raises the same exception for ever, its trace growing each time.
        if self._writer is not None and not self._guard.failed:
            with self._guard:
                for name, value in metrics.items():
                    self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            with self._guard:
                self._writer.close()
            self._writer = None


class Wandb:
    """Log to Weights & Biases under `<run_dir>/wandb`; a resumed run continues its wandb run.

    Nothing is asked and nothing but config and metrics is collected: no code, git, command line,
    console or machine data. `timeout`: seconds to wait for the server at the start, twice that at
    the end. If the server does not answer at the start, the run is recorded offline.
    """

    def __init__(
        self,
        *,
        mode: str = "offline",
        project: str = "gossamer",
        timeout: float = 30.0,
    ) -> None:
        if mode not in WANDB_MODES:
            raise Refusal("tracker.mode", mode, ", ".join(WANDB_MODES), "choose one of them")
        if not 0 < timeout < math.inf:
            raise Refusal("tracker.timeout", timeout, "seconds above 0", "leave it at 30")
        self._mode = mode
        self._project = project
        self._timeout = timeout
        self._guard = _Guard("wandb")
        self._run: Any = None

    def check(self) -> None:
        """Refuse where the package is not installed."""
        _require("wandb")

    def start(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Start or continue the run; Refusal without the package or, online, without a login."""
        wandb = _require("wandb")
        if self._mode == "online":
            _check_login(wandb)
            try:
                self._run = self._init(wandb, "online", run_dir, config)
            except Exception as error:  # whatever the server did, the run must go on
                logger.warning(
                    "wandb online did not start (%s); recording offline, upload it with "
                    "`wandb sync`",
                    error,
                )
                with self._guard:
                    wandb.teardown()  # its service would call the run id taken
        if self._run is None:
            mode = "disabled" if self._mode == "disabled" else "offline"
            with self._guard:
                self._run = self._init(wandb, mode, run_dir, config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._run is not None:
            with self._guard:
                self._run.log(metrics, step=step)

    def finish(self) -> None:
        if self._run is not None:
            with self._guard:
                self._run.finish()
            self._run = None

    def _init(self, wandb: ModuleType, mode: str, run_dir: Path, config: dict[str, Any]) -> Any:
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            finish_timeout=2 * self._timeout,
            init_timeout=self._timeout,
            quiet=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        return wandb.init(
            project=self._project,
            dir=str(run_dir),
            mode=mode,
            id=_run_id(run_dir / "wandb_id.txt"),
            resume="allow",
            config=config,
            settings=settings,
        )


class _Guard:
    """Swallow what goes wrong inside, and warn about the first time."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self.failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if not self.failed:
            logger.warning("%s failed, the run goes on without it: %s", self._doing, error)
            self.failed = True
        return True


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        fix = f"pip install {package}, or choose tracker=none"
        raise Refusal("tracker", package, "an installed package", fix) from None


def _check_login(wandb: ModuleType) -> None:
    fix = "run `wandb login` or set WANDB_API_KEY, or choose mode=offline"
    try:
        # The mode, or WANDB_MODE would win; no viewer, or login would wait for the server.
        wandb.setup(wandb.Settings(mode="online", x_disable_viewer=True))
        known = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise Refusal("tracker", f"wandb online ({error})", "a valid API key", fix) from None
    if not known:
        raise Refusal("tracker", "wandb online", "a configured API key", fix)


def _run_id(path: Path) -> str:
    """Read the wandb run id of a run directory; a new one is drawn and stored."""
    stored = path.read_text("utf-8").strip() if path.is_file() else ""
    if not stored:
        stored = secrets.token_hex(4)
        write_atomic(path, stored)
    return stored
