"""Mixed precision: bf16, where a step of this very network takes less time in it on this device."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import nn

from polar_deploy.errors import first_line
from polar_deploy.gating import processes
from polar_deploy.tasks import Batch, Task
from polar_deploy.tensors import take

WORTHWHILE = 0.85  # of a step's time in FP32, at most: what is nearer to it than the noise shall not decide
SAMPLES = 32  # of a batch, at most, that a step is measured with
_ROUNDS, _SECONDS = 3, 10.0  # of measuring, whichever is over first


class MixedPrecision:
    """Whether a training run computes in bf16: as it was asked, or measured once, before its first step.

    What a device gains depends on the network: AVX512-BF16 halves the time of convolutions, and takes several times as
    long for what follows Hardswish and SiLU backward. So `auto` tries both on a CPU that has any unit for bf16. A GPU
    that has one is not asked: it gains.

    Attributes:
        bf16: None: not known yet.
    """

    def __init__(self, amp: str, device: torch.device) -> None:
        self._device = device
        self.bf16: bool | None = amp == "bf16"
        if amp == "auto":  # as the first of several processes has it: all have to compute alike
            on_gpu = device.type == "cuda"
            has_unit = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_has_unit()
            self.bf16 = processes.of_the_first(None if has_unit and not on_gpu else has_unit)

    def autocast(self) -> torch.autocast:
        """For a forward pass and its loss."""
        return _autocast(self._device, bool(self.bf16))

    def settle(self, network: nn.Module, task: Task, batch: Batch) -> str:
        """Measure steps in both; what was found, in words. The first of several processes decides.

        Args:
            network: of the kind that is going to be trained; its gradients and statistics change.
            batch: of the training set; its first samples are enough.
        """
        try:
            with torch.random.fork_rng([]):
                share = self._share(network, task, batch)
            found = f"takes {share:.2f} of its time"
        except RuntimeError as error:  # an operation that torch has not got in bf16; one that fails in FP32 fails later
            share, found = math.inf, f"fails: {first_line(error)}"
        share, found = processes.of_the_first((share, found))
        self.bf16 = share <= WORTHWHILE
        return f"computes in {'bf16' if self.bf16 else 'FP32'}; in bf16 a step {found}"

    def _share(self, network: nn.Module, task: Task, batch: Batch) -> float:
        """Seconds of a step in bf16, over those in FP32: the fastest of each, by turns, whatever else runs here."""
        batch = Batch(*(take(tensors, slice(SAMPLES)) for tensors in batch))
        fastest, end = {False: math.inf, True: math.inf}, time.monotonic() + _SECONDS
        for turn in range(1 + _ROUNDS):
            for bf16 in fastest:
                started = time.process_time()
                with _autocast(self._device, bf16):
                    loss = task.loss(task.forward(network, batch.inputs), batch)
                loss.backward()  # type: ignore[no-untyped-call]
                if turn:  # the first one has to prepare itself
                    fastest[bf16] = min(fastest[bf16], time.process_time() - started)
            if turn and time.monotonic() > end:
                break
        return fastest[True] / fastest[False] if fastest[False] else math.inf  # some clocks are coarse


def _autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def _cpu_has_unit() -> bool:
    """Whether this CPU has instructions for bf16."""
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones have not
    return any(has for name, has in able.items() if "bf16" in name)
