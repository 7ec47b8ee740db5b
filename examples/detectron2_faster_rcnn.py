"""The backbone in detectron2's own Faster R-CNN, selected by a config: one training step, then detections.

python examples/detectron2_faster_rcnn.py                                            seconds on a CPU, random weights
python examples/detectron2_faster_rcnn.py --depth 50 --weights torchvision:ResNet50_Weights.IMAGENET1K_V1

Whole configurations for detectron2's tools/train_net.py are in configs/detectron2; `tools/train_coco.py --engine
detectron2` trains this detector. detectron2 has no release on the package registry; build it from its repository.
"""

import argparse
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import resbackbone.adapters.detectron2  # noqa: F401 - registers build_resbackbone_fpn, which the file names

CONFIG = Path(__file__).parents[1] / "configs" / "detectron2" / "faster_rcnn_R_50_FPN_1x.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--weights", default="", help="a weight file, or a named source; default: random")
    options = parser.parse_args()
    torch.manual_seed(0)

    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIG))
    settings = {
        "MODEL.RESBACKBONE.WEIGHTS": options.weights,
        "MODEL.BACKBONE.FREEZE_AT": 2 if options.weights else 0,  # do not freeze random layers
        "MODEL.RESNETS.NORM": "FrozenBN" if options.weights else "BN",
        "MODEL.RESNETS.DEPTH": options.depth,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if options.depth in (18, 34) else 256,
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,  # labels 0, 1 and 2
        "MODEL.DEVICE": "cpu",
    }
    cfg.merge_from_list([word for setting in settings.items() for word in setting])
    model = build_model(cfg)

    image = torch.randint(0, 256, (3, 97, 130))
    truth = Instances((97, 130), gt_boxes=Boxes(torch.tensor([[10.0, 20, 60, 80]])), gt_classes=torch.tensor([1]))
    with EventStorage():
        losses = model([{"image": image, "instances": truth}])
    sum(losses.values()).backward()
    print({name: round(loss.item(), 3) for name, loss in losses.items()})
    with torch.no_grad():
        [found] = model.eval()([{"image": image, "height": 97, "width": 130}])
    print(len(found["instances"]), "boxes")


if __name__ == "__main__":
    main()
