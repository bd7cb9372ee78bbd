"""Object detection: the backbone of a torchvision detector is gated alone, and the detector trained as ever.

What comes behind the backbone chooses boxes by their values, which no exporter takes: it stays as it is. Run it, in
half a minute and without data:

    python examples/detector_backbone.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from polar_deploy import Gates

STEPS, HEIGHT, WIDTH = 8, 64, 96


def scene() -> tuple[Tensor, dict[str, Tensor]]:
    """A picture with one bright rectangle, and where it is."""
    picture = 0.1 * torch.rand(3, HEIGHT, WIDTH)
    left, top = int(torch.randint(WIDTH - 40, ())), int(torch.randint(HEIGHT - 30, ()))
    picture[:, top : top + 30, left : left + 40] += 0.8
    box = torch.tensor([[left, top, left + 40, top + 30]], dtype=torch.float32)
    return picture, {"boxes": box, "labels": torch.ones(1, dtype=torch.int64)}


def main() -> tuple[Gates, nn.Module]:
    """Train, cut, compare."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    # A few proposals will do for one object.
    few = {"rpn_post_nms_top_n_train": 64, "rpn_post_nms_top_n_test": 64, "box_batch_size_per_image": 32}
    model = FasterRCNN(backbone, num_classes=2, min_size=HEIGHT, max_size=WIDTH, **few)
    gates = Gates(model.backbone, torch.zeros(1, 3, HEIGHT, WIDTH), budget=0.6, steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for _ in range(STEPS):
        pictures, targets = zip(*(scene() for _ in range(2)), strict=True)
        losses = model(list(pictures), list(targets))
        loss = sum(losses.values()) + gates.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.step()

    model.eval()
    small = gates.cut()
    x = torch.stack(pictures)
    with torch.no_grad():
        gated, ours = gates.model(x), small(x)
    off = max(float((ours[name] - gated[name]).abs().max() / gated[name].abs().max()) for name in gated)
    model.backbone = small
    with torch.no_grad():
        found = model(list(pictures))
    print(f"MACs: {gates.full['macs']:,}, of which 0.6 may stay; {gates.promise()['macs']:,} do")
    print(f"the small backbone differs from the gated one by {off:.1e} of its outputs' scale")
    print(f"with it the detector finds {[len(each['boxes']) for each in found]} boxes")
    return gates, small


if __name__ == "__main__":
    main()
