"""Trackers: TensorBoard, Weights & Biases or trackio get what metrics.jsonl gets, the resolved
configuration and the sample texts. They never end a training."""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from common.console import one_line, warn
from common.files import replacing
from configuration import Configuration

NAMES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "trackio": "trackio"}
PROJECT = "gigagpt"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another
RUN_ID = "tracker_id"  # the file in out_dir with which a resumed run goes on in the same record


class Tracker:
    """The tracker that `config.tracker` chooses, if any, of a run from step `start`. One that fails
    is warned of once, and is not used again."""

    def __init__(self, config: Configuration, start: int):
        self.service = None
        self.name = NAMES.get(config.tracker)
        if config.tracker is not None:
            service = _TensorBoard if config.tracker == "tensorboard" else _Service
            with self._warning():
                self.service = service(config, start)

    def log(self, step: int, numbers: dict[str, float], samples: Sequence[str] = ()) -> None:
        """Passes on the figures of a step or an evaluation, and texts that the model wrote."""
        if self.service is not None:
            with self._warning():
                self.service.log(step, numbers, samples)

    def close(self) -> None:
        if self.service is not None:
            with self._warning():
                self.service.close()

    @contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each package has errors of its own
            self.service = None
            reason = one_line(error)[:300]
            if isinstance(error, ModuleNotFoundError):
                reason = f"{error.name} is not installed: pip install {error.name}"
            warn(f"{self.name} failed ({reason}); training continues")


class _TensorBoard:
    def __init__(self, config: Configuration, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(f"{config.out_dir}/tensorboard", purge_step=start + 1)
        lines = (f"    {key}: {value}" for key, value in asdict(config).items())
        self.writer.add_text("configuration", "\n".join(lines), start)

    def log(self, step: int, numbers: dict[str, float], samples: Sequence[str]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        for number, sample in enumerate(samples):
            self.writer.add_text(f"sample_{number}", sample, step)

    def close(self) -> None:
        self.writer.close()


class _Service:
    """Weights & Biases, or trackio, whose functions are the same."""

    def __init__(self, config: Configuration, start: int):
        self.module = import_module(config.tracker)
        path = Path(config.out_dir) / RUN_ID
        if start == 0 or not path.exists():
            with replacing(path) as writing:
                writing.write_text(secrets.token_hex(4))
        name = Path(config.out_dir).absolute().name
        run_id = path.read_text()
        if config.tracker == "wandb":
            options = {"name": name, "id": run_id, "dir": config.out_dir}
        else:
            options = {"name": f"{name}-{run_id}"}
        project = os.environ.get(f"{config.tracker.upper()}_PROJECT", PROJECT)
        self.module.init(project=project, config=asdict(config), resume="allow", **options)

    def log(self, step: int, numbers: dict[str, float], samples: Sequence[str]) -> None:
        values = dict(numbers)
        if samples:
            rows = [[step, sample] for sample in samples]
            values["samples"] = self.module.Table(columns=["step", "text"], data=rows)
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()
