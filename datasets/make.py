"""Makes small fixtures in the layout of every data set that lcl-adapter reads: shapes on plain paper.

    python datasets/make.py            # writes datasets/fixtures, with the same bytes every time (except the Arrow file)

They have only the layouts of the real data sets and nothing of their content, so this project's licence applies.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent / "fixtures"
SIZE = (48, 40)
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
TEST_SHAPES = ("ring", "bar", "frame", "dots")  # ImageNet's fixture: no class of the test is trained on
COLOURS = {
    "circle": (200, 60, 50),
    "square": (50, 90, 200),
    "triangle": (60, 160, 70),
    "cross": (160, 70, 170),
    "ring": (220, 150, 40),
    "frame": (90, 90, 90),
    "dots": (30, 60, 90),
    "bar": (40, 150, 160),
}


def draw_shape(shape: str, seed: int, size: tuple[int, int] = SIZE) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A shape at a random place on light paper, and its box in pixels."""
    rng = np.random.default_rng([(*SHAPES, *TEST_SHAPES[2:]).index(shape), seed])
    image = Image.new("RGB", size, tuple(int(v) for v in rng.integers(225, 250, 3)))
    side = int(rng.integers(16, 24))
    left, top = int(rng.integers(2, size[0] - side - 2)), int(rng.integers(2, size[1] - side - 2))
    box = (left, top, left + side, top + side)
    pen, fill = ImageDraw.Draw(image), tuple(int(np.clip(c + rng.integers(-15, 15), 0, 255)) for c in COLOURS[shape])
    corners = (box[0], box[1], box[2] - 1, box[3] - 1)
    match shape:
        case "circle":
            pen.ellipse(corners, fill=fill)
        case "square":
            pen.rectangle(corners, fill=fill)
        case "triangle":
            pen.polygon([(box[0], box[3] - 1), (box[2] - 1, box[3] - 1), ((box[0] + box[2]) // 2, box[1])], fill=fill)
        case "cross":
            pen.line((box[0], box[1], box[2] - 1, box[3] - 1), fill=fill, width=4)
            pen.line((box[0], box[3] - 1, box[2] - 1, box[1]), fill=fill, width=4)
        case "frame":
            pen.rectangle(corners, outline=fill, width=3)
        case "dots":
            for x, y in ((box[0], box[1]), (box[2] - 7, box[1]), (box[0], box[3] - 7), (box[2] - 7, box[3] - 7)):
                pen.ellipse((x, y, x + 6, y + 6), fill=fill)
        case "ring":
            pen.ellipse(corners, outline=fill, width=4)
        case _:
            pen.rectangle((box[0], (box[1] + box[3]) // 2 - 3, box[2] - 1, (box[1] + box[3]) // 2 + 3), fill=fill)
    return image, box


def draw_defect(shape: str, seed: int, kind: str) -> tuple[Image.Image, Image.Image]:
    """A shape with a defect, and the mask of the defect."""
    image, box = draw_shape(shape, seed)
    mask = Image.new("L", image.size)
    for page, fill in ((image, (20, 20, 20)), (mask, 255)):
        pen = ImageDraw.Draw(page)
        if kind == "scratch":
            pen.line((box[0] + 2, box[1] + 3, box[0] + 14, box[1] + 12), fill=fill, width=3)
        else:
            pen.ellipse((box[0] + 4, box[1] + 4, box[0] + 12, box[1] + 12), fill=fill)
    return image, mask


def save_image(path: Path, image: Image.Image) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.name


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def write_table(path: Path, rows: list[list[Any]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)


def write_gzip(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as file:
        file.write(text.encode())
    path.write_bytes(buffer.getvalue())


def mvtec(root: Path) -> None:
    """MVTec AD's tree: three categories with two kinds of defect each."""
    for category, shape in (("metal_nut", "ring"), ("tile", "square"), ("screw", "bar")):
        for number in range(4):
            save_image(root / category / "train" / "good" / f"{number:03}.png", draw_shape(shape, number)[0])
        for number in range(3):
            save_image(root / category / "test" / "good" / f"{number:03}.png", draw_shape(shape, 10 + number)[0])
        for kind in ("scratch", "hole"):
            for number in range(3):
                image, mask = draw_defect(shape, 20 + number, kind)
                save_image(root / category / "test" / kind / f"{number:03}.png", image)
                save_image(root / category / "ground_truth" / kind / f"{number:03}_mask.png", mask)


def visa(root: Path) -> None:
    """VisA as it is published: two objects. The values in its masks are ids, not 255."""
    rows = [["object", "split", "label", "image", "mask"]]
    for category, shape in (("candle", "circle"), ("pcb1", "cross")):
        kinds = [["image", "label", "mask"]]
        for number in range(6):
            name = f"{category}/Data/Images/Normal/{number:04}.JPG"
            save_image(root / name, draw_shape(shape, number)[0])
            rows.append([category, "train" if number < 4 else "test", "normal", name, ""])
            kinds.append([name, "normal", ""])
        for number in range(3):
            image, mask = draw_defect(shape, 30 + number, "scratch" if number else "hole")
            name, mask_name = f"{category}/Data/Images/Anomaly/{number:03}.JPG", f"{category}/Data/Masks/Anomaly/{number:03}.png"
            save_image(root / name, image)
            save_image(root / mask_name, mask.point(lambda v: 3 if v else 0))
            rows.append([category, "test", "anomaly", name, mask_name])
            kinds.append([name, "scratch,other" if number else "hole", mask_name])
        write_table(root / category / "image_anno.csv", kinds)
    write_table(root / "split_csv" / "1cls.csv", rows)


def imagenet(root: Path) -> None:
    """LCL's pairs over a small part of ImageNet's tree; neighbours are ranked from near to far."""
    train, test = [], []
    classes = (*SHAPES[:4], *TEST_SHAPES)
    for number, shape in enumerate(classes):
        names = [f"train/n0{number}/{shape}_{k}.JPEG" for k in range(5)] + [f"val/{shape}_{k}.JPEG" for k in range(3)]
        for k, name in enumerate(names):
            save_image(root / "images" / name, draw_shape(shape, k)[0])
        others = [*range(number + 1, len(classes)), *range(number)]
        neighbours = [[str(o + 1), classes[o], f"train/n0{o}/{classes[o]}_{k}.JPEG"] for o in others for k in range(2)]
        train.append({"class_id": str(number + 1), "class_name": shape, "samples": names, "neighbors": neighbours})
        test.append({"class_id": str(number + 1), "class_name": shape.title(), "context_samples": names[:4], "test_samples": names[4:]})
    write_lines(root / "train900_pairs.jsonl", train[:4])
    write_lines(root / "test100_pairs.jsonl", test[4:])


def isekai(root: Path) -> None:
    """ISEKAI's questions: an unreal thing and its real counterpart. The file is JSON Lines, though named ``.json``."""
    records = []
    for real, unreal in (("circle", "ring"), ("square", "cross")):
        support = {shape: [f"{shape}/{k}.png" for k in range(8)] for shape in (real, unreal)}
        for shape, names in support.items():
            for k, name in enumerate(names):
                save_image(root / name, draw_shape(shape, 40 + k)[0])
        for k, correct in enumerate((unreal, real, unreal)):
            query = f"{correct}/asked_{k}.png"
            save_image(root / query, draw_shape(correct, 50 + k)[0])
            record = {"image_name": query, "positive_list": support[unreal], "negative_list": support[real]}
            records.append(
                {
                    **record,
                    "positive_promt": f"Hollow {unreal}",
                    "negative_promt": real,
                    "label_name": f"Hollow {unreal}" if correct == unreal else real,
                }
            )
    write_lines(root / "ISEKAI-10.json", records)


def open_mi(root: Path) -> None:
    """VL-ICL Bench's open MiniImageNet: made-up names, bound anew in each record. A JSON list."""
    names = ("dax", "blicket", "perpo")
    shapes = ("circle", "square", "ring", "cross")
    records = []
    for number in range(6):
        support = {}
        for place, name in enumerate(names):
            shape = shapes[(number + place) % len(shapes)]
            files = [f"open_mi/{number}/{shape}_{k}.png" for k in range(2)]
            for k, file in enumerate(files):
                save_image(root / file, draw_shape(shape, 60 + 10 * number + k)[0])
            support[name] = {"images": files}
        answer = names[number % 3]
        query = f"open_mi/{number}/asked.png"
        save_image(root / query, draw_shape(shapes[(number + number % 3) % len(shapes)], 65 + 10 * number)[0])
        records.append({"image": [query], "question": "This is a", "answer": answer, "classes": list(names), "support": support})
    (root / "open_mi" / "query.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def products(root: Path) -> None:
    """The same photos as four catalogues: a CSV, Stanford Online Products' list, ABO's listings, RPC's COCO JSON."""
    rows = [["photo", "sku", "family"]]
    online: list[list[Any]] = [["image_id", "class_id", "super_class_id", "path"]]
    listings = []
    image_paths = [["image_id", "path"]]
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for number, shape in enumerate(SHAPES, 1):
        coco["categories"].append({"id": number, "name": shape, "supercategory": "round" if shape in {"circle", "ring"} else "straight"})
        for k in range(4):
            name = f"{shape}/{k}.png"
            image, box = draw_shape(shape, 60 + k)
            save_image(root / "images" / name, image)
            photo = len(online)
            rows.append([name, shape, "round" if shape in {"circle", "ring"} else "straight"])
            online.append([photo, number, 1 + number % 2, name])
            image_paths.append([f"{photo:02}Ab", name])
            coco["images"].append({"id": photo, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
            x0, y0, x1, y1 = box
            coco["annotations"].append({"id": photo, "image_id": photo, "category_id": number, "bbox": [x0, y0, x1 - x0, y1 - y0]})
        photos = [f"{len(online) - 4 + k:02}Ab" for k in range(4)]
        item = {"item_id": f"B0{number}", "main_image_id": photos[0], "other_image_id": photos[1:], "product_type": [{"value": "SHAPE"}]}
        listings.append({**item, "item_name": [{"language_tag": "en", "value": shape}]})
    write_table(root / "products.csv", rows)
    write_table(root / "Ebay_train.txt", online, " ")
    write_gzip(root / "listings" / "listings_0.json.gz", "".join(json.dumps(r) + "\n" for r in listings))
    write_gzip(root / "images.csv.gz", "".join(",".join(map(str, r)) + "\n" for r in image_paths))
    (root / "instances_train2019.json").write_text(json.dumps(coco), encoding="utf-8")


def boxes(root: Path) -> None:
    """Class folders with boxes, for few-shot detection."""
    records = []
    for shape in SHAPES[:3]:
        for k in range(4):
            image, box = draw_shape(shape, 70 + k, (60, 44))
            save_image(root / shape / f"{k}.png", image)
            records.append({"image": f"{shape}/{k}.png", "bbox": list(box)})
    write_lines(root / "boxes.jsonl", records)


def questions(root: Path) -> None:
    """VQAv2, POPE, LLaVA's question and answer files, LLaVA's instruction JSON, Shikra's kinds."""
    vqav2, annotations, pope, llava, answers, instruct, rec, vqa, captions, gqa = ([] for _ in range(10))
    for number, shape in enumerate(SHAPES * 2):
        image, box = draw_shape(shape, 80 + number)
        name = save_image(root / "images" / f"COCO_val2014_{number:012}.jpg", image)
        vqav2.append({"image_id": number, "question": "What shape is it?", "question_id": 1000 + number})
        ten_answers = [shape] * (10 - number % 4) + ["thing"] * (number % 4)
        several = [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(ten_answers)]
        annotations.append({"question_id": 1000 + number, "multiple_choice_answer": shape, "answers": several, "image_id": number})
        yes = number % 2 == 0
        pope.append(
            {"question_id": number, "image": name, "text": f"Is there a {shape if yes else 'dog'} in the image?", "label": "yes" if yes else "no"}
        )
        llava.append(
            {
                "question_id": number,
                "image": name,
                "text": "What shape is it?\nAnswer the question using a single word or phrase.",
                "category": "shapes",
            }
        )
        answers.append(
            {"question_id": number, "prompt": "What shape is it?", "text": shape, "answer_id": f"a{number}", "model_id": "none", "metadata": {}}
        )
        human = {"from": "human", "value": "<image>\nWhat do you see?"}
        instruct.append({"id": str(number), "image": name, "conversations": [human, {"from": "gpt", "value": f"A {shape} on paper."}]})
        rec.append({"img_path": name, "expression": f"the {shape}", "bbox": list(box)})
        vqa.append({"image_path": name, "question": "What shape is it?", "annotation": {"multiple_choice_answer": shape}})
        captions.append({"img_path": name, "caption": f"A {shape} on paper."})
        gqa.append({"imageId": name.removesuffix(".jpg"), "question": "What is on the paper?", "answer": shape})
    two = {"id": "two", "image": ["COCO_val2014_000000000000.jpg", "COCO_val2014_000000000001.jpg"]}
    two["conversations"] = [{"from": "human", "value": "Here <image> and there <image>: the same?"}, {"from": "gpt", "value": "No."}]  # type: ignore[assignment]
    none = {"id": "none", "conversations": [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello."}]}
    (root / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": vqav2}), encoding="utf-8")
    (root / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}), encoding="utf-8")
    (root / "instruct.json").write_text(json.dumps([*instruct, two, none], indent=1), encoding="utf-8")
    files = {"coco_pope_random": pope, "questions": llava, "answers": answers}
    for name, records in {**files, "REC_val": rec, "vqa": vqa, "captions": captions, "gqa": gqa}.items():
        write_lines(root / f"{name}.jsonl", records)


def hugging_face(root: Path) -> None:
    """A data set as ``Dataset.save_to_disk`` writes it: each row has an image, its class, a question and its answer."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows: dict[str, list[Any]] = {"image": [], "label": [], "question": [], "answer": []}
    for shape in SHAPES[:3]:
        for k in range(3):
            buffer = io.BytesIO()
            draw_shape(shape, 90 + k)[0].save(buffer, "PNG")
            rows["image"].append({"bytes": buffer.getvalue(), "path": None})
            rows["label"].append(SHAPES.index(shape))
            rows["question"].append("What shape is it?")
            rows["answer"].append(shape)
    features = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=list(SHAPES[:3])), "question": Value("string"), "answer": Value("string")}
    )
    Dataset.from_dict(rows, features=features).save_to_disk(root)


def main(root: Path = ROOT) -> None:
    shutil.rmtree(root, ignore_errors=True)
    sets = {"mvtec": mvtec, "visa": visa, "imagenet-lcl": imagenet, "isekai": isekai, "vl-icl": open_mi, "products": products, "boxes": boxes}
    for name, make in sets.items():
        make(root / name)
    questions(root / "questions")
    hugging_face(root / "hugging-face")


if __name__ == "__main__":
    main()
