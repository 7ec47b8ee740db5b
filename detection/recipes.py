"""Training recipes for Faster R-CNN: Detectron's on COCO, the ResNet paper's own, one for small data, a short one."""

from dataclasses import dataclass, field, replace

from resbackbone.engine.schedule import Schedule

DETECTRON_SIDES = (640, 672, 704, 736, 768, 800)
SMALL_DATA = 40_000  # images; of fewer, 1x would see each over 36 times, as often as 3x does COCO's


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained, apart from data, hardware and weights.

    The schedule is for `batch_size` images per update; if it covers less than `epochs` epochs, it is stretched to that
    many (its warm-up is not). Sizes are in pixels: the shorter side is one of `short_sides` in training and `min_size`
    in testing; the longer side is at most `max_size`. `norm` None is FrozenBN with weights, BN without. `variant` and
    `frozen_through` are defaults, the latter only with weights ("auto" is "c2", for VGG-16 "stem"). `pyramid` goes to
    `build_resnet_backbone` (variant fpn), `detector` to `build_faster_rcnn`.
    """

    schedule: Schedule
    batch_size: int = 16
    variant: str = "fpn"
    depth: int = 50
    norm: str | None = None
    frozen_through: str | None = "auto"
    short_sides: tuple[int, ...] = DETECTRON_SIDES
    min_size: int = 800
    max_size: int = 1333
    optimizer: str = "sgd"  # with momentum 0.9; or "adamw", whose rate does not follow the batch size
    weight_decay: float = 1e-4
    clip_grad: float | None = None
    checkpoint_period: int = 5000  # updates
    epochs: float = 0
    pyramid: dict = field(default_factory=dict)
    detector: dict = field(default_factory=dict)

    def schedule_for(self, batch_size: int, *, images: int) -> Schedule:
        """The schedule for `batch_size` images per update and `images` training images."""
        schedule = self.schedule.stretched(self.epochs * images / (self.schedule.steps * self.batch_size))
        return schedule.for_batch(batch_size, self.batch_size, scale_rate=self.optimizer == "sgd")


def detectron(steps: int, *milestones: int) -> Recipe:
    """Detectron's schedule: 0.02 for 16 images, a thousand steps of warm-up, a tenth at each milestone.

    Published with ImageNet weights and R50-FPN: 1x 37.9, 3x 40.2 box AP (detectron2's model zoo, 8 V100), with
    detections under a score of 0.05 cut off. AP is defined over all of them, so the cut here is at 0.01.
    """
    schedule = Schedule(rate=0.02, steps=steps, milestones=milestones, warmup_steps=1000)
    return Recipe(schedule, detector={"box_score_thresh": 0.01})


ONE_X = detectron(90_000, 60_000, 80_000)  # about 12 epochs of COCO

# For data of one's own: 12 epochs like 1x, but 16,000 images at least, which is 80 epochs of 200. Meant for a start
# from the weights of a detector or of a trained backbone.
SMALL = replace(
    ONE_X,
    schedule=Schedule(rate=0.01, steps=2000, cosine=True, warmup_steps=200),
    batch_size=8,
    epochs=12,
    checkpoint_period=500,
)

# Faster R-CNN on COCO as in He et al. 2015, appendix A (240k updates at 0.001, 80k at a tenth), with what it takes from
# Ren et al. 2015 (Sec. 3.1.3, 3.3 and 4.2): shorter sides of 600, longer ones of at most 1000; anchors of four sides;
# 256 anchors and 64 regions an image to train on, those below an IoU of 0.5 as background; 300 proposals in testing;
# NMS at 0.3; a weight decay of 5e-4; conv1 and conv2 of VGG-16 frozen, of ResNets the norms alone. Published (Table 8:
# train2014, the 40k images of val2014): AP 27.2, AP50 48.4 with ResNet-101; AP 21.2, AP50 41.5 with VGG-16.
# Departures: RPN and Fast R-CNN are trained together, not in turns, by the schedule of the latter (16 images); RoIAlign
# instead of RoI max pooling; the cut at a score of 0.01.
PAPER_R101_C4 = Recipe(
    Schedule(rate=0.001, steps=320_000, milestones=(240_000,)),
    variant="c4",
    depth=101,
    frozen_through=None,
    short_sides=(600,),
    min_size=600,
    max_size=1000,
    weight_decay=5e-4,
    detector={
        "anchor_sides": (64, 128, 256, 512),
        "rpn_pre_nms_top_n_train": 12000,
        "rpn_pre_nms_top_n_test": 6000,
        "rpn_post_nms_top_n_train": 2000,
        "rpn_post_nms_top_n_test": 300,
        "box_batch_size_per_image": 64,
        "box_nms_thresh": 0.3,
        "box_score_thresh": 0.01,
    },
)
PAPER_VGG16_C5 = replace(PAPER_R101_C4, variant="vgg16", depth=16, frozen_through="stem")
# With global context, which has to be trained. The other improvements (appendix B) are options of testing, in
# tools/evaluate_coco.py. Published (Table 9): AP 29.9 with refinement, 30.0 with context too, 32.5 with all scales too.
PAPER_R101_C4_CONTEXT = replace(PAPER_R101_C4, detector={**PAPER_R101_C4.detector, "global_context": True})

# For the built-in data set, from scratch on two CPU cores: small images, a thin pyramid, few regions, and AdamW, with
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
    "small": SMALL,
    "short": SHORT,
    "paper-r101-c4": PAPER_R101_C4,
    "paper-r101-c4-context": PAPER_R101_C4_CONTEXT,
    "paper-vgg16-c5": PAPER_VGG16_C5,
}


def default_recipe(images: int) -> str:
    """The name of the default recipe for that many training images."""
    return "small" if images < SMALL_DATA else "1x"
