"""Classify photos with an exported adapter, in upstream LLaVA's own environment.

The prompt is that of `lcl-adapter ask`.

    python llava-lora-mine/ask_upstream.py --base /models/llava-v1.5-7b photos/ query.png

photos/ contains one folder of photos per class. The script needs what upstream needs and nothing else.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from llava.mm_utils import expand2square, process_anyres_image, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from PIL import Image

FOLDER = Path(__file__).resolve().parent
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def prompt_of(settings, labels):
    """The conversation up to the open answer, with one image in each user turn.

    ``settings``: the content of ask_upstream.json.
    """
    text = settings["system"]
    for position, label in enumerate(labels):
        question = settings["first"] if position == 0 else settings["question"]
        answer = settings["said"].replace("{name}", label)
        text += settings["user"].format(image=settings["image"], text=question)
        text += settings["assistant"] + settings["answer"].format(text=answer) + settings["end"]
    return text + settings["user"].format(image=settings["image"], text=settings["query"]) + settings["assistant"]


def pixels_of(settings, processor, config, files):
    """Images padded to a square, as in training.

    LLaVA 1.6 gets the whole picture, or tiles of it if it was trained on tiles.
    """
    images = []
    for file in files:
        colour = (255, 255, 255) if settings["padding"] == "white" else tuple(int(255 * m) for m in processor.image_mean)
        image = expand2square(Image.open(file, formats=["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]).convert("RGB"), colour)
        if settings["tiles"]:
            side = 2 * settings["side"]
            images.append(process_anyres_image(image.resize((side, side), Image.BICUBIC), processor, config.image_grid_pinpoints))
        else:
            pixels = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
            images.append(pixels[None] if settings["next"] else pixels)
    return images if settings["next"] else torch.stack(images)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("support", type=Path)
    parser.add_argument("queries", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    settings = json.loads((FOLDER / "ask_upstream.json").read_text(encoding="utf-8"))
    tokenizer, model, processor, _ = load_pretrained_model(
        str(FOLDER), options.base, FOLDER.name, device_map="auto" if options.device == "cuda" else None, device=options.device
    )
    model.eval()
    examples = [
        (file, folder.name)
        for folder in sorted(p for p in options.support.iterdir() if p.is_dir() and not p.name.startswith("."))
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    ]
    examples = [examples[i] for i in np.random.default_rng(0).permutation(len(examples))]
    prompt = prompt_of(settings, [label for _, label in examples])
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None].to(options.device)
    sizes = [(2 * settings["side"], 2 * settings["side"])] * (len(examples) + 1)
    target = {"device": options.device, "dtype": model.dtype}
    answers = {}
    for query in options.queries:
        images = pixels_of(settings, processor, model.config, [*(file for file, _ in examples), query])
        images = [image.to(**target) for image in images] if isinstance(images, list) else images.to(**target)
        with torch.inference_mode():
            new_ids = model.generate(ids, images=images, image_sizes=sizes, do_sample=False, max_new_tokens=options.new_tokens, use_cache=True)
        answers[str(query)] = tokenizer.decode(new_ids[0], skip_special_tokens=True).split(settings["end"])[0].strip()
        print(f"{query}: {answers[str(query)]}")
    return answers


if __name__ == "__main__":
    main()
