"""Upstream's side, run in its own environment: jobs from a file, answers into another. Imports nothing of this project.

A job is {"do": "logits" | "pixels" | "prompts" | "train" | "ask", ...}; see ``check.py``, which writes them.
`load_pretrained_model` hard-codes fp16; comparing in fp32, its module is given a `torch` whose `float16` is `float32`.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import llava.model.builder as builder
import torch
from llava.conversation import conv_templates
from llava.mm_utils import expand2square, process_images, tokenizer_image_token
from PIL import Image


class WholeTorch(types.ModuleType):
    """torch with another float16."""

    float16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def load(job):
    builder.torch = torch if job.get("half") else WholeTorch("torch")
    tokenizer, model, processor, _ = builder.load_pretrained_model(
        job["model"], job.get("base"), Path(job["model"]).name, device_map=None, device="cpu"
    )
    return tokenizer, model.eval() if job.get("half") else model.float().eval(), processor


def images_of(job, processor, config):
    images = [Image.open(p).convert("RGB") for p in job["images"]]
    if job["pixels"] == "upstream":
        return process_images(images, processor, config)
    colour = (255, 255, 255) if job["pixels"] == "white" else tuple(int(255 * m) for m in processor.image_mean)
    made = [processor.preprocess(expand2square(i, colour), return_tensors="pt")["pixel_values"][0] for i in images]
    return [m[None] for m in made] if job["pixels"] == "base tile" else torch.stack(made)


@torch.no_grad()
def logits(job):
    tokenizer, model, processor = load(job)
    found = []
    for prompt in job["prompts"]:
        ids = tokenizer_image_token(prompt["text"], tokenizer, return_tensors="pt")[None]
        images = images_of({**job, **prompt}, processor, model.config)
        images = [i.to(model.dtype) for i in images] if isinstance(images, list) else images.to(model.dtype)
        sizes = [Image.open(p).size for p in prompt["images"]]
        out = model(input_ids=ids, images=images, image_sizes=sizes)
        found.append(out.logits[0, -1].float().tolist())
    return found


def pixels(job):
    _, model, processor = load(job)
    made = images_of(job, processor, model.config)
    return [i.float().tolist() for i in made]


def prompts(job):
    """Upstream's own text for turns, by the name of its conversation."""
    found = []
    for turns in job["turns"]:
        conversation = conv_templates[job["conversation"]].copy()
        conversation.messages = []
        for role, text in turns:
            conversation.append_message(conversation.roles[role == "assistant"], text)
        found.append(conversation.get_prompt())
    return found


def train(job):
    """A random adapter, written as upstream's train.py writes one: LoRA by suffixes, the projector in full."""
    from peft import LoraConfig, get_peft_model

    _, model, _ = load(job)
    names = {
        n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "vision_tower" not in n and "mm_projector" not in n
    }
    config = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(names - {"lm_head"}), lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    torch.manual_seed(3)
    state, other = {}, {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            inside = "vision_tower" not in name
            parameter.data.normal_(0, 0.05 if inside else 0.02)
            if not inside and "lora_B" in name:
                parameter.data.zero_()  # nothing of the tower is trained
            state[name.replace(".default", "")] = parameter.data.clone()
        elif "mm_projector" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
            other[name] = parameter.data.clone()
        elif "image_newline" in name:
            other[name] = parameter.data.clone()
    out = Path(job["out"])
    out.mkdir(parents=True)
    model.config.save_pretrained(out)
    model.peft_config["default"].save_pretrained(out)
    torch.save(state, out / "adapter_model.bin")
    torch.save(other, out / "non_lora_trainables.bin")
    return sorted(state)[:2]


def ask(job):
    builder.torch = WholeTorch("torch")
    spec = importlib.util.spec_from_file_location("ask_upstream", Path(job["adapter"]) / "ask_upstream.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.load_pretrained_model = builder.load_pretrained_model
    given = ["--base", job["base"], "--device", "cpu", "--new-tokens", str(job["new_tokens"]), job["support"], *job["queries"]]
    return script.main(given)


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    done = []
    for job in jobs:
        done.append(globals()[job["do"]](job))
        Path(sys.argv[2]).write_text(json.dumps(done))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
