#!/bin/bash
# A job that leaves the GPUs while the grid is dirty and comes back by itself.
#
#   sbatch --begin="$(green-torch when --region DE --hours 8 --within 24h --format slurm)" examples/slurm/train.sh python train.py
#
# train.py has CarbonAwarePause(..., on_pause="exit", deadline=datetime(...)) among its callbacks. Leaving, it saves a checkpoint, writes
# the time at which it wants to go on into green_resume_at, and ends with 75 (EX_TEMPFAIL); the script then queues itself again for
# that time, and Lightning takes the checkpoint up. Any other exit code is passed through.
#
# GREEN_ROOT: the trainer's default_root_dir (the run's log_dir for tracker.pause_if_dirty); the working directory where not set.
# GREEN_MOST_REQUEUES: a bound, so that a mistake can't queue for ever.
#SBATCH --job-name=green
#SBATCH --time=1-00:00
set -u

resume_file="${GREEN_ROOT:-.}/green_resume_at"
requeues="${GREEN_REQUEUES:-0}"
rm -f "$resume_file" # of an earlier start

${GREEN_LAUNCH-srun} "$@"
code=$?
if [ "$code" -ne 75 ] || [ ! -s "$resume_file" ]; then
  exit "$code"
fi
if [ "$requeues" -ge "${GREEN_MOST_REQUEUES:-20}" ]; then
  echo "green: queued again $requeues times already: not once more" >&2
  exit "$code"
fi
begin="$(cat "$resume_file")"
# Slurm runs a copy of this script from its spool directory, so the original's place is asked for where there is a job.
script="${GREEN_SCRIPT:-$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')}"
echo "green: going on at $begin" >&2
GREEN_REQUEUES=$((requeues + 1)) exec sbatch --begin="$begin" --export=ALL "${script:-$0}" "$@"
