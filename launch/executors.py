"""submitit's executor for Slurm, told what a recipe says."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import submitit

from launch.config import LaunchConfig, minutes_of
from launch.task import LOGS

ALL = 1_000_000  # elements of an array at once: submitit wants a number
LEAVE = 300  # seconds that tasks may end after the first of them; the first tells wandb that it is done

# After all tasks have ended. 75: asked to stop, and saved; 76: another task was lost; above 128: killed. What came
# otherwise is an error, which would come again, and so would what kept launch/task.py from saying that it started, and
# from counting. Whoever cancelled the job does not want it back. A controller may be starting anew just then.
REQUEUE = """\
code=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
patient() { "$@" || { sleep 10; "$@"; } || { sleep 30; "$@"; }; }
began() { grep -q "^job $job, start $((${SLURM_RESTART_COUNT:-0} + 1))," LOG; }
if { [ "$code" -eq 75 ] || [ "$code" -eq 76 ] || [ "$code" -gt 128 ]; } && began; then
  if [ "$(patient squeue -h -j "$job" -o %T)" = RUNNING ]; then
    echo "dinoreg-launch: ended with $code; back to the queue, to go on from the last checkpoint"
    patient scontrol requeue "$job"
  fi
fi
exit "$code\""""


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, which can also write a script on a machine without Slurm. Who submits has checked for it."""

    @classmethod
    def affinity(cls) -> int:
        return max(1, super().affinity())

    def script(self, count: int = 1) -> str:
        """What sbatch would be given, for so many tasks."""
        if count > 1:
            self.parameters["map_count"] = count
        return self._make_submission_file_text(self._submitit_command_str, "")


def slurm_executor(asked: LaunchConfig, folder: Path, code: Path, name: str) -> SlurmExecutor:
    """Everything in `launch:` as sbatch and srun want it. folder: of the run, or of what runs as an array."""
    python = asked.python or ("python3" if asked.container_image else sys.executable)
    executor = SlurmExecutor(folder=folder / LOGS, python=shlex.quote(python))
    options: dict[str, Any] = {
        "job_name": name,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks_a_node,
        "gpus_per_node": asked.gpus_a_node or None,
        "cpus_per_task": asked.cpus_a_task,
        "time": None if asked.time is None else minutes_of(asked.time),
        "signal_delay_s": asked.signal_seconds,
        "array_parallelism": asked.array or ALL,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": [*surroundings(asked), f"cd {shlex.quote(str(code))}"],  # where Python looks first
        "teardown": REQUEUE.replace("LOG", f"{shlex.quote(str(folder / LOGS))}/${{job}}_0_log.out").splitlines(),
        "srun_args": _srun(asked, folder, code),
        "additional_parameters": {
            "requeue": True,
            **({"mem": asked.memory} if asked.memory else {}),
            **asked.sbatch_options(),
        },
    }
    options |= {name: getattr(asked, name) for name in _NAMED}
    executor.update_parameters(**options)
    return executor


_NAMED = ("partition", "account", "qos", "constraint", "exclude", "comment")


def _srun(asked: LaunchConfig, folder: Path, code: Path) -> list[str]:
    # Tasks that are asked to stop leave one by one, the first one last: none of them is to be killed for that. Those
    # that wait for a peer that never came are.
    words = ["--kill-on-bad-exit=0", f"--wait={LEAVE}"]
    if asked.cpus_a_task is not None:
        words.append(f"--cpus-per-task={asked.cpus_a_task}")  # since 22.05 srun does not ask sbatch
    if asked.container_image:
        own = [folder] if code.is_relative_to(folder) else [folder, code]  # a run of a sweep has its code beside it
        mounts = ",".join([*(f"{path}:{path}" for path in own), *asked.container_mounts])
        words += [f"--container-image={asked.container_image}", f"--container-mounts={mounts}"]
        words.append(f"--container-workdir={code}")
    return words


def surroundings(asked: LaunchConfig) -> list[str]:
    """Shell lines before Python."""
    pairs = [text.partition("=") for text in asked.env]
    return [*asked.setup, *(f"export {name}={shlex.quote(value)}" for name, _, value in pairs)]
