"""detectron2's Faster R-CNN on our backbones, trained and evaluated in place of our own detector.

Importing this needs detectron2.
"""

import io
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from detection.config import DetectorSettings
from detection.recipes import Recipe
from resbackbone import Backbone, build_resnet_backbone
from resbackbone.adapters.detectron2 import INPUT, NORMS
from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError, one_of
from resbackbone.config import FREEZABLE
from resbackbone.resnet import DEPTHS

MODEL_FILE = "model_final.pth"
CONFIGS = Path(detectron2.__file__).parent / "model_zoo" / "configs"  # its model_zoo module needs an old setuptools
BASES = {"fpn": "Base-RCNN-FPN.yaml", "c4": "Base-RCNN-C4.yaml", "dc5": "Base-RCNN-DilatedC5.yaml"}
KEYS = {  # torchvision's names, as recipes have them, and detectron2's
    "representation_size": "MODEL.ROI_BOX_HEAD.FC_DIM",
    "rpn_batch_size_per_image": "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    "rpn_pre_nms_top_n_train": "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
    "rpn_pre_nms_top_n_test": "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "rpn_post_nms_top_n_train": "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    "rpn_post_nms_top_n_test": "MODEL.RPN.POST_NMS_TOPK_TEST",
    "box_batch_size_per_image": "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "box_positive_fraction": "MODEL.ROI_HEADS.POSITIVE_FRACTION",
    "box_score_thresh": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "box_loss": "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
    "box_loss_weight": "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
}
LOSSES = {  # detectron2's names, and torchvision's
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
}


class Detectron2Detector(nn.Module):
    """detectron2's model with the interface of our detectors: RGB floats in 0..1, labels 1..N, losses by our names."""

    def __init__(self, cfg: CfgNode, categories: dict[int, str]):
        super().__init__()
        self.cfg, self.categories, self.model = cfg, categories, build_model(cfg)
        self.resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)

    @property
    def backbone(self) -> Backbone:
        return self.model.backbone.body

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        """Resized images [3, H, W] and targets -> losses in training; in eval mode images of any size -> detections."""
        if targets is not None:
            entries = [_training_entry(*sample) for sample in zip(images, targets, strict=True)]
            try:
                with EventStorage():  # detectron2 counts regions in it
                    return {_our_name(name): loss for name, loss in self.model(entries).items()}
            except FloatingPointError as error:
                raise UserError(f"detectron2: {error}") from None
        outputs = self.model([self._entry(image) for image in images])
        found = [output["instances"] for output in outputs]
        return [{"boxes": x.pred_boxes.tensor, "labels": x.pred_classes + 1, "scores": x.scores} for x in found]

    def _entry(self, image: Tensor) -> dict:
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()  # the pixels of the file
        height, width, _ = pixels.shape
        resized = self.resize.get_transform(pixels).apply_image(pixels)
        return {"image": torch.from_numpy(resized.copy()).permute(2, 0, 1), "height": height, "width": width}

    def save(self, folder: Path) -> None:
        """Write model_final.pth and detectron2.yaml, the weights and settings as detectron2 reads them."""
        buffer = io.BytesIO()
        torch.save({"model": self.model.state_dict()}, buffer)
        write_atomically(folder / MODEL_FILE, buffer.getvalue())
        write_atomically(folder / "detectron2.yaml", self.cfg.dump())

    def load(self, folder: Path) -> None:
        """Load the weights that `save` wrote. Raises UserError if they are of another number of classes."""
        state = torch.load(folder / MODEL_FILE, weights_only=True, map_location="cpu")["model"]
        try:
            self.model.load_state_dict(state)
        except RuntimeError:
            raise UserError(f"{folder}: was trained on other categories than those of the data") from None


def _our_name(loss: str) -> str:
    """The name here of detectron2's loss: loss_classifier_1 for loss_cls_stage1, of a cascade."""
    name, _, stage = loss.partition("_stage")
    return f"{LOSSES[name]}_{stage}" if stage else LOSSES[name]


def _training_entry(image: Tensor, target: dict[str, Tensor]) -> dict:
    boxes, classes = Boxes(target["boxes"]), target["labels"] - 1
    return {"image": image * 255, "instances": Instances(tuple(image.shape[-2:]), gt_boxes=boxes, gt_classes=classes)}


def detectron2_config(options, recipe: Recipe, *, num_classes: int, device: torch.device) -> CfgNode:
    """The config of detectron2's own Faster R-CNN of the variant, with the changes of options and recipe."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / BASES[options.variant]))
    usual = vars(DetectorSettings())
    asked = {name: value for name, value in vars(recipe.detector).items() if value != usual[name]}
    for name in ("variant", "min_size", "max_size"):  # set below
        asked.pop(name, None)
    scale, ious = asked.pop("anchor_scale", 8.0) / 8, asked.pop("cascade_ious", ())
    for name in ("box_fg_iou_thresh", "box_bg_iou_thresh"):
        if ious and asked.get(name) == ious[0]:  # as in detectron2's first stage
            del asked[name]
    trunk = recipe.backbone.arguments(fpn=True)
    if other := [*(asked.keys() - KEYS.keys()), *(trunk.keys() - {"levels", "fpn_channels"})]:
        raise UserError(
            f"--engine detectron2 cannot train recipe {options.recipe} with its {', '.join(sorted(other))}; leave "
            "--engine out"
        )
    settings = {**INPUT, **{KEYS[name]: value for name, value in asked.items()}}
    cfg.merge_from_list([word for setting in settings.items() for word in setting])

    basic = DEPTHS[options.depth][0].expansion == 1
    norm = options.norm or recipe.backbone.norm or ("FrozenBN" if options.weights else "BN")
    frozen_through = options.frozen_through or ("c2" if options.weights else "none")
    frozen_through = None if frozen_through == "none" else frozen_through
    model = cfg.MODEL
    model.DEVICE = str(device)
    model.BACKBONE.NAME = "build_resbackbone_fpn" if options.variant == "fpn" else "build_resbackbone"
    model.BACKBONE.FREEZE_AT = FREEZABLE.index(one_of("frozen_through", frozen_through, FREEZABLE))
    model.RESBACKBONE.WEIGHTS = options.weights or ""
    model.RESNETS.DEPTH, model.RESNETS.NORM = options.depth, one_of("norm", norm, NORMS)
    model.RESNETS.RES2_OUT_CHANNELS = 64 if basic else 256
    # None, which takes it from the weights, is no value of a config.
    stem = build_resnet_backbone(options.depth, levels=["c2"], weights=options.weights)
    model.RESNETS.STRIDE_IN_1X1 = stem.config.stride_in_1x1
    if options.variant == "fpn" and trunk:
        model.RPN.IN_FEATURES = list(recipe.backbone.levels or model.RPN.IN_FEATURES)
        model.FPN.OUT_CHANNELS = recipe.backbone.fpn_channels or model.FPN.OUT_CHANNELS
    elif options.variant == "c4":
        model.ROI_HEADS.NAME = "ResBackboneRes5ROIHeads"
    sizes = model.ANCHOR_GENERATOR.SIZES[: len(model.RPN.IN_FEATURES)]
    model.ANCHOR_GENERATOR.SIZES = [[size * scale for size in of_level] for of_level in sizes]
    model.ROI_HEADS.NUM_CLASSES = num_classes
    if ious:
        model.ROI_HEADS.NAME, model.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = "CascadeROIHeads", True
        deltas = [tuple(stage * weight for weight in (10.0, 10.0, 5.0, 5.0)) for stage in range(1, len(ious) + 1)]
        model.ROI_BOX_CASCADE_HEAD.IOUS, model.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS = ious, deltas
        model.ROI_HEADS.IOU_THRESHOLDS = [ious[0]]

    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = recipe.augmentation.short_sides, recipe.detector.min_size
    cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST = recipe.augmentation.max_size, recipe.detector.max_size
    return cfg
