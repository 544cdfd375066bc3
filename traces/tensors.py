"""NumPy arrays as torch tensors and back, bit for bit, bfloat16 included."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrace.traces.bfloat16 import BFLOAT16

if TYPE_CHECKING:
    import torch


def to_torch(array: npt.NDArray[Any]) -> "torch.Tensor":
    """The same numbers as a CPU tensor; shares the array's memory."""
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: "torch.Tensor") -> npt.NDArray[Any]:
    """The same numbers as an array, copied to the host where they are not there."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        viewed: npt.NDArray[Any] = tensor.view(torch.int16).numpy().view(BFLOAT16)
        return viewed
    array: npt.NDArray[Any] = tensor.numpy()
    return array
