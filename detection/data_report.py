"""The page about a data set, made from its statistics; and the same as one section of a run's report."""

from collections.abc import Mapping

from detection.coco import CocoImages
from detection.gallery import contact_sheet
from detection.statistics import EDGES, LEVELS, SMALL, DataStatistics, describe
from resbackbone.report.charts import bar, histogram
from resbackbone.report.numbers import number
from resbackbone.report.page import Cell, Section, fraction, macros, short

CHARTS = {  # of EDGES: title, axis
    "box_sides": ("Sizes of boxes, percent", "sqrt(width · height), pixels"),
    "aspect_ratios": ("Shapes of boxes, percent", "width / height"),
    "boxes_per_image": ("Images by their number of boxes, percent", "boxes"),
}
SPREADS = {  # of a split
    "widths": "image width",
    "heights": "image height",
    "box_sides": "box size",
    "aspect_ratios": "box width / height",
    "boxes_per_image": "boxes per image",
}
NAMED = 20  # files of a group of equal ones; data.json has all
QUANTILES = ("least", "5 %", "median", "95 %", "most")


def data_sections(splits: Mapping[str, CocoImages], data: DataStatistics) -> list[Section]:
    """The sections of the page on `data`, the statistics of `splits`."""
    words, of_splits = macros("data.html"), data.splits
    charts = [
        histogram(title, EDGES[name], {split: of.histograms[name] for split, of in of_splits.items()}, x=axis)
        for name, (title, axis) in CHARTS.items()
    ]
    sheet = words.sheet(contact_sheet(splits))
    return [
        Section("Data", words.summary(data)),
        Section("Classes", words.classes(*_classes(data))),
        Section("Boxes", words.boxes(charts, *_at_network_sizes(data), SMALL, f"{LEVELS[0]}–{LEVELS[-1]}")),
        Section("Images", words.images(*_images(data))),
        Section("Suspicious boxes and copies", words.odd(*_odd(data))),
        Section("Pictures", sheet),
    ]


def data_section(splits: Mapping[str, CocoImages]) -> tuple[Section, dict[str, str]]:
    """All of them as one section, in which what follows the first folds away; and facts for the top of a report."""
    data = describe(splits)
    first, *others = data_sections(splits, data)
    sides = []
    for name in ("widths", "heights"):
        spreads = [getattr(of, name) for of in data.splits.values()]
        least, most = min(spread.min for spread in spreads), max(spread.max for spread in spreads)
        sides.append(f"{least:g}" if least == most else f"{least:g} to {most:g}")
    boxes = ", ".join(f"{number(of.boxes)} in {name}" for name, of in data.splits.items())
    facts = {"image sizes": f"{' × '.join(sides)} pixels", "boxes": boxes}
    return Section(first.title, macros("data.html").folded(first.content, others)), facts


def _classes(data: DataStatistics) -> tuple[list[str], list[list]]:
    first = next(iter(data.splits))
    most = max((c.boxes.get(first, 0) for c in data.classes), default=0) or 1
    rows: list[list] = []
    for of_class in data.classes:
        row: list = [short(of_class.name), bar(of_class.boxes.get(first, 0) / most)]
        for split in data.splits:
            boxes = of_class.boxes.get(split)
            shown = Cell("not listed", -1) if boxes is None else Cell(number(boxes), boxes)
            row += [shown, of_class.images.get(split, 0)]
        rows.append(row)
    return ["class", "", *(f"{what}, {split}" for split in data.splits for what in ("boxes", "images"))], rows


def _at_network_sizes(data: DataStatistics) -> tuple[list[str], list[list]]:
    scales = list(next(iter(data.splits.values())).at_network_sizes[0].unreached)
    header = ["shorter side", "split", "5 % of sizes below", "median", f"under {SMALL} pixels, %"]
    header += [f"no anchor at scale {scale}, %" for scale in scales]
    rows = [
        [f"{at.shorter_side} pixels", split, *(_pixels(side) for side in (at.sides.p5, at.sides.median))]
        + [fraction(at.small), *(fraction(at.unreached[scale]) for scale in scales)]
        for sizes in zip(*(of.at_network_sizes for of in data.splits.values()), strict=True)
        for split, at in zip(data.splits, sizes, strict=True)
    ]
    return header, rows


def _images(data: DataStatistics) -> tuple[list[str], list[list], list[str], list[list], list[list]]:
    spreads = [
        [what, split, *map(_pixels, vars(getattr(of, name)).values())]
        for name, what in SPREADS.items()
        for split, of in data.splits.items()
    ]
    sizes = [
        [split, f"{width} × {height}", images, fraction(images / of.images)]
        for split, of in data.splits.items()
        for width, height, images in of.image_sizes
    ]
    unusable: list[list] = [[split, why] for split, of in data.splits.items() for why in of.unusable_images]
    return ["", "split", *QUANTILES], spreads, ["split", "width × height", "images", "percent"], sizes, unusable


def _odd(data: DataStatistics) -> tuple[list[str], list[list], list[list], list[list]]:
    kinds = list(next(iter(data.splits.values())).odd_boxes)
    rows: list[list] = [[kind, *(of.odd_boxes[kind].boxes for of in data.splits.values())] for kind in kinds]
    rows.append(["crowds, which are neither trained on nor count in AP", *(of.crowds for of in data.splits.values())])
    rows.append(["images equal to an earlier one of their split", *data.copies.values()])
    leaked = [sum(n for pair, n in data.leaks.items() if pair.startswith(f"{split} in ")) for split in data.splits]
    rows.append(["images equal to one of an earlier split", *leaked])
    examples: list[list] = [
        [
            kind,
            split,
            short(e["file"]),
            short(e["class"]),
            ", ".join("NaN" if v is None else f"{v:g}" for v in e["box_xywh"]),
        ]
        for kind in kinds
        for split, of in data.splits.items()
        for e in of.odd_boxes[kind].examples
    ]
    equal: list[list] = [
        [len(files), ", ".join(files[:NAMED]) + (", …" if len(files) > NAMED else "")]
        for group in data.equal_images
        for files in [[f"{split}: {short(name)}" for split, names in group.items() for name in names]]
    ]
    return ["", *data.splits], rows, examples, equal


def _pixels(value: float | None) -> Cell:
    return Cell(number(value, 3), value)
