"""Other implementations that tests and the benchmark compare with."""

from types import ModuleType

import torch

_SCHEMAS: list[torch.library.Library] = []  # torch forgets a schema when its Library object goes


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators do not load (a CUDA build of it beside a CPU build of torch).

    There the import stops at operators without a schema. Its networks use none of them: bare schemas will do.
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
