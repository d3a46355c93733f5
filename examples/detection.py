"""Train a detector with a CMT backbone: timm's feature pyramid in torchvision's RetinaNet, on shapes drawn
on noise.

    python examples/detection.py --steps 120

CMT's position tables belong to one image size, so a detector trains at one square size: all images have
`img_size` px, and RetinaNet's own resizing leaves them as they are. cmtrain.storage.weights.start_from(PATH,
backbone) loads weights of another size and resizes the tables; the pyramid has no head to replace.
"""

import argparse
from collections import OrderedDict
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import cmtrain  # noqa: F401 - registers the CMT models with timm

SHAPES = ("square", "disc", "cross")


class Pyramid(nn.Module):
    """Turn (B, 3, px, px) into five maps of `channels` at strides 8 to 128, as RetinaNet needs."""

    def __init__(self, name: str, img_size: int, channels: int = 64) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3), img_size=img_size)
        self.fpn = FeaturePyramidNetwork(
            self.body.feature_info.channels(), channels, extra_blocks=LastLevelP6P7(channels, channels)
        )
        self.out_channels = channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(
            OrderedDict((str(level), features) for level, features in enumerate(self.body(images)))
        )


def make_detector(name: str = "cmt_micro", img_size: int = 128) -> RetinaNet:
    """Return a RetinaNet with three anchors per place, from an eighth of the image up; it never resizes."""
    sides = [(side,) for side in (16, 32, 64, 96, 128)]
    anchors = AnchorGenerator(sides, ((0.7, 1.0, 1.4),) * len(sides))
    return RetinaNet(
        Pyramid(name, img_size),
        num_classes=len(SHAPES),
        anchor_generator=anchors,
        min_size=img_size,
        max_size=img_size,
        size_divisible=img_size,
    )


def made_up_batches(
    size: int, img_size: int, seed: int
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Yield batches of noise with one to three bright shapes per image, their boxes and labels."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    while True:
        images, targets = [], []
        for _ in range(size):
            image = 0.3 * torch.rand(3, img_size, img_size, generator=generator)
            boxes, labels = [], []
            for _ in range(whole(1, 4)):
                side, label = whole(20, 56), whole(0, len(SHAPES))
                x, y = whole(0, img_size - side), whole(0, img_size - side)
                image[:, y : y + side, x : x + side] += 0.6 * shape_mask(SHAPES[label], side)
                boxes.append([x, y, x + side, y + side])
                labels.append(label)
            images.append(image.clamp(max=1))
            targets.append(
                {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}
            )
        yield images, targets


def shape_mask(shape: str, side: int) -> Tensor:  # -> (side, side), 0 or 1
    axis = torch.linspace(-1, 1, side)
    x, y = axis[None, :], axis[:, None]
    inside = {
        "square": (x.abs() <= 1) & (y.abs() <= 1),
        "disc": x**2 + y**2 <= 1,
        "cross": x.abs().minimum(y.abs()) < 0.3,
    }
    return inside[shape].float()


def train(
    detector: RetinaNet, *, steps: int, batch_size: int = 4, img_size: int = 128, lr: float = 1e-3
) -> list[float]:
    """Return the loss (classification and boxes together) of every step."""
    optimizer = torch.optim.AdamW(detector.parameters(), lr=lr, weight_decay=0.05)
    batches = made_up_batches(batch_size, img_size, seed=0)
    losses = []
    detector.train()
    for _ in range(steps):
        loss = torch.stack(list(detector(*next(batches)).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Train RetinaNet with a CMT backbone on made-up shapes.")
    parser.add_argument("--model", default="cmt_micro")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    torch.manual_seed(0)
    losses = train(make_detector(options.model), steps=options.steps)
    for step in range(0, options.steps, 10):
        window = losses[step : step + 10]
        print(f"step {step + len(window):>4}  loss {sum(window) / len(window):.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
