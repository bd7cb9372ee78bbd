"""What a network is for: what it takes and gives, what it learns from, and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from polar_deploy.errors import ContentError
from polar_deploy.tasks.data import Data
from polar_deploy.tasks.metric import Metric
from polar_deploy.tensors import Arrays, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from polar_deploy.data.dataset import Pixels

Tensors: TypeAlias = "Mapping[str, Tensor]"  # name -> [B, …], on the device that trains


class Batch(NamedTuple):
    """Samples on the device that trains: inputs as the network takes them, and targets, by name."""

    inputs: Tensors
    targets: Tensors


@dataclass(frozen=True, eq=False)
class Task:
    """A task. `polar_deploy.tasks` says how one is made.

    Attributes:
        name: as reports and bundles have it.
        inputs: name -> what the network takes, in the order of its forward's arguments; only the batch varies.
        outputs: name -> what the network gives, in the order in which its forward returns them; one that returns a
            dictionary has these keys. What else it has is for the loss alone.
        data: reads the data set. It is called once, by the first stage that needs it.
        loss: (outputs, batch) -> scalar; outputs may be of bf16 under autocast.
        metric: what parity compares networks by; None: it compares their outputs alone, and decides nothing by them.
        distill: (outputs, the teacher's outputs) -> scalar; None: the full network teaches nothing.
        classes: how many there are; models are called with `classes=` then, and else without arguments.
        monitor: (outputs, batch) -> scalar on the device, which the log of training has as `train_score`; None: it
            has none.
        epochs, batch_size: of a training run, where the settings leave them open.
        show: (inputs, targets, outputs of "full" and "compressed") of N samples -> pictures uint8 [N, H, W, 3], for
            the report's worst samples; None: it has none.
        panels: what lies side by side in each of these, from left to right; (): one picture alone.
        require: called with what a network's outputs were found to be; raises a ContentError where they do not fit
            in a way that their shapes alone do not tell.
    """

    name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    data: Callable[[], Data]
    loss: Callable[[Tensors, Batch], Tensor]
    metric: Metric | None
    distill: Callable[[Tensors, Tensors], Tensor] | None = None
    classes: int | None = None
    monitor: Callable[[Tensors, Batch], Tensor] | None = None
    epochs: int = 20
    batch_size: int = 32
    show: Callable[[Arrays, Arrays, Mapping[str, Arrays]], Pixels] | None = None
    panels: tuple[str, ...] = ()
    require: Callable[[Mapping[str, TensorSpec]], None] | None = None

    def forward(self, network: nn.Module, inputs: Tensors) -> dict[str, Tensor]:
        """What a network gives for inputs, by name.

        Raises:
            ContentError: it gives other outputs than the task names.
        """
        return self.named(network(*(inputs[name] for name in self.inputs)))

    def only_outputs(self, network: nn.Module) -> None:
        """Make a network that returns a dictionary leave out, in evaluation mode, what is no output of the task.

        What trains it, an auxiliary head for example, is then in no graph. Names of its modules stay as they are.
        """

        def leave_out(module: nn.Module, arguments: object, result: Any) -> Any:
            if module.training or not isinstance(result, Mapping) or not set(result) > set(self.outputs):
                return result
            return {name: value for name, value in result.items() if name in self.outputs}

        network.register_forward_hook(leave_out)

    def named(self, result: Any) -> dict[str, Any]:
        """What a forward returned, by name, in the order in which it was returned; of a dictionary all that it has.

        Raises:
            ContentError: an output is missing, or it is not clear which ones these are.
        """
        wanted = list(self.outputs)
        if isinstance(result, Mapping):
            if set(result) >= set(wanted):
                return dict(result)
            found = f"a dictionary of {', '.join(map(str, result)) or 'nothing'}"
        else:
            values = list(result) if isinstance(result, (tuple, list)) else [result]
            if len(values) == len(wanted):
                return dict(zip(wanted, values, strict=True))
            found = f"{len(values)} outputs" if isinstance(result, (tuple, list)) else "one output"
        raise ContentError(
            f"the network returns {found}, the task {self.name} has {len(wanted)}: {', '.join(wanted)}",
            "return a tensor, a tuple in this order, or a dictionary by these names",
        )
