"""Where a run's numbers go: metrics.jsonl always, Weights & Biases when asked for."""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import secrets
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from dinoreg.config import ConfigError

RUN_ID_FILE = "wandb_id.txt"
EVALUATIONS = "evaluations.jsonl"  # in the run directory: what others measure on its teachers, by step
SENT_FILE = "evaluations.sent"  # how many bytes of it wandb has
NETWORK_PATIENCE = 5.0  # seconds to wait for any answer of the server before going offline


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "dinoreg"
    name: str | None = None  # default: the run directory's name
    pictures_every: int = 1000  # steps between pictures of crops and attention; 0 for none

    def check(self) -> None:
        """Raises ConfigError on a number of steps that is none."""
        if self.pictures_every < 0:
            raise ConfigError("must be 0 (never) or a number of steps", key="pictures_every")


class Tracker:
    """Writes the metrics of one run. Only the main rank makes one.

    `start_step` is the step that the run goes on from (0 for a new run). Lines of metrics.jsonl beyond it belong to
    work that a crash threw away and that is about to be done again, so they are dropped.
    `say` receives the one line that tells where wandb went, and what cannot be written. Lines that find no room on the
    disk wait for the next; trouble with wandb ends wandb, never the training.
    """

    def __init__(
        self,
        cfg: TrackingConfig,
        run_dir: str | Path,
        resolved_config: dict[str, Any],
        start_step: int = 0,
        say: Callable[[str], None] = print,
        wandb_id: str | None = None,
    ) -> None:
        """wandb_id: of the run there that goes on, where the run directory does not know it."""
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        _drop_lines_after(path, start_step)
        self._say = say
        self._file = path.open("ab", buffering=0)  # a line reaches the disk at once
        self._waiting = bytearray()  # what is still to be written, less than a line if all is well
        self._full = False
        if cfg.wandb != "disabled" and wandb_id is not None and not (self.run_dir / RUN_ID_FILE).exists():
            (self.run_dir / RUN_ID_FILE).write_text(wandb_id + "\n")
        self._wandb = None if cfg.wandb == "disabled" else _start_wandb(cfg, self.run_dir, resolved_config, say)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; `step` is the number of steps done."""
        line = {"step": step, **{name: _plain(value) for name, value in metrics.items() if name != "step"}}
        self._write(json.dumps(line, allow_nan=False) + "\n")
        self._send({**metrics, "step": step})
        self._send_evaluations()

    def log_picture(self, step: int, name: str, picture: str | Path) -> None:
        """Send a PNG that lies in the run directory to wandb, under `pictures/name`."""
        if self._wandb is not None:
            import wandb

            self._send({f"pictures/{name}": wandb.Image(str(picture)), "step": step})

    def sync(self) -> None:
        """Let the lines survive a power cut."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        """Close the file, and wandb with the exit code it shows as finished or crashed. May be called twice."""
        self._file.close()
        self._send_evaluations()
        self._with_wandb(lambda run: run.finish(exit_code=int(failed)))
        self._wandb = None

    def _write(self, line: str) -> None:
        """Append, in one piece as far as the disk has room; the rest follows when it has."""
        self._waiting += line.encode()
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self._full = False
        except OSError as error:
            if not self._full:
                self._say(f"{self._file.name}: {error.strerror}; its lines wait until they can be written")
            self._full = True

    def _send(self, content: dict[str, Any]) -> None:
        self._with_wandb(lambda run: run.log(content))

    def _send_evaluations(self) -> None:
        """Of earlier steps: while the run goes on, nobody else writes to its curve."""
        self._with_wandb(lambda run: _pass_on(run, self.run_dir))

    def _with_wandb(self, act: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            act(self._wandb)
        except Exception as error:  # whatever it is, it is no reason to stop a training
            self._wandb = None
            self._say(f"wandb: ended by {type(error).__name__}: {error}; metrics still go to metrics.jsonl")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl as numbers ("nan" and "inf" too); a last line cut short by a crash is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    parsed = [_parse(line) for line in lines]
    return [{name: float(value) for name, value in line.items()} for line in parsed if line is not None]


def send_evaluations(
    cfg: TrackingConfig, run_dir: Path, resolved_config: dict[str, Any], say: Callable[[str], None] = print
) -> None:
    """Send what is new in evaluations.jsonl to the run at wandb. For whoever holds the run's lock, no training then."""
    if cfg.wandb == "disabled" or not _new_evaluations(run_dir)[0]:
        return
    run = _start_wandb(cfg, run_dir, resolved_config, say)
    if run is not None:
        _pass_on(run, run_dir)
        run.finish()


def _pass_on(run: Any, run_dir: Path) -> None:
    lines, end = _new_evaluations(run_dir)
    for line in lines:
        run.log(line)
    if lines:
        fresh = run_dir / f"{SENT_FILE}.new"
        fresh.write_text(f"{end}\n")
        fresh.replace(run_dir / SENT_FILE)


def _new_evaluations(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines that wandb does not have, and the place in the file where they end."""
    path, sent = run_dir / EVALUATIONS, run_dir / SENT_FILE
    if not path.exists():
        return [], 0
    begin = int(sent.read_text()) if sent.exists() else 0
    if begin > path.stat().st_size:
        begin = 0  # somebody has written it anew
    with path.open("rb") as file:
        file.seek(begin)
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    parsed = [_parse(line) for line in text.decode(errors="replace").splitlines()]
    return [line for line in parsed if line is not None], begin + len(text)


def _plain(value: float) -> float | str:
    """JSON has no NaN or infinity: they are written as the strings that float() reads back."""
    return value if math.isfinite(value) else str(float(value))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`, in a new file put in place at once so that a second crash loses nothing."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    # A run that begins anew has done nothing yet, not even its step 0.
    kept = [line for line in lines if step > 0 and (record := _parse(line)) is not None and record["step"] <= step]
    fresh = path.with_suffix(".jsonl.new")
    fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    fresh.replace(path)


def _start_wandb(cfg: TrackingConfig, run_dir: Path, config: dict[str, Any], say: Callable[[str], None]) -> Any:
    """A wandb run, or None where the package is not installed. Being asked for tracking never stops a training."""
    try:
        import wandb
    except ImportError:
        say("wandb: not installed (pip install wandb); metrics go to metrics.jsonl only")
        return None
    obstacle = _why_not_online() if cfg.wandb == "online" else None
    mode = "offline" if cfg.wandb == "offline" or obstacle else "online"
    try:
        run = _open_run(wandb, cfg, run_dir, config, mode)
    except wandb.Error as error:  # a wrong key, or a server that answers but does not serve
        if mode == "offline":
            raise
        wandb.teardown()
        obstacle = " ".join(str(error).split())
        run = _open_run(wandb, cfg, run_dir, config, "offline")
    if obstacle:
        say(f"wandb: offline, because {obstacle}; upload later with: wandb sync {Path(run.dir).parent}")
    else:
        say(f"wandb: {run.url}" if mode == "online" else f"wandb: offline, in {Path(run.dir).parent}")
    return run


def _open_run(wandb: Any, cfg: TrackingConfig, run_dir: Path, config: dict[str, Any], mode: str) -> Any:
    settings = wandb.Settings(
        console="off",  # the progress bar redraws itself: captured, it would be thousands of lines
        silent=True,
        x_disable_stats=False,
        disable_git=True,
        save_code=False,
        login_timeout=10,
        init_timeout=30,
        finish_timeout=60,  # a network lost during the run must not keep the job alive
        finish_timeout_raises=False,
    )
    run = wandb.init(
        project=cfg.project,
        name=cfg.name or run_dir.resolve().name,
        id=_run_id(run_dir),
        resume="allow" if mode == "online" else None,
        dir=str(run_dir),
        mode=mode,
        config=config,
        settings=settings,
    )
    # A resumed run repeats the steps since its last checkpoint. wandb's own counter refuses to go back; a metric may.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def known_run_id(run_dir: Path) -> str | None:
    """The identity of the run at wandb, if it has one."""
    path = run_dir / RUN_ID_FILE
    return path.read_text().strip() if path.exists() else None


def _run_id(run_dir: Path) -> str:
    """The same identity after every restart, so that one run stays one curve."""
    path = run_dir / RUN_ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _why_not_online() -> str | None:
    """What keeps wandb from its server, in words, or None. Never waits for longer than NETWORK_PATIENCE."""
    if os.environ.get("WANDB_MODE") == "offline":
        return "WANDB_MODE=offline is set"
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not _has_key(urlparse(server).hostname or ""):
        return "no API key was found (set WANDB_API_KEY or run: wandb login)"
    if not _answers(server):
        return f"{server} does not answer"
    return None


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in candidates if name):
        try:
            if path.is_file() and netrc.netrc(path).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError) as error:
            print(f"wandb: {path} could not be read: {error}", file=sys.stderr)
    return False


def _answers(url: str) -> bool:
    """Whether anything at all is heard from the server; through a proxy too, where one is set."""
    heard = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=NETWORK_PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # a refusal is an answer
        except (OSError, ValueError):
            return
        heard.set()

    # A name server that keeps silent is beyond urlopen's timeout: hence a thread that is left behind.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(NETWORK_PATIENCE)
    return heard.is_set()
