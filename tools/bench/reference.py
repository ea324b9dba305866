"""Other implementations that tests and the benchmark compare with."""

from types import ModuleType

import torch

_SCHEMAS: list[torch.library.Library] = []  # torch drops a schema when its Library object is deleted


def import_torchvision() -> ModuleType:
    """Imports torchvision even if its compiled operators do not load (its CUDA build with a CPU build of torch).

    The import then fails at operators that have no schema. The networks use none of them, so defining schemas is
    enough.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)
        import torchvision
    return torchvision
