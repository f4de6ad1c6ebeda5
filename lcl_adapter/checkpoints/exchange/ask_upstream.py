"""Ask an exported adapter in upstream LLaVA's own environment, by labelled photos: the same prompt as `lcl-adapter ask`.

    python llava-lora-mine/ask_upstream.py --base /models/llava-v1.5-7b photos/ query.png

photos/ holds a folder of photos a class. Needs what upstream needs and nothing else.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from llava.mm_utils import expand2square, process_anyres_image, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from PIL import Image

HERE = Path(__file__).resolve().parent
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def prompt_of(told, labels):
    """The conversation up to the open answer; one image a turn."""
    text = told["system"]
    for place, label in enumerate(labels):
        question = told["first"] if place == 0 else told["question"]
        text += told["user"].format(image=told["image"], text=question)
        text += told["assistant"] + told["answer"].format(text=told["said"].replace("{name}", label)) + told["end"]
    return text + told["user"].format(image=told["image"], text=told["query"]) + told["assistant"]


def pixels_of(told, processor, config, files):
    """Padded to a square as it was trained; 1.6 sees the whole picture, or tiles of it where it was trained so."""
    images = []
    for file in files:
        colour = (255, 255, 255) if told["padding"] == "white" else tuple(int(255 * m) for m in processor.image_mean)
        image = expand2square(Image.open(file).convert("RGB"), colour)
        if told["tiles"]:
            side = 2 * told["side"]
            images.append(process_anyres_image(image.resize((side, side), Image.BICUBIC), processor, config.image_grid_pinpoints))
        else:
            pixels = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
            images.append(pixels[None] if told["next"] else pixels)
    return images if told["next"] else torch.stack(images)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("support", type=Path)
    parser.add_argument("queries", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    told = json.loads((HERE / "ask_upstream.json").read_text(encoding="utf-8"))
    tokenizer, model, processor, _ = load_pretrained_model(
        str(HERE), options.base, HERE.name, device_map="auto" if options.device == "cuda" else None, device=options.device
    )
    model.eval()
    shown = [
        (file, folder.name)
        for folder in sorted(p for p in options.support.iterdir() if p.is_dir() and not p.name.startswith("."))
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    ]
    shown = [shown[i] for i in np.random.default_rng(0).permutation(len(shown))]
    ids = tokenizer_image_token(prompt_of(told, [label for _, label in shown]), tokenizer, return_tensors="pt")[None].to(options.device)
    answers = {}
    for query in options.queries:
        images = pixels_of(told, processor, model.config, [*(file for file, _ in shown), query])
        move = {"device": options.device, "dtype": model.dtype}
        images = [i.to(**move) for i in images] if isinstance(images, list) else images.to(**move)
        side = 2 * told["side"]
        with torch.inference_mode():
            made = model.generate(
                ids, images=images, image_sizes=[(side, side)] * (len(shown) + 1), do_sample=False, max_new_tokens=options.new_tokens, use_cache=True
            )
        answers[str(query)] = tokenizer.decode(made[0], skip_special_tokens=True).split(told["end"])[0].strip()
        print(f"{query}: {answers[str(query)]}")
    return answers


if __name__ == "__main__":
    main()
