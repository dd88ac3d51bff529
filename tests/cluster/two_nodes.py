"""A real SLURM cluster on this machine for the tests: a head and some nodes, each in Linux namespaces of its own.

Each has its own host name, network, mounts and process tree, so that what only works on one host fails here as on a
cluster. Files are those of this machine. Needs root and Debian's slurmctld, slurmd, slurm-client, munge and iproute2.
"""

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import psutil
from launching import PROJECT, VENV, eval_losses, losses, same_bits, stopped_at

TRAINING = ("--max_steps", 20, "--save_steps", 5, "--save_total_limit", 9, "--num_sample_answers", 0, "--max_samples", 50,
            "--per_device_eval_batch_size", 1)  # fmt: skip
KEYS = (*TRAINING, "--eval_steps", 5, "--max_eval_samples", 12)
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey", "ip", "unshare", "nsenter")
LOOK_EVERY_S = 10  # at the queue: that takes longer than a save
NETWORK = "10.78.0"  # exists inside the namespaces only
CONF = """\
ClusterName=carelm
SlurmctldHost=head
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
EnforcePartLimits=ALL
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdTimeout=10
MessageTimeout=5
ReturnToService=1
MinJobAge=86400
GresTypes=gpu
NodeName=node[1-{nodes}] CPUs=4 RealMemory=1000000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
"""
# The first process of a machine: when it ends, the kernel ends all others of it. A node waits for its network cable.
BOOT = """\
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
if [ {name} = head ]; then
    ip link add br0 type bridge && ip address add {network}.1/24 dev br0 && ip link set br0 up
    munged --foreground --force --key-file={folder}/munge.key --socket={folder}/munge.socket \
        --pid-file={folder}/munge.pid --seed-file={folder}/munge.seed --log-file={folder}/munge.log &
    slurmctld -D &
else
    until ip link set eth0 up 2>/dev/null; do sleep 0.02; done
    ip address add {network}.{number}/24 dev eth0
    slurmd -D -b &
fi
wait -n
"""


def what_is_missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    namespaces = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "true"]
    if shutil.which("unshare") and subprocess.run(namespaces, capture_output=True).returncode != 0:
        return "needs root's right to make namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"needs SLURM's daemons ({', '.join(absent)} not installed)" if absent else None


class Cluster:
    """Up from the start; `down` ends it. The folder's path must be short (its sockets)."""

    def __init__(self, folder: Path, nodes: int = 2):
        self.folder, self.machines = folder, ["head", *(f"node{i + 1}" for i in range(nodes))]
        self._first: dict[str, subprocess.Popen] = {}
        (folder / "state").mkdir(parents=True)
        subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
        hosts = "".join(f"{NETWORK}.{i + 1} {name}\n" for i, name in enumerate(self.machines))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, nodes=nodes))
        for i in range(2):  # GPUs that are only counted
            os.mknod(folder / f"gpu{i}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"NodeName=node[1-{nodes}] Name=gpu File={folder}/gpu[0-1]\n")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "CARELM_CACHE": "/dev/shm/carelm-cache",
        }  # a node's own
        try:
            for name in self.machines:
                self.boot(name)
            self.wait_for_nodes()
        except BaseException:
            self.down()
            raise

    def boot(self, name: str) -> None:
        number = self.machines.index(name) + 1
        script = BOOT.format(name=name, folder=self.folder, network=NETWORK, number=number)
        options = ["--mount", "--uts", "--net", "--pid", "--fork", "--kill-child"]
        if name != "head":  # the head keeps this machine's processes, so that commands that join it can be killed
            options.append("--mount-proc")
        with open(self.folder / f"{name}.log", "a") as log:
            self._first[name] = subprocess.Popen(["unshare", *options, "bash", "-c", script], env=self.environment,
                                                 stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # fmt: skip
        namespace = f"/proc/{self._first[name].pid}/ns/net"
        _until(lambda: os.readlink(namespace) != os.readlink("/proc/self/ns/net"), 5, f"{name} does not start")
        head = ["nsenter", "--net", "--target", str(self._first["head"].pid), "ip", "link"]
        if name == "head":
            _until(lambda: subprocess.run([*head, "show", "br0"], capture_output=True).returncode == 0, 5, "no network")
        else:
            subprocess.run([*head, "delete", name], stderr=subprocess.DEVNULL)
            mac = f"02:00:00:00:00:{number:02x}"  # the same from boot to boot, as the others remember it
            cable = ["add", name, "type", "veth", "peer", "name", "eth0", "address", mac, "netns"]
            subprocess.run([*head, *cable, str(self._first[name].pid)], check=True)
            subprocess.run([*head, "set", name, "master", "br0", "up"], check=True)

    def crash(self, name: str) -> None:
        """Cuts the power of a machine."""
        first = self._first.pop(name)
        for child in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        first.wait()

    def down(self) -> None:
        for name in reversed(list(self._first)):
            self.crash(name)

    def wait_for_nodes(self) -> None:
        """Until every node takes jobs; one that is down although it answers (it has lost jobs) is resumed."""

        def ready() -> bool:
            states = self.run("sinfo", "-h", "-p", "main", "-N", "-o", "%N %T", check=False).stdout.split()
            states = dict(zip(states[::2], states[1::2]))
            for node in (n for n, state in states.items() if re.fullmatch("down|drained", state)):
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            return len(states) == len(self.machines) - 1 and all(
                re.fullmatch("idle|mixed|allocated|completing", state) for state in states.values()
            )

        _until(ready, 40, "the nodes do not come up")

    def run(self, *command, machine: str = "head", check: bool = True, cwd: Path | None = None, **extra: str):
        """Runs a command on a machine; `extra` are environment variables."""
        outer = self._first[machine].pid
        join = ["nsenter", "--mount", "--uts", "--net", "--target", str(outer)]
        if machine != "head":
            join.insert(1, f"--pid=/proc/{outer}/ns/pid_for_children")
        words = [*join, "env", "-C", str(cwd or Path.cwd()), *map(str, command)]
        done = subprocess.run(words, env={**self.environment, **extra}, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done

    def processes(self, machine: str, word: str) -> list[int]:
        """The processes of a machine whose command line holds a word; numbers as this machine has them."""
        found = []
        for process in psutil.Process(self._first[machine].pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if word in " ".join(process.cmdline()):
                    found.append(process.pid)
        return found

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job."""
        text = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def is_queued(self, number: str) -> bool:
        """Whether a job waits or runs."""
        return bool(self.run("squeue", "-h", "-j", number, check=False).stdout.strip())

    def wait(self, number: str, seconds: float = 300) -> dict[str, str]:
        """Until a job has ended for good."""
        _until(lambda: not self.is_queued(number), seconds, f"job {number} does not end")
        return self.job(number)


class Jobs:
    """The jobs of one training, submitted in a folder of their own, in which the logs are."""

    def __init__(self, cluster: Cluster, folder: Path, project: Path = PROJECT):
        self.cluster, self.folder, self.run, self.project = cluster, folder, folder / "run", project
        folder.mkdir(exist_ok=True)

    def submit(self, *words, options=("--nodes=2",), script="train.sh", check=True, **extra) -> str:
        """The job's number, or what sbatch complained of where it must not be checked; `extra` are environment variables."""
        done = self.cluster.run(
            "sbatch", "--parsable", *options, self.project / "slurm" / script, *words, cwd=self.folder, check=check,
            **{"OMP_NUM_THREADS": "1", "HF_HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": "", "TQDM_MININTERVAL": "0",
               "VENV": str(VENV), **extra},
        )  # fmt: skip
        return done.stdout.strip() if check else done.stderr

    def train(self, *keys, recipe="recipes/demo.yaml", **kwargs) -> str:
        return self.submit(recipe, "--output_dir", self.run, *keys, **kwargs)

    def log(self, job: str) -> str:
        return "".join(f.read_text() for f in sorted(self.folder.glob(f"slurm-{job}*.log")))

    def wait_for(self, job: str, pattern: str) -> None:
        """Until the log holds it."""
        self._until(job, lambda: re.search(pattern, self.log(job)), 0.03)

    def wait_for_state(self, job: str, state: str) -> None:
        self._until(job, lambda: self.cluster.job(job)["JobState"] == state, 0.1)

    def code(self, job: str) -> Path:
        """The copy of code and recipes that the job runs."""
        return self.run.parent / ".code" / job

    def wait_for_rank(self, job: str, node: str) -> int:
        """The process number of a node's training rank, once it is there."""
        file = self.code(job) / "train/sft.py"
        return self._until(job, lambda: self.cluster.processes(node, f"-u {file}"), 0.1)[0]

    def wait_for_save(self, job: str, step: int) -> None:
        """Until the save of a step has begun."""
        checkpoint = self.run / f"checkpoint-{step}"
        self._until(job, lambda: checkpoint.with_suffix(".partial").exists() or checkpoint.exists(), 0.002)

    def freeze_in_save(self, job: str, step: int) -> int:
        """Stops the rank that writes (SIGSTOP) in the middle of the save of a step; returns its process number."""
        writer = self.wait_for_rank(job, "node1")
        self.wait_for_save(job, step)
        os.kill(writer, signal.SIGSTOP)
        assert (self.run / f"checkpoint-{step}.partial").exists(), "the save was over before the rank could be stopped"
        return writer

    def _until(self, job: str, condition, pause: float, seconds: float = 180):
        end, look = time.time() + seconds, time.time() + LOOK_EVERY_S
        while not (found := condition()):
            if time.time() > look:
                assert time.time() < end and self.cluster.is_queued(job), self.log(job)[-3000:]
                look = time.time() + LOOK_EVERY_S
            time.sleep(pause)
        return found

    def completes(self, job: str) -> None:
        state = self.cluster.wait(job)["JobState"]
        assert state == "COMPLETED", f"job {job} is {state}: {self.log(job)[-3000:]}"

    def goes_on(self, job: str, start: int) -> int:
        """Waits for the first new step of a start, which must be the one after the last stop (returned): none is done twice."""
        stopped = stopped_at(self.log(job).partition(f"start {start}")[0].rpartition("start ")[2])
        self.wait_for(job, rf"start {start}[^$]*going on from .*checkpoint-{stopped}\n[^$]*\| {stopped + 1}/20")
        return stopped

    def ends_like(self, job: str, unbroken: Path) -> None:
        self.completes(job)
        assert losses(self.run) == losses(unbroken) and eval_losses(self.run) == eval_losses(unbroken)
        assert same_bits(self.run, unbroken)


def check_close(run: Path, reference: Path) -> None:
    for a, b in ((losses(run), losses(reference)), (eval_losses(run), eval_losses(reference))):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-3 * b[k] for k in b)


def _until(condition, seconds: float, problem: str) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, problem
        time.sleep(0.05)
