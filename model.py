"""A model's files: find, load and merge them; device, dtype and memory."""

import math
import os
import sys
import warnings
from array import array
from dataclasses import dataclass
from pathlib import Path

import torch

from common import DTYPES, UserError, first_line, hash_file, log, processes, read_json

# What decides a model's output; only these are downloaded and hashed. No pickled weights: loading
# them can run code, so safetensors alone are read.
TOKENIZER_FILES = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    *TOKENIZER_FILES,
)  # fmt: skip
CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder on disk. For a LoRA adapter, `base` is the model that its config names.

    `gguf` names the one file that holds weights, config and tokenizer, where the model is a GGUF file.
    """

    name: str
    folder: Path
    base: "ModelFiles | None"
    gguf: str | None = None

    def hashes(self, patterns=MODEL_FILES):
        """SHA-256 by file name, the base's under `base/`."""
        if self.gguf:
            return {self.gguf: hash_file(self.folder / self.gguf)}
        found = sorted({path for pattern in patterns for path in self.folder.glob(pattern)})
        own = {path.name: hash_file(path) for path in found}
        return own | {f"base/{name}": value for name, value in (self.base.hashes() if self.base else {}).items()}


def find_model(model_id, as_base=False):
    """The files of a model given by folder or hub id (then downloaded, or taken from the cache).

    What transformers would pass over in silence is refused here: a damaged generation config, a
    weight index that names files of another kind, an attention function fetched from the hub.
    """
    folder = Path(model_id).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return find_gguf(model_id, folder)
    if not folder.is_dir():
        if folder.exists() or model_id.startswith((".", "/", "~")):
            raise UserError(
                f"--model-id {model_id}: not a model; pass a folder with config.json, a .gguf file, or a hub id"
            )
        folder = download_model(model_id)
    if (folder / "adapter_config.json").is_file():
        if as_base:
            raise UserError(
                f"{model_id}: the base of an adapter, yet an adapter itself: merge it into its own base first"
            )
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise UserError(f"{folder}/adapter_config.json: names no base model (base_model_name_or_path)")
        return ModelFiles(model_id, folder, find_model(base, as_base=True))
    quantized = sorted(folder.glob("*.gguf"))
    if len(quantized) == 1 and not (folder / "config.json").is_file():
        return find_gguf(model_id, quantized[0])
    if len(quantized) > 1 and not (folder / "config.json").is_file():
        raise UserError(f"--model-id {model_id}: holds {len(quantized)} GGUF files; pass one of them: {quantized[0]}")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model-id {model_id}: not a model folder: no config.json or adapter_config.json in it")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"--model-id {model_id}: no *.safetensors in it; other weight files can run code and are not "
            "read: save the model again with save_pretrained"
        )
    for index in folder.glob("*.safetensors.index.json"):
        for shard in set(read_json(index).get("weight_map", {}).values()):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise UserError(f"{index}: names {shard!r}; weights are read from *.safetensors beside it alone")
    configs = {name: read_json(folder / name) for name in CONFIG_FILES if (folder / name).is_file()}
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(configs["config.json"].get(key)):
            raise UserError(f"{folder}/config.json: {key} names code on the hub, which is not run: remove it")
    return ModelFiles(model_id, folder, None)


def find_gguf(model_id, path):
    """The one file of a GGUF model; raises UserError where it is none, or the package that reads it is missing."""
    from importlib.util import find_spec

    if not find_spec("gguf"):
        raise UserError(f"--model-id {model_id}: reading GGUF files wants the package gguf: pip install gguf")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"--model-id {model_id}: {path} is not a GGUF file: it does not begin with GGUF")
    return ModelFiles(model_id, path.parent, None, path.name)


def quantization(files):
    """How the weights of a GGUF file are quantized, such as MOSTLY_Q4_1; None for other models."""
    if not files.gguf:
        return None
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(files.folder / files.gguf).get_field("general.file_type")
    return None if field is None else LlamaFileType(int(field.contents())).name


def find_tokenizer(name):
    """The files of a tokenizer alone, by folder, GGUF file or hub id: a server has the weights."""
    folder = Path(name).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return find_gguf(name, folder)
    return ModelFiles(name, folder if folder.is_dir() else download_model(name, TOKENIZER_FILES), None)


def download_model(model_id, patterns=MODEL_FILES):
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(snapshot_download(model_id, allow_patterns=list(patterns), ignore_patterns="*/*"))
    except Exception as error:  # hub, network and name errors share no base class
        raise UserError(
            f"--model-id {model_id}: neither a folder here nor to be had from the hub ({first_line(error)}); "
            "without the hub pass a model folder, such as demo/model"
        ) from error


def load_tokenizer(files):
    from transformers import AutoTokenizer

    has_own = files.gguf or any(files.folder.glob("tokenizer*"))
    source = files if has_own or not files.base else files.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its parser raises
        raise UserError(f"--model-id {files.name}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not tokenizer("0")["input_ids"]:  # without its files transformers makes one that knows no text
        raise UserError(f"--model-id {files.name}: its tokenizer knows no digits; are its files there?")
    return tokenizer


def encode(tokenizer, texts):
    """The token ids of each text, an array each, a thousand texts at a time: lists of a million would fill the memory."""
    ids = []
    for start in range(0, len(texts), 1000):
        batch = tokenizer(texts[start : start + 1000], add_special_tokens=False, return_attention_mask=False)
        ids += [array("i", tokens) for tokens in batch["input_ids"]]
    return ids


def load_model(files, dtype, device):
    """The causal model on the device, an adapter merged into its base, in evaluation mode.

    An adapter is merged in fp32 and rounded once: added to bf16 weights most of it would be lost.
    """
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    final, full = getattr(torch, DTYPES[dtype]), files.base or files
    try:
        refuse_too_large(full, 4 if files.base else final.itemsize, device)
        model, report = AutoModelForCausalLM.from_pretrained(
            full.folder,
            gguf_file=full.gguf,
            # Plain weights, which can be saved and trained. Packed ones would need kernels from the hub.
            quantization_config=GgufConfig(dequantize=True) if full.gguf else None,
            dtype=torch.float32 if files.base else final,
            use_safetensors=None if full.gguf else True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they come with the report, by name
            output_loading_info=True,
        )
        if files.base:
            model = merge_adapter(model, files)
            for (
                weight
            ) in model.parameters():  # no buffers: rounded, rope's frequencies turn too far with every position
                weight.data = weight.data.to(final)
        model = model.to(device).eval()
    except UserError:
        raise
    except Exception as error:  # damaged or unfit files raise whatever their parser raises
        raise UserError(f"--model-id {files.name}: cannot be loaded: {first_line(error)}") from error
    for trouble in ("missing_keys", "mismatched_keys"):
        if report[trouble]:
            raise UserError(
                f"--model-id {files.name}: {trouble.replace('_', ' ')} in its weights: {min(report[trouble])}"
            )
    return model


def refuse_too_large(files, element, device):
    """Before weights are loaded: a process that outgrows a machine's memory is killed without a word."""
    from safetensors import safe_open

    weights, folder = 0, files.folder
    if files.gguf:
        from gguf import GGUFReader

        weights = sum(int(tensor.n_elements) for tensor in GGUFReader(folder / files.gguf).tensors)
    index = next(folder.glob("*.safetensors.index.json"), None)
    names = (
        set(read_json(index)["weight_map"].values()) if index else {path.name for path in folder.glob("*.safetensors")}
    )
    names = () if files.gguf else names
    for name in names:
        with safe_open(folder / name, "pt") as file:
            weights += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    free = free_memory(device)
    if weights * element > free:
        raise UserError(
            f"--model-id {files.name}: its {weights:,} weights take {weights * element / 2**30:.3g} GiB, "
            f"and {free / 2**30:.3g} are free on {device}; a 16-bit --dtype or a smaller model need less"
        )


def positions(model):
    """How many positions a model has; without a limit, more than anyone asks for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def merge_adapter(model, files):
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = files.folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"--model-id {files.name}: no adapter_model.safetensors in it; other weight files are not read")
    with warnings.catch_warnings(action="ignore"):  # of missing keys too, which the check below names
        adapted = PeftModel.from_pretrained(model, files.folder)
    with safe_open(weights, "pt") as file:
        missing = get_peft_model_state_dict(adapted).keys() - set(file.keys())
    if missing:  # peft leaves them as they begin, without effect
        raise UserError(f"{weights}: missing keys that its config asks for: {min(missing)}")
    return adapted.merge_and_unload()


def choose_device(device, note=log):
    """The named device, or CUDA where there is one."""
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}" if processes() > 1 else "cuda"
        note(f"device {device}: {torch.cuda.get_device_name(device)}")
    elif device is None:
        device = "cpu"
        note(f"device {device}: no CUDA device here")
    try:
        torch.zeros(1, device=device).item()  # read back, which a device without memory cannot
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used here: {first_line(error)}") from error
    return torch.device(device)


def choose_dtype(dtype, device, note=log):
    """The named precision, or bf16 on CUDA and fp32 elsewhere."""
    if dtype is None:
        dtype = "bf16" if device.type == "cuda" else "fp32"
        reason = "half the memory traffic of fp32" if dtype == "bf16" else "exact, and CPUs are slow in bf16"
        note(f"dtype {dtype}: the default on {device.type}, {reason}")
    return dtype


def free_memory(device):
    """Bytes that are free on the device: its own memory on CUDA, the machine's elsewhere."""
    import psutil

    if device.type != "cuda":  # all processes on the machine share it
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.cuda.empty_cache()  # what torch keeps for itself is free too
    return torch.cuda.mem_get_info(device)[0]


def is_out_of_memory(error):
    told = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)
