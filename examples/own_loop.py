"""Use the pipelines under a training loop of your own: images by DALI, the rest is yours.

python examples/own_loop.py photos --epochs 3      # photos/train/<class>/*.jpg and photos/val/<class>/*.jpg
"""

import argparse

import timm
import torch

from pipelines.files.manifest import Manifest
from pipelines.loader import eval_loader, train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, EvalSpec, Placement


def train(
    root: str, *, model_name: str = "resnet18", image_px: int = 64, batch_size: int = 32, epochs: int = 3
):
    """Yield the accuracy (0..1) on `root`/val after each epoch over `root`/train."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    train_images = Manifest.from_folder(f"{root}/train")
    val_images = Manifest.from_folder(f"{root}/val", class_names=train_images.class_names)
    place = Placement(device=device, threads=2)
    plan = Plan(
        seed=0, num_samples=len(train_images), global_batch_size=batch_size, micro_batch_size=batch_size
    )
    batches = train_loader(train_images, plan, AugmentSpec(image_px, color_jitter=0.4), place)
    val_batches = eval_loader(val_images, EvalSpec(image_px, image_px), place, batch_size=batch_size)

    model = timm.create_model(model_name, num_classes=len(train_images.class_names)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * len(batches))
    for epoch in range(epochs):
        model.train()
        for images, labels, _ in batches.epoch(epoch):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            correct = sum(
                (model(images).argmax(1) == labels).sum() for images, labels, _ in val_batches.epoch(0)
            )
        yield int(correct) / len(val_images)
    batches.close()
    val_batches.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a timm model on a folder of images.")
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    for epoch, accuracy in enumerate(train(options.root, epochs=options.epochs)):
        print(f"epoch {epoch + 1}: {100 * accuracy:.1f} % of the validation images right", flush=True)  # noqa: T201
