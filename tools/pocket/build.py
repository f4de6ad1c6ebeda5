"""Build the pocket base and its data from npm packages alone.

    python -m tools.pocket.build                 # everything; complete stages are not run again
    python -m tools.pocket.build --stage data    # only the drawings

Stages: ``data`` (npm icon sets -> classes.json, drawings.zip, questions), ``tower`` (contrastive training of the vision
tower), ``language`` (tokenizer, language model, and the checkpoint itself). Every stage is seeded. A stage that was
killed continues from its last saved step. The script needs npm, and ``pip install resvg-py`` (in the ``dev`` extra).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from lcl_adapter.data.conversations import WORDINGS
from lcl_adapter.pocket import BASE, DATA
from tools.pocket import drawings, language, questions, tower
from tools.pocket import tokenizer as tk

SHORT = WORDINGS["short"]


def class_words(work: Path) -> list[str]:
    """The words of all emoji names. The tokenizer learns them as whole words, and the text tasks use them as keys."""
    words: set[str] = set()
    for entry in json.loads((work / "npm" / "emoji-datasource" / "emoji.json").read_text()):
        text = " ".join([entry["name"] or "", *entry["short_names"]]).lower()
        words |= {word for word in re.findall("[a-z]+", text) if len(word) > 2}
    return sorted(words)


def build_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    sentences = [SHORT.question, SHORT.query, SHORT.support_question(first=True), language.KIND_QUESTION, "yes", "no"]
    sentences += [f"Is this a {kind}?" for kind in drawings.KINDS.values()] + list(drawings.KINDS.values())
    return tk.train_tokenizer(class_words(work), sentences)


def build_processor(tokenizer: PreTrainedTokenizerFast, patch: int) -> LlavaProcessor:
    side = {"height": drawings.SIZE, "width": drawings.SIZE}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[tower.PIXEL_MEAN] * 3, image_std=[tower.PIXEL_STD] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tk.CHAT_TEMPLATE,
    )


def training_pictures(work: Path, vision: CLIPVisionModel, views: int = 2) -> language.Pictures:
    """Features of the shipped drawings of training classes: each drawing unchanged, and ``views`` times augmented."""
    records = {r["id"]: r for r in json.loads((DATA / "classes.json").read_text())}
    pixels, ids, sets = drawings.load_work(work / "drawings.npz")
    rows = [
        index
        for index, class_id in enumerate(ids)
        if class_id in records and records[class_id]["split"] == "train" and sets[index] in records[class_id]["drawings"]
    ]
    features = [tower.patch_features(vision, pixels[rows])]
    images = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2)
    with torch.no_grad():
        for view in range(views):
            generator = torch.Generator().manual_seed(view)
            features.append(torch.cat([vision(pixel_values=tower.augment(part, generator)).last_hidden_state[:, 1:] for part in images.split(256)]))
    names = [records[ids[i]]["name"] for i in rows] * (views + 1)
    kinds = [records[ids[i]]["kind"] for i in rows] * (views + 1)
    return language.Pictures(torch.cat(features), names, kinds)


def build_base(work: Path, out: Path, steps: int, tower_folder: Path) -> dict[str, float]:
    """Train tokenizer, language model and projector for the trained tower. Writes a Hugging Face checkpoint in fp16.

    Returns the last running accuracy of each task.
    """
    vision = CLIPVisionModel.from_pretrained(tower_folder)
    vision.config._name_or_path = ""  # the path on the build machine must not be shipped
    pictures = training_pictures(work, vision)
    tokenizer = build_tokenizer(work)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(language.llava_config(vision.config, tokenizer))
    model.model.vision_tower.load_state_dict(vision.state_dict())
    language.standardise(model.model.multi_modal_projector, pictures.features)
    language.induction_start(model)
    phrases = language.Phrases(SHORT.instruction, SHORT.question, SHORT.query)
    tasks = language.Tasks(tokenizer, pictures, class_words(work), phrases)
    accuracies = language.train(model, tasks, work / "language.pt", steps=steps)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.half().save_pretrained(out)
    build_processor(tokenizer, vision.config.patch_size).save_pretrained(out)
    return accuracies


@click.command(context_settings={"show_default": True})
@click.option("--stage", type=click.Choice(["all", "data", "tower", "language"]), default="all")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/pocket"), help="Folder for downloads and checkpoints.")
@click.option("--data", type=click.Path(path_type=Path), default=DATA, help="Folder to write the shipped data into.")
@click.option("--out", type=click.Path(path_type=Path), default=BASE, help="Folder to write the base into.")
@click.option("--tower-steps", default=6000)
@click.option("--language-steps", default=2500)
@click.option("--threads", default=2)
def main(stage: str, work: Path, data: Path, out: Path, tower_steps: int, language_steps: int, threads: int) -> None:
    """Build the pocket base and its data."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    if stage in {"all", "data"} and not (stage == "all" and (work / "drawings.npz").exists()):
        drawings.build(work, data)
        questions.write(data)
    if stage in {"all", "tower"}:
        tower.train(work, data, steps=tower_steps)
    if stage in {"all", "language"}:
        accuracies = build_base(work, out, language_steps, work / "tower")
        click.echo(json.dumps({name: round(value, 3) for name, value in accuracies.items()}))


if __name__ == "__main__":
    main()
