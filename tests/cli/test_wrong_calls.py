"""Wrong calls, and the one line that each is answered with."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from resbackbone.cli.command import main_of

TOOLS = Path(__file__).parents[2] / "tools"
COMMANDS = sorted(path.stem for path in TOOLS.glob("[!_]*.py"))

# The folder of the calls has an empty folder `empty`, a run's folder `runs/mine` without a run, `my photo.jpg`, the
# files in FILES, and folders of data that lack something. `..` at the end of an
# answer stands for more of it.
CALLS = """
# Options that there are not

train_coco --detph 18
    no option --detph; did you mean --depth?
train_coco --epoch=3
    no option --epoch; did you mean --epochs?
train_coco --imgsz 640
    no option --imgsz; did you mean --image-size?
pretrain --img-size 224
    no option --img-size; did you mean --size?
train_coco --batch 8
    no option --batch; did you mean --batch-size?
benchmark -b 8
    no option -b; did you mean --batch-sizes?
train_coco --learning_rate 0.1
    no option --learning_rate; did you mean --lr?
train_cifar10 --epochs 3
    no option --epochs; did you mean --steps?
train_coco --data-path photos
    no option --data-path; did you mean --data?
train_coco --work-dir runs/mine
    no option --work-dir; did you mean --output?
pretrain -j 4
    no option -j; did you mean --workers?
train_coco --num-gpus 2
    no option --num-gpus; did you mean --gpus?
train_coco --cfg my.yaml
    no option --cfg; did you mean --config?
detect runs/mine photo.jpg --conf 0.3
    no option --conf; did you mean --threshold?
detect --source photo.jpg --weights runs/mine
    no option --source; INPUTS is given without a name; for example: python tools/detect.py runs/shapes-r18-fpn-short ..
evaluate_coco --model runs/mine
    no option --model; RUN is given without a name; for example: python tools/evaluate_coco.py runs/shapes-r18-fpn-short
convert_data my_folder other --format yolo
    no option --format; did you mean --to?
train_coco -depth 18
    no option -depth; did you mean --depth?
train_coco —depth 18
    no option —depth; did you mean --depth?
train_coco --not-quiet
    no option --not-quiet; did you mean --no-quiet?
train_coco -help
    no option -help; did you mean --help?
train_coco --frobnicate 3
    no option --frobnicate nor one like it; --help lists the options
detect --recipe.schedule.rate 3
    no option --recipe.schedule.rate nor one like it; --help lists the options
doctor --gpus
    '--gpus': the doctor takes no options and no words; it runs every check
gpu_check --quik
    no option --quik; did you mean --quick?

# Options that other packages have

train_coco --num-classes 3
    no option --num-classes; the classes are those of the data
train_coco --val
    no option --val; did you mean --val-json?
pretrain --test-only
    no option --test-only; did you mean --eval-only?
train_coco --freeze-at 2
    no option --freeze-at; did you mean --frozen-through?
pretrain --freeze 2
    no option --freeze; train_coco.py --frozen-through freezes stages
train_coco --sync-bn
    no option --sync-bn; did you mean --norm=SyncBN?
train_coco --from-scratch
    no option --from-scratch; without --weights, a training starts from random ones
train_coco --momentum 0.9
    no option --momentum; SGD's momentum is 0.9
train_coco --cfg-options lr=3
    no option --cfg-options; in train_coco.py and pretrain.py, --recipe.NAME VALUE sets what has no option; ..
train_coco --launcher pytorch
    no option --launcher; torchrun sets the ranks, as in docs/scaling.md
detect runs/mine photo.jpg --iou 0.5
    no option --iou; a detector is trained with it: train_coco.py --recipe.detector.box-nms-thresh
detect runs/mine photo.jpg --save-txt
    no option --save-txt; detections.json in --output has every box
detect runs/mine photo.jpg --show
    no option --show; no window opens; --output has the pictures
export runs/mine detector.onnx --half
    no option --half; exported files compute in fp32
export runs/mine detector.onnx --dynamic
    no option --dynamic; exported files take images of any size and number
export runs/mine detector.onnx --opset 17
    no option --opset; PyTorch simplifies the file and chooses its opset
publish runs/mine --public
    no option --public; did you mean --no-private?
publish runs/mine --token abc
    no option --token; log in with `hf auth login`, or set HF_TOKEN
detect --version
    no option --version; `pip show resbackbone` prints it

# Values that do not fit

train_coco --depth eighteen
    --depth eighteen: must be a whole number
train_coco --depth resnet50
    --depth resnet50: must be a whole number; did you mean 50?
train_coco --depth 19
    unknown depth 19; choose from 18, 34, 50, 101, 152
train_coco --depth
    --depth: needs a value, a whole number
train_coco --depth --quiet
    --depth: needs a value, a whole number
train_coco --depth -5
    --depth -5: must be at least 1
train_coco --max-steps 1e5
    --max-steps 1e5: must be a whole number
train_coco --lr nan
    --lr nan: must be a number below 1e18
train_coco --seed 99999999999999999999
    --seed 99999999999999999999: must be a whole number below 1e18
train_coco --lr 0,01
    --lr 0,01: must be a number
train_coco --ema true
    --ema true: must be a number
train_coco --resume true
    --resume true: takes no value; --resume is on, --no-resume is off
train_coco --quiet=0
    --quiet=0: takes no value; --quiet is on, --no-quiet is off
train_coco --anchor-scale large
    --anchor-scale large: must be a number or auto
train_coco --image-size 1
    --image-size 1: must be at least 32
train_coco --milestones 5 late
    --milestones 5 late: must be whole numbers
train_coco --milestones 8,11
    --milestones 8,11: must be whole numbers, with spaces between them
train_coco --lr-steps 8 11
    no option --lr-steps; did you mean --milestones?
convert_weights a.pth b.pth --mean 0.5 0.5
    --mean 0.5 0.5: must be 3 numbers
detect runs/mine photo.jpg --threshold 50
    --threshold 50: must be from 0 to 1
train_coco --device tpu
    unknown device 'tpu'; choose from cuda, cpu, mps (cuda:0 is the first GPU)
train_coco --optimizer SGD
    unknown optimizer 'SGD'; choose from sgd, adamw, lamb; did you mean sgd?
train_coco --norm bn --data photos
    unknown norm 'bn'; choose from BN, FrozenBN, SyncBN, GN; did you mean BN?
train_coco --frozen-through C3 --data photos
    unknown frozen_through 'C3'; choose from none, auto, stem, c2, c3, c4, c5; did you mean c3?
evaluate_coco runs/mine --split valid
    unknown split 'valid'; choose from train, val, test, all; did you mean val?
train_coco --precision fp16 --device cpu
    --precision fp16: needs a GPU, as a CPU is dozens of times slower with it; give fp32 or bf16
train_coco --tyro-print-completion csh
    unknown shell 'csh'; choose from bash, zsh, fish
gpu_check --minutes ten --device cpu
    --minutes ten: must be a number above 0
gpu_check --parts speed
    unknown part 'speed'; choose from machine, ..

# Values of a recipe

train_coco --recipe shrot
    unknown recipe 'shrot'; choose from 1x, 2x, 3x, ..
train_coco --recipe.detectr.box-norm BN
    no option --recipe.detectr.box-norm; did you mean --recipe.detector.box-norm?
train_coco --recipe.box_norm BN
    no option --recipe.box-norm; did you mean --recipe.detector.box-norm?
train_coco --recipe.colour 3
    no option --recipe.colour nor one like it; --print-recipe lists the values
train_coco --recipe.augmentation.photometric yes
    --recipe.augmentation.photometric yes: must be True or False
pretrain --recipe.mixup lots
    --recipe.mixup lots: must be a number

# Words that are missing, and words too many

detect
    RUN is missing: A run's folder, a weight file of a Faster R-CNN (ours, torchvision's, ..
detect runs/mine
    INPUTS is missing: Images, folders of images, quoted patterns such as 'photos/**/*.jpg', video files, or a ..
compare_runs runs/mien runs/mine
    runs/mien: no such folder; did you mean runs/mine?; give the folders of runs
convert_data my_folder other
    --to is missing: coco, yolo or voc; for example: python tools/convert_data.py my_folder my_folder_yolo --to yolo
evaluate_coco runs/mine photos
    photos: one word too many; for example: python tools/evaluate_coco.py runs/shapes-r18-fpn-short
train_coco --data my photos
    photos: one word too many after --data my; put quotes around a value with spaces
train_coco --resume runs/mine
    runs/mine: one word too many after --resume, which takes no value
train_coco empty
    empty: belongs to no option; did you mean --data empty?
train_coco everything
    everything: belongs to no option; --help lists the options
train_coco epochs=3
    epochs=3: is not an option; did you mean --epochs?
doctor all
    'all': the doctor takes no options and no words; it runs every check

# Files and folders

train_coco --data ''
    --data '': is empty; give a path, or leave the option out
detect '' photo.jpg
    RUN '': is empty; give a name
train_coco --data https://example.com/photos.zip
    --data https://example.com/photos.zip: is a URL; download it, and give the path of the file
inspect_data -
    DATA -: neither stdin nor stdout is used; give a path
detect - photo.jpg
    RUN -: neither stdin nor stdout is used; give a name
train_coco --data nowhere
    --data nowhere: no such folder; give the data's folder, its data.yaml or a COCO .json
inspect_data emtpy
    emtpy: no such folder; did you mean empty?; give the data's folder, its data.yaml or a COCO .json
train_coco --data notes.txt
    --data notes.txt: a file, but neither data.yaml nor a COCO .json; give one, or a folder with ..
train_coco --train-json nowhere.json
    nowhere.json: cannot be read (No such file or directory)
train_coco --output notes.txt
    --output notes.txt: is a file; give a folder
train_coco --output notes.txt/run
    --output notes.txt/run: notes.txt is a file; give a folder
detect runs/mien photo.jpg
    runs/mien: no such run folder or file; did you mean runs/mine?; give one, or a named source (torchvision:..)
detect empty https://example.com/photo.jpg
    https://example.com/photo.jpg: is a URL; download it, and give the file
detect photo.jpg runs/mine
    photo.jpg: is an image; the run's folder or weight file comes first, as in: runs/mine photo.jpg
detect runs/mine my photo.jpg
    my photo.jpg: put quotes around a name with spaces
detect notes.txt 'my photo.jpg'
    weights 'notes.txt': a damaged file, or not a PyTorch or pickle file; download it again, or save it with torch.save
train_coco --weights none
    weights 'none': leave the weights out to start from random ones
train_coco --weights imagenet
    weights 'imagenet': no such file; if a published network is meant: torchvision:ResNet50_Weights.IMAGENET1K_V1, ..
train_coco --weights torchvision:ResNet18_Weights.IMAGENET1K_V2
    weights 'torchvision:ResNet18_Weights.IMAGENET1K_V2': torchvision has no such weights; did you mean ..
train_coco --weights nothing
    weights 'nothing': an empty file; download or save it again
train_coco --config empty
    --config empty: cannot be read (Is a directory)
train_coco --config nothing
    --config nothing: must hold options as lines `name: value`
train_coco --config list.yaml
    --config list.yaml: must hold options as lines `name: value`
train_coco --config typo.yaml
    --config typo.yaml: no option --detph; did you mean --depth?
train_coco --config d2.yaml
    --config d2.yaml: is detectron2's; adapters.detectron2 builds its backbone (docs/frameworks.md)
train_coco --config data.yaml
    --config data.yaml: is YOLO's data.yaml, which train_coco.py takes as --data
train_coco --output runs/cifar --resume
    runs/cifar/config.yaml: belongs to a run of train_cifar10.py; give one of train_coco.py
layer_responses --runs runs/coco
    --runs runs/coco/config.yaml: belongs to a run of train_coco.py; give one of train_cifar10.py
train_coco --weights pointer.safetensors
    weights 'pointer.safetensors': a Git LFS pointer, not the file itself; run git lfs pull
detect runs/mine my-photo.jpg
    image my-photo.jpg: no such file; did you mean my photo.jpg?
publish runs/mien --repo me/mine
    runs/mien: no such folder; did you mean runs/mine?; give the folder of a finished run, or best/ in it
publish notes.txt --repo me/mine
    notes.txt: is a file; give the folder of a finished run, or best/ in it
train_coco --data photos
    --data photos: 2 images without annotations; add a COCO .json, YOLO's .txt or Pascal VOC's .xml
inspect_data yolo
    yolo: 2 .txt files without images; add the images that they describe
inspect_data labelled
    labelled: its .json is not a COCO annotation file (labelled/boxes.json: not JSON (..
export detector.onnx runs/mine
    runs/mine: no file name that ends in .onnx or .pt2
export runs/mine detector.xml
    unknown suffix '.xml'; choose from .onnx, .pt2
"""
FILES = {
    "notes.txt": "hello",
    "nothing": "",
    "list.yaml": "- a\n",
    "typo.yaml": "detph: 18\n",
    "d2.yaml": "_BASE_: Base-RCNN-FPN.yaml\n",
    "data.yaml": "train: images/train\nnames: [cat]\n",
    "pointer.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "runs/cifar/config.yaml": "effective:\n  command: python tools/train_cifar10.py --depth 20\n",
    "runs/coco/config.yaml": "effective:\n  command: resbackbone-train-coco --output runs/coco\n",
}
PAIRS = re.findall(r"^(\w.*)\n    (.+)$", CALLS, re.M)
RAW = (
    "Error parsing",
    "Unrecognized",
    "invalid choice",
    "expected one argument",
    "usage:",
    " INT",
    "{STR",
    "Traceback",
)


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("here"))
    os.environ.pop("RESBACKBONE_DEBUG", None)
    for name in ("empty", "runs/mine", "runs/cifar", "runs/coco", "photos", "yolo/labels", "labelled"):
        Path(name).mkdir(parents=True)
    for name, text in FILES.items():
        Path(name).write_text(text)
    for name in (
        "my photo.jpg",
        "photos/a.jpg",
        "photos/b.PNG",
        "labelled/a.jpg",
        "yolo/labels/a.txt",
        "yolo/labels/b.txt",
    ):
        Path(name).touch()
    Path("labelled/boxes.json").write_text('{"images": [')
    yield
    os.chdir(before)


def answer(name: str, words: list[str], capsys) -> str:
    """What a command says in its one line on stderr."""
    command = importlib.import_module(f"resbackbone.tools.{name}")
    capsys.readouterr()  # of the import
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: command.main(words))
    line = exit.value.code  # Python prints it on stderr and exits with status 1
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    assert not [text for text in RAW if text in line]
    assert capsys.readouterr().err == ""
    return line.removeprefix("error: ")


@pytest.mark.parametrize("call, expected", PAIRS, ids=[call for call, _ in PAIRS])
def test_a_wrong_call_is_answered_in_one_line(call, expected, capsys):
    name, *words = shlex.split(call)
    said = answer(name, words, capsys)
    assert said.startswith(expected[:-2]) if expected.endswith("..") else said == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_an_option_that_it_does_not_know(name, capsys):
    assert "--zzz" in answer(name, ["--zzz=1"], capsys)


# What a shell is needed for


def ran(program: str, *words: str, **more) -> subprocess.CompletedProcess:
    """Run a program in which `main_of`, `parse` and options are imported."""
    imports = (
        "from resbackbone.cli.command import console, main_of, parse; from resbackbone.cli.options import RunOptions; "
    )
    return subprocess.run([sys.executable, "-c", imports + program, *words], stderr=subprocess.PIPE, **more)


def test_a_reader_that_leaves_ends_a_command_quietly():
    read, write = os.pipe()
    os.close(read)
    runs = [ran("main_of(lambda: parse(RunOptions, ['--help']))", stdout=write)]
    runs += [subprocess.run([sys.executable, TOOLS / "doctor.py", "-h"], stdout=write, stderr=subprocess.PIPE)]
    os.close(write)
    for run in runs:
        assert run.stderr == b"" and run.returncode != 0


def test_characters_that_the_output_lacks_are_printed_as_their_numbers():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    program = "main_of(lambda: (console.print('\U0001f600: cat'), parse(RunOptions, ['\U0001f600'])))"
    run = ran(program, env=environment, stdout=subprocess.PIPE)
    assert run.returncode == 1 and run.stdout == rb"\U0001f600: cat" + os.linesep.encode()
    assert run.stderr.startswith(rb"error: \U0001f600: belongs to no option")


@pytest.mark.skipif(sys.platform != "linux", reason="where names of files are bytes")
def test_a_name_that_the_system_cannot_read_is_refused():
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    run = ran("main_of(lambda: parse(RunOptions, None))", "--output", "\U0001f600", env=environment)
    assert run.returncode == 1
    said = rb"error: '\udcf0\udc9f\udc98\udc80': is not ascii; set PYTHONUTF8=1, or rename the file or folder"
    assert run.stderr.startswith(said)
