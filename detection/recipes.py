"""Training recipes for Faster R-CNN, each with its source and what was published with it."""

from dataclasses import dataclass, field, replace
from typing import Any

from detection.config import DetectorSettings
from resbackbone.checks import check_ranges
from resbackbone.engine.schedule import Schedule

DETECTRON_SIDES = (640, 672, 704, 736, 768, 800)
SMALL_DATA = 40_000  # images; of fewer, 1x would see each over 36 times, as often as 3x does COCO's
_LARGEST = 1e9
RANGES = {  # the values of a recipe: smallest, largest, in words
    "batch_size checkpoint_period": (1, _LARGEST, "at least 1"),
    "least_epochs weight_decay": (0, _LARGEST, "at least 0"),
    "clip_grad": (1e-12, _LARGEST, "above 0"),
    "ema": (0, 1 - 1e-12, "from 0 to below 1"),
}
PYRAMID_ONLY = ("levels", "fpn_channels", "fpn_norm")


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed: the arguments of `detection.transforms.TrainTransform`."""

    short_sides: tuple[int, ...] = DETECTRON_SIDES
    max_size: int = 1333
    flip: float = 0.5
    scale_jitter: tuple[float, float] | None = None
    crop_size: int | None = None
    photometric: bool = False
    copy_paste: float = 0.0


@dataclass(frozen=True)
class Trunk:
    """Arguments of `build_resnet_backbone`; those that are None are its defaults.

    `norm` None is FrozenBN with weights, BN without. `frozen_through` holds with weights alone ("auto" is "c2", for
    VGG-16 "stem"). `levels`, `fpn_channels` and `fpn_norm` are of the pyramid.
    """

    depth: int = 50
    norm: str | None = None
    frozen_through: str | None = "auto"
    stem: str | None = None
    shortcut: str | None = None
    levels: tuple[str, ...] | None = None
    fpn_channels: int | None = None
    fpn_norm: str | None = None

    def arguments(self, *, fpn: bool) -> dict:
        """The arguments that are not None and not options of the command; without `fpn`, none of the pyramid's."""
        left_out = ("depth", "norm", "frozen_through", *(() if fpn else PYRAMID_ONLY))
        return {name: value for name, value in vars(self).items() if value is not None and name not in left_out}


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained, apart from data, hardware and weights.

    The schedule is for `batch_size` images per update; if it covers less than `least_epochs`, it is made that long.
    Sizes are in pixels. Images are tested with a shorter side of `detector.min_size` and a longer one of at most
    `detector.max_size`. `decay_norms`: whether norms and biases have weight decay. `ema` is the decay of a moving
    average of the weights, which is what is tested then; 0 for none.
    """

    schedule: Schedule
    batch_size: int = 16
    least_epochs: float = 0
    optimizer: str = "sgd"  # with momentum 0.9; or "adamw", whose rate does not follow the batch size
    weight_decay: float = 1e-4
    decay_norms: bool = True
    clip_grad: float | None = None
    ema: float = 0.0
    checkpoint_period: int = 5000  # updates
    augmentation: Augmentation = field(default_factory=Augmentation)
    backbone: Trunk = field(default_factory=Trunk)
    detector: DetectorSettings = field(default_factory=DetectorSettings)

    def __post_init__(self):
        check_ranges(self, RANGES)

    def schedule_for(
        self,
        batch_size: int,
        *,
        images: int,
        lr: float | None = None,
        epochs: float | None = None,
        steps: int | None = None,
        milestones: tuple[int, ...] | None = None,
        warmup_steps: int | None = None,
    ) -> Schedule:
        """The schedule for `batch_size` images per update and `images` training images.

        What else is given is used as it is: `lr` for this batch size, the length as epochs or steps, and updates.
        Raises ValueError if these do not fit together.
        """
        schedule = self.schedule.for_batch(batch_size, self.batch_size, scale_rate=self.optimizer == "sgd")
        least = round(self.least_epochs * images / batch_size)
        if epochs is not None:
            steps = max(1, round(epochs * images / batch_size))
        if steps is not None or least > schedule.steps:
            schedule = schedule.of_length(steps or least)
        given = {"rate": lr, "milestones": milestones, "warmup_steps": warmup_steps}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(schedule, **changes)

    def at_size(self, side: int) -> "Recipe":
        """The recipe for test images with a shorter side of `side` pixels; all other sizes are in proportion."""
        usual = self.detector.min_size
        scale = side / (usual if isinstance(usual, int) else usual[-1])
        changed = self.augmentation
        crop = None if changed.crop_size is None else round(changed.crop_size * scale)
        sides = tuple(round(short * scale) for short in changed.short_sides)
        augmentation = replace(changed, short_sides=sides, max_size=round(changed.max_size * scale), crop_size=crop)
        longest = round(self.detector.max_size * scale)
        return replace(
            self, augmentation=augmentation, detector=replace(self.detector, min_size=side, max_size=longest)
        )


def detectron(steps: int, *milestones: int) -> Recipe:
    """Detectron's schedule: 0.02 for 16 images, a thousand steps of warm-up, a tenth at each milestone.

    Published with ImageNet weights and R50-FPN: 1x 37.9, 3x 40.2 box AP (detectron2's model zoo, 8 V100), with
    detections under a score of 0.05 cut off. AP is defined over all of them, so the cut here is at 0.01.
    """
    schedule = Schedule(rate=0.02, steps=steps, milestones=milestones, warmup_steps=1000)
    return Recipe(schedule, detector=DetectorSettings(box_score_thresh=0.01))


ONE_X = detectron(90_000, 60_000, 80_000)  # about 12 epochs of COCO

# A better start and optimizer (Wightman et al. 2021; mmdetection, configs/resnet_strikes_back): 40.8 box AP at 1x,
# against 37.4 there with the usual weights and SGD. AdamW, no decay of norms; searched for the weights named A1:
#   train_coco.py --data coco --recipe rsb --weights timm:resnet50.a1_in1k
# Departures: norms are wholly frozen (there their scales and shifts train); shorter sides of 640..800 (there 800);
# biases have no decay either.
RSB = replace(
    ONE_X,
    schedule=Schedule(rate=2e-4, steps=90_000, milestones=(60_000, 82_500), warmup_steps=500),
    optimizer="adamw",
    weight_decay=0.05,
    decay_norms=False,
)

# torchvision's fasterrcnn_resnet50_fpn_v2: 46.7 box AP after 400 epochs from scratch on 32 GPUs (pytorch/vision#5763),
# and after 100 epochs what detectron2 publishes with a mask head beside it (configs/new_baselines, 44.6). Norms that
# train in trunk, pyramid and box head; two convolutions in the RPN, four in the box head; large-scale jitter
# (Ghiasi et al. 2021; Li et al. 2021, arXiv 2111.11429).
#   train_coco.py --data coco --recipe v2-100ep
V2_100 = Recipe(
    Schedule(rate=0.1, steps=184_375, milestones=(163_889, 177_546), warmup_steps=1000),
    batch_size=64,
    weight_decay=4e-5,
    augmentation=Augmentation(scale_jitter=(0.1, 2.0), crop_size=1024),
    backbone=Trunk(norm="SyncBN", frozen_through=None, fpn_norm="SyncBN"),
    detector=DetectorSettings(rpn_conv_depth=2, box_conv_layers=(256,) * 4, box_norm="SyncBN", box_score_thresh=0.01),
)
V2 = replace(V2_100, schedule=Schedule(rate=0.1, steps=737_500, milestones=(649_000, 708_000), warmup_steps=1000))

# Cascade R-CNN (Cai and Vasconcelos 2018): three box heads, each on the boxes of the one before. 40.3 box AP at 1x in
# mmdetection (configs/cascade_rcnn), against 37.4 of its Faster R-CNN. Departure: smooth L1 from 1/9 (there from 1).
CASCADE = replace(ONE_X, detector=replace(ONE_X.detector, cascade_ious=(0.5, 0.6, 0.7)))

# Half the proposals in testing: PaddleDetection (configs/rcnn_enhance) measured 36.4 -> 36.2 box AP at 43.6 -> 52.5
# images a second with 500 a level before NMS and 300 after it. Training is that of 1x.
FAST = replace(ONE_X, detector=replace(ONE_X.detector, rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_test=300))

# For data of one's own: 12 epochs like 1x, but 16,000 images at least, which is 80 epochs of 200. Meant for a start
# from the weights of a detector or of a trained backbone.
SMALL = replace(
    ONE_X,
    schedule=Schedule(rate=0.01, steps=2000, cosine=True, warmup_steps=200),
    batch_size=8,
    least_epochs=12,
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
    weight_decay=5e-4,
    augmentation=Augmentation(short_sides=(600,), max_size=1000),
    backbone=Trunk(depth=101, frozen_through=None),
    detector=DetectorSettings(
        variant="c4",
        min_size=600,
        max_size=1000,
        anchor_sides=(64, 128, 256, 512),
        rpn_pre_nms_top_n_train=12000,
        rpn_pre_nms_top_n_test=6000,
        rpn_post_nms_top_n_train=2000,
        rpn_post_nms_top_n_test=300,
        box_batch_size_per_image=64,
        box_nms_thresh=0.3,
        box_score_thresh=0.01,
    ),
)
PAPER_VGG16_C5 = replace(
    PAPER_R101_C4,
    backbone=Trunk(depth=16, frozen_through="stem"),
    detector=replace(PAPER_R101_C4.detector, variant="vgg16"),
)
# With global context, which has to be trained. The other improvements (appendix B) are options of testing, in
# tools/evaluate_coco.py. Published (Table 9): AP 29.9 with refinement, 30.0 with context too, 32.5 with all scales too.
PAPER_R101_C4_CONTEXT = replace(PAPER_R101_C4, detector=replace(PAPER_R101_C4.detector, global_context=True))

# For the built-in data set, from scratch on two CPU cores: small images, a thin pyramid, few regions, and AdamW, with
# which so few updates go further than with SGD.
SHORT = Recipe(
    Schedule(rate=0.002, steps=1100, cosine=True, warmup_steps=100),
    batch_size=8,
    optimizer="adamw",
    weight_decay=0.05,
    decay_norms=False,
    clip_grad=10.0,
    checkpoint_period=200,
    augmentation=Augmentation(short_sides=(128,), max_size=256),
    backbone=Trunk(depth=18, levels=("p2", "p3", "p4", "p5"), fpn_channels=64),
    detector=DetectorSettings(
        min_size=128,
        max_size=256,
        anchor_scale=4.0,
        representation_size=256,
        rpn_batch_size_per_image=64,
        rpn_pre_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=128,
        box_positive_fraction=0.5,
        box_score_thresh=0.01,
    ),
)

# For small data on a CPU, from random weights or those of a backbone: SHORT with three box heads and copy-paste, which
# both help (docs/experiments/bccd.md), and three image sizes.
SCRATCH = replace(
    SHORT,
    least_epochs=12,
    augmentation=replace(SHORT.augmentation, short_sides=(112, 128, 144), max_size=288, copy_paste=0.5),
    detector=replace(SHORT.detector, cascade_ious=(0.5, 0.6, 0.7)),
)

RECIPES: dict[str, Recipe] = {
    "1x": ONE_X,
    "2x": detectron(180_000, 120_000, 160_000),
    "3x": detectron(270_000, 210_000, 250_000),
    "rsb": RSB,
    "v2": V2,
    "v2-100ep": V2_100,
    "cascade": CASCADE,
    "fast": FAST,
    "small": SMALL,
    "scratch": SCRATCH,
    "short": SHORT,
    "paper-r101-c4": PAPER_R101_C4,
    "paper-r101-c4-context": PAPER_R101_C4_CONTEXT,
    "paper-vgg16-c5": PAPER_VGG16_C5,
}


def default_recipe(images: int) -> str:
    """The name of the default recipe for that many training images, apart from `scratch`."""
    return "1x" if images >= SMALL_DATA else "small"
