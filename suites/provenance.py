"""Where a number comes from: code, packages and hardware."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "lm-eval",
    "datasets",
    "safetensors",
    "triton",
    "bitsandbytes",
    "numpy",
    "numba",
    "tokenizers",
    "scipy",
)


#: The packages of the product.
CODE = ("spiel", "baselines", "suites")

#: Variables of the environment by which libraries compute otherwise.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


@dataclass(frozen=True)
class Environment:
    """The machine and the software that a record was made with."""

    git_revision: str | None
    #: Whether tracked files differed from that revision, or code lay beside them that is in none.
    git_dirty: bool | None
    packages: dict[str, str]
    python: str
    platform: str
    cpu: str
    num_cpus: int
    num_threads: int
    gpus: tuple[str, ...]
    device: str
    #: Data-parallel processes; threads are those of each.
    num_processes: int = 1
    #: Of all Python files of the product, committed or not.
    code_hash: str = ""
    #: The CUDA version that torch was built for.
    cuda: str | None = None
    #: What else decides the last digits, see `numerics`.
    numerics: dict[str, str] = field(default_factory=dict)

    @property
    def hardware(self) -> str:
        """One line; records whose lines differ do not share a table."""
        gpus = ", ".join(self.gpus) or "no GPU"
        several = f", {self.num_processes} processes" if self.num_processes > 1 else ""
        return f"{self.cpu}, {self.num_threads} threads, {gpus}, on {self.device}{several}"


def environment(device: str, num_processes: int = 1, first_gpu: int = 0) -> Environment:
    """Looks at this process, which trains on `device`, one of `num_processes`; their GPUs, where
    they have any, are those that torch counts from `first_gpu` on.
    """
    import torch

    revision = git_revision()
    changes = _git("status", "--porcelain", "--untracked-files=no")
    unknown = _git("status", "--porcelain", "--", *(f":/{package}" for package in CODE))
    num_gpus = num_processes if device.startswith("cuda") else 0
    return Environment(
        git_revision=revision,
        git_dirty=None if revision is None or changes is None else bool(changes or unknown),
        packages=package_versions(),
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=cpu_name(),
        num_cpus=os.cpu_count() or 0,
        num_threads=torch.get_num_threads(),
        gpus=tuple(torch.cuda.get_device_name(first_gpu + index) for index in range(num_gpus)),
        device=device,
        num_processes=num_processes,
        code_hash=code_hash(),
        cuda=torch.version.cuda,
        numerics=numerics(),
    )


def numerics() -> dict[str, str]:
    """Torch's switches and the variables of the environment that change how it rounds."""
    import torch

    cudnn = torch.backends.cudnn
    return {
        "fp32 products": torch.get_float32_matmul_precision(),
        "TF32 in cuDNN": str(cudnn.allow_tf32),
        "cuDNN": str(cudnn.version() if cudnn.is_available() else None),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def git_revision() -> str | None:
    """The commit that is checked out here, or None where there is no git or no repository."""
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    return _git("rev-parse", "HEAD") if tracked else None


def code_hash() -> str:
    """Of all Python files of the product: what tells a checkpoint by other code."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for package in CODE:
        for path in sorted((root / package).rglob("*.py")):
            if path.is_file():  # an editor's lock is a link that leads nowhere
                found.update(path.read_bytes())
    return found.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of those of PACKAGES that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git prints in this repository, or None where there is no git or no repository."""
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
