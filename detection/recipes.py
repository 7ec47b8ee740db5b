"""Training recipes for Faster R-CNN: Detectron's 1x, 2x and 3x on COCO, and a short one for the embedded data set."""

from dataclasses import dataclass, field

from resbackbone.training.schedule import Schedule

DETECTRON_SIDES = (640, 672, 704, 736, 768, 800)


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained: all that is not data, hardware or weights.

    The schedule is stated for `batch_size` images an update. Sizes are in pixels: training images get one of
    `short_sides` as their shorter side, test images `min_size`, and neither is longer than `max_size`. `norm` None
    is FrozenBN where weights are given, BN from scratch. `pyramid` goes to `build_resnet_backbone` (variant fpn),
    `detector` to `build_faster_rcnn`.
    """

    schedule: Schedule
    batch_size: int = 16
    depth: int = 50
    norm: str | None = None
    short_sides: tuple[int, ...] = DETECTRON_SIDES
    min_size: int = 800
    max_size: int = 1333
    optimizer: str = "sgd"  # with momentum 0.9; or "adamw", whose rate does not follow the batch size
    weight_decay: float = 1e-4
    clip_grad: float | None = None
    checkpoint_period: int = 5000  # updates
    pyramid: dict = field(default_factory=dict)
    detector: dict = field(default_factory=dict)


def detectron(steps: int, *milestones: int) -> Recipe:
    """Detectron's schedule: 0.02 for 16 images, a thousand steps of warm-up, a tenth at each milestone.

    Published with ImageNet weights and R50-FPN: 1x 37.9, 3x 40.2 box AP (detectron2's model zoo, 8 V100), with
    detections under a score of 0.05 cut off. AP is defined over all of them, so the cut here is at 0.01.
    """
    schedule = Schedule(rate=0.02, steps=steps, milestones=milestones, warmup_steps=1000)
    return Recipe(schedule, detector={"box_score_thresh": 0.01})


ONE_X = detectron(90_000, 60_000, 80_000)  # about 12 epochs of COCO

# For the embedded data set, from scratch on two CPU cores: small images, a thin pyramid, few regions, and AdamW, with
# which so few updates go further than with SGD.
SHORT = Recipe(
    Schedule(rate=0.002, steps=1100, cosine=True, warmup_steps=100),
    batch_size=8,
    depth=18,
    short_sides=(128,),
    min_size=128,
    max_size=256,
    optimizer="adamw",
    weight_decay=0.05,
    clip_grad=10.0,
    checkpoint_period=200,
    pyramid={"levels": ("p2", "p3", "p4", "p5"), "fpn_channels": 64},
    detector={
        "anchor_scale": 4.0,
        "representation_size": 256,
        "rpn_batch_size_per_image": 64,
        "rpn_pre_nms_top_n_train": 300,
        "rpn_pre_nms_top_n_test": 300,
        "rpn_post_nms_top_n_train": 100,
        "rpn_post_nms_top_n_test": 100,
        "box_batch_size_per_image": 128,
        "box_positive_fraction": 0.5,
        "box_score_thresh": 0.01,
    },
)

RECIPES: dict[str, Recipe] = {
    "1x": ONE_X,
    "2x": detectron(180_000, 120_000, 160_000),
    "3x": detectron(270_000, 210_000, 250_000),
    "short": SHORT,
}
